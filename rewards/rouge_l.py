"""ROUGE-L F1 of a report against the reference: the longest common subsequence of words (Lin 2004)."""

import re
from importlib.metadata import version
from typing import Any

from rouge_score.rouge_scorer import RougeScorer


class RougeL:
    """Longest common word sequence with the reference report, F1 in [0, 1].

    Computed by Google's rouge_score with Porter stems, as RadEval and Hugging Face's `evaluate` do: lower case, Latin
    letters and digits only. pycocoevalcap's ROUGE-L (recall-weighted, no stems) is another scale. An empty candidate
    scores 0; a study whose reference has no such word (or that has none) is masked.
    """

    needs = "nothing"

    def __init__(self) -> None:
        self._scorer = RougeScorer(["rougeL"], use_stemmer=True)

    @property
    def identity(self) -> dict[str, Any]:
        """The implementation, its version and setting."""
        return {"metric": "ROUGE-L F1", "implementation": f"rouge_score {version('rouge-score')}", "stemmer": "porter"}

    def score(self, candidates: list[str], references: list[str], **columns: Any) -> list[float | None]:
        """See the class."""
        return [
            float(self._scorer.score(reference, candidate)["rougeL"].fmeasure)
            if re.search("[a-z0-9]", reference.lower())
            else None
            for candidate, reference in zip(candidates, references, strict=True)
        ]
