"""`unirg audit`: what would a policy learn from these rewards? They score the probes (`probes.py`) of 100 reports.

Each change is compared with the text that was changed, study by study: with the study's own report ("own"), and with a
half-right draft ("draft"). A harmful change should lose, a harmless one keep its score. How much is much differs from
reward to reward, so differences are judged against what the report of another patient costs.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from unirg.errors import UserError
from unirg.prompt import report_text
from unirg.scoring.contract import RewardConfig, ScoreBatch, study_columns
from unirg.scoring.engine import ScoringEngine
from unirg.scoring.files import read_references
from unirg.scoring.probes import PROBES, Case, Probe, commonest_normal, half_right
from unirg.study import Study

STUDIES = 100
"""So many of the reports are probed, spread evenly over the data."""
TOLERANCE = 0.05
"""A difference up to this share of the yardstick is called small. The yardstick is the mean absolute difference between
a study's own report and another study's."""
ROUNDING = 1e-6
BATCH = 256
SUM = "weighted sum"
BASES = ("own", "draft")

Verdict = Literal["loses", "hardly", "wins", "keeps", "moves", "none"]
"""Of a harmful change: it loses; it loses little or nothing; it wins. Of a harmless one: its score stays within the
tolerance, or moves. `none`: there was no report to judge by."""


@dataclass(frozen=True)
class Trial:
    """One text to score: a base ("own", "draft") of study `study` (an index), changed by `probe`; "" is unchanged. The
    base "other" is another study's report."""

    study: int
    base: str
    probe: str
    text: str


@dataclass(frozen=True)
class Outcome:
    """What one change earns: the mean of changed less unchanged, the share of studies in which the score rises, over
    `judged` of the `reports` to which the change applies; None without any."""

    reports: int
    judged: int
    difference: float | None
    pays: float | None
    verdict: Verdict


@dataclass(frozen=True)
class Subject:
    """A reward, or a sum of rewards, under all probes: mean score of the unchanged texts by base, and by base and probe
    what changes earn. `decides`: the exit status follows from it."""

    label: str
    decides: bool
    yardstick: float
    unchanged: Mapping[str, float | None]
    outcomes: Mapping[str, Mapping[str, Outcome]]

    @property
    def wins(self) -> list[tuple[str, str]]:
        """(base, probe) of the harmful changes that win, the best paid first."""
        return [place for place in self.ranked() if self.outcomes[place[0]][place[1]].verdict == "wins"]

    def ranked(self) -> list[tuple[str, str]]:
        """(base, probe) of all harmful changes that could be judged, the best paid (or least punished) first."""
        harmful = {probe.name for probe in PROBES if probe.harmful}
        paid = {
            (base, probe): outcome.difference
            for base, outcomes in self.outcomes.items()
            for probe, outcome in outcomes.items()
            if probe in harmful and outcome.difference is not None
        }
        return sorted(paid, key=lambda place: -paid[place])


@dataclass(frozen=True)
class Audit:
    """One stage's rewards, or the rewards of a list, under all probes. `how` says how the sum is made."""

    name: str
    studies: int
    how: str
    subjects: list[Subject]

    @property
    def passes(self) -> bool:
        """Whether no harmful change wins in what decides."""
        return not any(subject.decides and subject.wins for subject in self.subjects)


def audit(
    recipe: Path | None,
    overrides: Sequence[str] = (),
    *,
    rewards: str | None = None,
    references: Path | None = None,
    as_json: bool = False,
    plot: Path | None = None,
) -> int:
    """Audit the rewards of a recipe's GRPO stages on its training reports, or a list of rewards (as `parse_rewards`
    reads it) on a file of references, whose column `prior` may hold prior reports. Prints tables, or with `as_json` one
    object a stage; `plot` is a picture's path.

    Returns 1 where a harmful change wins: in a stage's weighted sum, which is what its policy is trained on, or in any
    reward of a list. Raises UserError for what cannot be read, loaded or scored.
    """
    if (recipe is None) == (rewards is None) or (rewards is None) != (references is None):
        raise UserError("unirg audit: give a RECIPE, or --rewards and --references")
    if recipe is not None:
        audits = audit_recipe(recipe, overrides)
    else:
        from unirg.scoring.command import parse_rewards

        assert rewards is not None and references is not None
        texts, studies = read_references(references)
        audits = [audit_rewards(references.name, parse_rewards(rewards), list(studies.values()), list(texts.values()))]
    if as_json:
        for found in audits:
            print(json.dumps(asdict(found) | {"tolerance": TOLERANCE, "passes": found.passes}, ensure_ascii=False))
    else:
        from unirg.scoring.audit_view import print_audit

        for found in audits:
            print_audit(found)
    if plot is not None:
        from unirg.scoring.audit_view import draw_audits

        draw_audits(audits, plot)
        Console(stderr=True).print(f"picture: {plot}", soft_wrap=True)
    return 0 if all(found.passes for found in audits) else 1


