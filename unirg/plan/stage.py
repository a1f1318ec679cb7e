"""A stage's plan: memory, tokens and FLOPs by phase, seconds by phase, what bounds it."""

import math
from collections.abc import Mapping
from typing import Any

from unirg.errors import UserError
from unirg.grpo.loop import scores_decide
from unirg.plan.compute import Phase, Reports, StageCost
from unirg.plan.disk import stage_bytes, written
from unirg.plan.machine import Machine
from unirg.plan.memory import Weights, advice, moments, peak, shards
from unirg.plan.policy import Lengths
from unirg.recipe.schema import GrpoStage, Recipe, StageConfig, VisionStage
from unirg.scoring.contract import RewardConfig

REWARD_SECONDS = {"radgraph_f1": 0.055, "r1": 0.055, "radcliq": 0.055, "ratescore": 0.028}
"""CPU seconds for one report, its reference included, on one thread, as `benchmarks/README.md` has measured them with
random weights of the official sizes in float32: 28.15 s and 14.3 s for 512. RadGraph is most of R1 and of RadCliQ."""
Seconds = dict[str, Any]
"""A phase: seconds and what bounds it, tokens, FLOPs."""
VLLM_ROWS = 256
"""Reports that one vLLM engine decodes at once: its default."""


def link(machine: Machine, nodes: int) -> float:
    """Bytes per second from one rank to the next: the slowest on the way round."""
    return machine.network if nodes > 1 else machine.node


def plan_stage(
    recipe: Recipe,
    stage: StageConfig,
    weights: Weights,
    cost: StageCost,
    lengths: Lengths,
    machine: Machine,
    *,
    nodes: int,
    gpus: int,
    sampling_gpus: int,
    reward_seconds: Mapping[str, float],
) -> dict[str, Any]:
    """What `unirg plan --json` says of a stage: bytes, seconds, tokens and FLOPs per step, over all ranks but for
    memory, which is one GPU's; and what comes beside its steps."""
    world = nodes * gpus
    together = stage.iterations if isinstance(stage, GrpoStage) else 1
    phases: dict[str, Seconds] = {}
    if lengths.reading is not None:
        reads = stage.steps * stage.studies_per_step / world / together
        if lengths.kept is not None:  # a rank reads each once, at most
            reads = min(reads, lengths.kept)
        phases["reading studies"] = _phase(lengths.reading * reads / stage.steps, "one CPU core")
    if cost.sampling is not None:
        for name, one in _writing(recipe, weights, cost.sampling, machine, nodes, world, sampling_gpus).items():
            phases[name] = one | {key: one[key] / together for key in ("seconds", "tokens", "flops")}
    for name, phase in cost.phases.items():
        seconds, bound = phase.seconds(machine)
        if name == "optimiser":  # each rank steps its own shard
            seconds /= shards(recipe, stage, world)
        phases[name] = _phase(seconds, bound, phase.tokens * world, phase.flops * world)
    phases |= _network(recipe, stage, weights, cost, machine, nodes, world, phases)
    step = sum(phase["seconds"] for phase in phases.values())
    if isinstance(stage, GrpoStage):
        sampling = sum(phases[name]["seconds"] for name in ("prefill", "decode"))
        if stage.ahead and sampling_gpus:  # a copy of the policy takes its turn on the same device instead
            step = max(sampling, step - sampling)
        phases["rewards"] = _rewards(stage, reward_seconds, world, phases, step if stage.ahead else None)
        step += phases["rewards"]["seconds"]
    found = moments(recipe, stage, weights, cost, world, machine)
    moment, needed = peak(found, machine)
    memory = machine.memory / (gpus if machine.cpu else 1)
    slowest = max(phases, key=lambda name: phases[name]["seconds"])
    beside = _beside(recipe, stage, weights, cost, machine, nodes, world, sampling_gpus, reward_seconds)
    hours = (step * stage.steps + sum(part["seconds"] for part in beside.values())) / 3600
    planned = {
        "name": stage.name,
        "kind": stage.kind,  # type: ignore[attr-defined]
        "steps": stage.steps,
        "phases": phases,
        "step_seconds": step,
        "beside_steps": beside,
        "run_hours": hours,
        "gpu_hours": hours * world,
        "sampling_gpu_hours": hours * sampling_gpus,
        "bound": f"{slowest} ({phases[slowest]['bound']}), {phases[slowest]['seconds'] / step:.0%} of a step",
        "tokens_per_forward": cost.forward_tokens,
        "memory": found,
        "memory_needed": needed,
        "memory_moment": moment,
        "fits": needed <= memory,
        "disk": stage_bytes(stage, weights) + weights.all,
        "unshared_flops": {name: value * world for name, value in cost.unshared.items()},
    }
    if not planned["fits"]:
        planned["try"] = advice(recipe, stage, found, machine, world)
        planned["bound"] = f"memory: does not fit, needs {needed / 1e9:.0f} GB of {memory / 1e9:.0f} GB ({moment})"
    return planned


