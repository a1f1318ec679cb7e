"""The published models of RaTEScore: a DeBERTa tagger for entities, an MPNet encoder for their strings.

Both answer as upstream's do, which tags one sentence at a time and embeds the strings of one report at a time; the work
is arranged otherwise. A sentence is tagged once and a string embedded once, whatever report they stand in, the last
SENTENCES and STRINGS of them are remembered, and what is new is forwarded sorted by length within a budget of tokens.

DeBERTa projects its table of relative positions, 512 rows, in every layer of every forward, which for a sentence of ten
words is most of the work. Here a forward sees the rows that its longest sentence can reach, and no others.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from unirg.scoring.contract import RewardError

from .ratescore_sentences import SPLITTERS, Cut, load_splitter
from .ratescore_weights import TYPES
from .text_encoder import Encoder, Recent, fingerprint, for_inference

SENTENCE_TOKENS = 512
STRING_TOKENS = 30
SENTENCES = 50_000
STRINGS = 20_000
LABELS = {"O", *(f"{mark}-{kind}" for mark in "BI" for kind in TYPES)}

Entity = tuple[str, str]


class OfficialModels:
    """Entities and embeddings from two model folders or hub ids, sentences by one of SPLITTERS. All is loaded by
    `setup`, or on the CPU when first needed."""

    def __init__(self, ner: str, embedder: str, sentences: str) -> None:
        if sentences not in SPLITTERS:
            raise ValueError(f"sentences '{sentences}' is neither {' nor '.join(SPLITTERS)}")
        self.ner, self.embedder, self.sentences = ner, embedder, sentences
        self._cut: Cut | None = None
        self._tagger: Tagger | None = None
        self._strings: StringEncoder | None = None

    @property
    def shares(self) -> str:
        """Rewards of the same two models belong into one process: both are loaded, and every text is read, once."""
        return f"ratescore:{self.ner}:{self.embedder}"

    @property
    def identity(self) -> dict[str, Any]:
        """Both models, how sentences are cut, and once loaded what the weights are."""
        named: dict[str, Any] = {"ner": self.ner, "embedder": self.embedder, "sentences": self.sentences}
        if self._tagger is not None and self._strings is not None:
            named["sentences"] = self._cutter
            named["ner_weights"] = self._tagger.encoder.weights
            named["embedder_weights"] = self._strings.encoder.weights
        return named

    def setup(self, device: str = "cpu") -> None:
        """Load the splitter and both models, once per process. Raises RewardError naming what cannot be loaded, or is a
        model of another kind."""
        if self._tagger is None:
            self._cut, self._cutter = load_splitter(self.sentences)
            self._tagger, self._strings = load_tagger(self.ner, device), load_strings(self.embedder, device)

    def entities(self, reports: list[str]) -> list[list[Entity]]:
        """(string, type) of every entity, report by report, in the text's order."""
        self.setup()
        assert self._tagger is not None and self._cut is not None
        sentences = [self._cut(report) for report in reports]
        found = self._tagger.entities([sentence for report in sentences for sentence in report])
        return [[entity for sentence in report for entity in found[sentence]] for report in sentences]

    def embed(self, strings: list[str]) -> np.ndarray:
        """One vector (E) per string."""
        self.setup()
        assert self._strings is not None
        vectors = self._strings.embed(strings)
        return np.stack([vectors[string] for string in strings])


class Tagger:
    """Finds the entities of sentences; what the last SENTENCES held is kept."""

    def __init__(self, encoder: Encoder, names: dict[int, str]) -> None:
        self.encoder, self._names = encoder, names
        self._entities: Recent[list[Entity]] = Recent(SENTENCES)

    def entities(self, sentences: Sequence[str]) -> dict[str, list[Entity]]:
        """(string, type) of every entity, by sentence."""
        return self._entities.look_up(sentences, self._tag)

    def _tag(self, sentences: list[str]) -> list[list[Entity]]:
        tokenizer = self.encoder.tokenizer
        ids = tokenizer(sentences, max_length=SENTENCE_TOKENS, truncation=True)["input_ids"]
        found: dict[int, list[Entity]] = {}
        for rows, logits_BTL in self.encoder.batches(ids):
            for row, best in zip(rows, logits_BTL.argmax(dim=2).tolist(), strict=True):
                # Upstream counts a sentence's tokens by those that are not padding; a report may say "[PAD]" itself.
                length = sum(token != tokenizer.pad_token_id for token in ids[row])
                tokens: list[str] = tokenizer.convert_ids_to_tokens(ids[row][:length])
                spans = entity_spans(tokens, [self._names[label] for label in best[: len(ids[row])]])
                found[row] = [
                    (tokenizer.convert_tokens_to_string(tokens[first : last + 1]), kind) for first, last, kind in spans
                ]
        return [found[row] for row in range(len(sentences))]


