"""GRPO, top to bottom: sample, submit scores, log-probs, collect, advantages, loss, step.

One step: every study of the batch gets G reports from the policy; rewards score them; a report's advantage is its
reward against its group; the policy is moved towards what scored better. Shapes: B reports in a micro-batch, T tokens
of the longest.

Workers score while the policy computes: the reports that are finished while longer ones are sampled, and then during
the first step's self-check and every step's first forward, the reference's included. Later forwards come after the
scores: their activations would have to be held all at once. So does the first where scores decide what is trained
(`train_on`, `resample`): most of it would be for nothing. Once a batch is scored, rewards read the next one's
references.
`time/scoring_hidden` says what share of the rewards' time was hidden in this way. Without workers the order is the
same, and so are the numbers.
"""

import copy
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from unirg import run as run_folder
from unirg.grpo.ahead import Ahead
from unirg.grpo.choose import choose_forward, share_prompts
from unirg.grpo.forward import AnswerScores, Forward, plan_forwards
from unirg.grpo.loss import LossResult, Normaliser, grpo_loss, sampler_correction, sampler_metrics
from unirg.grpo.monitors import monitors
from unirg.grpo.rollouts import Group, collect_scores, judge_rollouts, prepare_scoring, sample_groups, without_scores
from unirg.policy import EncodedPrompt, Policy, load_policy
from unirg.recipe.schema import GrpoStage
from unirg.rollout import ApartSampler, Sampler
from unirg.scoring.engine import ScoringEngine
from unirg.steps import optimise
from unirg.training import RanksStop, StageRun, Stopwatch


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
    refusal = share_prompts(work, reference)
    monitor = monitors(work)
    ahead: Ahead | None = None
    if stage.ahead:
        assert isinstance(sampler, ApartSampler)  # the recipe is refused where it is not
        ahead = Ahead(work, sampler, engine)

    def step_metrics(step: int) -> dict[str, float]:
        watch = Stopwatch()
        batch, iteration = divmod(step, stage.iterations)
        first: Pass | None = None
        if iteration == 0:
            studies = work.mine(work.step_studies(batch))
            if "groups" not in held:
                prepare_scoring(engine, studies)
            rollouts = ahead.take(batch, watch) if ahead is not None else None
            with work.together("weights"), watch("weights"):
                sampler.sync_weights()
            groups, submitted = rollouts or sample_groups(work, sampler, engine, studies, watch, batch)
            last = step + stage.iterations >= stage.steps
            if ahead is not None and not last:
                with work.together("sampling"):
                    ahead.start(batch + 1)
            if "forward" not in held:
                answers = [[sample.ids for sample in group.samples] for group in groups]
                with watch("self-check"):
                    held["forward"] = choose_forward(work, refusal, [group.prompt for group in groups], answers)
            if not scores_decide(stage):
                first = first_pass(work, groups, held["forward"], reference, watch)
            with work.together("scoring"):
                collect_scores(engine, submitted, watch)
            held["metrics"], held["normaliser"] = judge_rollouts(work, sampler, engine, groups, batch, watch)
            held["unscored"] = without_scores(work, held["metrics"], batch, held.get("unscored"))
            held["groups"], held["own"] = groups, rollouts is None
            held["metrics"] |= monitor(groups, batch)
            if not last:
                prepare_scoring(engine, work.mine(work.step_studies(batch + 1)))
        metrics = {k: v for k, v in held["metrics"].items() if iteration == 0 or not k.startswith("time/")}
        metrics |= update(work, held["groups"], held["normaliser"], held["forward"], reference, watch, first)
        if held["own"]:  # a batch sampled ahead is of the update before, from which one step may lead far
            check_sampler(work, metrics)
        return metrics | watch.metrics()

    if ahead is None:
        optimise(work, work.policy.model, step_metrics, evaluate=evaluate, boundary=stage.iterations)
        return

    def evaluate_alone() -> dict[str, float]:
        assert evaluate is not None
        ahead.wait()  # one tokenizer does not serve two threads
        return evaluate()

    evaluate_then = None if evaluate is None else evaluate_alone
    try:
        optimise(
            work, work.policy.model, step_metrics, evaluate=evaluate_then, boundary=stage.iterations, carried=ahead
        )
    finally:
        ahead.end()


