"""Memory of one GPU, by part: while sampling, in forward and backward, in the optimiser's step, while evaluating."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unirg.distributed import beside_engine, stacked_layers
from unirg.plan.compute import Reports, StageCost, fullest
from unirg.plan.machine import RESERVE, Machine
from unirg.policy import Policy
from unirg.recipe.schema import GrpoStage, Recipe, StageConfig, VisionStage

Moment = dict[str, float]
"""Bytes by part."""
LIVE, BUCKET = 1_000_000_000, 500_000_000
"""DeepSpeed's defaults: weights that it keeps gathered, and gradients that it sums at once, in numbers."""


@dataclass(frozen=True)
class Weights:
    """Bytes of a policy's weights, of its gradients and of what every rank holds in any case; how many weights it has
    without its adapters, and with them by where FSDP2 puts them: in layers, in the largest layer, in the rest."""

    all: int
    trained: int
    unsharded: int
    count: int
    layered: int
    largest: int
    rest: int


def weights_of(policy: Policy, stage: StageConfig) -> Weights:
    """Of the policy in that stage: a vision stage trains the tower alone, in float32, and shards nothing else."""
    own = list(policy.model.parameters())
    size, unsharded, sharded = sum(p.nbytes for p in own), 0, policy.model
    trained = sum(p.nbytes for p in own if p.requires_grad)
    if isinstance(stage, VisionStage):
        sharded = policy.base.model.visual
        trained = 4 * sum(p.numel() for p in sharded.parameters())
        unsharded = size - sum(p.nbytes for p in sharded.parameters())
        size = unsharded + trained
    layers = [sum(p.numel() for p in layer.parameters()) for layer in stacked_layers(sharded)]
    rest = sum(p.numel() for p in sharded.parameters()) - sum(layers)
    count = sum(p.numel() for name, p in policy.model.named_parameters() if "lora_" not in name)
    return Weights(size, trained, unsharded, count, sum(layers), max(layers, default=0), rest)


def reference_bytes(recipe: Recipe, stage: StageConfig, weights: Weights) -> int:
    """Of the KL penalty's policy, where it is one of its own."""
    if not isinstance(stage, GrpoStage) or not stage.loss.kl:
        return 0
    if stage.kl.reference == "start":
        return 0 if recipe.policy.lora is not None else weights.all
    return 4 * weights.count


def shards(recipe: Recipe, stage: StageConfig, world: int) -> int:
    """Over how many ranks weights, gradients and optimiser state are sharded."""
    return 1 if strategy_of(recipe, stage) == "ddp" else world


def strategy_of(recipe: Recipe, stage: StageConfig) -> str:
    """How the stage's weights lie on the ranks: DeepSpeed's engine does not run vision stages."""
    strategy = recipe.distributed.strategy
    return beside_engine(strategy) if isinstance(stage, VisionStage) else strategy


