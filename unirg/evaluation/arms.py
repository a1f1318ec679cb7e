"""The arms of an experiment side by side, with the controls without which no figure means much.

- The ceiling: a perfect reporter, who writes the complete reference.
- The floor: for every figure the best constant report, chosen on other studies than those it is scored on.
- The shuffled-film control: an arm's own reports paired with other studies' films. What is left of a figure then is
  what can be had without looking.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unirg.errors import UserError
from unirg.evaluation.evaluate import COMPLETE, Arm, EvaluationConfig, Measurement, compare, measure, summarise
from unirg.scoring.contract import RewardConfig
from unirg.scoring.engine import ScoringEngine
from unirg.study import Study

OUTPUTS = ("length", "duplicates", "normal", "truncated")
"""Figures of the reports alone: no reference enters them."""


def evaluate_arms(
    studies: Sequence[Study],
    arms: Mapping[str, Arm],
    config: EvaluationConfig,
    *,
    split: str,
    constants: Mapping[str, str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Every arm on `studies`, with controls and, where `config.baseline` is among the arms, paired comparisons.

    `constants` are the best constant reports (see `best_constants`). Of the configured metrics only the headline is
    taken on shuffled films. Returns what RUN/evaluation/<split>.json holds. Raises UserError where an arm's ids are
    not the studies', RewardError where a metric fails.
    """
    engine = ScoringEngine(config.metrics) if config.metrics else None
    headline_engine = _engine_for(config.headline, config.metrics)
    drawn: dict[str, Any] = {"draws": config.draws, "seed": seed}
    measured = {name: measure(studies, arm.reports, engine, truncated=arm.truncated) for name, arm in arms.items()}
    results = {}
    for name, arm in arms.items():
        result: dict[str, Any] = {"sees": arm.sees, "seconds": arm.seconds, "cpu_seconds": arm.cpu_seconds}
        result |= summarise(measured[name], **drawn)
        if arm.sampled is not None:
            result["sampled"] = summarise(measure(studies, arm.sampled, engine), **drawn)["metrics"]
        shuffled = measure(studies, shuffle(studies, arm.reports, seed=seed), headline_engine)
        result["shuffled"] = _reference_figures(summarise(shuffled, **drawn)["metrics"])
        results[name] = result
    return {
        "split": split,
        "studies": len(studies),
        "film": _film(studies),
        "headline": config.headline,
        "baseline": config.baseline,
        "draws": config.draws,
        "arms": results,
        "controls": _controls(studies, constants, config.headline, engine, drawn),
        "versus": _versus(measured, config.baseline, drawn),
        "identities": engine.identities() if engine is not None else {},
    }


def best_constants(
    studies: Sequence[Study], candidates: Sequence[str], headline: str, metrics: Sequence[RewardConfig] = ()
) -> dict[str, str]:
    """For every figure the candidate that has the highest one when it is written for every study; the first of equals.
    One text is not the floor of every figure: the template that wins entity F1 has no positive finding at all.

    Give studies that are not the ones it will be scored on. Raises UserError where the headline is no figure
    of theirs, ValueError where there are no candidates.
    """
    if not candidates:
        raise ValueError("the best constant report needs candidates: give the most frequent training reports")
    engine = ScoringEngine(metrics) if metrics else None
    best: dict[str, tuple[float, str]] = {}
    for candidate in candidates:
        statistics = measure(studies, {study.id: candidate for study in studies}, engine).statistics
        if headline not in statistics:
            raise UserError(f"evaluation.headline '{headline}' is no figure here; there are: {', '.join(statistics)}")
        for key, statistic in statistics.items():
            if key not in best or math.isnan(best[key][0]) or statistic.value > best[key][0]:
                best[key] = (statistic.value, candidate)
    return {key: text for key, (_, text) in best.items()}


def shuffle(studies: Sequence[Study], reports: Mapping[str, str], *, seed: int = 0) -> dict[str, str]:
    """Each study given the report of another: a random cycle through all studies, so that none keeps its own."""
    order = np.random.default_rng(seed).permutation(len(studies))
    return {studies[i].id: reports[studies[j].id] for i, j in zip(order, np.roll(order, 1), strict=True)}


def _engine_for(headline: str, metrics: Sequence[RewardConfig]) -> ScoringEngine | None:
    """The metric that the headline is, or is a figure of, alone; None where the headline is a counted figure."""
    name = headline.removesuffix(f"/{COMPLETE}")
    needed = [m for m in metrics if name == m.log_label or name.startswith(f"{m.log_label}.")]
    return ScoringEngine(needed) if needed else None


def _controls(
    studies: Sequence[Study],
    constants: Mapping[str, str] | None,
    headline: str,
    engine: ScoringEngine | None,
    drawn: dict[str, Any],
) -> dict[str, Any]:
    controls: dict[str, Any] = {}
    if studies and all(study.extra.get(COMPLETE) for study in studies):
        perfect = {study.id: str(study.extra[COMPLETE]) for study in studies}
        controls["perfect reporter"] = summarise(measure(studies, perfect, engine), **drawn)
    if constants:
        everywhere = {
            text: summarise(measure(studies, {study.id: text for study in studies}, engine), **drawn)
            for text in dict.fromkeys(constants.values())
        }
        floor = everywhere[constants[headline]]
        metrics = {}
        for key in floor["metrics"]:
            # Precision and recall are of the report with the best F1; outputs are described by the headline's report.
            chosen = key.replace("_precision", "_f1").replace("_recall", "_f1")
            text = constants[headline] if key in OUTPUTS else constants.get(chosen, constants[headline])
            metrics[key] = everywhere[text]["metrics"][key]
        controls["best constant report"] = {"report": constants[headline]} | floor | {"metrics": metrics}
    return controls


def _versus(measured: Mapping[str, Measurement], baseline: str | None, drawn: dict[str, Any]) -> dict[str, Any]:
    if baseline is None or baseline not in measured:
        return {}
    return {name: compare(measured[baseline], other, **drawn) for name, other in measured.items() if name != baseline}


def _reference_figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Without what shuffling cannot change: the outputs are the same ones."""
    return {key: value for key, value in metrics.items() if key not in OUTPUTS}


def _film(studies: Sequence[Study]) -> str | None:
    """ "drawn" where any film is, else what the data says of them, else None."""
    kinds = {str(study.extra["film"]) for study in studies if study.extra.get("film")}
    return "drawn" if "drawn" in kinds else (sorted(kinds)[0] if kinds else None)
