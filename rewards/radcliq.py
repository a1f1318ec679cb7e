"""RadCliQ: how many errors a radiologist would count, predicted from four metrics (Yu et al., Patterns 2023).

A linear regression on standardised components: RadGraph F1 (ReXrank's mean of entity and relation F1), BERTScore
(distilroberta-base, layer 5, rescaled), SembScore, and BLEU-2. Lower is better, an exact match is -1.44 in v1. The
constants are those of the published models, in both versions:

    v1 = 2.450143 - 1.245216 RadGraph - 1.650845 BERTScore - 0.994772 SembScore (BLEU has no weight)
    v0 = 5.516161 - 1.589034 RadGraph - 3.009830 BERTScore - 1.873372 SembScore + 0.713942 BLEU-2 (which worsens it)

The reward is -RadCliQ. Leaderboards print 1/RadCliQ-v1, and that is a figure of a corpus, 1/mean: of a single report it
has a pole at 0, which good reports cross, so that an exact match would score below a report that is half right.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .radcliq_components import NEEDS, Components


@dataclass(frozen=True)
class Regression:
    """Constants of one version, in the order RadGraph, BERTScore, SembScore, BLEU-2."""

    mean: tuple[float, float, float, float]
    scale: tuple[float, float, float, float]
    weight: tuple[float, float, float, float]
    intercept: float


REGRESSIONS = {
    "v0": Regression(
        (0.5398376019, 0.6312549595, 0.7716797867, 0.4607372065),
        (0.3018344441, 0.2246695075, 0.2475033381, 0.3033667094),
        (-0.4796252645, -0.6762170542, -0.4636657516, 0.2165861905),
        1.6416666667,
    ),
    "v1": Regression(
        (0.5379231241, 0.6175725628, 0.7647942121, 0.4473833540),
        (0.3028258411, 0.2243093846, 0.2539439110, 0.2989271672),
        (-0.3770836826, -0.3703000997, -0.2526162179, 4.315e-12),
        2.4666e-10,
    ),
}


def radcliq(radgraph: float, bertscore: float, semb_score: float, bleu: float, version: str = "v1") -> float:
    """RadCliQ of one report, or by its linearity of a corpus's mean components. Lower is better."""
    model = REGRESSIONS[version]
    values = (radgraph, bertscore, semb_score, bleu)
    terms = zip(values, model.mean, model.scale, model.weight, strict=True)
    return math.fsum(weight * (value - mean) / scale for value, mean, scale, weight in terms) + model.intercept


class RadCliQ:
    """Errors that RadCliQ predicts from RadGraph F1, BERTScore, SembScore and BLEU-2, negated: higher is better.

    Options: `version` v1 (default) or v0; `radgraph`, `bertscore` and `chexbert`, the options of those components (see
    `radcliq_components`). -v1 lies between -5.1 (an empty candidate) and 1.44 (an exact match), most reports between -3
    and 0. A study with a blank reference is masked.
    """

    needs = NEEDS

    def __init__(
        self,
        version: str = "v1",
        radgraph: Mapping[str, Any] | None = None,
        bertscore: Mapping[str, Any] | None = None,
        chexbert: Mapping[str, Any] | None = None,
    ) -> None:
        if version not in REGRESSIONS:
            raise ValueError(f"version '{version}' is neither v1 nor v0")
        self.version = version
        self.components = Components(radgraph, bertscore, chexbert)

    @property
    def shares(self) -> tuple[str, ...]:
        """Its models'."""
        return self.components.shares

    def setup(self, device: str = "cpu") -> None:
        """Load the models. Raises what the components raise, which says what is missing."""
        self.components.setup(device)

    def prepare(self, references: list[str]) -> None:
        """Let the models read references, which they remember."""
        self.components.prepare(references)

    @property
    def identity(self) -> dict[str, Any]:
        """Version and sign, and each component's identity."""
        return {"metric": f"-RadCliQ-{self.version}"} | self.components.identity

    def score(self, candidates: list[str], references: list[str], **columns: Any) -> list[float | None]:
        """See the class."""
        rows = self.components.values(candidates, references)
        return [None if row is None else -radcliq(**row, version=self.version) for row in rows]

    def corpus_terms(self, candidates: list[str], references: list[str], **columns: Any) -> dict[str, list[Any]]:
        """The leaderboards' `reciprocal`, 1 / mean RadCliQ over the judged reports; higher is better."""
        scores = self.score(candidates, references)
        return {"reciprocal": [None if score is None else (1.0, -score) for score in scores]}
