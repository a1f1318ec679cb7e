"""Signs that a policy games its rewards, read off every batch of samples: logged as `monitor/...`, told, or a stop.

A reward that rises says nothing of how. Outputs that become one, that all turn normal, or that grow or shrink, fewer
statements, and a reward that no longer goes with a metric it does not contain, do.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from unirg.extraction import extract, is_normal
from unirg.section import Section

if TYPE_CHECKING:
    from unirg.grpo.rollouts import Group
    from unirg.training import StageRun


class Limits(Section):
    """Bounds of what the monitors measure in one batch of samples; what is not set is not watched."""

    unique_outputs: float | None = Field(None, ge=0, le=1)
    """At least this share of a study's reports must be distinct, on average over studies."""
    normal_excess: float | None = Field(None, ge=0, le=1)
    """The share of reports that affirm nothing may exceed that of the studies' own reports by so much."""
    length_drift: float | None = Field(None, gt=1)
    """The mean length in words may be at most so many times that of the stage's first batch, and at least that
    fraction of it: 2 is from half to double."""
    entities: float | None = Field(None, ge=0)
    """The mean number of distinct findings that a report affirms, doubts or denies must be at least this."""
    agreement: float | None = Field(None, ge=-1, le=1)
    """The correlation, within studies, of the weighted sum with each reward of weight 0 (a held-out metric: scored and
    not trained on) must be at least this."""


class MonitorConfig(Section):
    """What is to happen where samples look as if the policy games its rewards. All is measured in any case."""

    warn: Limits = Limits()
    """Crossing one of these is told, the first time in a run and again after each return within it."""
    stop: Limits = Limits()
    """Crossing one of these ends the run with a message; checkpoints stay."""


class Signs(NamedTuple):
    """What is counted in one study's reports: which affirm nothing, words, distinct findings; and in its own report."""

    distinct: int
    normal: list[bool]
    words: list[int]
    entities: list[int]
    reference_normal: bool


def signs(reports: Sequence[str], reference: str) -> Signs:
    """The signs of a study's reports beside its own report, `reference`: half a millisecond a report."""
    return Signs(
        distinct=len(set(reports)),
        normal=[is_normal(text) for text in reports],
        words=[len(text.split()) for text in reports],
        entities=[len({(mention.finding, mention.polarity) for mention in extract(text)}) for text in reports],
        reference_normal=is_normal(reference),
    )


def sample_metrics(studies: Sequence[Signs], first_words: float | None = None) -> dict[str, float]:
    """What one batch of samples looks like, from the signs of its studies, of which there is at least one.

    `first_words` is `monitor/words` of the stage's first batch; without it there is no drift.
    """
    normal = fmean(each for study in studies for each in study.normal)
    words = fmean(each for study in studies for each in study.words)
    metrics = {
        "unique_outputs": fmean(study.distinct / len(study.words) for study in studies),
        "all_normal": normal,
        "normal_excess": normal - fmean(study.reference_normal for study in studies),
        "words": words,
        "entities": fmean(each for study in studies for each in study.entities),
    }
    if first_words:
        metrics["length_drift"] = words / first_words
    return {f"monitor/{name}": value for name, value in metrics.items()}


def agreement(rewards: Sequence[Sequence[float]], held_out: Sequence[Sequence[float | None]]) -> float | None:
    """Pearson correlation of the reward with a held-out metric within studies (each value less its group's mean), over
    the reports that both judge; NaN and None are "not judged". None where either does not vary."""
    pairs = []
    for own, other in zip(rewards, held_out, strict=True):
        judged = [(r, h) for r, h in zip(own, other, strict=True) if h is not None and r == r and h == h]
        if judged:
            means = [fmean(column) for column in zip(*judged, strict=True)]
            pairs += [(r - means[0], h - means[1]) for r, h in judged]
    spread = sum(r * r for r, _ in pairs) * sum(h * h for _, h in pairs)
    return sum(r * h for r, h in pairs) / spread**0.5 if spread > 1e-24 else None


def crossed(metrics: Mapping[str, float], limits: Limits) -> dict[str, str]:
    """The metrics beyond their limits, each with what it is and should be; what was not measured crosses nothing."""
    found = {}
    for name, bound in limits.model_dump(exclude_none=True).items():
        for metric, value in metrics.items():
            if metric != f"monitor/{name}" and not (name == "agreement" and metric.startswith("monitor/agreement/")):
                continue
            if name == "length_drift":
                fine, wanted = 1 / bound <= value <= bound, f"between {1 / bound:.3g} and {bound:.3g}"
            elif name == "normal_excess":
                fine, wanted = value <= bound, f"at most {bound:g}"
            else:
                fine, wanted = value >= bound, f"at least {bound:g}"
            if not fine:
                found[metric] = f"{metric} is {value:.3g}, and should be {wanted}"
    return found


def monitors(work: "StageRun") -> "Callable[[Sequence[Group], int], dict[str, float]]":
    """A function of this rank's scored groups and the batch's number (from 0) that returns the metrics over all ranks,
    tells what crosses a `warn` limit, and raises RanksStop where a `stop` limit is crossed."""
    from unirg import run as run_folder
    from unirg.prompt import report_text
    from unirg.training import RanksStop, say

    config: MonitorConfig = work.stage.monitors
    held_out = [reward.log_label for reward in work.stage.rewards if reward.weight == 0]
    told: list[str] = []
    started: list[float] = []  # the mean length of the stage's first batch, which may be of an earlier start of the run

    def watch(groups: "Sequence[Group]", batch: int) -> dict[str, float]:
        if batch and not started:
            started.extend(record["monitor/words"] for record in run_folder.read_metrics(work.folder)[:1])
        shares = [
            (signs([s.text for s in group.samples], report_text(group.study)), group.rewards, group.scores, started[:1])
            for group in groups
        ]
        # Of all ranks, and all of it: they must come to the same verdict, or one would wait for the others for ever.
        counted, rewards, scores, known = zip(*work.everyones(shares), strict=True)
        metrics = sample_metrics(counted, next((words for found in known for words in found), None))
        if not batch:
            started[:] = [metrics["monitor/words"]]
        for label in held_out:
            value = agreement(rewards, [of_group[label] for of_group in scores])
            if value is not None:
                metrics[f"monitor/agreement/{label}"] = value
        at = f"batch {batch + 1}"
        if found := crossed(metrics, config.stop):
            raise RanksStop(
                f"stage {work.stage.name}, {at}: stopped, as monitors.stop says: {'; '.join(found.values())}. Look at "
                f"{work.run / 'rollouts' / work.stage.name}; checkpoints are intact"
            )
        found = crossed(metrics, config.warn)
        for metric in found:
            if metric not in told:
                say(work.accelerator, work.stage.name, f"[yellow]{at}: {found[metric]}[/yellow]")
        told[:] = found
        return metrics

    return watch
