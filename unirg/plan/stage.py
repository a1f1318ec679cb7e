"""A stage's plan: memory, tokens and FLOPs by phase, seconds by phase, what bounds it."""

import math
from collections.abc import Mapping
from typing import Any

from unirg.errors import UserError
from unirg.grpo.loop import scores_decide
from unirg.plan.compute import Phase, StageCost
from unirg.plan.machine import Machine
from unirg.plan.memory import Weights, advice, moments, peak, shards
from unirg.recipe.schema import GrpoStage, Recipe, StageConfig, VisionStage
from unirg.scoring.contract import RewardConfig

REWARD_SECONDS = {"radgraph_f1": 0.0567, "r1": 0.0567}
"""CPU seconds for one report, on one thread, of rewards that `benchmarks/README.md` has measured (RadGraph in float32
with random weights, which is most of R1 too)."""
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
    machine: Machine,
    *,
    nodes: int,
    gpus: int,
    sampling_gpus: int,
    reward_seconds: Mapping[str, float],
) -> dict[str, Any]:
    """What `unirg plan --json` says of a stage: bytes, seconds, tokens and FLOPs per step, over all ranks but for
    memory, which is one GPU's."""
    world = nodes * gpus
    phases: dict[str, dict[str, Any]] = {}
    for name, phase in cost.phases.items():
        if phase.pieces:
            seconds, bound = phase.seconds(machine)
            if name == "optimiser":  # each rank steps its own shard
                seconds /= shards(recipe, stage, world)
            phases[name] = _phase(seconds, bound, phase.tokens * world, phase.flops * world)
    if isinstance(stage, GrpoStage) and recipe.rollout.engine == "vllm":
        engines = sampling_gpus or world
        phases |= _vllm(recipe, stage, weights, cost, machine, engines, world)
    phases |= _network(recipe, stage, weights, cost, machine, nodes, world, phases)
    if isinstance(stage, GrpoStage):
        phases["rewards"] = _rewards(stage, reward_seconds, world, phases)
    step = sum(phase["seconds"] for phase in phases.values())
    found = moments(recipe, stage, weights, cost, world, machine)
    moment, needed = peak(found, machine)
    memory = machine.memory / (gpus if machine.cpu else 1)
    slowest = max(phases, key=lambda name: phases[name]["seconds"])
    planned = {
        "name": stage.name,
        "kind": stage.kind,  # type: ignore[attr-defined]
        "steps": stage.steps,
        "phases": phases,
        "step_seconds": step,
        "run_hours": step * stage.steps / 3600,
        "gpu_hours": step * stage.steps / 3600 * (world + (sampling_gpus if "weight push" in phases else 0)),
        "bound": f"{slowest} ({phases[slowest]['bound']}), {phases[slowest]['seconds'] / step:.0%} of a step",
        "tokens_per_forward": cost.forward_tokens,
        "memory": found,
        "memory_needed": needed,
        "memory_moment": moment,
        "fits": needed <= memory,
        "unshared_flops": {name: value * world for name, value in cost.unshared.items()},
    }
    if not planned["fits"]:
        planned["try"] = advice(recipe, stage, found, machine, world)
        planned["bound"] = f"memory: does not fit, needs {needed / 1e9:.0f} GB of {memory / 1e9:.0f} GB ({moment})"
    return planned


def _phase(seconds: float, bound: str, tokens: float = 0.0, flops: float = 0.0) -> dict[str, Any]:
    return {"seconds": seconds, "bound": bound, "tokens": tokens, "flops": flops}


