"""A reward that is a class: it has something to load, and says which variant it is."""

import csv
import re
from importlib.resources import files
from typing import Any


class SaysSide:
    """Share of the sides that the study's labels name which the report names; masked where the labels name none."""

    needs = "studies with labels that have sides, such as effusion/left"

    def __init__(self, language: str = "en") -> None:
        self.language = language
        self.words: dict[str, str] = {}

    def setup(self) -> None:
        """Read the words; UniRG calls this once per process, before the first score."""
        with files(__package__).joinpath("sides.csv").open(encoding="utf-8", newline="") as file:
            rows = {row.pop("language"): row for row in csv.DictReader(file)}
        if self.language not in rows:
            raise ValueError(f"language '{self.language}' is none of {', '.join(rows)}")
        self.words = rows[self.language]

    @property
    def identity(self) -> dict[str, Any]:
        """Kept in every run's manifest."""
        return {"metric": "sides said", "version": "0.2", "language": self.language}

    def score(self, candidates: list[str], references: list[str], labels: list[dict[str, int]]) -> list[float | None]:
        """See the class. `labels` is a column of the data: this reward gets no other."""
        return [self._one(candidate.lower(), known or {}) for candidate, known in zip(candidates, labels, strict=True)]

    def _one(self, candidate: str, labels: dict[str, int]) -> float | None:
        there = {key.partition("/")[2] for key, value in labels.items() if value == 1}
        wanted = [word for side, word in self.words.items() if side in there]
        return sum(bool(re.search(rf"\b{word}", candidate)) for word in wanted) / len(wanted) if wanted else None
