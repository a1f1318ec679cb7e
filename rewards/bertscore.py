"""BERTScore F1 (Zhang et al., ICLR 2020; the bert_score package 0.3.13): words of two reports matched by meaning.

Every token takes its most similar token on the other side, by the cosine of their vectors in one layer of an encoder.
Precision is the mean over the candidate's tokens, recall over the reference's, [CLS] and [SEP] not counted (they may be
matched); F1 of both is rescaled to (F1 - baseline) / (1 - baseline), the baseline being the mean of random pairs.

A figure means something only with its model, layer, rescaling and weighting, so the identity names all four. Tokens
weigh alike; with `idf_corpus` they weigh their inverse document frequency in that fixed corpus. The frequencies of the
batch's own references, which the package takes, are not offered: with one reference all of them are zero.

To a candidate without a token the package gives raw 0, which rescales to -5.55: beside texts that score within one of
each other, it alone would set the spread of its group. Here it scores -1, and no rescaled score is lower: silence never
beats a try, however poor, and stays on the scale of the others. `official_edges: true` gives the package's value.
Taken alone, BERTScore hardly sees a negation or a severity that is turned round.
"""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unirg.scoring.contract import RewardError

from .report_corpus import read_corpus
from .text_encoder import SHARES, Encoder, Recent, load_encoder

if TYPE_CHECKING:
    import torch

KNOWN = {
    "distilroberta-base": (5, 0.8473319),
    "distilbert-base-uncased": (5, 0.66620487),
    "roberta-large": (17, 0.83122575),
    "bert-base-uncased": (9, 0.35219112),
}
"""The package's layer for a model of that name, and its F1 baseline there for English."""
FLOOR = -1.0
BLOCK = 256  # pairs whose token vectors are held at once
PAIRS = 50_000  # scores remembered
REFERENCES = 512  # whose token vectors are remembered: about 300 kB each, at 100 tokens


