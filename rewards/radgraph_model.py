"""RadGraph's model (DyGIE++ on a BERT), for inference: reports to entities and relations, many reports at once.

The answers are the official package's, report by report; the work is arranged otherwise:

- Encoder: reports sorted by length, in batches of a bounded number of tokens, padding masked. A report longer than the
  encoder takes is folded into pieces of that length, as upstream folds it.
- Spans: all runs of up to `max_span_width` words, those of a batch's reports side by side and none of them padding
  (padded spans are what makes batches of the original invent relations). A span is [first word, last word, width], so
  the first layer of each scorer is computed per word and per width, and summed per span.
- Relations: upstream scores every pair of the spans that its pruner keeps and later drops those whose ends are no
  entities. Here only pairs of entities that survive the pruner are scored. The product part of a pair is the same in
  both directions and is computed once.

Shape suffixes: B batch rows, L padded length, P word pieces, T words of a batch, N spans, K entities that survive,
M pairs, W widths, D encoder width, S span width (2 D + width features), H hidden, C classes.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from .onednn_linear import use_onednn
from .radgraph_archive import ENCODER, Archive, read_archive

Annotation = dict[str, dict[str, Any]]  # "1" -> {tokens, label, start_ix, end_ix, relations: [[relation, "2"], ...]}
Words = tuple[str, ...]

BATCH_TOKENS = {"cpu": 512, "cuda": 16384}  # of an encoder batch, padding included
CACHED = 20_000  # annotations, and words with their pieces
PAIRS = 8192  # scored at once; a pair takes S floats


@lru_cache(maxsize=4)
def load_radgraph(model: str, model_folder: str | None, device: str, precision: str) -> "RadGraph":
    """The model, once per process for these four. Raises what `read_archive` raises, and OSError where the encoder's
    configuration and tokenizer cannot be had."""
    return RadGraph(model, read_archive(model, model_folder), torch.device(device), precision)


class RadGraph:
    """Annotates reports that are split into words already; see the module.

    `precision` is the encoder's: float32 gives the official answers, bfloat16 is faster and may differ where a score is
    near its threshold. Everything after the encoder is float32. `fingerprint` names the weights.
    """

    def __init__(self, model: str, archive: Archive, device: torch.device, precision: str) -> None:
        self.fingerprint, self.encoder_name, self.device = archive.fingerprint, archive.encoder, device
        self._max_length, self._max_span_width = archive.max_length, archive.max_span_width
        self._spans_per_word = archive.spans_per_word
        ner_labels, relation_labels = archive.ner_labels, archive.relation_labels
        self._ner_labels, self._relation_labels = ner_labels, relation_labels
        try:
            config = AutoConfig.from_pretrained(archive.encoder)
            self._tokenizer = AutoTokenizer.from_pretrained(archive.encoder)
        except OSError as error:
            raise OSError(
                f"{archive.path} needs the configuration and tokenizer of its encoder, {archive.encoder} ({error}); "
                f"put its config.json and tokenizer files (no weights) into {archive.encoder_folder}"
            ) from error
        own_class = type(self._tokenizer) is not PreTrainedTokenizerFast
        self._ends = (self._tokenizer.cls_token_id, self._tokenizer.sep_token_id) if own_class else None
        encoder = _load_encoder(archive, config).to(device=device, dtype=getattr(torch, precision)).eval()
        self._encoder = use_onednn(encoder) if device.type == "cpu" else encoder
        ner, relation = f"{model}__ner_labels", f"{model}__relation_labels"
        pruner = f"_relation._mention_pruners.{relation}._scorer"
        self._ner = _Head(archive, f"_ner._ner_scorers.{ner}.0._module", f"_ner._ner_scorers.{ner}.1._module", device)
        self._mention = _Head(archive, f"{pruner}.0._module", f"{pruner}.1._module", device)
        self._relation = _Head(
            archive, f"_relation._relation_feedforwards.{relation}", f"_relation._relation_scorers.{relation}", device
        )
        for head, labels in ((self._ner, len(ner_labels) - 1), (self._relation, len(relation_labels))):
            if head.classes != labels:
                raise ValueError(f"{archive.path}: {head.key} scores {head.classes} classes, its labels make {labels}")
        widths = archive.weight("_endpoint_span_extractor._span_width_embedding.weight")
        self._widths_WF = widths[: archive.max_span_width].to(device)
        self._pieces: OrderedDict[str, list[int]] = OrderedDict()
        self._annotations: OrderedDict[Words, Annotation] = OrderedDict()

    def annotate(self, reports: Sequence[Words]) -> list[Annotation]:
        """Entities and relations of each report, in the package's form and order; {} for a report without words.

        Answers are kept (the last CACHED, by words) and equal reports share one: do not change it.
        """
        found = {words: self._annotations[words] for words in reports if words in self._annotations}
        new = [words for words in dict.fromkeys(reports) if words not in found]
        for batch in self._batches(new):
            found.update(zip((report.words for report in batch), self._annotate(batch), strict=True))
        for words in dict.fromkeys(reports):
            self._annotations[words] = found.setdefault(words, {})
            self._annotations.move_to_end(words)
        while len(self._annotations) > CACHED:
            self._annotations.popitem(last=False)
        return [found[words] for words in reports]

    def _batches(self, reports: Iterable[Words]) -> "Iterator[list[_Report]]":
        """The reports that have a word piece, shortest first, in batches within the budget of tokens (or of one)."""
        prepared = [
            _Report(words, [self._word_pieces(word) for word in words], self._ends, self._max_length)
            for words in reports
        ]
        budget = BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cuda"])
        batch: list[_Report] = []
        for report in sorted(prepared, key=lambda report: len(report.ids)):
            if batch and (len(batch) + 1) * len(report.ids) > budget:
                yield batch
                batch = []
            if report.ids:
                batch.append(report)
        if batch:
            yield batch

    def _word_pieces(self, word: str) -> list[int]:
        """Ids of the word by itself. As upstream, "/." and "/?" are shown to the encoder without their stroke."""
        if word not in self._pieces:
            shown = word[1:] if word in ("/.", "/?") else word
            self._pieces[word] = self._tokenizer(shown, add_special_tokens=False)["input_ids"]
            if len(self._pieces) > CACHED:
                self._pieces.popitem(last=False)
        return self._pieces[word]

    @torch.inference_mode()
    def _annotate(self, batch: "list[_Report]") -> list[Annotation]:
        words_TD = self._encode(batch)
        spans = [_all_spans(len(report.words), self._max_span_width) for report in batch]  # each report counts from 0
        offsets = [0, *accumulate(len(report.words) for report in batch)]
        bounds = [0, *accumulate(map(len, spans))]
        ends_N2 = torch.cat([one + offset for one, offset in zip(spans, offsets)]).to(self.device)
        batch_spans = _Spans(words_TD, self._widths_WF, *ends_N2.unbind(1))
        labels_N = _best_class(self._ner.of_spans(batch_spans))
        mention_N = self._mention.of_spans(batch_spans).squeeze(1)
        kept_N = torch.zeros_like(labels_N, dtype=torch.bool)
        for report, start, stop in zip(batch, bounds, bounds[1:]):
            # In float32, as upstream has it: what is 0.3 times 10 words there?
            count = int(torch.ceil(torch.tensor(float(len(report.words))) * self._spans_per_word))
            kept_N[start + mention_N[start:stop].topk(min(count, stop - start)).indices] = True
        survivors = ((labels_N > 0) & kept_N).nonzero().squeeze(1)
        relations = self._relations(batch_spans, mention_N, survivors, bounds)
        entities = labels_N.nonzero().squeeze(1).tolist()
        labels = labels_N.tolist()
        annotations = []
        for report, own_spans, start, stop in zip(batch, spans, bounds, bounds[1:]):
            own = entities[bisect_left(entities, start) : bisect_left(entities, stop)]
            number = {span: str(i) for i, span in enumerate(own, 1)}
            annotation: Annotation = {}
            for span in own:
                first, last = own_spans[span - start].tolist()
                annotation[number[span]] = {
                    "tokens": " ".join(report.words[first : last + 1]),
                    "label": self._ner_labels[labels[span]],
                    "start_ix": first,
                    "end_ix": last,
                    "relations": [[name, number[target]] for target, name in sorted(relations.get(span, []))],
                }
            annotations.append(annotation)
        return annotations

    def _encode(self, batch: "list[_Report]") -> torch.Tensor:
        """[T, D] float32: the mean of each word's pieces, 0 for a word that has none."""
        rows: list[list[int]] = []
        reads: list[int] = []
        word_of_read: list[int] = []
        words = 0
        width = min(self._max_length, max(len(report.ids) for report in batch))
        for report in batch:
            # A piece's place in the padded batch: its row's start and its column.
            reads += [(len(rows) + i // self._max_length) * width + i % self._max_length for i in report.reads]
            word_of_read += [words + word for word in report.word_of_read]
            words += len(report.words)
            rows += [report.ids[i : i + self._max_length] for i in range(0, len(report.ids), self._max_length)]
        pad = self._tokenizer.pad_token_id or 0
        ids_BL = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        mask_BL = (torch.arange(width) < torch.tensor([[len(row)] for row in rows])).long()
        on_device = {"input_ids": ids_BL.to(self.device), "attention_mask": mask_BL.to(self.device)}
        encoded_BLD = self._encoder(**on_device).last_hidden_state
        pieces_PD = encoded_BLD.flatten(0, 1)[torch.tensor(reads, device=self.device, dtype=torch.long)].float()
        word_P = torch.tensor(word_of_read, device=self.device, dtype=torch.long)
        sums_TD = pieces_PD.new_zeros(words, pieces_PD.shape[1]).index_add_(0, word_P, pieces_PD)
        return sums_TD / torch.bincount(word_P, minlength=words).clamp(min=1)[:, None]

    def _relations(
        self, spans: "_Spans", mention_N: torch.Tensor, survivors_K: torch.Tensor, bounds: list[int]
    ) -> dict[int, list[tuple[int, str]]]:
        """Span -> its targets with the relation, among the surviving entities of one report."""
        weight_HS3, bias_H = self._relation.layers[0]
        as_source_HS, as_target_HS, product_HS = weight_HS3.chunk(3, dim=1)
        chosen = _Spans(spans.words_TD, spans.widths_WF, spans.first_N[survivors_K], spans.last_N[survivors_K])
        source_KH, target_KH = chosen.first_layer(as_source_HS) + bias_H, chosen.first_layer(as_target_HS)
        embedded_KS, mention_K = chosen.embedded(), mention_N[survivors_K]
        survivors = survivors_K.tolist()
        edges = [bisect_left(survivors, bound) for bound in bounds]
        within = [torch.triu_indices(stop - start, stop - start) + start for start, stop in pairwise(edges)]
        found: dict[int, list[tuple[int, str]]] = {}
        for pairs_2M in torch.cat(within, dim=1).split(PAIRS, dim=1):
            i, j = pairs_2M.to(self.device)
            product_MH = F.linear(embedded_KS[i] * embedded_KS[j], product_HS)
            for a, b in ((i, j), (j, i)):
                scores_MC = self._relation.after_first(source_KH[a] + target_KH[b] + product_MH)
                labels_M = _best_class(scores_MC + (mention_K[a] + mention_K[b])[:, None])
                if a is j:
                    labels_M = labels_M * (i != j)  # a span with itself is one pair, met above
                hits = labels_M.nonzero().squeeze(1)
                for source, target, label in zip(a[hits].tolist(), b[hits].tolist(), labels_M[hits].tolist()):
                    found.setdefault(survivors[source], []).append(
                        (survivors[target], self._relation_labels[label - 1])
                    )
        return found


class _Report:
    """A report as the encoder is shown it: `ids`, in rows of `max_length` where it is longer; and which of these
    (`reads`) make up which word (`word_of_read`).

    `ends` are the ids that open and close a row. None stands for a tokenizer of the generic class, as is usual for
    ModernBERT: with transformers 4 the official package then adds no ends but counts one in, so that each word reads
    the pieces one further on, and rows within a long report lose their ends. That is what it answers, so it is kept.
    """

    def __init__(self, words: Words, pieces: list[list[int]], ends: tuple[int, int] | None, max_length: int) -> None:
        self.words = words
        ids = [piece for one in pieces for piece in one]
        if ends:
            starts = range(0, len(ids), max_length - 2)
            ids = [i for start in starts for i in (ends[0], *ids[start : start + max_length - 2], ends[1])]
        self.ids, count = ids, len(ids)
        kept = list(range(count))
        if count > max_length:  # each row without its ends, between the first and the last of all
            rows = -(-count // max_length)
            inner = [row * max_length + column for row in range(rows) for column in range(1, max_length - 1)]
            kept = [0, *inner[: count - 2 * rows], count - 1]
        word_of_piece = [word for word, one in enumerate(pieces) for _ in one]
        self.reads = kept[1 : 1 + len(word_of_piece)]
        self.word_of_read = word_of_piece[: len(self.reads)]


@dataclass(frozen=True)
class _Spans:
    """Spans over the words of a batch; first and last word are inclusive."""

    words_TD: torch.Tensor
    widths_WF: torch.Tensor
    first_N: torch.Tensor
    last_N: torch.Tensor

    def first_layer(self, weight_HS: torch.Tensor) -> torch.Tensor:
        """[N, H]: embedded() @ weight.T, computed per word and per width and then summed."""
        width = self.words_TD.shape[1]
        first_HD, last_HD, widths_HF = weight_HS.split([width, width, self.widths_WF.shape[1]], dim=1)
        of_width_N = (self.widths_WF @ widths_HF.T)[self.last_N - self.first_N]
        return (self.words_TD @ first_HD.T)[self.first_N] + (self.words_TD @ last_HD.T)[self.last_N] + of_width_N

    def embedded(self) -> torch.Tensor:
        """[N, S]: first word, last word, width."""
        widths_NF = self.widths_WF[self.last_N - self.first_N]
        return torch.cat([self.words_TD[self.first_N], self.words_TD[self.last_N], widths_NF], dim=1)


class _Head:
    """A scorer of spans or pairs: layers with ReLU, then a linear one. `key` is its name in the state dict."""

    def __init__(self, archive: Archive, layers: str, scorer: str, device: torch.device) -> None:
        names = [f"{layers}._linear_layers.0"]
        while f"{layers}._linear_layers.{len(names)}.weight" in archive.weights:
            names.append(f"{layers}._linear_layers.{len(names)}")
        pairs = [(archive.weight(f"{name}.weight"), archive.weight(f"{name}.bias")) for name in [*names, scorer]]
        *self.layers, self._scorer = [(weight.float().to(device), bias.float().to(device)) for weight, bias in pairs]
        self.key, self.classes = scorer, len(self._scorer[1])

    def of_spans(self, spans: _Spans) -> torch.Tensor:
        """[N, C]."""
        weight_HS, bias_H = self.layers[0]
        return self.after_first(spans.first_layer(weight_HS) + bias_H)

    def after_first(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """[N, C] from what the first layer gives before its ReLU."""
        for weight_HH, bias_H in self.layers[1:]:
            hidden_NH = F.linear(F.relu(hidden_NH), weight_HH, bias_H)
        return F.linear(F.relu(hidden_NH), *self._scorer)


def _load_encoder(archive: Archive, config: Any) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):  # it draws weights first, which must not shift a run's own draws
        encoder: torch.nn.Module = AutoModel.from_config(config)
    own = {key.removeprefix(ENCODER): value for key, value in archive.weights.items() if key.startswith(ENCODER)}
    absent, strange = encoder.load_state_dict(own, strict=False)
    absent = [key for key in absent if not key.startswith("pooler.")]  # not used
    strange = [key for key in strange if not key.endswith("position_ids")]  # a constant, saved by old versions
    if absent or strange:
        raise ValueError(
            f"{archive.path}: the weights of its encoder do not fit {archive.encoder} "
            f"(missing: {', '.join(absent[:2]) or 'none'}; not expected: {', '.join(strange[:2]) or 'none'})"
        )
    return encoder


def _all_spans(words: int, max_width: int) -> torch.Tensor:
    """[N, 2]: first and last word of every span, by first word and then by width, as upstream lists them."""
    first_T1 = torch.arange(words)[:, None]
    last_TW = first_T1 + torch.arange(max_width)
    inside_TW = last_TW < words
    return torch.stack([first_T1.expand_as(last_TW)[inside_TW], last_TW[inside_TW]], dim=1)


def _best_class(scores_NC: torch.Tensor) -> torch.Tensor:
    """[N]: 0 where no class scores above 0, else the best one's number from 1."""
    best_N, class_N = scores_NC.max(dim=1)
    return torch.where(best_N > 0, class_N + 1, 0)