def audit_recipe(path: Path, overrides: Sequence[str]) -> list[Audit]:
    """The audit of every GRPO stage of a recipe, on the training reports of its data. Raises UserError."""
    from unirg.data import load_studies
    from unirg.recipe.load import load_recipe
    from unirg.recipe.schema import GrpoStage

    recipe = load_recipe(path, overrides)
    stages = [stage for stage in recipe.stages if isinstance(stage, GrpoStage)]
    if not stages:
        raise UserError(f"{path}: has no stage of kind grpo, so there are no rewards to audit")
    loaded: list[tuple[Any, list[Study]]] = []
    audits = []
    for stage in stages:
        config = stage.data or recipe.data
        studies = next((known for seen, known in loaded if seen == config), None)
        if studies is None:
            studies = load_studies(config, "train")
            loaded.append((config, studies))
        audits.append(
            audit_rewards(stage.name, stage.rewards, studies, [report_text(s) for s in studies], stage.aggregation)
        )
    return audits


def audit_rewards(
    name: str,
    configs: Sequence[RewardConfig],
    studies: Sequence[Study],
    references: Sequence[str],
    aggregation: str | None = None,
) -> Audit:
    """The audit of some rewards on studies with these reference texts; with `aggregation` (a GRPO stage's) of their
    weighted sum too, which then decides.

    Raises RewardError for rewards that cannot be used, UserError where fewer than two reports say different things.
    """
    chosen = [i for i, text in enumerate(references) if text.strip()]
    chosen = chosen[:: max(1, math.ceil(len(chosen) / STUDIES))]
    engine = ScoringEngine(configs)
    normal = commonest_normal(references)
    cases = [
        Case(references[i], references[i], studies[i].labels, prior=prior_text(studies[i]), normal=normal)
        for i in chosen
    ]
    trials = trials_of(name, cases)
    scores = scores_of(engine, trials, [studies[i] for i in chosen], [case.reference for case in cases])
    subjects = [judge(label, trials, values, decides=aggregation is None) for label, values in scores.items()]
    how = ""
    if aggregation is not None:
        weights = {config.log_label: config.weight for config in configs if config.weight}
        how = " + ".join(f"{weight:g} {label}" for label, weight in weights.items())
        if aggregation == "normalise_then_sum":
            spreads = {label: spread(trials, scores[label]) for label in weights}
            weights = {label: weight / spreads[label] for label, weight in weights.items() if spreads[label]}
            how += ", each divided by its standard deviation within a study's probes (training: within each group)"
        subjects.append(judge(SUM, trials, weighted(trials, scores, weights), decides=True))
    return Audit(name, len(cases), how, subjects)


def prior_text(study: Study) -> str:
    """The report of the study before: `study.prior`, or the further column `prior`, a text or an object with report, or
    findings and impression; "" without one."""
    if study.prior is not None:
        return report_text(study.prior)
    prior = study.extra.get("prior")
    if isinstance(prior, Mapping):
        if isinstance(prior.get("report"), str):
            return str(prior["report"])
        texts = {key: prior[key] for key in ("findings", "impression") if isinstance(prior.get(key), str)}
        return report_text(Study(id="prior", **texts))
    return prior if isinstance(prior, str) else ""


def trials_of(name: str, cases: Sequence[Case], probes: Sequence[Probe] = PROBES) -> list[Trial]:
    """Every text to score for these cases, study by study. Raises UserError where no two reports differ."""
    trials = []
    for i, case in enumerate(cases):
        others = (cases[(i + step) % len(cases)] for step in range(1, len(cases)))
        other = next((each.reference for each in others if each.right != case.right), None)
        if other is None:
            other = next((each.reference for each in cases if each.reference != case.reference), None)
        if other is None:
            raise UserError(
                f"{name}: an audit needs at least two reports that differ; there are {len(cases)} with text"
            )
        trials.append(Trial(i, "other", "", other))
        for base, text in (("own", case.text), ("draft", half_right(case))):
            if text is None:
                continue
            trials.append(Trial(i, base, "", text))
            of_base = Case(text, case.reference, case.labels, case.prior, case.normal)
            changes = ((probe.name, probe(of_base)) for probe in probes)
            trials += [Trial(i, base, probe, changed) for probe, changed in changes if changed is not None]
    if not trials:
        raise UserError(f"{name}: no report has any text; there is nothing to audit")
    return trials


