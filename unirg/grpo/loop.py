"""GRPO, top to bottom: sample, submit scores, log-probs, collect, advantages, loss, step.

One step: every study of the batch gets G reports from the policy; rewards score them; a report's advantage is its
reward against its group; the policy is moved towards what scored better. Shapes: S studies of a rank, G reports per
study, N = S * G over all ranks, B reports in a micro-batch, T tokens of the longest.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch

from unirg import run as run_folder
from unirg.grpo.advantages import AdvantageResult, advantages, most_extreme
from unirg.grpo.choose import choose_forward
from unirg.grpo.forward import Forward, plan_forwards
from unirg.grpo.loss import Normaliser, grpo_loss, sampler_correction, sampler_metrics
from unirg.policy import EncodedPrompt, Policy, load_policy
from unirg.prompt import report_text
from unirg.recipe.schema import GrpoStage
from unirg.rollout import Sample, Sampler
from unirg.scoring.contract import ScoreBatch, study_columns
from unirg.scoring.engine import ScoringEngine, score_summary
from unirg.study import Study
from unirg.training import StageRun, optimise


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


class Stopwatch:
    """Seconds per phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def metrics(self) -> dict[str, float]:
        return {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}


def run_grpo(
    work: StageRun,
    sampler: Sampler,
    engine: ScoringEngine,
    evaluate: Callable[[], dict[str, float]] | None,
    reference: Policy | None,
) -> None:
    """Trains `work.policy` on the rewards of `engine` for the stage's steps. `reference` is the KL penalty's policy;
    None where there is no penalty, or where the policy without its adapters is the reference."""
    stage: GrpoStage = work.stage
    held: dict[str, Any] = {}

    def step_metrics(step: int) -> dict[str, float]:
        watch = Stopwatch()
        batch, iteration = divmod(step, stage.iterations)
        if iteration == 0:
            held["groups"], held["metrics"], held["normaliser"] = collect_rollouts(work, sampler, engine, batch, watch)
        if "forward" not in held:
            with watch("self-check"):
                held["forward"] = choose_forward(
                    work,
                    reference,
                    [group.prompt for group in held["groups"]],
                    [[sample.ids for sample in group.samples] for group in held["groups"]],
                )
        metrics = dict(held["metrics"])
        metrics |= update(work, held["groups"], held["normaliser"], held["forward"], reference, watch)
        return metrics | watch.metrics()

    optimise(work, work.policy.model, step_metrics, evaluate=evaluate, boundary=stage.iterations)


def collect_rollouts(
    work: StageRun, sampler: Sampler, engine: ScoringEngine, batch: int, watch: Stopwatch
) -> tuple[list[Group], dict[str, float], Normaliser]:
    """Samples and scores this rank's share of a batch, and computes advantages over all ranks' reports.

    Returns the rank's groups, the step's metrics (over all ranks), and the counts that normalise the step's loss.
    """
    stage: GrpoStage = work.stage
    groups = sample_groups(work, sampler, engine, work.mine(work.step_studies(batch)), watch, batch, 0)
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
        fresh = sample_groups(work, sampler, engine, [spare[mine[i]] for i in replaced], watch, batch, attempt)
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
    write_rollouts(work.run / "rollouts" / stage.name / name, groups)
    return groups, metrics, normaliser


def sample_groups(
    work: StageRun,
    sampler: Sampler,
    engine: ScoringEngine,
    studies: list[Study],
    watch: Stopwatch,
    batch: int,
    attempt: int,
) -> list[Group]:
    """G scored reports for each study. Seeds follow from run, step, study and sample, not from rank or batch shape."""
    if not studies:
        return []
    stage: GrpoStage = work.stage
    with watch("sampling"), work.accelerator.autocast():
        prompts = [work.policy.encode(study) for study in studies]
        seeds = [[work.seed("sample", batch, attempt, s.id, g) for g in range(stage.group_size)] for s in studies]
        samples = sampler.sample(
            prompts, seeds, temperature=stage.sampling.temperature, max_new_tokens=stage.sampling.max_new_tokens
        )
    groups = [Group(*parts) for parts in zip(studies, prompts, samples, strict=True)]
    with watch("scoring"):
        handle = engine.submit(score_batch(groups))
        scores = engine.collect(handle)
    size = stage.group_size
    for i, group in enumerate(groups):
        group.scores = {label: values[i * size : (i + 1) * size] for label, values in scores.items()}
    return groups


def score_batch(groups: list[Group]) -> ScoreBatch:
    """The groups' reports with their studies' texts and columns, one row per report."""
    studies = [group.study for group in groups for _ in group.samples]
    samples = [sample for group in groups for sample in group.samples]
    columns = study_columns(studies) | {"truncated": [sample.truncated for sample in samples]}
    return ScoreBatch([sample.text for sample in samples], [report_text(study) for study in studies], columns)


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


Micro = list[tuple[Group, list[int]]]
"""Groups that share a forward, each with the indices of its samples in it."""