def _vllm(
    recipe: Recipe, stage: GrpoStage, weights: Weights, cost: StageCost, machine: Machine, engines: int, world: int
) -> dict[str, dict[str, Any]]:
    """vLLM's prefill and decode from first principles: at every decoded token the weights and the cache are read once.

    Raises UserError where its share of the memory holds no weights.
    """
    rows = world * cost.phases["decode"].tokens / cost.report / engines
    prompt = cost.phases["prefill"].tokens * stage.group_size * world / (rows * engines)
    half = 2 if recipe.policy.dtype == "bfloat16" else 4
    share = recipe.rollout.vllm.gpu_memory_utilization if recipe.rollout.vllm.mode == "colocate" else 0.9
    room = share * machine.memory - half * weights.count
    kept = cost.kv_numbers * half
    held = int(room / (kept * (prompt / stage.group_size + cost.longest_report)))
    if held < 1:
        raise UserError(
            f"stage {stage.name}: {share * machine.memory / 1e9:.0f} GB of a {machine.name} hold no "
            f"{half * weights.count / 1e9:.0f} GB of weights and a cache for vLLM; raise "
            "rollout.vllm.gpu_memory_utilization, or use servers"
        )
    together = min(rows, held, VLLM_ROWS)
    rate = (machine.half if half == 2 else machine.single) * machine.compute_share
    bandwidth = machine.bandwidth * machine.bandwidth_share
    moving = (half * weights.count + together * kept * (prompt + cost.report / 2)) / bandwidth
    products = together * cost.decoded_flops / rate
    steps = max(rows / together * cost.report, cost.longest_report)
    decode, prefill = cost.phases["decode"], cost.phases["prefill"]
    pushed = half * weights.count / link(machine, 2 if recipe.rollout.vllm.mode == "server" else 1)
    return {
        "prefill": _phase(
            prefill.flops * world / engines / rate, "compute", prefill.tokens * world, prefill.flops * world
        ),
        "decode": _phase(
            steps * max(moving, products),
            "memory bandwidth" if moving > products else "compute",
            decode.tokens * world,
            decode.flops * world,
        ),
        "weight push": _phase(pushed / stage.iterations, "network"),
    }


def _network(
    recipe: Recipe,
    stage: StageConfig,
    weights: Weights,
    cost: StageCost,
    machine: Machine,
    nodes: int,
    world: int,
    phases: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """What ranks send each other, beyond what computing hides."""
    if world == 1:
        return {}
    around, speed = (world - 1) / world, link(machine, nodes)
    if recipe.distributed.strategy == "ddp" or isinstance(stage, VisionStage):
        return {"gradients over ranks": _phase(2 * around * weights.trained / speed, "network")}
    half = 2 if recipe.policy.dtype == "bfloat16" else 4
    gathered = weights.layered * half + weights.rest * 4
    ahead = cost.phases["forward"].passes + cost.phases.get("reference", Phase()).passes
    back = cost.phases["backward"].passes
    sent = around / speed * (ahead * gathered + back * (weights.layered * half + weights.trained))
    hidden = sum(phases[name]["seconds"] for name in ("forward", "backward", "reference") if name in phases)
    found = {"shards over ranks": _phase(max(0.0, sent - hidden), "network")}
    if isinstance(stage, GrpoStage) and recipe.rollout.engine == "hf":
        found["weights for sampling"] = _phase(around * gathered / speed / stage.iterations, "network")
    return found


def _rewards(
    stage: GrpoStage, given: Mapping[str, float], world: int, phases: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What is waited for: rewards run side by side, one worker each on every rank, while reports are sampled (half of
    that time: those that end early) and during the first forward where scores do not decide what is trained."""
    reports = stage.studies_per_step * stage.group_size / stage.iterations
    seconds = {r.log_label: seconds_of(r, given) for r in stage.rewards}
    known = {label: value for label, value in seconds.items() if value is not None}
    slowest = max(known.values(), default=0.0) * reports / world
    hidden = 0.5 * phases["decode"]["seconds"]
    if not scores_decide(stage):
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
    if not any(isinstance(stage, GrpoStage) for stage in recipe.stages):
        raise UserError("the recipe has no stage of kind grpo: `unirg plan` is about what sampling and GRPO cost")


def readable(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{math.floor(seconds / 86400 * 10) / 10} days"
