"""Evaluation of reports: every figure with its 95% interval, and the controls that say what it is worth.

Figures are keyed by name. A configured metric has its reward's label (`bleu`, `entity_f1`), and where the reward has
figures of a corpus, these have label and name (`chexbert.micro_14`, `radcliq.reciprocal`). What the evaluation counts
itself (`findings.py`, micro over the corpus) is `positive_f1`, `core_f1`, `negation_f1` against the reference text and
`truth_f1`, `truth_core_f1` against the studies' labels, each also as `_precision` and `_recall`; outputs are described
by `length`, `duplicates`, `normal` and `truncated`. A key without an ending is against the study's own report; the
ending `/complete` says that the same figure is taken against the complete reference, where the studies have one
(`Study.extra["complete"]`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from unirg.errors import UserError
from unirg.evaluation.findings import (
    Counts,
    count_against_labels,
    count_against_text,
    count_by_finding,
    output_statistics,
)
from unirg.evaluation.intervals import Statistic, corpus_statistic, intervals, mean_statistic, paired_ratios
from unirg.prompt import report_text
from unirg.scoring.contract import RewardConfig, ScoreBatch, study_columns
from unirg.scoring.engine import ScoringEngine
from unirg.section import Section
from unirg.study import Study

COMPLETE = "complete"


class EvaluationConfig(Section):
    """What is measured on the stages of a finished run, and against which of them."""

    splits: list[str] = ["dev"]
    """The splits to write reports for and to score. Choose on dev; look at test once."""
    metrics: list[RewardConfig] = []
    """Rewards to report as metrics, beside the finding counts that every evaluation has."""
    headline: str = "positive_f1"
    """The figure that decides: the best checkpoint on dev, the best constant report; it is marked in the
    tables. Such as positive_f1, truth_f1, negation_f1/complete, a metric's label, or one of its figures of the
    corpus (chexbert.micro_14, radcliq.reciprocal)."""
    baseline: str | None = None
    """The stage that the others are compared with, study by study; default none."""
    stages: list[str] | None = None
    """The stages to evaluate; default every stage that writes reports."""
    sampled: bool = True
    """Also sample one report per study at temperature 1: part of a greedy gain can be which phrasing the mode is."""
    max_new_tokens: int | None = Field(None, gt=0)
    """The longest report written, in tokens; default the sampling limit of the run's last GRPO stage, else 256."""
    batch_size: int = Field(64, gt=0)
    """Studies whose reports are written at once."""
    draws: int = Field(1000, gt=0)
    """Bootstrap draws per interval."""


@dataclass(frozen=True)
class Arm:
    """The reports of one stage (or one file) for a split, by study id, and what is known of how they came about."""

    reports: Mapping[str, str]
    truncated: Mapping[str, bool] | None = None
    sampled: Mapping[str, str] | None = None
    """Reports sampled at temperature 1, beside the greedy ones."""
    sees: str = ""
    """In words, what the arm was allowed to learn from."""
    seconds: float | None = None
    """Measured training time of the arm, in seconds,"""
    cpu_seconds: float | None = None
    """and in CPU seconds, which do not count waiting for others on the machine."""


@dataclass(frozen=True)
class Measurement:
    """Every figure of one set of reports, by study, before intervals."""

    statistics: dict[str, Statistic]
    by_finding: dict[str, Counts] = field(default_factory=dict)
    distinct: int = 0


def measure(
    studies: Sequence[Study],
    reports: Mapping[str, str],
    engine: ScoringEngine | None = None,
    *,
    truncated: Mapping[str, bool] | None = None,
) -> Measurement:
    """Every figure of `reports` (by study id) on `studies`: counted findings, outputs, and `engine`'s metrics.

    Raises UserError where the ids of reports and studies differ, or where a metric takes the name of a counted figure.
    """
    candidates = _in_order(studies, reports)
    cut = None if truncated is None else [truncated[study.id] for study in studies]
    own = [report_text(study) for study in studies]
    labels = [study.labels for study in studies]
    references = {"": own}
    if studies and all(study.extra.get(COMPLETE) for study in studies):
        references[f"/{COMPLETE}"] = [str(study.extra[COMPLETE]) for study in studies]
    statistics: dict[str, Statistic] = {}
    for ending, texts in references.items():
        for name, counts in count_against_text(candidates, texts).items():
            statistics |= _named(name, ending, counts)
    if any(labels):
        for name, counts in count_against_labels(candidates, labels).items():
            statistics |= _named(name.replace("label", "truth"), "", counts)
    statistics |= output_statistics(candidates, cut)
    if engine is not None:
        columns = study_columns(studies) | {"truncated": cut or [False] * len(studies)}
        for name, statistic in _metrics(engine, candidates, references, columns).items():
            if name in statistics:
                raise UserError(f"metric '{name}' has the name of a figure that is always counted; give it a `label`")
            statistics[name] = statistic
    return Measurement(statistics, count_by_finding(candidates, own, labels), len(set(candidates)))