def _phase(seconds: float, bound: str, tokens: float = 0.0, flops: float = 0.0) -> Seconds:
    return {"seconds": seconds, "bound": bound, "tokens": tokens, "flops": flops}


def _beside(
    recipe: Recipe,
    stage: StageConfig,
    weights: Weights,
    cost: StageCost,
    machine: Machine,
    nodes: int,
    world: int,
    sampling_gpus: int,
    reward_seconds: Mapping[str, float],
) -> dict[str, dict[str, Any]]:
    """What a stage does beside its steps: how often, and the seconds of all times together."""
    count, size = written(stage, weights)
    found: dict[str, dict[str, Any]] = {"checkpoints": {"count": count, "bytes": size, "seconds": size / machine.disk}}
    if cost.evaluation is not None and stage.evaluate_every is not None:
        phases = _writing(recipe, weights, cost.evaluation, machine, nodes, world, sampling_gpus)
        metrics = {metric.log_label: seconds_of(metric, reward_seconds) for metric in recipe.evaluation.metrics}
        # Side by side, and on every rank all studies.
        scores = max((value for value in metrics.values() if value), default=0.0) * stage.evaluate_studies
        count = stage.steps // stage.evaluate_every
        found["evaluations"] = {
            "count": count,
            "seconds": count * (sum(phase["seconds"] for phase in phases.values()) + scores),
            "scoring": count * scores,
            "unknown": [label for label, value in metrics.items() if value is None],
        }
    return found


def _writing(
    recipe: Recipe,
    weights: Weights,
    reports: Reports,
    machine: Machine,
    nodes: int,
    world: int,
    sampling_gpus: int,
) -> dict[str, Seconds]:
    """What the recipe's engine needs to write these reports of every rank."""
    if recipe.rollout.engine == "vllm":
        return _vllm(recipe, weights, reports, machine, sampling_gpus or world, world)
    phases = {}
    for name, phase in (("prefill", reports.prefill), ("decode", reports.decode)):
        phases[name] = _phase(*phase.seconds(machine), phase.tokens * world, phase.flops * world)
    if world > 1 and recipe.distributed.strategy != "ddp":
        moved = (world - 1) / world * gathered_bytes(recipe, weights)
        phases["weights for sampling"] = _phase(moved / link(machine, nodes), "network")
    return phases


def _vllm(
    recipe: Recipe, weights: Weights, reports: Reports, machine: Machine, engines: int, world: int
) -> dict[str, Seconds]:
    """vLLM's prefill and decode from first principles: at every decoded token the weights and the cache are read once.

    Raises UserError where its share of the memory holds no weights.
    """
    rows = world * reports.studies * reports.size / engines
    prompt = reports.prefill.tokens / reports.studies
    half = 2 if recipe.policy.dtype == "bfloat16" else 4
    share = recipe.rollout.vllm.gpu_memory_utilization if recipe.rollout.vllm.mode == "colocate" else 0.9
    room = share * machine.memory - half * weights.count
    kept = reports.kv_numbers * half
    held = int(room / (kept * (prompt / reports.size + reports.longest_report)))
    if held < 1:
        raise UserError(
            f"rollout.vllm: {share * machine.memory / 1e9:.0f} GB of a {machine.name} hold no "
            f"{half * weights.count / 1e9:.0f} GB of weights and a cache; raise "
            "rollout.vllm.gpu_memory_utilization, or use servers"
        )
    at_once = min(rows, held, VLLM_ROWS)
    rate = (machine.half if half == 2 else machine.single) * machine.compute_share
    bandwidth = machine.bandwidth * machine.bandwidth_share
    moving = (half * weights.count + at_once * kept * (prompt + reports.report / 2)) / bandwidth
    products = at_once * reports.decoded_flops / rate
    steps = max(rows / at_once * reports.report, reports.longest_report)
    pushed = half * weights.count / link(machine, 2 if recipe.rollout.vllm.mode == "server" else 1)
    read, decoded = reports.prefill, reports.decode
    return {
        "prefill": _phase(read.flops * world / engines / rate, "compute", read.tokens * world, read.flops * world),
        "decode": _phase(
            steps * max(moving, products),
            "memory bandwidth" if moving > products else "compute",
            decoded.tokens * world,
            decoded.flops * world,
        ),
        "weight push": _phase(pushed, "network"),
    }


