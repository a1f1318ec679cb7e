"""What one step of a stage computes on one rank, phase by phase: the project's own forwards, sampler, losses and
optimiser, run on shapes.

Studies are taken to be alike, with a prompt of the typical length and reports of the mean one. Shapes: G reports of R
tokens to a prompt of P, N rows that are decoded together.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch

from unirg.evaluation.run import max_new_tokens
from unirg.grpo.forward import DENSE, Forward, plan_forwards
from unirg.grpo.shared_prefix import packed_forward, prepare
from unirg.plan.machine import Machine
from unirg.plan.policy import Lengths, with_text
from unirg.plan.trace import Cost, Tracer
from unirg.policy import EncodedPrompt, Policy
from unirg.recipe.schema import GrpoStage, Recipe, SftStage, StageConfig, VisionStage
from unirg.rollout.hf import DROP_SHARE, HFSampler, _keep_rows
from unirg.steps import build_optimiser
from unirg.vision import Probe


@dataclass
class Phase:
    """A phase of a rank's step: pieces of the program, each with how often it is done, and the language model's tokens
    of all of them."""

    pieces: list[tuple[Cost, float]] = field(default_factory=list)
    tokens: float = 0.0
    passes: float = 0.0
    """How many times weights are gone through: what a sharded policy gathers."""

    @property
    def flops(self) -> float:
        return sum(cost.flops * times for cost, times in self.pieces)

    def seconds(self, machine: Machine) -> tuple[float, str]:
        """Seconds on the machine, each operation bounded by products or by memory, and which of them (or the starting
        of operations) takes most."""
        compute = memory = launch = total = 0.0
        for cost, times in self.pieces:
            for operation in cost.operations:
                rate = machine.half if operation.half else machine.single
                slower = getattr(machine, operation.kind, 1.0)
                products = slower * operation.flops / (rate * machine.compute_share)
                moving = operation.bytes / (machine.bandwidth * machine.bandwidth_share)
                compute += times * products * (products >= moving)
                memory += times * moving * (products < moving)
            started = times * machine.launch * len(cost.operations)
            launch += started
        busy = compute + memory
        total = busy + launch if machine.cpu else max(busy, launch)  # a GPU works while the next operation is started
        bounds = {"compute": compute, "memory bandwidth": memory, "launching operations": launch}
        return total, max(bounds, key=lambda name: bounds[name])


@dataclass
class Reports:
    """What writing reports costs one rank, with the Hugging Face engine."""

    prefill: Phase
    decode: Phase
    studies: int
    size: int
    """Reports of each study."""
    report: int
    longest_report: int
    peaks: dict[str, tuple[float, float]]
    """As `StageCost.peaks`, of prefill and decode (keys and values)."""
    kv_cache: int
    """Keys and values when the longest reports end."""
    kv_numbers: int
    """Numbers that one token of one row keeps in the cache."""
    decoded_flops: float
    """FLOPs of one decoded token."""


@dataclass
class StageCost:
    """Phases of a stage's step on one rank, and its memory in bytes beyond weights, gradients and optimiser state."""

    phases: dict[str, Phase]
    """Of the update: forward, backward, reference, optimiser."""
    forward_tokens: int
    """Tokens of the fullest forward that may come."""
    peaks: dict[str, tuple[float, float]]
    """The most alive in that forward and that backward (activations, logits); and how much of it are weights in
    bfloat16, made by autocast."""
    logits: int
    """The head's logits and their gradient, in that forward."""
    optimiser_state: int = 0
    optimiser_peak: int = 0
    sampling: Reports | None = None
    """Of one batch, which `iterations` steps share."""
    evaluation: Reports | None = None
    """Of one dev evaluation."""
    unshared: dict[str, float] = field(default_factory=dict)
    """FLOPs of forward, backward and reference pass, were every prompt read once per report."""


def fullest(peaks: Mapping[str, tuple[float, float]], *, cast: bool = True) -> tuple[float, float]:
    """The fullest of these peaks; without `cast` weights in bfloat16 do not count."""
    return max(peaks.values(), key=lambda peak: peak[0] - (0 if cast else peak[1]))