class StringEncoder:
    """Embeds entities' strings: the last layer's first token. The last STRINGS vectors are kept."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._vectors: Recent[np.ndarray] = Recent(STRINGS)

    def embed(self, strings: Sequence[str]) -> dict[str, np.ndarray]:
        """The vector (E) of every string."""
        return self._vectors.look_up(strings, self._embed)

    def _embed(self, strings: list[str]) -> list[np.ndarray]:
        ids = self.encoder.tokenizer(strings, max_length=STRING_TOKENS, truncation=True)["input_ids"]
        vectors: dict[int, np.ndarray] = {}
        for rows, states_BTE in self.encoder.batches(ids):
            vectors.update(zip(rows, states_BTE[:, 0].cpu().numpy(), strict=True))
        return [vectors[row] for row in range(len(strings))]


@lru_cache(maxsize=4)
def load_tagger(name: str, device: str) -> Tagger:
    """The tagger of a folder or hub id, once per process.

    Raises RewardError where it cannot be loaded, or tags something else than RaTEScore's five types.
    """
    encoder = _load("AutoModelForTokenClassification", name, device)
    names: dict[int, str] = encoder.model.config.id2label
    if set(names.values()) != LABELS:
        raise RewardError(
            f"{name} tags {', '.join(sorted(names.values()))}; RaTEScore needs O, and B- and I- with {', '.join(TYPES)}"
        )
    return Tagger(encoder, names)


@lru_cache(maxsize=4)
def load_strings(name: str, device: str) -> StringEncoder:
    """The string encoder of a folder or hub id, once per process. Raises RewardError where it cannot be loaded."""
    return StringEncoder(_load("AutoModel", name, device))


def _load(kind: str, name: str, device: str) -> Encoder:
    import torch
    import transformers

    model: Any
    try:
        model, found = getattr(transformers, kind).from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise RewardError(
            f"{name} cannot be loaded for RaTEScore ({' '.join(str(error).split())}). Expected a folder with "
            f"config.json, model.safetensors and the tokenizer's files, or a hub id; fetch it with `hf download {name} "
            "--local-dir FOLDER` where there is a network, and give FOLDER as `ner` or `embedder`"
        ) from error
    # A pooler's output is not read.
    if missing := sorted(key for key in found["missing_keys"] if not key.startswith("pooler.")):
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise RewardError(f"{name} lacks {len(missing)} weights of its own configuration: {shown}")
    weights = str(getattr(model.config, "_commit_hash", None) or fingerprint(Path(name)))
    model = for_inference(model, device)
    if model.config.model_type == "deberta-v2" and model.config.relative_attention:
        _narrow_positions(model.deberta.encoder)
    return Encoder(model, tokenizer, tokenizer.model_max_length, device, weights)


def _narrow_positions(encoder: Any) -> None:
    """Shows each forward of a DeBERTa-v2 encoder, in place, the middle rows of its table of relative positions: as many
    as its texts reach. What is left out is never looked up, so that nothing changes but the work."""
    import torch

    with torch.inference_mode():
        table_PE = encoder.get_rel_embedding().clone()
    middle = len(table_PE) // 2

    def before(_: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        states_BTE = options.get("hidden_states", arguments[0] if arguments else None)
        reach = min(int(encoder.get_rel_pos(states_BTE).abs().max()) + 1, middle)
        encoder.get_rel_embedding = lambda: table_PE[middle - reach : middle + reach]
        for layer in encoder.layer:
            layer.attention.self.pos_ebd_size = reach

    encoder.register_forward_pre_hook(before, with_kwargs=True)


def entity_spans(tokens: Sequence[str], labels: Sequence[str]) -> list[tuple[int, int, str]]:
    """(first token, last token, type) of the entities, from one label per token, by upstream's reading of B-, I-, O.

    It looks one label ahead, that of [SEP] after the last word. A `B-` followed by `I-` opens an entity, which keeps
    that type; an `I-` followed by `B-` or `O` closes it; a `B-` followed by anything else is an entity of one token; an
    `I-` that nothing opened is no entity. Upstream's quirk is kept: what a sentence leaves open is an entity only if
    nothing had ended since the last `O` (its `end` is reset nowhere else).
    """
    spans: list[tuple[int, int, str]] = []
    start: int | None = None
    end: int | None = None
    kind = ""
    for here in range(min(len(tokens), len(labels) - 1)):
        label, ahead = labels[here], labels[here + 1][:1]
        if tokens[here] in ("[CLS]", "[SEP]") or label == "O":
            continue
        if label[0] == "B" and ahead == "I":
            start, kind = here, label[2:]
        elif ahead in ("B", "O"):
            if label[0] == "B":
                spans.append((here, here, label[2:]))
            elif start is not None:
                spans.append((start, here, kind))
            start, end, kind = (here, here, label[2:]) if ahead == "B" else (None, None, "")
    if start is not None and end is None:
        spans.append((start, len(tokens) - 2, kind))
    return spans
