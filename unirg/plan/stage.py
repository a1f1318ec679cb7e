"""A stage's plan: memory, tokens and FLOPs by phase, seconds by phase, what bounds it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unirg.errors import UserError
from unirg.grpo.loop import scores_decide
from unirg.plan.compute import Phase, Reports, StageCost
from unirg.plan.disk import stage_bytes, written
from unirg.plan.machine import Cluster
from unirg.plan.memory import Weights, advice, moments, peak, reference_bytes, shards, strategy_of
from unirg.plan.policy import Lengths
from unirg.recipe.schema import GrpoStage, Recipe, StageConfig
from unirg.rollout import SamplingConfig
from unirg.scoring.contract import RewardConfig

REWARD_SECONDS = {"radgraph_f1": 0.055, "r1": 0.055, "radcliq": 0.055, "ratescore": 0.028}
"""CPU seconds for one report, its reference included, on one thread, as `benchmarks/README.md` has measured them with
random weights of the official sizes in float32: 28.15 s and 14.3 s for 512. RadGraph is most of R1 and of RadCliQ."""
Seconds = dict[str, Any]
"""A phase: seconds and what bounds it, tokens, FLOPs."""
VLLM_MEMORY = 0.92
"""What a vLLM server takes of its GPU: its default."""


@dataclass(frozen=True)
class Setting:
    """A stage with all that its plan follows from."""

    recipe: Recipe
    stage: StageConfig
    weights: Weights
    cost: StageCost
    """Of a step on one of the cluster's ranks."""
    lengths: Lengths
    cluster: Cluster
    reward_seconds: Mapping[str, float]
    """For one report by a reward's or metric's label, where they were given."""

    @property
    def together(self) -> int:
        """Steps that share a batch of reports."""
        return self.stage.iterations if isinstance(self.stage, GrpoStage) else 1


def plan_stage(setting: Setting) -> dict[str, Any]:
    """What `unirg plan --json` says of a stage: bytes, seconds, tokens and FLOPs per step, over all ranks but for
    memory, which is one GPU's; and what comes beside its steps."""
    recipe, stage, cost, cluster = setting.recipe, setting.stage, setting.cost, setting.cluster
    machine, world = cluster.machine, cluster.world
    phases = _phases(setting)
    step = sum(phase["seconds"] for phase in phases.values())
    if isinstance(stage, GrpoStage):
        sampling = sum(phases[name]["seconds"] for name in ("prefill", "decode"))
        if stage.ahead and cluster.sampling_gpus:  # a copy of the policy takes its turn on the same device instead
            step = max(sampling, step - sampling)
        phases["rewards"] = _rewards(setting, stage, phases, step if stage.ahead else None)
        step += phases["rewards"]["seconds"]
    found = moments(recipe, stage, setting.weights, cost, world, machine)
    moment, needed = peak(found, machine)
    slowest = max(phases, key=lambda name: phases[name]["seconds"])
    beside = _beside(setting)
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
        "sampling_gpu_hours": hours * cluster.sampling_gpus,
        "bound": f"{slowest} ({phases[slowest]['bound']}), {phases[slowest]['seconds'] / step:.0%} of a step",
        "tokens_per_forward": cost.forward_tokens,
        "memory": found,
        "memory_needed": needed,
        "memory_moment": moment,
        "fits": needed <= cluster.memory,
        "disk": stage_bytes(stage, setting.weights) + setting.weights.all,
        "unshared_flops": {name: value * world for name, value in cost.unshared.items()},
    }
    if not planned["fits"]:
        planned["try"] = advice(recipe, stage, found, machine, world)
        planned["bound"] = (
            f"memory: does not fit, needs {needed / 1e9:.0f} GB of {cluster.memory / 1e9:.0f} GB ({moment})"
        )
    return planned


def _phases(setting: Setting) -> dict[str, Seconds]:
    """The phases of a step, but for its rewards."""
    stage, cost, lengths, world = setting.stage, setting.cost, setting.lengths, setting.cluster.world
    phases: dict[str, Seconds] = {}
    if lengths.reading is not None:
        reads = stage.steps * stage.studies_per_step / world / setting.together
        if lengths.kept is not None:  # a rank reads each once, at most
            reads = min(reads, lengths.kept)
        phases["reading studies"] = _phase(lengths.reading * reads / stage.steps, "one CPU core")
    if cost.sampling is not None:
        for name, one in _writing(setting, cost.sampling, cost.sampling.studies).items():
            phases[name] = one | {key: one[key] / setting.together for key in ("seconds", "tokens", "flops")}
    for name, phase in cost.phases.items():
        seconds, bound = phase.seconds(setting.cluster.machine)
        if name == "optimiser":  # each rank steps its own shard
            seconds /= shards(setting.recipe, stage, world)
        phases[name] = _phase(seconds, bound, phase.tokens * world, phase.flops * world)
    return phases | _network(setting, phases)


