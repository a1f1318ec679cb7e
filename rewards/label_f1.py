"""F1 of the findings a report states against the study's own labels: the truth, where the reference text may omit.

Positives. The items to find are the findings labelled 1. A finding labelled 0 that the candidate affirms is a false
item. One without a label, or labelled -1 (uncertain), is unknown: it counts neither way, whatever is said of it.
With `sides`, a finding whose labels name its sides ("effusion/left") counts once per side; naming the finding and no
side earns half an item, the wrong side none.

Negations. Labels are 0 for far more findings than anyone would write down, so here the items to find are the findings
that the reference report denies, less those labelled 1. Every other finding that the candidate denies is a false item,
above all one labelled 1. A finding that a report both affirms and denies ("no right effusion, small left effusion")
counts as affirmed.
"""

from collections.abc import Mapping
from typing import Any

from unirg.extraction import FINDINGS, extract

Item = tuple[str, str | None]  # finding, and its side where sides count


class LabelF1:
    """Findings affirmed (or denied) in the report against the study's own labels, as F1; masked without labels.

    Options: `polarity` positive (default), negative, or both (their items pooled); `sides` (positives per side where
    the labels have sides); `uncertain` positive (default: "possible pneumonia" claims pneumonia, so that hedging is not
    free, as in CheXbert's report mode) or ignore. Lies in [0, 1]. Where neither side has an item the score is 1: a
    normal study answered without a false finding is right. A candidate without a word scores 0.
    """

    needs = "studies with labels"

    def __init__(self, polarity: str = "positive", sides: bool = False, uncertain: str = "positive") -> None:
        if polarity not in ("positive", "negative", "both"):
            raise ValueError(f"polarity '{polarity}' is none of positive, negative, both")
        if uncertain not in ("positive", "ignore"):
            raise ValueError(f"uncertain '{uncertain}' is neither positive nor ignore")
        self.polarity, self.sides, self.uncertain = polarity, sides, uncertain

    @property
    def identity(self) -> dict[str, Any]:
        """What is counted, and by which extractor."""
        counted = {"polarity": self.polarity, "sides": self.sides, "uncertain": self.uncertain}
        return {"metric": "label F1", "extractor": "unirg.extraction"} | counted

    def score(
        self,
        candidates: list[str],
        references: list[str],
        labels: list[Mapping[str, int]],
        **columns: Any,
    ) -> list[float | None]:
        """See the class."""
        return [self._study(*study) for study in zip(candidates, references, labels, strict=True)]

    def _study(self, candidate: str, reference: str, labels: Mapping[str, int]) -> float | None:
        labels = {key: value for key, value in (labels or {}).items() if key.partition("/")[0] in FINDINGS}
        truth = {key: value for key, value in labels.items() if "/" not in key and value in (0, 1)}
        if not truth or (self.polarity != "positive" and not reference.strip()):
            return None
        if not any(letter.isalnum() for letter in candidate):
            return 0.0
        hits, claimed, wanted = 0.0, 0, 0
        if self.polarity != "negative":
            hits, claimed, wanted = self._positives(candidate, truth, labels)
        if self.polarity != "positive":
            denied = self._denied(candidate)
            deniable = self._denied(reference) - {finding for finding, value in truth.items() if value == 1}
            hits, claimed, wanted = hits + len(denied & deniable), claimed + len(denied), wanted + len(deniable)
        return 2 * hits / (claimed + wanted) if claimed + wanted else 1.0

    def _positives(self, candidate: str, truth: Mapping[str, int], labels: Mapping[str, int]) -> tuple[float, int, int]:
        """(items hit, items claimed by the candidate, items in the labels)."""
        wanted = {item for finding in truth if truth[finding] == 1 for item in self._wanted(finding, labels)}
        sided = {finding for finding, side in wanted if side}
        claimed: set[Item] = set()
        for finding, sides in self._affirmed(candidate).items():
            if finding not in truth:
                continue
            if finding not in sided:
                claimed.add((finding, None))
                continue
            named = {(finding, side) for side in sides if labels.get(f"{finding}/{side}") in (0, 1)}
            if named or not sides:
                claimed |= named or {(finding, None)}
        hits: float = len(claimed & wanted)
        hits += 0.5 * sum(1 for finding, side in claimed if side is None and finding in sided)
        return hits, len(claimed), len(wanted)

    def _wanted(self, finding: str, labels: Mapping[str, int]) -> set[Item]:
        sides = {side for side in ("left", "right") if labels.get(f"{finding}/{side}") == 1}
        return {(finding, side) for side in sides} if self.sides and sides else {(finding, None)}

    def _affirmed(self, report: str) -> dict[str, set[str]]:
        """The sides named of each finding that the report affirms; none where it names no side."""
        counted = ("positive", "uncertain") if self.uncertain == "positive" else ("positive",)
        found: dict[str, set[str]] = {}
        for mention in extract(report):
            if mention.polarity in counted:
                sides = {"left", "right"} if mention.side == "bilateral" else {mention.side} - {None}
                found.setdefault(mention.finding, set()).update(side for side in sides if side)
        return found

    def _denied(self, report: str) -> set[str]:
        return {mention.finding for mention in extract(report) if mention.polarity == "negative"} - {
            mention.finding for mention in extract(report) if mention.polarity != "negative"
        }