def stage_cost(
    policies: Sequence[tuple[Policy, float]], lengths: Lengths, recipe: Recipe, stage: StageConfig, world: int
) -> StageCost:
    """The stage's step on one of `world` ranks. The caller has seen that studies divide by ranks.

    `policies` are the policy; or shallow ones, of which its cost is a sum with these weights (see `in_depth`).
    """
    cost: StageCost = _sum([(_stage_cost(policy, lengths, recipe, stage, world), share) for policy, share in policies])
    return cost


def _sum(parts: Sequence[tuple[Any, float]]) -> Any:
    """Costs times their shares, which add up to 1, field by field."""
    first = parts[0][0]
    if isinstance(first, Phase):
        return replace(first, pieces=[(cost, times * share) for phase, share in parts for cost, times in phase.pieces])
    if is_dataclass(first) and not isinstance(first, type):
        of = [field.name for field in fields(first)]
        return replace(first, **{name: _sum([(getattr(part, name), share) for part, share in parts]) for name in of})
    if isinstance(first, dict):
        return {name: _sum([(part[name], share) for part, share in parts]) for name in first}
    if isinstance(first, tuple):
        return tuple(_sum([(part[i], share) for part, share in parts]) for i in range(len(first)))
    if first is None:
        return None
    total = sum(part * share for part, share in parts)
    return round(total) if isinstance(first, int) else total


def _stage_cost(policy: Policy, lengths: Lengths, recipe: Recipe, stage: StageConfig, world: int) -> StageCost:
    studies, checkpointing = stage.studies_per_step // world, recipe.policy.gradient_checkpointing
    if isinstance(stage, VisionStage):
        return _vision(policy, lengths, studies, stage)
    if isinstance(stage, SftStage):
        cost = _sft(policy, lengths, studies, stage, checkpointing)
    else:
        assert isinstance(stage, GrpoStage)
        cost = _grpo(policy, lengths, studies, stage, checkpointing)
    if stage.evaluate_every:
        config, read = recipe.evaluation, math.ceil(stage.evaluate_studies / world)
        cost.evaluation = _reports(policy, lengths, read, 1, config.batch_size, max_new_tokens(recipe), 0.0)
    return cost


def _autocast(policy: Policy) -> bool:
    return policy.config.dtype == "bfloat16"


def _update(
    policy: Policy, forward: Forward, prompts: Sequence[EncodedPrompt], reports: list[list[int]], checkpointing: bool
) -> tuple[Cost, Cost]:
    """Forward and backward of one forward's groups; `reports` are lengths."""
    answers = [[[0] * n for n in own] for own in reports]
    policy.model.train()
    with Tracer(policy.model, _autocast(policy), checkpointing) as tracer:
        with tracer.part() as ahead:
            loss = forward.logps(policy, prompts, answers).logps_BT.sum()
        with tracer.part() as back:
            torch.autograd.backward(loss)
            del loss
    return ahead, back


@torch.no_grad()
def _pass(policy: Policy, forward: Forward, prompt: EncodedPrompt, reports: list[int]) -> Cost:
    """One forward without gradient."""
    with Tracer(policy.model, _autocast(policy), False) as tracer, tracer.part() as cost:
        forward.logps(policy, [prompt], [[[0] * n for n in reports]])
    return cost


def _optimiser(policy: Policy, stage: StageConfig) -> tuple[Cost, int]:
    """A step of the stage's AdamW with its clipping, and the bytes of its state."""
    own = [p for p in policy.model.parameters() if p.requires_grad]
    optimiser = build_optimiser(stage.optimiser, policy.model.named_parameters())
    with Tracer(policy.model, False, False) as tracer:
        for p in own:
            p.grad = torch.empty_like(p)
        optimiser.step()  # makes the state
        with tracer.part() as cost:
            torch.nn.utils.clip_grad_norm_(own, stage.optimiser.max_grad_norm)
            optimiser.step()
    state = sum(x.nbytes for values in optimiser.state.values() for x in values.values() if isinstance(x, torch.Tensor))
    return cost, state