GAP = 0.5
"""The largest mean difference, in nats a token, between a sampler's log-probs and the trainer's: many times what
precision and kernels make, and less than where an engine reads a model's config otherwise than transformers does."""


def check_sampler(work: StageRun, metrics: dict[str, float]) -> None:
    """Raises RanksStop, before the step changes a weight, where the reports are plainly not the policy's own."""
    gap = metrics.get("sampling/sampling_logp_difference/mean", 0.0)
    if gap > GAP:  # of all ranks' reports
        raise RanksStop(
            f"stage {work.stage.name}: the sampled reports' log-probs are {gap:.2f} nats a token from the trainer's; "
            f"rollout.engine {work.recipe.rollout.engine} samples from another model than the one that is trained. Set "
            "rollout.engine=hf for this model"
        )


Micro = list[tuple[Group, list[int]]]
"""Groups that share a forward, each with the indices of its samples in it."""


@dataclass
class Pass:
    """A forward that was made: what was in it, whether any of it can train, and its log-probs."""

    micro: Micro
    active: bool
    scores: AnswerScores
    reference_logps_BT: torch.Tensor | None


def scores_decide(stage: GrpoStage) -> bool:
    """Whether scores decide which reports go through the backward, but for the few that no reward can judge."""
    return stage.resample > 0 or (stage.train_on is not None and stage.train_on < stage.group_size)


def first_pass(
    work: StageRun, groups: list[Group], forward: Forward, reference: Policy | None, watch: Stopwatch
) -> Pass:
    """The step's first forward, made while workers score: it needs no scores, only that they do not decide what is
    trained. It is the first alone, because the activations of each wait for its backward. A report in it that turns out
    to be masked trains nothing."""
    work.policy.model.train()
    cut = work.stage.mask_truncated
    chosen = [[i for i, sample in enumerate(group.samples) if not (cut and sample.truncated)] for group in groups]
    planned = plan_micros(work, groups, chosen, forward)
    micro, active = (planned[0], True) if planned else (one_report(groups), False)
    return forward_pass(work, micro, active, forward, reference, watch)


def forward_pass(
    work: StageRun, micro: Micro, active: bool, forward: Forward, reference: Policy | None, watch: Stopwatch
) -> Pass:
    """Log-probs of a micro-batch under the policy, and under the reference where the loss has a KL penalty."""
    work.meet("log-probs")
    prompts = [group.prompt for group, _ in micro]
    answers = [[group.samples[i].ids for i in own] for group, own in micro]
    temperature = work.stage.sampling.temperature
    with watch("logps"), work.accelerator.autocast():
        # The reference first: its activations go before the policy's come.
        reference_logps_BT = _reference_logps(work, forward, reference, prompts, answers)
        scores = forward.logps(work.policy, prompts, answers, temperature=temperature)
        return Pass(micro, active, scores, reference_logps_BT)


def micro_batches(
    work: StageRun, groups: list[Group], forward: Forward, first: Pass | None = None
) -> list[tuple[Micro, bool]]:
    """The rank's forwards after `first`, and whether each trains: a rank with fewer than the others adds forwards of
    one masked report, since engines need the same number everywhere."""
    done = {(id(group), i) for group, own in first.micro for i in own} if first is not None else set()
    chosen = [[i for i in group.trained if (id(group), i) not in done] for group in groups]
    micros = plan_micros(work, groups, chosen, forward)
    counts = work.accelerator.gather(torch.tensor([len(micros)], device=work.accelerator.device))
    spare = max(1 if first is None else 0, int(counts.max())) - len(micros)
    return [(micro, True) for micro in micros] + [(one_report(groups), False)] * spare


def plan_micros(work: StageRun, groups: list[Group], chosen: list[list[int]], forward: Forward) -> list[Micro]:
    """The chosen samples of each group in forwards."""
    plan = plan_forwards(
        forward,
        [len(group.prompt) for group in groups],
        [[len(group.samples[i].ids) for i in own] for group, own in zip(groups, chosen, strict=True)],
        budget=work.stage.tokens_per_forward,
        groups=work.stage.studies_per_forward,
    )
    return [[(groups[p.group], [chosen[p.group][a] for a in p.answers]) for p in parts] for parts in plan]