def scores_of(
    engine: ScoringEngine, trials: Sequence[Trial], studies: Sequence[Study], references: Sequence[str]
) -> dict[str, list[float | None]]:
    """Each reward's score of each trial, by label. Raises RewardError."""
    collected: dict[str, list[float | None]] = {label: [] for label in engine.identities()}
    for start in range(0, len(trials), BATCH):
        part = trials[start : start + BATCH]
        columns = study_columns([studies[trial.study] for trial in part]) | {"truncated": [False] * len(part)}
        batch = ScoreBatch([trial.text for trial in part], [references[trial.study] for trial in part], columns)
        for label, values in engine.collect(engine.submit(batch)).items():
            collected[label] += values
    return collected


def spread(trials: Sequence[Trial], values: Sequence[float | None]) -> float:
    """The standard deviation of a reward within a study's texts, pooled over studies; 0 where it never varies."""
    squares, free = 0.0, 0
    for own in _by_study(trials, values).values():
        judged = [value for value in own if value is not None]
        if len(judged) > 1:
            mean = sum(judged) / len(judged)
            squares += sum((value - mean) ** 2 for value in judged)
            free += len(judged) - 1
    deviation = math.sqrt(squares / free) if free else 0.0
    return deviation if deviation > ROUNDING else 0.0


def weighted(
    trials: Sequence[Trial], scores: Mapping[str, Sequence[float | None]], weights: Mapping[str, float]
) -> list[float | None]:
    """The weighted sum of each trial. As in training, a reward that judges none of a study's texts is left out for that
    study, and a text that lacks a reward which others of its study have is masked (None)."""
    has = {
        label: {study for study, own in _by_study(trials, scores[label]).items() if any(v is not None for v in own)}
        for label in weights
    }
    sums: list[float | None] = []
    for row, trial in enumerate(trials):
        parts = [(weights[label], scores[label][row]) for label in weights if trial.study in has[label]]
        judged = [weight * value for weight, value in parts if value is not None]
        sums.append(sum(judged) if judged and len(judged) == len(parts) else None)
    return sums


def judge(label: str, trials: Sequence[Trial], values: Sequence[float | None], *, decides: bool) -> Subject:
    """What these scores pay for each probe."""
    at = {(trial.study, trial.base, trial.probe): value for trial, value in zip(trials, values, strict=True)}
    unchanged = {base: [v for (_, b, probe), v in at.items() if b == base and not probe] for base in BASES}
    others = [(value, at[study, "own", ""]) for (study, base, _), value in at.items() if base == "other"]
    yardstick = _mean([abs(own - other) for other, own in others if own is not None and other is not None]) or 0.0
    outcomes: dict[str, dict[str, Outcome]] = {base: {} for base in BASES}
    for base in BASES:
        for probe in PROBES:
            pairs = [
                (value, at[study, base, ""])
                for (study, b, name), value in at.items()
                if (b, name) == (base, probe.name)
            ]
            gains = [new - old for new, old in pairs if new is not None and old is not None]
            difference = _mean(gains)
            pays = _mean([float(gain > ROUNDING * (yardstick or 1)) for gain in gains])
            verdict = _verdict(probe.harmful, difference, yardstick)
            outcomes[base][probe.name] = Outcome(len(pairs), len(gains), difference, pays, verdict)
    means = {base: _mean([value for value in found if value is not None]) for base, found in unchanged.items()}
    return Subject(label, decides, yardstick, means, outcomes)


def _verdict(harmful: bool, difference: float | None, yardstick: float) -> Verdict:
    if difference is None:
        return "none"
    small = max(TOLERANCE * yardstick, ROUNDING)
    if not harmful:
        return "keeps" if abs(difference) <= small else "moves"
    if difference > ROUNDING * (yardstick or 1):
        return "wins"
    return "loses" if difference < -small else "hardly"


def _by_study(trials: Sequence[Trial], values: Sequence[float | None]) -> dict[int, list[float | None]]:
    found: dict[int, list[float | None]] = {}
    for trial, value in zip(trials, values, strict=True):
        found.setdefault(trial.study, []).append(value)
    return found


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