def _grpo(policy: Policy, lengths: Lengths, studies: int, stage: GrpoStage, checkpointing: bool) -> StageCost:
    shares = stage.shared_prefix and prepare(policy) is None
    forward = packed_forward("sdpa") if shares else DENSE
    prompt, trained = lengths.prompt, min(stage.train_on or stage.group_size, stage.group_size)
    sampling = stage.sampling
    report = min(lengths.report, sampling.max_new_tokens)
    group = [report] * trained
    plan = plan_forwards(
        forward,
        [len(prompt)] * studies,
        [group] * studies,
        budget=stage.tokens_per_forward,
        groups=stage.studies_per_forward,
    )
    phases = {name: Phase() for name in ("reference", "forward", "backward", "optimiser")}
    kinds: dict[tuple[int, ...], int] = {}
    for parts in plan:
        kind = tuple(len(part.answers) for part in parts)
        kinds[kind] = kinds.get(kind, 0) + 1
    peaks: dict[str, tuple[float, float]] = {}
    tokens = logits = 0
    for kind, times in kinds.items():
        ahead, back = _update(policy, forward, [prompt] * len(kind), [[report] * n for n in kind], checkpointing)
        of_kind = forward.tokens([(len(prompt), [report] * n) for n in kind])
        for name, cost in (("forward", ahead), ("backward", back)):
            phases[name].pieces.append((cost, times))
            phases[name].tokens += times * of_kind
            phases[name].passes += times
        if of_kind >= tokens:
            peaks, tokens, logits = _peaks(ahead, back), of_kind, _logits(policy, sum(kind) * report)
    if stage.loss.kl:
        for kind, times in kinds.items():
            cost = _pass(policy, forward, prompt, [report] * kind[0])
            phases["reference"].pieces.append((cost, times * len(kind)))
        phases["reference"].tokens, phases["reference"].passes = phases["forward"].tokens, len(plan)
    cost, state = _optimiser(policy, stage)
    phases["optimiser"].pieces.append((cost, 1))
    phases = {name: phase for name, phase in phases.items() if phase.pieces}
    made = StageCost(phases, tokens, peaks, logits, state, cost.peak)
    fullest = [(len(lengths.longest_prompt), [min(lengths.longest_report, sampling.max_new_tokens)] * trained)]
    most = forward.tokens(fullest * min(stage.studies_per_forward or studies, studies))
    _fill(made, min(most, stage.tokens_per_forward))
    size, rows = stage.group_size, sampling.rows_per_forward
    made.sampling = _reports(
        policy, lengths, studies, size, rows // size, sampling.max_new_tokens, sampling.temperature
    )
    ahead, back = _update(policy, DENSE, [prompt], [group], checkpointing)
    made.unshared = {"forward": ahead.flops * studies, "backward": back.flops * studies}
    made.unshared["reference"] = made.unshared["forward"] if stage.loss.kl else 0.0
    return made


