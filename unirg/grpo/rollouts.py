"""A batch of rollouts: sample, submit scores, collect them, advantages over all ranks, what is trained, what is kept.

Shapes: S studies of a rank, G reports per study, N = S * G over all ranks.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch

from unirg import run as run_folder
from unirg.errors import UserError
from unirg.grpo.advantages import AdvantageResult, advantages, most_extreme
from unirg.grpo.loss import Normaliser
from unirg.policy import EncodedPrompt
from unirg.prompt import report_text
from unirg.recipe.schema import GrpoStage
from unirg.rollout import Sample, Sampler
from unirg.scoring.contract import ScoreBatch, study_columns
from unirg.scoring.engine import ScoringEngine, score_summary
from unirg.study import Study
from unirg.training import StageRun, Stopwatch


@dataclass
class Group:
    """One study with its sampled reports, their scores by reward label and what the loss needs of them."""

    study: Study
    prompt: EncodedPrompt
    samples: list[Sample]
    scores: dict[str, list[float | None]] = field(default_factory=dict)
    rewards: list[float] = field(default_factory=list)
    """The weighted sums of the scores; NaN where a report is masked."""
    advantages: list[float] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    """Indices of the samples that go through the backward."""
    old_logps: dict[int, torch.Tensor] = field(default_factory=dict)
    """Per sample, its tokens' log-probs under the policy that sampled; kept where a batch makes several steps."""


Shared = tuple[str, dict[str, list[float | None]], list[tuple[int, bool]]]
"""What ranks tell each other of a group: study id, scores by label, (length, truncated) of each report."""

UNSCORED = 3
"""After so many batches in a row without one scored report, or with a reward that fails on all, a stage stops."""

Submitted = list[tuple[int, list[tuple[Group, int]]]]
"""Handles of scores, each with the groups and indices of the reports in its batch."""

Rollouts = tuple[list[Group], Submitted]
"""A batch of a rank that has been sampled and submitted."""

AT_ONCE = 32
"""Reports are submitted as they are finished, at least so many at a time: models score in batches."""


def sample_groups(
    work: StageRun,
    sampler: Sampler,
    engine: ScoringEngine,
    studies: list[Study],
    watch: Stopwatch,
    batch: int,
    attempt: int = 0,
) -> Rollouts:
    """Samples G reports for each study, and submits them (see `begin_sampling`)."""
    sample = begin_sampling(work, sampler.sample, engine, studies, batch, attempt)
    with work.together("sampling"), watch("sampling"):
        return sample()


def begin_sampling(
    work: StageRun,
    draw: Callable[..., Sequence[list[Sample] | None]],
    engine: ScoringEngine,
    studies: list[Study],
    batch: int,
    attempt: int = 0,
) -> Callable[[], Rollouts]:
    """Reads the studies; what it returns has `draw`, a sampler's `sample` or `attempt`, sample G reports for each, and
    submits them as they are finished: workers score the short ones while the long ones are sampled. Where a reward
    compares a study's reports, all are submitted at the end. Studies that were left out have no samples.

    Seeds follow from run, step, study and sample, not from rank or batch shape. Of several ranks each calls this as
    often as the others, with no studies if it has none: engines may need all of them.
    """
    stage: GrpoStage = work.stage
    seeds = [[work.seed("sample", batch, attempt, s.id, g) for g in range(stage.group_size)] for s in studies]
    groups = [Group(study, prompt, []) for study, prompt in zip(studies, work.encode(studies), strict=True)]
    submitted: Submitted = []
    ready: list[tuple[int, int, Sample]] = []

    def submit() -> None:
        ready.sort(key=lambda report: report[:2])  # a study's reports side by side
        submitted.append(submit_reports(engine, [(groups[i], g, sample) for i, g, sample in ready]))
        ready.clear()

    def finished(i: int, g: int, sample: Sample) -> None:
        ready.append((i, g, sample))
        if len(ready) >= AT_ONCE and not engine.compares:
            submit()

    def sample() -> Rollouts:
        with work.accelerator.autocast():
            sampled = draw(
                [group.prompt for group in groups],
                seeds,
                temperature=stage.sampling.temperature,
                max_new_tokens=stage.sampling.max_new_tokens,
                finished=finished,
            )
        if ready:
            submit()
        for group, samples in zip(groups, sampled, strict=True):
            group.samples = samples or []
        return groups, submitted

    return sample


def submit_reports(
    engine: ScoringEngine, reports: list[tuple[Group, int, Sample]]
) -> tuple[int, list[tuple[Group, int]]]:
    """Submits reports, given with their groups and indices in them."""
    handle = engine.submit(score_batch([(group.study, sample) for group, _, sample in reports]))
    return handle, [(group, g) for group, g, _ in reports]