def _phase(seconds: float, bound: str, tokens: float = 0.0, flops: float = 0.0) -> Seconds:
    return {"seconds": seconds, "bound": bound, "tokens": tokens, "flops": flops}


def _beside(setting: Setting) -> dict[str, dict[str, Any]]:
    """What a stage does beside its steps: how often, and the seconds of all times together."""
    stage, cost, evaluation = setting.stage, setting.cost, setting.recipe.evaluation
    count, size = written(stage, setting.weights)
    seconds = size / setting.cluster.machine.disk
    found: dict[str, dict[str, Any]] = {"checkpoints": {"count": count, "bytes": size, "seconds": seconds}}
    if cost.evaluation is not None and stage.evaluate_every is not None:
        phases = _writing(setting, cost.evaluation, min(evaluation.batch_size, cost.evaluation.studies))
        metrics = {metric.log_label: seconds_of(metric, setting.reward_seconds) for metric in evaluation.metrics}
        # Side by side, all studies on the first rank.
        scores = max((value for value in metrics.values() if value), default=0.0) * stage.evaluate_studies
        count = stage.steps // stage.evaluate_every
        found["evaluations"] = {
            "count": count,
            "seconds": count * (sum(phase["seconds"] for phase in phases.values()) + scores),
            "scoring": count * scores,
            "unknown": [label for label, value in metrics.items() if value is None],
        }
    return found


def _writing(setting: Setting, reports: Reports, batch: int) -> dict[str, Seconds]:
    """What the recipe's engine needs to write these reports of every rank, asked for `batch` studies at a time."""
    cluster, recipe = setting.cluster, setting.recipe
    if recipe.rollout.engine == "vllm":
        return _vllm(setting, reports, batch)
    phases = {}
    for name, phase in (("prefill", reports.prefill), ("decode", reports.decode)):
        seconds, bound = phase.seconds(cluster.machine)
        phases[name] = _phase(seconds, bound, phase.tokens * cluster.world, phase.flops * cluster.world)
    if cluster.world > 1 and recipe.distributed.strategy != "ddp":
        phases["weights for sampling"] = _phase(
            cluster.around * gathered_bytes(setting, recipe.distributed.strategy) / cluster.link, "network"
        )
    return phases


def _vllm_rows(setting: Setting) -> int:
    """Reports that one vLLM engine decodes at once: what the stage asks of a colocated one, a server's default."""
    stage = setting.stage
    if setting.recipe.rollout.vllm.mode == "server":
        return setting.cluster.machine.vllm_rows
    return stage.rows if isinstance(stage, GrpoStage) else SamplingConfig().rows_per_forward


def _vllm(setting: Setting, reports: Reports, batch: int) -> dict[str, Seconds]:
    """vLLM's prefill and decode from first principles: at every decoded token the weights and the cache are read once.

    Raises UserError where its share of the memory holds no weights.
    """
    recipe, weights, world = setting.recipe, setting.weights, setting.cluster.world
    machine, engines = setting.cluster.machine, setting.cluster.sampling_gpus or world
    rows = world * batch * reports.size / engines
    prompt = reports.prefill.tokens / reports.studies
    half = 2 if recipe.policy.dtype == "bfloat16" else 4
    colocated = recipe.rollout.vllm.mode == "colocate"
    share = recipe.rollout.vllm.gpu_memory_utilization if colocated else VLLM_MEMORY
    room = share * machine.memory - half * weights.count
    kept = reports.kv_numbers * half
    held = int(room / (kept * (prompt / reports.size + reports.longest_report)))
    if held < 1:
        instead = (
            "raise rollout.vllm.gpu_memory_utilization, use servers, or"
            if colocated
            else "a plan has one GPU a server:"
        )
        raise UserError(
            f"rollout.vllm: {share * machine.memory / 1e9:.0f} GB of a {machine.name} do not hold "
            f"{half * weights.count / 1e9:.0f} GB of weights and a cache; {instead} take a GPU with more memory"
        )
    at_once = min(rows, held, _vllm_rows(setting))
    rate = (machine.half if half == 2 else machine.single) * machine.compute_share
    bandwidth = machine.bandwidth * machine.bandwidth_share
    moving = (half * weights.count + at_once * kept * (prompt + reports.report / 2)) / bandwidth
    products = at_once * reports.decoded_flops / rate
    steps = reports.studies / batch * max(rows / at_once * reports.report, reports.longest_report)
    read, decoded = reports.prefill, reports.decode
    return {
        "prefill": _phase(read.flops * world / engines / rate, "compute", read.tokens * world, read.flops * world),
        "decode": _phase(
            steps * max(moving, products),
            "memory bandwidth" if moving > products else "compute",
            decoded.tokens * world,
            decoded.flops * world,
        ),
        "weight push": _push(setting, half * weights.count, bandwidth),
    }


