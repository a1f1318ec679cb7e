"""What one step of a stage computes on one rank, phase by phase: the project's own forwards, sampler, losses and
optimiser, run on shapes.

Studies are taken to be alike, with a prompt of the typical length and reports of the mean one. Shapes: G reports of R
tokens to a prompt of P, N rows that are decoded together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from unirg.grpo.forward import DENSE, Forward, plan_forwards
from unirg.grpo.shared_prefix import packed_forward, prepare
from unirg.plan.machine import Machine
from unirg.plan.policy import Lengths, with_text
from unirg.plan.trace import Cost, Tracer
from unirg.policy import EncodedPrompt, Policy
from unirg.recipe.schema import GrpoStage, SftStage, StageConfig, VisionStage
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
                products = operation.flops / (rate * machine.compute_share)
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
class StageCost:
    """Phases of a stage's step on one rank, and its memory in bytes beyond weights, gradients and optimiser state."""

    phases: dict[str, Phase]
    forward_tokens: int
    """Tokens of the fullest forward."""
    peaks: dict[str, tuple[float, float]]
    """The most alive in that forward and that backward (activations, logits), in prefill and decode of the Hugging Face
    engine (keys and values); and how much of it are weights in bfloat16, made by autocast."""
    logits: int
    """The head's logits and their gradient, in that forward."""
    optimiser_state: int = 0
    optimiser_peak: int = 0
    kv_cache: int = 0
    """Keys and values when the longest reports end."""
    kv_numbers: int = 0
    """Numbers that one token of one row keeps in the cache."""
    decoded_flops: float = 0.0
    """FLOPs of one decoded token."""
    report: int = 0
    longest_report: int = 0
    unshared: dict[str, float] = field(default_factory=dict)
    """FLOPs of forward, backward and reference pass, were every prompt read once per report."""

    def peak(self, *phases: str, cast: bool = True) -> tuple[float, float]:
        """The fullest of these phases' peaks; without `cast` weights in bfloat16 do not count."""
        return max((self.peaks[name] for name in phases), key=lambda peak: peak[0] - (0 if cast else peak[1]))


def stage_cost(
    policies: Sequence[tuple[Policy, float]], lengths: Lengths, stage: StageConfig, world: int, checkpointing: bool
) -> StageCost:
    """The stage's step on one of `world` ranks. The caller has seen that studies divide by ranks.

    `policies` are the policy; or shallow ones, of which its cost is a sum with these weights (see `in_depth`).
    """
    costs = [(_stage_cost(policy, lengths, stage, world, checkpointing), share) for policy, share in policies]
    first = costs[0][0]
    if len(costs) == 1:
        return first
    phases = {}
    for name, phase in first.phases.items():
        pieces = [(piece, times * share) for cost, share in costs for piece, times in cost.phases[name].pieces]
        phases[name] = Phase(pieces, phase.tokens, phase.passes)
    same = ("phases", "peaks", "forward_tokens", "logits", "report", "longest_report", "unshared")
    sums = {
        field.name: sum(getattr(cost, field.name) * share for cost, share in costs)
        for field in fields(StageCost)
        if field.name not in same
    }
    unshared = {name: sum(cost.unshared[name] * share for cost, share in costs) for name in first.unshared}
    rounded = {name: value if name == "decoded_flops" else round(value) for name, value in sums.items()}
    peaks = {}
    for name in first.peaks:
        all_bytes, copies = (sum(cost.peaks[name][i] * share for cost, share in costs) for i in (0, 1))
        peaks[name] = (all_bytes, copies)
    return replace(first, phases=phases, peaks=peaks, unshared=unshared, **rounded)


def _stage_cost(policy: Policy, lengths: Lengths, stage: StageConfig, world: int, checkpointing: bool) -> StageCost:
    studies = stage.studies_per_step // world
    if isinstance(stage, VisionStage):
        return _vision(policy, lengths, studies, stage, checkpointing)
    if isinstance(stage, SftStage):
        return _sft(policy, lengths, studies, stage, checkpointing)
    assert isinstance(stage, GrpoStage)
    return _grpo(policy, lengths, studies, stage, checkpointing)


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
    report, longest = (min(n, stage.sampling.max_new_tokens) for n in (lengths.report, lengths.longest_report))
    group = [report] * trained
    plan = plan_forwards(
        forward,
        [len(prompt)] * studies,
        [group] * studies,
        budget=stage.tokens_per_forward,
        groups=stage.studies_per_forward,
    )
    phases = {name: Phase() for name in ("prefill", "decode", "reference", "forward", "backward", "optimiser")}
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
    made = StageCost(phases, tokens, peaks, logits, state, cost.peak)
    _sampling(made, policy, prompt, studies, stage, report, longest)
    ahead, back = _update(policy, DENSE, [prompt], [group], checkpointing)
    made.unshared = {"forward": ahead.flops * studies, "backward": back.flops * studies}
    made.unshared["reference"] = made.unshared["forward"] if stage.loss.kl else 0.0
    return made


@torch.no_grad()
def _sampling(
    made: StageCost, policy: Policy, prompt: EncodedPrompt, studies: int, stage: GrpoStage, report: int, longest: int
) -> None:
    """Prefill and decode as the Hugging Face engine does them, a batch of whole groups at a time."""
    size = stage.group_size
    batch = max(1, min(studies, stage.sampling.rows_per_forward // size))
    batches = studies / batch / stage.iterations
    sampler = HFSampler(policy, stage.sampling.rows_per_forward)
    policy.model.eval()
    with Tracer(policy.model, _autocast(policy), False) as tracer:
        with tracer.part() as prefill:
            logits_BV, cache, _ = sampler._prefill([prompt] * batch)
            _keep_rows(cache, torch.arange(batch).repeat_interleave(size))
        del logits_BV
        first: Any = cache.layers[0]
        per_token = len(cache.layers) * sum(x[0, :, 0].nbytes for x in (first.keys, first.values))
        made.kv_numbers = per_token // first.keys.element_size()
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
            sampler._draw(out.logits[:, -1], np.zeros(rows), stage.sampling.temperature)
    phases = made.phases
    phases["prefill"] = Phase([(prefill, batches)], batches * batch * len(prompt), batches)
    steps = batches * longest
    phases["decode"] = Phase([(decode, steps)], batches * batch * size * report, steps)
    made.decoded_flops, made.report, made.longest_report = decode.flops / rows, report, longest
    made.kv_cache = per_token * batch * size * (len(prompt) + longest)
    # The cache is longest at the end; appending to it copies one layer at a time.
    grown = decode.peak + made.kv_cache - per_token * rows * mask_1P.shape[1]
    made.peaks |= {"prefill": (prefill.peak, prefill.copies), "decode": (grown, decode.copies)}


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
    return StageCost(phases, tokens, _peaks(ahead, back), _logits(policy, size * report), state, cost.peak)


def _vision(policy: Policy, lengths: Lengths, studies: int, stage: VisionStage, checkpointing: bool) -> StageCost:
    with torch.device("meta"):
        probe = Probe(policy, ["finding"] * 14)
    probe.tower.requires_grad_(True)
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


def _logits(policy: Policy, predicted: int) -> int:
    """Bytes of the head's output for so many predicted tokens, and of its gradient."""
    weight = policy.base.get_output_embeddings().weight
    size = 2 if _autocast(policy) else weight.element_size()
    return math.ceil(2 * predicted * weight.shape[0] * size)