def evaluate_predictions(
    studies: Sequence[Study],
    reports: Mapping[str, str],
    metrics: Sequence[RewardConfig] = (),
    *,
    truncated: Mapping[str, bool] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """One set of reports, every figure with its interval, ready for JSON; see `measure` for the errors raised."""
    engine = ScoringEngine(metrics) if metrics else None
    return summarise(measure(studies, reports, engine, truncated=truncated), draws=draws, seed=seed)


def summarise(measurement: Measurement, *, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Intervals of a measurement, ready for JSON: `metrics` (key -> mean, low, high, studies judged), `per_finding`."""
    f1s = {finding: counts.f1 for finding, counts in measurement.by_finding.items()}
    f1 = _intervals(f1s, draws, seed)
    per_finding = {
        finding: {
            "f1": f1[finding],
            "precision": number(counts.precision.value),
            "recall": number(counts.recall.value),
            "present": int((counts.tp_N + counts.fn_N).sum()),
            "reported": int((counts.tp_N + counts.fp_N).sum()),
        }
        for finding, counts in measurement.by_finding.items()
    }
    metrics = _intervals(measurement.statistics, draws, seed)
    return {"metrics": metrics, "per_finding": per_finding, "distinct": measurement.distinct}


def compare(baseline: Measurement, other: Measurement, *, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
    """`other` less `baseline` on the same studies, for every figure that both have: key -> difference, low, high,
    relative (to the baseline's figure)."""
    keys = [key for key in baseline.statistics if key in other.statistics]
    pairs = [[run.statistics[key] for key in keys] for run in (baseline, other)]
    return {
        key: {
            "difference": number(found.mean),
            "low": number(found.low),
            "high": number(found.high),
            "relative": number(found.relative),
        }
        for key, found in zip(keys, paired_ratios(*pairs, draws=draws, seed=seed), strict=True)
    }


def number(value: float) -> float | None:
    """A figure for JSON: 6 decimals, None where it is undefined."""
    return None if math.isnan(value) else round(value, 6)


def _intervals(statistics: Mapping[str, Statistic], draws: int, seed: int) -> dict[str, dict[str, float | int | None]]:
    found = intervals(list(statistics.values()), draws=draws, seed=seed)
    return {
        key: {
            "mean": number(interval.mean),
            "low": number(interval.low),
            "high": number(interval.high),
            "judged": statistic.judged,
        }
        for (key, statistic), interval in zip(statistics.items(), found, strict=True)
    }


def _named(name: str, ending: str, counts: Counts) -> dict[str, Statistic]:
    return {
        f"{name}_f1{ending}": counts.f1,
        f"{name}_precision{ending}": counts.precision,
        f"{name}_recall{ending}": counts.recall,
    }


def _metrics(
    engine: ScoringEngine,
    candidates: list[str],
    references: Mapping[str, list[str]],
    columns: dict[str, list[Any]],
) -> dict[str, Statistic]:
    """Each metric, and its figures of the corpus, against each reference; once only where the reference makes no
    difference to it."""
    batches = {ending: ScoreBatch(candidates, texts, columns) for ending, texts in references.items()}
    handles = {ending: engine.submit(batch) for ending, batch in batches.items()}
    scores = {ending: engine.collect(handle) for ending, handle in handles.items()}
    found: dict[str, Statistic] = {}
    for ending, batch in batches.items():
        terms = engine.corpus_terms(batch)
        for label, values in scores[ending].items():
            if ending and values == scores[""][label]:
                continue
            found[f"{label}{ending}"] = mean_statistic(values)
            for figure, rows in terms.get(label, {}).items():
                found[f"{label}.{figure}{ending}"] = corpus_statistic(rows)
    return found


def _in_order(studies: Sequence[Study], reports: Mapping[str, str]) -> list[str]:
    ids = [study.id for study in studies]
    if missing := [study_id for study_id in ids if study_id not in reports]:
        raise UserError(f"{len(missing)} of {len(ids)} studies have no report (first: {missing[0]})")
    if strangers := sorted(set(reports) - set(ids)):
        raise UserError(f"{len(strangers)} reports are of no study of the split (first: {strangers[0]})")
    return [reports[study_id] for study_id in ids]