def one_report(groups: list[Group]) -> Micro:
    """The first group's shortest report: the least that a forward can hold."""
    return [(groups[0], [min(range(len(groups[0].samples)), key=lambda i: len(groups[0].samples[i].ids))])]


def update(
    work: StageRun,
    groups: list[Group],
    normaliser: Normaliser,
    forward: Forward,
    reference: Policy | None,
    watch: Stopwatch,
    first: Pass | None = None,
) -> dict[str, float]:
    """Forward and backward over the rank's groups; metrics are summed over micro-batches and ranks. `first` is a
    forward that was made already."""
    work.policy.model.train()
    totals: dict[str, torch.Tensor] = {}
    extremes: list[dict[str, torch.Tensor]] = []
    passes = (forward_pass(work, *m, forward, reference, watch) for m in micro_batches(work, groups, forward, first))
    for made in passes if first is None else itertools.chain([first], passes):
        with watch("loss"):
            result, gap = pass_loss(work, made, normaliser)
        with watch("backward"):
            work.backward(result.loss)
        extremes.append(gap)
        for name, value in {"loss": result.loss.detach(), **result.metrics}.items():
            totals[name] = totals.get(name, torch.zeros_like(value)) + value
    metrics = {name: float(work.accelerator.reduce(value, "sum")) for name, value in totals.items()}
    for name in extremes[0]:
        values = torch.stack([gap[name] for gap in extremes])
        values = work.accelerator.gather(values[None] if work.accelerator.num_processes > 1 else values)
        values = values[~values.isnan()]  # of micro-batches with something to learn from
        if len(values):
            metrics[name] = float(values.min() if name.endswith("/min") else values.max())
    return metrics


def pass_loss(work: StageRun, made: Pass, normaliser: Normaliser) -> tuple[LossResult, dict[str, torch.Tensor]]:
    """A forward's loss with what adds up of its metrics, the sampler's means among them; and the sampler's extremes, by
    metric, NaN where nothing in the forward trains."""
    stage, policy = work.stage, work.policy
    config, logps_BT = stage.loss, made.scores.logps_BT
    rows = [(group, i) for group, own in made.micro for i in own]
    trains_B = torch.tensor([made.active and i in group.trained for group, i in rows], device=policy.device)
    mask_BT = made.scores.mask_BT.bool() & trains_B[:, None]
    sampled_BT = _padded([torch.tensor(group.samples[i].logps) for group, i in rows], logps_BT)
    old_logps_BT = None
    if stage.iterations > 1:  # the policy of the first iteration is the one that sampled
        for row, (group, i) in enumerate(rows):
            group.old_logps.setdefault(i, logps_BT[row, : len(group.samples[i].ids)].detach())
        old_logps_BT = _padded([group.old_logps[i] for group, i in rows], logps_BT)
    at_sampling_BT = logps_BT.detach() if old_logps_BT is None else old_logps_BT
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
        reference_logps_BT=made.reference_logps_BT,
        sampler_weights=weights,
        entropies_BT=made.scores.entropies_BT,
    )
    extremes = sampler_metrics(weights, at_sampling_BT, sampled_BT, mask_BT)
    token_share = mask_BT.sum() / max(1, normaliser.tokens)
    report_share = mask_BT.any(dim=1).sum() / max(1, normaliser.samples)
    for name in [name for name in extremes if name.endswith("/mean")]:
        mean = extremes.pop(name)
        per_report = weights.shape[1] == 1 and "ratio" in name
        if normaliser.tokens:
            result.metrics[name] = mean * (report_share if per_report else token_share)
    if not bool(mask_BT.any()):
        extremes = {name: value * torch.nan for name, value in extremes.items()}
    return result, extremes


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
        reference.blank = work.policy.blank  # it is sharded where the policy is
    reference.model.requires_grad_(False).eval().to(work.policy.device)
    return reference