@torch.no_grad()
def _reports(
    policy: Policy, lengths: Lengths, studies: int, size: int, batch: int, limit: int, temperature: float
) -> Reports:
    """`size` reports of each study, of at most `limit` tokens, as the Hugging Face engine writes them, `batch` studies
    at a time."""
    prompt = lengths.prompt
    report, longest = (min(n, limit) for n in (lengths.report, lengths.longest_report))
    batch = max(1, min(studies, batch))
    batches = studies / batch
    sampler = HFSampler(policy)
    policy.model.eval()
    with Tracer(policy.model, _autocast(policy), False) as tracer:
        with tracer.part() as prefill:
            logits_BV, cache, _ = sampler._prefill([prompt] * batch)
            _keep_rows(cache, torch.arange(batch).repeat_interleave(size))
        del logits_BV
        first: Any = cache.layers[0]
        per_token = len(cache.layers) * sum(x[0, :, 0].nbytes for x in (first.keys, first.values))
        kv_numbers = per_token // first.keys.element_size()
        del cache, first
    # Reports end at different times: `longest` steps, of as many rows on average as make up all tokens, and those that
    # are finished and not yet dropped.
    rows = max(1, round(batch * size * min(1.0, (1 + DROP_SHARE / 2) * report / longest)))
    with Tracer(policy.model, _autocast(policy), False) as tracer:
        with tracer.part():
            _, cache, mask_1P = sampler._prefill([with_text(prompt, len(prompt) + report // 2)])
            _keep_rows(cache, torch.zeros(rows, dtype=torch.long))
        position_N1 = torch.zeros(rows, 1, dtype=torch.long)
        with tracer.part() as decode:
            out = policy.model(
                input_ids=position_N1,
                attention_mask=torch.ones(rows, mask_1P.shape[1] + 1, dtype=torch.long),
                position_ids=position_N1.expand(3, -1, -1) if prompt.positions_3P is not None else position_N1,
                past_key_values=cache,
                use_cache=True,
            )
            sampler._draw(out.logits[:, -1], np.zeros(rows), temperature)
    kv_cache = per_token * batch * size * (len(prompt) + longest)
    # The cache is longest at the end; appending to it copies one layer at a time.
    grown = decode.peak + kv_cache - per_token * rows * mask_1P.shape[1]
    return Reports(
        Phase([(prefill, batches)], studies * len(prompt), batches),
        Phase([(decode, batches * longest)], studies * size * report, batches * longest),
        studies,
        size,
        report,
        longest,
        {"prefill": (prefill.peak, prefill.copies), "decode": (grown, decode.copies)},
        kv_cache,
        kv_numbers,
        decode.flops / rows,
    )


def _sft(policy: Policy, lengths: Lengths, studies: int, stage: SftStage, checkpointing: bool) -> StageCost:
    size = min(stage.studies_per_forward or studies, studies)
    prompt, report = lengths.prompt, lengths.report
    ahead, back = _update(policy, DENSE, [prompt] * size, [[report]] * size, checkpointing)
    forwards = studies / size
    tokens = size * (len(prompt) + report)
    cost, state = _optimiser(policy, stage)
    phases = {
        "forward": Phase([(ahead, forwards)], forwards * tokens, forwards),
        "backward": Phase([(back, forwards)], forwards * tokens, forwards),
        "optimiser": Phase([(cost, 1)]),
    }
    made = StageCost(phases, tokens, _peaks(ahead, back), _logits(policy, size * report), state, cost.peak)
    _fill(made, size * (len(lengths.longest_prompt) + lengths.longest_report))
    return made


def _vision(policy: Policy, lengths: Lengths, studies: int, stage: VisionStage) -> StageCost:
    with torch.device("meta"):
        probe = Probe(policy, ["finding"] * 14)
    probe.tower = copy.deepcopy(probe.tower).float().requires_grad_(True)  # later stages' may be frozen
    size = min(stage.studies_per_forward or studies, studies)
    images = lengths.prompt.images
    grids = images["image_grid_thw"].repeat(size, 1)
    with Tracer(probe, _autocast(policy), False) as tracer:
        with tracer.part() as ahead:
            pixels = torch.cat([images["pixel_values"]] * size).to("meta")
            loss = probe(pixels, grids, [len(images["image_grid_thw"])] * size).sum()
        with tracer.part() as back:
            torch.autograd.backward(loss)
            del loss
    forwards = studies / size
    optimiser = build_optimiser(stage.optimiser, probe.named_parameters())
    with Tracer(probe, False, False) as tracer:
        for p in probe.parameters():
            p.grad = torch.empty_like(p)
        optimiser.step()
        with tracer.part() as cost:
            optimiser.step()
    state = sum(x.nbytes for values in optimiser.state.values() for x in values.values() if isinstance(x, torch.Tensor))
    tokens = int(grids.prod(1).sum())
    phases = {
        "forward": Phase([(ahead, forwards)], forwards * tokens, forwards),
        "backward": Phase([(back, forwards)], forwards * tokens, forwards),
        "optimiser": Phase([(cost, 1)]),
    }
    return StageCost(phases, tokens, _peaks(ahead, back), 0, state, cost.peak)


def _peaks(ahead: Cost, back: Cost) -> dict[str, tuple[float, float]]:
    return {"forward": (ahead.peak, ahead.copies), "backward": (back.peak, back.copies)}


def _fill(cost: StageCost, tokens: int) -> None:
    """Makes the memory that of a forward of so many tokens, where these are more: lengths differ, and some forward
    comes near what the budget, or the longest of them, allow. Weights in bfloat16 stay as they are."""
    if tokens <= cost.forward_tokens:
        return
    times = tokens / cost.forward_tokens
    cost.peaks = {name: (cast + (alive - cast) * times, cast) for name, (alive, cast) in cost.peaks.items()}
    cost.logits, cost.forward_tokens = math.ceil(cost.logits * times), tokens


def _logits(policy: Policy, predicted: int) -> int:
    """Bytes of the head's output for so many predicted tokens, and of its gradient."""
    weight = policy.base.get_output_embeddings().weight
    size = 2 if _autocast(policy) else weight.element_size()
    return math.ceil(2 * predicted * weight.shape[0] * size)
