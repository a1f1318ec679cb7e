"""SembScore: how near CheXbert's vectors of a report and its reference are (Yu et al., Patterns 2023).

The cosine of the two last-layer [CLS] vectors, before any label is read from them. It moves with everything CheXbert
reads labels from, and with style; it is a component of RadCliQ.

Upstream embeds an empty report like any other, and its cosine may be above that of a report that says something. Here
silence scores -1, the least there is, so that it never beats a try; `official_edges: true` gives upstream's value.
"""

from typing import Any

import numpy as np

from .chexbert import weights_identity
from .chexbert_model import NEEDS, CheXbert, Reading, load_chexbert
from .text_encoder import SHARES

SILENT = -1.0


class SembScore:
    """Cosine of CheXbert's vectors of report and reference.

    Options: `model_folder` and `bert`, see `load_chexbert`; `official_edges` (see the module). Lies in [-1, 1]. A
    candidate without a token scores -1, the least there is; a study whose reference has none is masked.
    """

    needs = NEEDS
    shares = SHARES

    def __init__(self, model_folder: str | None = None, bert: str | None = None, official_edges: bool = False) -> None:
        self.model_folder, self.bert, self.official_edges = model_folder, bert, official_edges
        self._model: CheXbert | None = None

    def setup(self, device: str = "cpu") -> None:
        """Load CheXbert. Raises RewardError saying what is missing."""
        self._model = load_chexbert(self.model_folder, self.bert, device)

    @property
    def identity(self) -> dict[str, Any]:
        """The vector that is compared, what silence gets, and once loaded the weights' fingerprint."""
        silent = "embedded" if self.official_edges else SILENT
        named = {"metric": "SembScore", "vector": "CheXbert [CLS]", "empty candidate": silent}
        return named | weights_identity(self._model)

    def prepare(self, references: list[str]) -> None:
        """Read references, which the model remembers."""
        self._read(references)

    def score(self, candidates: list[str], references: list[str], **columns: Any) -> list[float | None]:
        """See the class."""
        readings = self._read([*candidates, *references])
        return [
            self._pair(candidate, reference)
            for candidate, reference in zip(readings[: len(candidates)], readings[len(candidates) :], strict=True)
        ]

    def _read(self, reports: list[str]) -> list[Reading]:
        if self._model is None:
            self.setup()
        assert self._model is not None
        return self._model.read(reports)

    def _pair(self, candidate: Reading, reference: Reading) -> float | None:
        if not self.official_edges and (candidate.empty or reference.empty):
            return None if reference.empty else SILENT
        return cosine(candidate.vector_E, reference.vector_E)


def cosine(one_E: np.ndarray, other_E: np.ndarray) -> float:
    """Cosine in [-1, 1] of two vectors; 0 where either is 0."""
    norms = float(np.linalg.norm(one_E.astype(np.float64)) * np.linalg.norm(other_E.astype(np.float64)))
    product = float(one_E.astype(np.float64) @ other_E.astype(np.float64))
    return min(1.0, max(-1.0, product / norms)) if norms else 0.0