def moments(
    recipe: Recipe, stage: StageConfig, weights: Weights, cost: StageCost, world: int, machine: Machine
) -> dict[str, Moment]:
    """Bytes by part of each moment on one of `world` ranks."""
    shard = shards(recipe, stage, world)
    fsdp2, zero3 = (shard > 1 and strategy_of(recipe, stage) == name for name in ("fsdp2", "zero3"))
    half = 2 if recipe.policy.dtype == "bfloat16" else 4
    held = {
        "weights": weights.unsharded + (weights.all - weights.unsharded) / shard,
        "optimiser": cost.optimiser_state / shard,
        "reference policy": reference_bytes(recipe, stage, weights) / shard,
    }
    gradients = {"gradients": weights.trained / shard}
    if zero3:  # it never gives the gradients' memory back
        held |= gradients
        held |= {"DeepSpeed's copy of what is trained": weights.trained / shard, "DeepSpeed's bucket": BUCKET * 4}
    if isinstance(stage, GrpoStage) and stage.ahead and recipe.rollout.engine == "hf":
        held["sampler's copy"] = weights.all
    vllm = recipe.rollout.engine == "vllm" and recipe.rollout.vllm.mode == "colocate"
    vllm = vllm and (cost.sampling is not None or cost.evaluation is not None)
    if vllm and not recipe.rollout.vllm.sleep:
        held["vLLM, colocated"] = recipe.rollout.vllm.gpu_memory_utilization * machine.memory
    alive, cast = fullest(cost.peaks, cast=not fsdp2)
    copies, logits = cast, min(cost.logits, alive - cast)
    update = held | gradients
    if fsdp2:  # two layers at a time, with their gradients, and what stands outside of layers
        update["gathered weights and gradients"] = 2 * weights.largest * (2 * half + 4) + weights.rest * (4 + 4)
        copies = weights.rest * half if half == 2 else 0
    elif zero3:
        update["gathered weights"] = min(1.0, LIVE / weights.count) * weights.all
    update |= {
        "bfloat16 weights (autocast)": copies,
        "logits": logits,
        "activations": alive - cast - logits,
    }
    found = {
        "forward and backward": update,
        "optimiser": held | gradients | {"optimiser's temporaries": cost.optimiser_peak / shard},
    }

    def writing(reports: Reports) -> Moment:
        if vllm and recipe.rollout.vllm.sleep:
            return held | {"vLLM, colocated": recipe.rollout.vllm.gpu_memory_utilization * machine.memory}
        if recipe.rollout.engine == "vllm":
            return held
        alive, cast = fullest(reports.peaks, cast=not fsdp2)
        gathered = weights.layered * half + weights.rest * 4 if fsdp2 else weights.all if zero3 else 0
        return held | {
            "gathered weights": gathered,
            "KV cache": reports.kv_cache,
            "bfloat16 weights (autocast)": min(cast, weights.rest * 2) if fsdp2 else cast,
            "activations": max(0.0, alive - reports.kv_cache - cast),
        }

    if cost.sampling is not None:
        found = {"sampling": writing(cost.sampling)} | found
    if cost.evaluation is not None:
        found["evaluation"] = writing(cost.evaluation)
    return {moment: {name: float(size) for name, size in parts.items() if size} for moment, parts in found.items()}


def peak(found: Mapping[str, Moment], machine: Machine) -> tuple[str, float]:
    """The fullest moment, and bytes needed there with the reserve."""
    moment = max(found, key=lambda name: sum(found[name].values()))
    return moment, sum(found[moment].values()) + (0.0 if machine.cpu else RESERVE)


def advice(recipe: Recipe, stage: Any, found: Mapping[str, Moment], machine: Machine, world: int) -> list[str]:
    """What to try where it does not fit: overrides of the recipe, those that save most first."""
    moment, needed = peak(found, machine)
    parts = found[moment]
    saves: list[tuple[float, str]] = []
    state = sum(found["optimiser"].get(name, 0.0) for name in ("weights", "gradients", "optimiser", "reference policy"))
    if recipe.distributed.strategy == "ddp" and world > 1 and not isinstance(stage, VisionStage):
        saves.append((state * (1 - 1 / world), "distributed.strategy=fsdp2"))
    if recipe.policy.lora is None and not isinstance(stage, VisionStage):
        saves.append((0.6 * state, "policy.lora={rank: 64, alpha: 128}"))
    if recipe.policy.dtype == "float32":
        saves.append((0.4 * parts.get("activations", 0.0), "policy.dtype=bfloat16"))
    if moment == "forward and backward":
        saved = parts["activations"] + parts.get("logits", 0.0)
        if not recipe.policy.gradient_checkpointing:
            saves.append((0.8 * saved, "policy.gradient_checkpointing=true"))
        if isinstance(stage, GrpoStage):
            half = stage.tokens_per_forward // 2
            saves.append((0.5 * saved, f"stages.{stage.name}.tokens_per_forward={half}"))
        else:
            size = max(1, (stage.studies_per_forward or stage.studies_per_step // world) // 2)
            saves.append((0.5 * saved, f"stages.{stage.name}.studies_per_forward={size}"))
    if moment in ("sampling", "evaluation") and recipe.rollout.engine == "hf":
        saved = parts.get("KV cache", 0.0) + parts.get("activations", 0.0)
        if moment == "sampling":
            rows = max(stage.group_size, stage.sampling.rows_per_forward // 2)
            saves.append((0.5 * saved, f"stages.{stage.name}.sampling.rows_per_forward={rows}"))
        else:
            saves.append((0.5 * saved, f"evaluation.batch_size={max(1, recipe.evaluation.batch_size // 2)}"))
    if recipe.distributed.strategy != "ddp" or world == 1:
        saves.append((state / 2, "more GPUs (--nodes, --gpus)" + ("" if world > 1 else " and fsdp2")))
    saves = [save for save in saves if save[0] > 0.02 * needed]
    return [text for _, text in sorted(saves, key=lambda save: -save[0])[:4]]
