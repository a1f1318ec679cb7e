"""Two rewards in the two shapes that the contract knows: a function, and a class with `score`."""

from typing import Any


def words_near(
    candidates: list[str], references: list[str], *, tolerance: int = 5, **columns: Any
) -> list[float | None]:
    """Whether the report has about as many words as the reference."""
    return [
        float(abs(len(candidate.split()) - len(reference.split())) <= tolerance) if reference else None
        for candidate, reference in zip(candidates, references)
    ]


class SaysSide:
    """Share of the sides of the study's labels that the report names; masked where the labels have no sides."""

    needs = "studies with labels that have sides"

    def __init__(self, sides: tuple[str, ...] = ("left", "right")) -> None:
        self.sides = sides
        self.ready = False

    def setup(self) -> None:
        self.ready = True

    def score(self, candidates: list[str], references: list[str], labels: list[dict[str, int]]) -> list[float | None]:
        assert self.ready, "setup() must run before the first score"
        return [self._one(candidate.lower(), known) for candidate, known in zip(candidates, labels)]

    def _one(self, candidate: str, labels: dict[str, int]) -> float | None:
        wanted = {side for side in self.sides for key, value in labels.items() if key.endswith(side) and value == 1}
        return sum(side in candidate for side in wanted) / len(wanted) if wanted else None