def micro_batches(work: StageRun, groups: list[Group], forward: Forward) -> list[tuple[Micro, bool]]:
    """The rank's forwards, and whether each trains: a rank with fewer than the others adds forwards of one masked
    report, since engines need the same number everywhere."""
    plan = plan_forwards(
        forward,
        [len(group.prompt) for group in groups],
        [[len(group.samples[i].ids) for i in group.trained] for group in groups],
        budget=work.stage.tokens_per_forward,
        groups=work.stage.studies_per_forward,
    )
    micros = [[(groups[p.group], [groups[p.group].trained[a] for a in p.answers]) for p in parts] for parts in plan]
    counts = work.accelerator.gather(torch.tensor([len(micros)], device=work.accelerator.device))
    shortest = min(range(len(groups[0].samples)), key=lambda i: len(groups[0].samples[i].ids))
    spare = max(1, int(counts.max())) - len(micros)
    return [(micro, True) for micro in micros] + [([(groups[0], [shortest])], False)] * spare


def update(
    work: StageRun,
    groups: list[Group],
    normaliser: Normaliser,
    forward: Forward,
    reference: Policy | None,
    watch: Stopwatch,
) -> dict[str, float]:
    """Forward and backward over the rank's groups; metrics are summed over micro-batches and ranks."""
    stage, policy = work.stage, work.policy
    policy.model.train()
    totals: dict[str, torch.Tensor] = {}
    gaps: list[dict[str, torch.Tensor]] = []
    for micro, active in micro_batches(work, groups, forward):
        prompts = [group.prompt for group, _ in micro]
        answers = [[group.samples[i].ids for i in own] for group, own in micro]
        rows = [(group, i) for group, own in micro for i in own]
        with watch("logps"), work.accelerator.autocast():
            scores = forward.logps(policy, prompts, answers, temperature=stage.sampling.temperature, model=work.model)
            mask_BT = scores.mask_BT.bool() & active
            reference_logps_BT = _reference_logps(work, forward, reference, prompts, answers)
        with watch("loss"):
            logps_BT = scores.logps_BT
            sampled_BT = _padded([torch.tensor(group.samples[i].logps) for group, i in rows], logps_BT)
            old_logps_BT = None
            if stage.iterations > 1:  # the policy of the first iteration is the one that sampled
                for row, (group, i) in enumerate(rows):
                    group.old_logps.setdefault(i, logps_BT[row, : len(group.samples[i].ids)].detach())
                old_logps_BT = _padded([group.old_logps[i] for group, i in rows], logps_BT)
            at_sampling_BT = logps_BT.detach() if old_logps_BT is None else old_logps_BT
            config = stage.loss
            weights = sampler_correction(
                at_sampling_BT, sampled_BT, mask_BT, config.correction, config.correction_level, config.correction_cap
            )
            advantages_B = torch.tensor([group.advantages[i] for group, i in rows])
            result = grpo_loss(
                logps_BT,
                old_logps_BT,
                mask_BT,
                advantages_B.to(policy.device),
                config=config,
                normaliser=normaliser,
                reference_logps_BT=reference_logps_BT,
                sampler_weights=weights,
                entropies_BT=scores.entropies_BT,
            )
            gap = sampler_metrics(weights, at_sampling_BT, sampled_BT, mask_BT)
            gaps.append(gap if bool(mask_BT.any()) else {name: value * torch.nan for name, value in gap.items()})
        with watch("backward"):
            work.backward(result.loss)
        for name, value in {"loss": result.loss.detach(), **result.metrics}.items():
            totals[name] = totals.get(name, torch.zeros_like(value)) + value
    metrics = {name: float(work.accelerator.reduce(value, "sum")) for name, value in totals.items()}
    for name in gaps[0]:
        values = torch.stack([gap[name] for gap in gaps])
        values = work.accelerator.gather(values[None] if work.accelerator.num_processes > 1 else values)
        values = values[~values.isnan()]  # of micro-batches with something to learn from
        if len(values):
            kind = name.rsplit("/", 1)[-1]
            metrics[name] = float(values.min() if kind == "min" else values.max() if kind == "max" else values.mean())
    return metrics


def _padded(rows: list[torch.Tensor], like_BT: torch.Tensor) -> torch.Tensor:
    """Rows of different lengths as one tensor of the shape of `like_BT`, NaN behind each row's end."""
    padded_BT = torch.full_like(like_BT, float("nan"), requires_grad=False)
    for padded_T, row in zip(padded_BT, rows, strict=True):
        padded_T[: len(row)] = row
    return padded_BT


@torch.no_grad()
def _reference_logps(
    work: StageRun,
    forward: Forward,
    reference: Policy | None,
    prompts: list[EncodedPrompt],
    answers: list[list[tuple[int, ...]]],
) -> torch.Tensor | None:
    if not work.stage.loss.kl:
        return None
    policy = work.policy if reference is None else reference
    with policy.model.disable_adapter() if reference is None else nullcontext():
        scores = forward.logps(policy, prompts, answers, temperature=work.stage.sampling.temperature)
    return scores.logps_BT


def load_reference(work: StageRun) -> Policy | None:
    """The frozen reference policy of the stage's KL penalty; None where there is no penalty, or where switching the
    policy's adapters off gives it. To be called before the stage goes on from a checkpoint: `start` is the policy as it
    stands."""
    stage: GrpoStage = work.stage
    if not stage.loss.kl or (stage.kl.reference == "start" and work.recipe.policy.lora is not None):
        return None
    if stage.kl.reference == "start":
        reference = replace(work.policy, model=copy.deepcopy(work.policy.model))
    else:
        config = work.recipe.policy.model_copy(update={"lora": None, "gradient_checkpointing": False})
        folder = run_folder.final_folder(work.run, stage.kl.reference)
        reference = load_policy(config, work.recipe.prompt, folder=folder)
    reference.model.requires_grad_(False).eval().to(work.policy.device)
    return reference


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