def submit_all(engine: ScoringEngine, groups: list[Group]) -> Submitted:
    """Submits every report of groups that are sampled."""
    reports = [(group, g, sample) for group in groups for g, sample in enumerate(group.samples)]
    return [submit_reports(engine, reports)] if reports else []


def collect_scores(engine: ScoringEngine, submitted: Submitted, watch: Stopwatch) -> None:
    """Waits for the scores and writes them to the groups."""
    with watch("scoring"):
        for handle, reports in submitted:
            for label, values in engine.collect(handle).items():
                for (group, g), value in zip(reports, values, strict=True):
                    group.scores.setdefault(label, [None] * len(group.samples))[g] = value


def judge_rollouts(
    work: StageRun, sampler: Sampler, engine: ScoringEngine, groups: list[Group], batch: int, watch: Stopwatch
) -> tuple[dict[str, float], Normaliser]:
    """Computes advantages over all ranks' reports and which reports are trained; `groups` are this rank's, scored.
    Where the stage resamples, groups without variance are replaced by others in the list.

    Returns the step's metrics (over all ranks), and the counts that normalise the step's loss. Writes the rollouts.
    """
    stage: GrpoStage = work.stage
    everyones = work.everyones([(g.study.id, g.scores, _lengths(g)) for g in groups])
    result = step_advantages(stage, everyones)
    first_zero = result.zero_variance_groups
    resampled = 0
    for attempt in range(1, stage.resample + 1):
        dull = zero_variance(result, stage.group_size)
        if not dull:
            break
        resampled += len(dull)
        spare = work.step_studies(batch + attempt * 7919)  # another part of the same endless permutation
        mine = work.mine(list(range(len(everyones))))
        replaced = [i for i, position in enumerate(mine) if position in dull]
        wanted = [spare[mine[i]] for i in replaced]
        fresh, submitted = sample_groups(work, sampler, engine, wanted, watch, batch, attempt)
        with work.together("scoring"):
            collect_scores(engine, submitted, watch)
        for i, group in zip(replaced, fresh, strict=True):
            groups[i] = group
        everyones = work.everyones([(g.study.id, g.scores, _lengths(g)) for g in groups])
        result = step_advantages(stage, everyones)

    by_group = result.advantages_N.view(-1, stage.group_size).tolist()
    counted = result.mask_N.view(-1, stage.group_size)
    if stage.mask_truncated:
        cut = torch.tensor([[truncated for _, truncated in lengths] for _, _, lengths in everyones])
        counted = counted & ~cut
    rows = torch.arange(result.advantages_N.numel()).view(-1, stage.group_size)
    if stage.train_on is not None and stage.train_on < stage.group_size:
        rows = most_extreme(result.advantages_N, stage.group_size, stage.train_on).view(-1, stage.train_on)
    trained = [[int(n) % stage.group_size for n in row if bool(counted.view(-1)[n])] for row in rows]
    rewards = result.rewards_N.view(-1, stage.group_size).tolist()
    for i, group in zip(work.mine(range(len(everyones))), groups, strict=True):
        group.rewards, group.advantages, group.trained = rewards[i], by_group[i], trained[i]
    tokens = sum(everyones[g][2][i][0] for g, indices in enumerate(trained) for i in indices)
    normaliser = Normaliser(sum(map(len, trained)), tokens, stage.sampling.max_new_tokens)
    metrics = rollout_metrics(stage, everyones, result) | {"frac_reward_zero_std": first_zero / result.groups}
    if stage.resample:
        metrics["resampled_groups"] = float(resampled)
    if work.accelerator.num_processes == 1:  # several ranks: each writes its own file
        name = f"step-{batch + 1:06d}.parquet"
    else:
        name = f"step-{batch + 1:06d}-rank{work.accelerator.process_index}.parquet"
    with work.together("rollouts"):
        write_rollouts(work.run / "rollouts" / stage.name / name, groups)
    return metrics | failed_scores(work, engine), normaliser


def failed_scores(work: StageRun, engine: ScoringEngine) -> dict[str, float]:
    """The engine's figures since the last step: failures over all ranks, and the share of this rank's scoring that was
    hidden."""
    figures = engine.step_figures()
    names = [name for name in figures if name.startswith("rewards/")]
    counts = torch.tensor([figures[name] for name in names], device=work.accelerator.device)
    return figures | dict(zip(names, work.accelerator.reduce(counts, "sum").tolist(), strict=True))


