"""R1, the composite reward that UniRG trains on: 0.370 BERTScore + 0.253 SembScore + 0.377 RadGraph F1.

The weights are the absolute coefficients of RadCliQ-v1, where they stand for *standardised* components. R1 as published
reads as a plain weighted sum, and that is what this is: no mean is subtracted, no scale divided by. The two differ:
RadCliQ divides BERTScore by 0.224 and RadGraph by 0.303, so that relative to RadGraph it counts BERTScore 1.33 times,
R1 0.98 times. For the former there is `radcliq`.

The paper names no RadGraph variant beside ReXrank's, which is the default here; the authors' own metric package scores
the variant `complete`: `radgraph: {level: complete}`.
"""

from collections.abc import Mapping
from typing import Any

from .radcliq_components import NEEDS, Components

WEIGHTS = {"bertscore": 0.370, "semb_score": 0.253, "radgraph": 0.377}


class R1:
    """UniRG's composite: 0.370 BERTScore + 0.253 SembScore + 0.377 RadGraph F1, not standardised.

    Options: `radgraph`, `bertscore` and `chexbert`, the options of those components (see `radcliq_components`). 1 is an
    exact match with a relation in it, -0.623 an empty candidate. A study with a blank reference is masked.
    """

    needs = NEEDS

    def __init__(
        self,
        radgraph: Mapping[str, Any] | None = None,
        bertscore: Mapping[str, Any] | None = None,
        chexbert: Mapping[str, Any] | None = None,
    ) -> None:
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
        """Weights, and each weighted component's identity."""
        named = {"metric": "UniRG R1", "weights": WEIGHTS, "standardised": False}
        return named | {name: value for name, value in self.components.identity.items() if name in WEIGHTS}

    def score(self, candidates: list[str], references: list[str], **columns: Any) -> list[float | None]:
        """See the class."""
        rows = self.components.values(candidates, references)
        return [None if row is None else r1(row["bertscore"], row["semb_score"], row["radgraph"]) for row in rows]


def r1(bertscore: float, semb_score: float, radgraph: float) -> float:
    """The weighted sum."""
    return WEIGHTS["bertscore"] * bertscore + WEIGHTS["semb_score"] * semb_score + WEIGHTS["radgraph"] * radgraph