def _push(setting: Setting, size: int, bandwidth: float) -> Seconds:
    """All weights to vLLM, `size` bytes: within the device, or to servers that the ranks share; sharded ones are
    gathered meanwhile, one parameter at a time and in their own precision."""
    recipe, weights, cluster = setting.recipe, setting.weights, setting.cluster
    sharded = shards(recipe, setting.stage, cluster.world) > 1
    gathering = cluster.around * weights.all / cluster.link if sharded else 0.0
    if recipe.rollout.vllm.mode == "server":
        share = math.ceil(cluster.sampling_gpus / cluster.world)  # of the servers, on the rank that has most
        return _phase(max(gathering, share * size / cluster.machine.stream), "network")
    copying = (weights.all + size) / bandwidth
    return _phase(max(gathering, copying), "network" if gathering > copying else "memory bandwidth")


def gathered_bytes(setting: Setting, strategy: str) -> float:
    """Of the whole weights as ranks send them: FSDP2 sends its layers as autocast wants them, DeepSpeed as they are."""
    weights = setting.weights
    if strategy == "zero3":
        return weights.all
    return weights.layered * (2 if setting.recipe.policy.dtype == "bfloat16" else 4) + weights.rest * 4


def _network(setting: Setting, phases: Mapping[str, Seconds]) -> dict[str, Seconds]:
    """What ranks send each other, beyond what computing hides."""
    weights, cost, cluster = setting.weights, setting.cost, setting.cluster
    if cluster.world == 1:
        return {}
    strategy = strategy_of(setting.recipe, setting.stage)
    if strategy == "ddp":
        return {"gradients over ranks": _phase(2 * cluster.around * weights.trained / cluster.link, "network")}
    gathered = gathered_bytes(setting, strategy)
    again = gathered if strategy == "zero3" else gathered - 4 * weights.rest
    forward, back = cost.phases["forward"].passes, cost.phases["backward"].passes
    apart = reference_bytes(setting.recipe, setting.stage, weights) > 0  # a reference of its own is FSDP2's
    reference = cost.phases.get("reference", Phase()).passes * gathered_bytes(setting, "fsdp2" if apart else strategy)
    sent = cluster.around / cluster.link * (forward * gathered + reference + back * (again + weights.trained))
    hidden = sum(phases[name]["seconds"] for name in ("forward", "backward", "reference") if name in phases)
    return {"shards over ranks": _phase(max(0.0, sent - hidden), "network")}


def _rewards(setting: Setting, stage: GrpoStage, phases: Mapping[str, Seconds], step: float | None) -> dict[str, Any]:
    """What is waited for: rewards run side by side, one worker each on every rank, while reports are sampled (half of
    that time: those that end early) and during the batch's first forward, the reference's included, where scores do
    not decide what is trained; one step ahead (`step` seconds without them) during all of it."""
    world = setting.cluster.world
    reports = stage.studies_per_step * stage.group_size / stage.iterations
    seconds = {r.log_label: seconds_of(r, setting.reward_seconds) for r in stage.rewards}
    known = {label: value for label, value in seconds.items() if value is not None}
    slowest = max(known.values(), default=0.0) * reports / world
    hidden = 0.5 * phases["decode"]["seconds"] if step is None else step
    if step is None and not scores_decide(stage):
        first = min(1.0, stage.tokens_per_forward / (phases["forward"]["tokens"] / world)) / setting.together
        hidden += first * sum(phases[name]["seconds"] for name in ("forward", "reference") if name in phases)
    found = _phase(max(0.0, slowest - hidden), "rewards")
    found["cpu_seconds"] = {label: value * reports for label, value in known.items()}
    found["unknown"] = [label for label, value in seconds.items() if value is None]
    return found


def seconds_of(reward: RewardConfig, given: Mapping[str, float]) -> float | None:
    """Seconds for one report: as given by label, else as measured for this reward; None where nothing is known."""
    if reward.log_label in given:
        return given[reward.log_label]
    return REWARD_SECONDS.get(reward.name)