def lacking(stage: GrpoStage, metrics: Mapping[str, float]) -> str | None:
    """What was wrong with a batch's scores, from its metrics; None where enough was scored to learn from."""
    judged_none = {r.log_label: r for r in stage.rewards if metrics[f"rewards/{r.log_label}/masked"] == 1}
    failed = [label for label, r in judged_none.items() if r.weight and metrics[f"rewards/{label}/failed"]]
    if failed:
        return f"{', '.join(failed)} failed on every report"
    return None if "reward" in metrics else "no report could be scored"


def without_scores(work: StageRun, metrics: dict[str, float], batch: int, before: int | None) -> int:
    """How many batches in a row had no report that could be scored, or a reward of non-zero weight that failed on every
    report; `before` of them ahead of this one, whose `metrics` are those of all ranks. None: as many as the log of the
    starts before this one ends with. At UNSCORED the stage stops: UserError."""
    if before is None:
        logged = reversed(run_folder.read_metrics(work.folder)[:: work.stage.iterations])
        before = sum(1 for _ in itertools.takewhile(lambda record: lacking(work.stage, record), logged))
    what = lacking(work.stage, metrics)
    if what is None:
        return 0
    failure = None
    if before + 1 >= UNSCORED and work.accelerator.is_main_process:
        failure = UserError(
            f"stage {work.stage.name}, batch {batch + 1}: {what}, {UNSCORED} batches in a row; what is learnt now is "
            f"not what was asked for. The reason stands above, and what rewards printed in {work.folder / 'workers'}; "
            "put that right, and the same command goes on"
        )
    work.meet("scores", failure)
    return before + 1


def prepare_scoring(engine: ScoringEngine, studies: list[Study]) -> None:
    """Tells the workers whose reports come next, so that they read the references before there are candidates."""
    if studies:
        engine.prepare([report_text(study) for study in studies], study_columns(studies))


def score_batch(reports: list[tuple[Study, Sample]]) -> ScoreBatch:
    """The reports with their studies' texts and columns, one row per report."""
    studies = [study for study, _ in reports]
    columns = study_columns(studies) | {"truncated": [sample.truncated for _, sample in reports]}
    return ScoreBatch([sample.text for _, sample in reports], [report_text(study) for study in studies], columns)


def step_advantages(stage: GrpoStage, everyones: list[Shared]) -> AdvantageResult:
    """Advantages of all ranks' reports, N = studies x G."""
    labels = [reward.log_label for reward in stage.rewards]
    scores = {label: [value for _, own, _ in everyones for value in own[label]] for label in labels}
    weights = {reward.log_label: reward.weight for reward in stage.rewards}
    return advantages(scores, weights, stage.group_size, stage.aggregation, stage.scale)


def zero_variance(result: AdvantageResult, group_size: int) -> set[int]:
    """Positions of the groups whose reports all have the same advantage."""
    by_group = result.advantages_N.view(-1, group_size)
    return {i for i, row in enumerate(by_group) if bool((row == row[0]).all())}


def _lengths(group: Group) -> list[tuple[int, bool]]:
    return [(len(sample.ids), sample.truncated) for sample in group.samples]


def rollout_metrics(stage: GrpoStage, everyones: list[Shared], result: AdvantageResult) -> dict[str, float]:
    """The step's rewards and lengths over all ranks, under TRL's names."""
    labels = [reward.log_label for reward in stage.rewards]
    metrics = score_summary({label: [v for _, own, _ in everyones for v in own[label]] for label in labels})
    judged = result.rewards_N[result.mask_N]
    if len(judged):
        metrics["reward"] = judged.mean().item()
        metrics["reward_std"] = judged.std().item() if len(judged) > 1 else 0.0
    lengths = [length for _, _, group in everyones for length, _ in group]
    cut = [truncated for _, _, group in everyones for _, truncated in group]
    return metrics | {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(cut) / len(cut),
        "masked_samples": float((~result.mask_N).sum()),
    }


def write_rollouts(path: Path, groups: list[Group]) -> None:
    """The batch's reports with scores, rewards (null where masked) and advantages, one row per report, as parquet."""
    rows = []
    for group in groups:
        for i, sample in enumerate(group.samples):
            scores = {label: values[i] for label, values in group.scores.items()}
            reward = None if math.isnan(group.rewards[i]) else group.rewards[i]
            rows.append(
                {"study_id": group.study.id, "candidate": sample.text, "reward": reward}
                | {"advantage": group.advantages[i], "length": len(sample.ids), "truncated": sample.truncated}
                | {"trained": i in group.trained}
                | {f"scores.{label}": value for label, value in scores.items()}
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), part)
    part.replace(path)
