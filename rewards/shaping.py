"""Shape of a report rather than its truth: length, repetition, sections, templates. Small weights beside a clinical
reward, which none of them replaces.

All lie in [0, 1], where 1 is as it should be and silence is 0, and none needs a reference.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unirg.scoring.contract import RewardError

_WORD = re.compile(r"\w+")
_SENTENCE_END = re.compile(r"[.!?;]+(?:\s+|$)|\n+")


def length_band(candidates: list[str], references: list[str], *, low: int, high: int, **columns: Any) -> list[float]:
    """1 for a report of `low` to `high` words; less in proportion below, and falling to 0 at twice `high` above."""
    if not 0 < low <= high:
        raise ValueError(f"low is {low} and high {high}; expected 0 < low <= high, in words")
    counts = [len(candidate.split()) for candidate in candidates]
    return [min(1.0, count / low, max(0.0, 2 - count / high)) for count in counts]


def repetition(candidates: list[str], references: list[str], *, n: int = 4, **columns: Any) -> list[float]:
    """The share of a report's n-grams, or of its sentences where that is less, that stand there for the first time.

    Words are compared in lower case, without punctuation. N-grams lie within sentences: across them, a sentence said
    again would make new ones, and could pay.
    """
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1")
    return [_first_time(candidate, n) for candidate in candidates]


def sections(
    candidates: list[str], references: list[str], *, headers: list[str] | None = None, **columns: Any
) -> list[float]:
    """1 where a report consists of the required headers, each once, in order and with content; otherwise 0.

    `headers` (Findings, Impression) are written with a colon, in any case, at the start of the report or after white
    space. Nothing may stand before the first; content is at least one word.
    """
    headers = ["Findings", "Impression"] if headers is None else headers
    if not headers or len({header.lower() for header in headers}) != len(headers):
        raise ValueError(f"headers are {headers}, expected at least one, each once")
    names = "|".join(re.escape(header) for header in sorted(headers, key=len, reverse=True))
    pattern = re.compile(rf"(?<!\S)({names})\s*:", re.IGNORECASE)
    wanted = [header.lower() for header in headers]
    scores = []
    for candidate in candidates:
        before, *rest = pattern.split(candidate)
        found, contents = [header.lower() for header in rest[::2]], rest[1::2]
        whole = not before.strip() and found == wanted and all(_WORD.search(content) for content in contents)
        scores.append(float(whole))
    return scores


class TemplateDuplicate:
    """0 for a report that is, or nearly is, one of the commonest training reports while its reference is not; else 1.

    `reports`: a file of training reports, .jsonl or .csv with the report in `column`, or .txt with one a line. The `k`
    commonest of those that occur more than once are the templates. A report nearly is one where at least `similarity`
    of the word pairs that either of the two has are in both. Where the reference itself nearly is that template, the
    report is simply right. Silence is 0.
    """

    needs = "a file of training reports"

    def __init__(self, reports: str, column: str = "report", k: int = 50, similarity: float = 0.9) -> None:
        if k < 1 or not 0 < similarity <= 1:
            raise ValueError(f"k is {k} and similarity {similarity}; expected k >= 1 and 0 < similarity <= 1")
        self.reports, self.column, self.k, self.similarity = Path(reports).expanduser(), column, k, similarity
        self._templates: list[frozenset[tuple[str, str]]] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Where the templates come from, and how many there are once they are read."""
        named = {"metric": "template duplicate", "reports": str(self.reports)}
        return named | ({} if self._templates is None else {"templates": len(self._templates)})

    def setup(self) -> None:
        """Read the file and keep the commonest reports.

        Raises RewardError: the file cannot be read, a line lacks the column, or no report occurs twice.
        """
        counts = Counter(_words(report) for report in _reports(self.reports, self.column))
        common = [words for words, count in counts.most_common(self.k) if count > 1 and words]
        if not common:
            raise RewardError(f"{self.reports}: no report occurs more than once, so there are no templates")
        self._templates = [_pairs(words) for words in common]

    def score(self, candidates: list[str], references: list[str], **columns: Any) -> list[float]:
        """See the class."""
        if self._templates is None:
            self.setup()
        matches = {text: self._matches(text) for text in {*candidates, *references}}
        return [
            float(bool(_words(candidate)) and matches[candidate] <= matches[reference])
            for candidate, reference in zip(candidates, references, strict=True)
        ]

    def _matches(self, text: str) -> set[int]:
        """The numbers of the templates that `text` nearly is."""
        assert self._templates is not None
        mine = _pairs(_words(text))
        near = enumerate(self._templates)
        return {i for i, other in near if mine and len(mine & other) >= self.similarity * len(mine | other)}


def _first_time(report: str, n: int) -> float:
    sentences = [words for sentence in _SENTENCE_END.split(report) if (words := _words(sentence))]
    grams = [gram for words in sentences for gram in zip(*(words[start:] for start in range(n)), strict=False)]
    return min((len(set(items)) / len(items) for items in (grams, sentences) if items), default=0.0)


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


def _pairs(words: tuple[str, ...]) -> frozenset[tuple[str, str]]:
    """Neighbouring words, with the report's two ends: even a report of one word has two pairs."""
    return frozenset(zip(("", *words), (*words, ""), strict=True)) if words else frozenset()


def _reports(path: Path, column: str) -> Iterator[str]:
    """The reports of a .jsonl, .csv or .txt file, in order."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".txt":
                yield from file
                return
            if path.suffix not in (".jsonl", ".csv"):
                raise RewardError(f"{path}: expected a .jsonl, .csv or .txt file of training reports")
            lines = (line for line in file if line.strip())
            rows = csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, lines)
            for number, row in enumerate(rows, 1):
                if not isinstance(row, dict) or not isinstance(row.get(column), str):
                    raise RewardError(f"{path}: report {number} has no text in '{column}'; name its column as `column`")
                yield row[column]
    except (OSError, UnicodeError, json.JSONDecodeError, csv.Error) as error:
        raise RewardError(f"{path}: the training reports cannot be read: {error}") from error
