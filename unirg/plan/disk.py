"""What a run writes: checkpoints while a stage trains, the best weights on dev, each stage's final policy."""

import math

from unirg.plan.memory import Weights, weights_of
from unirg.policy import Policy
from unirg.recipe.schema import GrpoStage, Recipe, StageConfig


def checkpoint_bytes(weights: Weights) -> int:
    """A checkpoint: what is trained, and AdamW's two moments of it."""
    return 3 * weights.trained


def stage_bytes(stage: StageConfig, weights: Weights) -> int:
    """The most that the stage's checkpoints take: those that are kept and the one being written; with `keep: best` two
    of the best weights and one being written."""
    kept = (stage.keep_checkpoints + 1) * checkpoint_bytes(weights)
    return kept + 3 * weights.trained * (stage.keep == "best")


def run_bytes(recipe: Recipe, policy: Policy) -> int:
    """The most that weights of the run take on its disk: a finished stage leaves its policy, and no checkpoints."""
    most = finished = 0
    for stage in recipe.stages:
        weights = weights_of(policy, stage)
        finished += weights.all  # put in place before the stage's checkpoints go
        most = max(most, finished + stage_bytes(stage, weights))
    return most


def written(stage: StageConfig, weights: Weights) -> tuple[int, float]:
    """How many checkpoints the stage writes, and the bytes of all that it writes; the best at every evaluation."""
    together = stage.iterations if isinstance(stage, GrpoStage) else 1
    count = (stage.steps - 1) // (math.ceil(stage.checkpoint_every / together) * together)
    best = stage.steps // stage.evaluate_every if stage.evaluate_every and stage.keep == "best" else 0
    return count, count * checkpoint_bytes(weights) + best * weights.trained + weights.all