class BertScore:
    """Words matched by meaning, F1 by BERTScore; distilroberta-base, layer 5, rescaled unless said otherwise.

    Options: `model` (its name; a hub id unless `model_folder` says where it lies), `layer` (the package's for `model`
    by default), `rescale` true (default) or false, `baseline` (the package's TSV for the model, where its layer is none
    of KNOWN), `idf_corpus` (a JSONL file of reports), `official_edges` (see the module). Rescaled scores lie in
    [-1, 1], others in [0, 1] with any real model. A candidate without a token scores -1 (0 where not rescaled); a study
    whose reference has none is masked.
    """

    needs = "the encoder's weights: a hub id in `model`, or its folder in `model_folder`"
    shares = SHARES

    def __init__(
        self,
        model: str = "distilroberta-base",
        layer: int | None = None,
        rescale: bool = True,
        model_folder: str | None = None,
        baseline: str | None = None,
        idf_corpus: str | None = None,
        official_edges: bool = False,
    ) -> None:
        known_layer, known_baseline = KNOWN.get(model, (0, None))
        if layer is None and not known_layer:
            raise ValueError(
                f"no layer is known for model '{model}'; name one with `layer` (known: {', '.join(KNOWN)})"
            )
        if baseline is not None and not rescale:
            raise ValueError("a `baseline` is for rescaling, and rescale is false; leave one of them out")
        self.layer: int = known_layer if layer is None else layer
        self.model, self.rescale, self.model_folder, self.idf_corpus = model, rescale, model_folder, idf_corpus
        self.official_edges = official_edges
        self.baseline: float | None = None
        if rescale and baseline is not None:
            self.baseline = read_baseline(baseline, self.layer)
        elif rescale:
            if known_baseline is None or self.layer != known_layer:
                raise ValueError(
                    f"no baseline is known for layer {self.layer} of model '{model}'; give the bert_score package's "
                    "file for it as `baseline`, or set rescale: false"
                )
            self.baseline = known_baseline
        self._encoder: Encoder | None = None
        self._idf: dict[int, float] | None = None
        self._unseen = 0.0
        self._corpus = ""
        self._scores: Recent[float | None] = Recent(PAIRS)
        self._references: Recent[tuple[torch.Tensor, torch.Tensor] | None] = Recent(REFERENCES)

    def setup(self, device: str = "cpu") -> None:
        """Load the encoder, and count the corpus where one is given. Raises RewardError saying what is missing."""
        self._encoder = load_encoder(self.model_folder or self.model, self.layer, device)
        if self.idf_corpus:
            reports, self._corpus = read_corpus(self.idf_corpus)
            counts = Counter(token for ids in self._tokens(reports) for token in set(ids))
            self._idf = {token: math.log((len(reports) + 1) / (count + 1)) for token, count in counts.items()}
            self._unseen = math.log(len(reports) + 1)

    @property
    def identity(self) -> dict[str, Any]:
        """Model, layer, rescaling with its baseline, weighting, what silence gets, and once loaded the weights."""
        named = {"metric": "BERTScore F1", "model": self.model, "layer": self.layer}
        named |= {
            "baseline": self.baseline,
            "empty candidate": self._silent,
            "idf": bool(self.idf_corpus),
        }
        if self._encoder is not None:
            named |= {"weights": self._encoder.weights} | ({"idf corpus": self._corpus} if self._corpus else {})
        return named

    @property
    def _silent(self) -> float:
        return self._rescaled(0.0) if self.official_edges or not self.rescale else FLOOR

    def prepare(self, references: list[str]) -> None:
        """Encode references, the last REFERENCES of which are remembered."""
        self._encode(references)

    def score(self, candidates: list[str], references: list[str], **columns: Any) -> list[float | None]:
        """See the class."""
        pairs = list(zip(candidates, references, strict=True))
        scores = self._scores.look_up(pairs, self._score)
        return [scores[pair] for pair in pairs]

    def _score(self, pairs: list[tuple[str, str]]) -> list[float | None]:
        return [score for start in range(0, len(pairs), BLOCK) for score in self._block(pairs[start : start + BLOCK])]

    def _block(self, pairs: list[tuple[str, str]]) -> list[float | None]:
        import torch

        wanted = self._encode([reference for _, reference in pairs])
        known = {text: vectors for text, vectors in wanted.items() if vectors is not None}
        known |= self._embed(list(dict.fromkeys(text for text, _ in pairs if text not in wanted)))
        with torch.inference_mode():
            found = [
                greedy_f1(*known[candidate], *known[reference])
                for candidate, reference in pairs
                if candidate in known and reference in known
            ]
            raw = iter(torch.stack(found).tolist() if found else [])  # an accelerator is waited for once, here
        scores: list[float | None] = []
        for candidate, reference in pairs:
            if reference not in known and not self.official_edges:
                scores.append(None)
            else:
                both = candidate in known and reference in known
                scores.append(self._rescaled(next(raw)) if both else self._silent)
        return scores

    def _encode(self, references: list[str]) -> "dict[str, tuple[torch.Tensor, torch.Tensor] | None]":
        """`_embed` of references, remembered; None for one without a token that counts."""
        if self._encoder is None:
            self.setup()

        def embedded(new: list[str]) -> "list[tuple[torch.Tensor, torch.Tensor] | None]":
            found = self._embed(new)
            return [found.get(text) for text in new]

        return self._references.look_up(references, embedded)

    def _embed(self, texts: list[str]) -> "dict[str, tuple[torch.Tensor, torch.Tensor]]":
        """Unit vectors (T, E) and weights (T) of each text's tokens; a text without a token that counts is left out."""
        import torch

        assert self._encoder is not None
        if not texts:  # which a tokenizer does not take
            return {}
        weights = {}
        for text, ids in zip(texts, self._tokens(texts), strict=True):
            weights_T = torch.tensor([self._weight(token) for token in ids])
            if len(ids) > 2 and (total := weights_T.sum()) > 0:
                weights[text] = ids, (weights_T / total).to(self._encoder.device)
        judged = list(weights)
        known = {}
        for rows, states_BTE in self._encoder.batches([weights[text][0] for text in judged]):
            for position, row in enumerate(rows):
                ids, weights_T = weights[judged[row]]
                with torch.inference_mode():
                    unit_TE = torch.nn.functional.normalize(states_BTE[position, : len(ids)], dim=-1)
                known[judged[row]] = unit_TE, weights_T
        return known

    def _rescaled(self, raw: float) -> float:
        if self.baseline is None:
            return raw
        rescaled = (raw - self.baseline) / (1 - self.baseline)
        return rescaled if self.official_edges else max(FLOOR, rescaled)

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with the special ones, cut at the encoder's limit."""
        assert self._encoder is not None
        tokenizer = self._encoder.tokenizer
        # As upstream, a byte-level vocabulary reads the first word like any other word, with a blank before it.
        bytewise = tokenizer("a")["input_ids"] != tokenizer(" a")["input_ids"]
        stripped = [text.strip() for text in texts]
        shown = [f" {text}" if bytewise and text else text for text in stripped]
        ids: list[list[int]] = tokenizer(shown, truncation=True, max_length=self._encoder.limit)["input_ids"]
        return ids

    def _weight(self, token: int) -> float:
        assert self._encoder is not None
        if self._idf is not None:
            return self._idf.get(token, self._unseen)
        tokenizer = self._encoder.tokenizer
        return float(token not in (tokenizer.cls_token_id, tokenizer.sep_token_id))


def greedy_f1(
    stated_SE: "torch.Tensor", weights_S: "torch.Tensor", wanted_WE: "torch.Tensor", weights_W: "torch.Tensor"
) -> "torch.Tensor":
    """F1 (a scalar) of the greedy matching of S tokens of the candidate with W of the reference, from unit vectors and
    weights that sum to 1. 0 where precision or recall is not positive, which no trained model's vectors give."""
    cosines_SW = stated_SE @ wanted_WE.T
    precision = (cosines_SW.amax(dim=1) * weights_S).sum().clamp(min=0)
    recall = (cosines_SW.amax(dim=0) * weights_W).sum().clamp(min=0)
    return (2 * precision * recall / (precision + recall)).nan_to_num(nan=0.0)


def read_baseline(path: str, layer: int) -> float:
    """The F1 baseline of `layer` in the bert_score package's file for a model (lines `LAYER,P,R,F`).

    Raises RewardError naming the file and what it lacks.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(
            f"baseline {path} cannot be read ({error}); expected bert_score's file for the model"
        ) from error
    for number, line in enumerate(lines[1:], 2):
        cells = line.replace("\t", ",").split(",")
        if cells[0].strip() == str(layer):
            try:
                return float(cells[3])
            except (IndexError, ValueError) as error:
                raise RewardError(f"baseline {path}:{number}: expected LAYER,P,R,F, found '{line}'") from error
    raise RewardError(f"baseline {path} has no layer {layer}")
