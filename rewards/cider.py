"""CIDEr-D: n-grams of a report weighed by how rare they are (Vedantam et al., CVPR 2015; pycocoevalcap's definition).

For n = 1 to 4, the cosine of the two reports' tf-idf vectors, the candidate's counts clipped to the reference's, times
exp(-d^2 / 72) for a difference d in length (pycocoevalcap counts bigrams); the mean of the four, times 10. Reports are
split on white space and keep their case, as pycocoevalcap's scorer takes them; put them through a tokenizer first where
a table asks for its PTBTokenizer.

For evaluation only. A policy is paid for the rare phrases and the length of the reference, whether they are findings or
style, and as much for a negation as for its opposite; and with the document frequencies of the batch, which is what
pycocoevalcap takes, a group that shares one reference has log(1) = 0 for every word. So here the frequencies come from
a file: the references under evaluation give pycocoevalcap's figure, the training reports one that no test set changes.
"""

import math
from collections import Counter
from functools import lru_cache
from typing import Any

from .report_corpus import read_corpus

ORDER = 4
SIGMA = 6.0

Grams = Counter[tuple[str, ...]]


class Cider:
    """CIDEr-D against the reference, with document frequencies from a fixed corpus; for evaluation only.

    Option: `corpus`, a JSONL file with a `report` on each line. Lies in [0, 10]. An empty candidate scores 0; a study
    with a blank reference is masked.
    """

    needs = "option `corpus`: a JSONL file of reports"
    evaluation_only = "it pays for rare phrases and for length, not for findings"

    def __init__(self, corpus: str | None = None) -> None:
        if not corpus:
            raise ValueError(
                "cider needs `corpus`, a JSONL file with a `report` on each line: the references under evaluation (for "
                "pycocoevalcap's figure) or the training reports"
            )
        reports, self.fingerprint = read_corpus(corpus)
        self._frequency: Counter[tuple[str, ...]] = Counter(gram for report in reports for gram in set(_grams(report)))
        self._reports = len(reports)

    @property
    def identity(self) -> dict[str, Any]:
        """The definition, and the corpus by size and fingerprint."""
        corpus = {"corpus": self.fingerprint, "corpus reports": self._reports}
        return {"metric": "CIDEr-D", "tokens": "white space, case kept"} | corpus

    def score(self, candidates: list[str], references: list[str], **columns: Any) -> list[float | None]:
        """See the class."""
        return [
            self._pair(_grams(candidate), _grams(reference)) if reference.strip() else None
            for candidate, reference in zip(candidates, references, strict=True)
        ]

    def _pair(self, stated: Grams, wanted: Grams) -> float:
        stated_weights, wanted_weights = self._weights(stated), self._weights(wanted)
        difference = _bigrams(stated) - _bigrams(wanted)
        total = 0.0
        for n in range(1, ORDER + 1):
            lengths = _length(stated_weights, n) * _length(wanted_weights, n)
            shared = [gram for gram in stated_weights if len(gram) == n and gram in wanted_weights]
            product = sum(min(stated_weights[gram], wanted_weights[gram]) * wanted_weights[gram] for gram in shared)
            total += product / lengths if lengths else 0.0
        return 10 * total / ORDER * math.exp(-(difference**2) / (2 * SIGMA**2))

    def _weights(self, grams: Grams) -> dict[tuple[str, ...], float]:
        """Count times log(corpus reports / reports with the n-gram); what is in none counts as what is in one."""
        rarity = math.log(self._reports)
        return {gram: count * (rarity - math.log(max(1, self._frequency[gram]))) for gram, count in grams.items()}


@lru_cache(maxsize=4096)
def _grams(report: str) -> Grams:
    """Counts of all n-grams. A reference is met once per candidate, hence the cache."""
    words = report.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDER + 1) for i in range(len(words) - n + 1))


def _bigrams(grams: Grams) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 2)


def _length(weights: dict[tuple[str, ...], float], n: int) -> float:
    return math.sqrt(sum(weight**2 for gram, weight in weights.items() if len(gram) == n))