def gathered_bytes(recipe: Recipe, weights: Weights) -> float:
    """Of the whole weights as ranks send them: FSDP2 sends its layers as autocast wants them, DeepSpeed as they are."""
    if recipe.distributed.strategy == "zero3":
        return weights.all
    return weights.layered * (2 if recipe.policy.dtype == "bfloat16" else 4) + weights.rest * 4


def _network(
    recipe: Recipe,
    stage: StageConfig,
    weights: Weights,
    cost: StageCost,
    machine: Machine,
    nodes: int,
    world: int,
    phases: Mapping[str, Seconds],
) -> dict[str, Seconds]:
    """What ranks send each other, beyond what computing hides."""
    if world == 1:
        return {}
    around, speed = (world - 1) / world, link(machine, nodes)
    if recipe.distributed.strategy == "ddp" or isinstance(stage, VisionStage):
        return {"gradients over ranks": _phase(2 * around * weights.trained / speed, "network")}
    gathered = gathered_bytes(recipe, weights)
    again = gathered if recipe.distributed.strategy == "zero3" else gathered - 4 * weights.rest
    ahead = cost.phases["forward"].passes + cost.phases.get("reference", Phase()).passes
    back = cost.phases["backward"].passes
    sent = around / speed * (ahead * gathered + back * (again + weights.trained))
    hidden = sum(phases[name]["seconds"] for name in ("forward", "backward", "reference") if name in phases)
    return {"shards over ranks": _phase(max(0.0, sent - hidden), "network")}


def _rewards(
    stage: GrpoStage,
    given: Mapping[str, float],
    world: int,
    phases: Mapping[str, Seconds],
    step: float | None,
) -> dict[str, Any]:
    """What is waited for: rewards run side by side, one worker each on every rank, while reports are sampled (half of
    that time: those that end early) and during the first forward where scores do not decide what is trained; one step
    ahead (`step` seconds without them) during all of it."""
    reports = stage.studies_per_step * stage.group_size / stage.iterations
    seconds = {r.log_label: seconds_of(r, given) for r in stage.rewards}
    known = {label: value for label, value in seconds.items() if value is not None}
    slowest = max(known.values(), default=0.0) * reports / world
    hidden = 0.5 * phases["decode"]["seconds"] if step is None else step
    if step is None and not scores_decide(stage):
        hidden += phases["forward"]["seconds"] * min(
            1.0, stage.tokens_per_forward / (phases["forward"]["tokens"] / world)
        )
    found = _phase(max(0.0, slowest - hidden), "rewards")
    found["cpu_seconds"] = {label: value * reports for label, value in known.items()}
    found["unknown"] = [label for label, value in seconds.items() if value is None]
    return found


def seconds_of(reward: RewardConfig, given: Mapping[str, float]) -> float | None:
    """Seconds for one report: as given by label, else as measured for this reward; None where nothing is known."""
    if reward.log_label in given:
        return given[reward.log_label]
    return REWARD_SECONDS.get(reward.name)


def check_world(recipe: Recipe, nodes: int, gpus: int) -> None:
    """Raises UserError where studies do not divide by the ranks."""
    from unirg.check import check_shares

    for stage in recipe.stages:
        check_shares(stage, nodes * gpus)


def readable(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{math.floor(seconds / 86400 * 10) / 10} days"
