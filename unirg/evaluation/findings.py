"""What reports say about findings, counted against a reference text and against what is known of the film.

A reference text is not the truth: reports leave findings out. So positive findings are counted three ways: against the
study's own report, against a complete reference where there is one, and against the study's labels. Negations are
counted apart, because a reward that counts them like findings is earned by writing "No pneumothorax or effusion".

An item is a finding ("effusion") or, in the `core` counts, a finding and its side ("effusion/left"; a bilateral one is
two items). A finding is positive in a report if any mention of it is; else uncertain if any is; else negative. What
the reference is uncertain about is left out of both sides, and so is what the labels do not know.

Shapes: N studies.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from unirg.evaluation.intervals import Statistic, mean_statistic
from unirg.extraction import extract, is_normal

Items = frozenset[str]


class Counts(NamedTuple):
    """True positives, false positives and false negatives of each study; micro figures pool them over the corpus."""

    tp_N: np.ndarray
    fp_N: np.ndarray
    fn_N: np.ndarray

    @property
    def f1(self) -> Statistic:
        """2 TP / (2 TP + FP + FN)."""
        return Statistic(2 * self.tp_N, 2 * self.tp_N + self.fp_N + self.fn_N)

    @property
    def precision(self) -> Statistic:
        """TP / (TP + FP)."""
        return Statistic(self.tp_N, self.tp_N + self.fp_N)

    @property
    def recall(self) -> Statistic:
        """TP / (TP + FN)."""
        return Statistic(self.tp_N, self.tp_N + self.fn_N)


class ReportItems(NamedTuple):
    """The items of one report by polarity; `core` and `core_uncertain` are by side."""

    positive: Items
    negative: Items
    uncertain: Items
    core: Items
    core_uncertain: Items


@lru_cache(maxsize=100_000)
def report_items(report: str) -> ReportItems:
    """The items that a report mentions, by polarity."""
    by_polarity: dict[str, set[str]] = {"positive": set(), "negative": set(), "uncertain": set()}
    sided: dict[str, set[str]] = {"positive": set(), "negative": set(), "uncertain": set()}
    for mention in extract(report):
        by_polarity[mention.polarity].add(mention.finding)
        sides = {"bilateral": ("left", "right"), None: ()}.get(mention.side, (mention.side,))
        sided[mention.polarity].update(f"{mention.finding}/{side}" for side in sides)
    positive = by_polarity["positive"]
    uncertain = by_polarity["uncertain"] - positive
    core = _with_sides(positive, sided["positive"])
    return ReportItems(
        positive=frozenset(positive),
        negative=frozenset(by_polarity["negative"] - positive - uncertain),
        uncertain=frozenset(uncertain),
        core=core,
        core_uncertain=_with_sides(by_polarity["uncertain"], sided["uncertain"]) - core,
    )


def count_against_text(candidates: Sequence[str], references: Sequence[str]) -> dict[str, Counts]:
    """Candidates against reference texts: `positive` findings, `core` (finding and side), `negation`."""
    rows: dict[str, list[tuple[int, int, int]]] = {"positive": [], "core": [], "negation": []}
    for candidate, reference in zip(candidates, references, strict=True):
        said, wanted = report_items(candidate), report_items(reference)
        rows["positive"].append(_count(said.positive - wanted.uncertain, wanted.positive))
        rows["core"].append(_count(said.core - wanted.core_uncertain, wanted.core))
        rows["negation"].append(_count(said.negative - wanted.uncertain, wanted.negative))
    return {name: _counts(row) for name, row in rows.items()}


def count_against_labels(candidates: Sequence[str], labels: Sequence[Mapping[str, int]]) -> dict[str, Counts]:
    """Positive findings of the candidates against the studies' labels: `label`, and `label_core` by side.

    Only findings with a known label (0 or 1) are counted. Where the labels do not know a present finding's side,
    `label_core` counts the finding alone.
    """
    rows: dict[str, list[tuple[int, int, int]]] = {"label": [], "label_core": []}
    for candidate, known in zip(candidates, labels, strict=True):
        said = report_items(candidate)
        truth = finding_labels(known)
        present = frozenset(finding for finding, value in truth.items() if value == 1)
        rows["label"].append(_count(said.positive & truth.keys(), present))
        rows["label_core"].append(_count(_comparable_core(said.core, known, truth), _present_core(known, present)))
    return {name: _counts(row) for name, row in rows.items()}


def count_by_finding(
    candidates: Sequence[str], references: Sequence[str], labels: Sequence[Mapping[str, int]]
) -> dict[str, Counts]:
    """Counts of each finding's positive mentions, against the labels where any study has some, else the references.

    Findings that neither side ever has are left out; the most frequent in the reference come first.
    """
    by_label = any(labels)
    rows: list[tuple[Items, Items]] = []
    for candidate, reference, known in zip(candidates, references, labels, strict=True):
        said, wanted = report_items(candidate), report_items(reference)
        if by_label:
            truth = finding_labels(known)
            rows.append((said.positive & truth.keys(), frozenset(f for f, value in truth.items() if value == 1)))
        else:
            rows.append((said.positive - wanted.uncertain, wanted.positive))
    seen = {finding for said_items, wanted_items in rows for finding in said_items | wanted_items}
    counts = {f: _counts([_count(said & {f}, wanted & {f}) for said, wanted in rows]) for f in sorted(seen)}
    return dict(sorted(counts.items(), key=lambda item: -(item[1].tp_N + item[1].fn_N).sum()))


def output_statistics(candidates: Sequence[str], truncated: Sequence[bool] | None = None) -> dict[str, Statistic]:
    """Length in words, share of duplicates, of all-normal and of truncated outputs.

    The share of duplicates is 1 - distinct outputs / outputs: a text that occurs c times gives each of its studies
    1 - 1/c. `truncated` is left out where it is unknown.
    """
    occurrences = Counter(candidates)
    statistics = {
        "length": mean_statistic([float(len(text.split())) for text in candidates]),
        "duplicates": mean_statistic([1 - 1 / occurrences[text] for text in candidates]),
        "normal": mean_statistic([float(is_normal(text)) for text in candidates]),
    }
    if truncated is not None:
        statistics["truncated"] = mean_statistic([float(cut) for cut in truncated])
    return statistics


def finding_labels(labels: Mapping[str, int]) -> dict[str, int]:
    """The known labels (0 or 1) by finding; a finding known only by side is present if any side has it."""
    known = {key: value for key, value in labels.items() if "/" not in key and value in (0, 1)}
    for key, value in labels.items():
        finding, _, side = key.partition("/")
        if side and value == 1 and finding not in labels:
            known[finding] = 1
    return known


def _present_core(labels: Mapping[str, int], present: Items) -> Items:
    sided = frozenset(key for key, value in labels.items() if "/" in key and value == 1)
    return _with_sides(present, frozenset(key for key in sided if key.partition("/")[0] in present))


def _comparable_core(said: Items, labels: Mapping[str, int], truth: Mapping[str, int]) -> Items:
    """The candidate's sided items as far as the labels can judge them: without the side where that is unknown."""
    sides_known = {key.partition("/")[0] for key, value in labels.items() if "/" in key and value == 1}
    comparable = set()
    for item in said:
        finding, _, side = item.partition("/")
        if finding not in truth or (side and labels.get(item) == -1):
            continue
        judged_by_side = finding in sides_known or truth[finding] == 0
        comparable.add(item if judged_by_side else finding)
    return frozenset(comparable)


def _with_sides(findings: set[str] | Items, sided: set[str] | Items) -> Items:
    """Sided items, and the bare finding where no side is given."""
    has_side = {item.partition("/")[0] for item in sided}
    return frozenset(sided) | (frozenset(findings) - has_side)


def _count(said: Items, wanted: Items) -> tuple[int, int, int]:
    return len(said & wanted), len(said - wanted), len(wanted - said)


def _counts(rows: list[tuple[int, int, int]]) -> Counts:
    tp_N, fp_N, fn_N = np.array(rows, dtype=np.float64).reshape(-1, 3).T
    return Counts(tp_N, fp_N, fn_N)
