"""Stages: what waits for what, who shares the cores, and that no two processes train one stage."""

from pathlib import Path

import pytest

from unirg.errors import UserError
from unirg.process import hold
from unirg.recipe.load import load_recipe
from unirg.recipe.schema import Recipe
from unirg.stages import beside, needed


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe(Path(__file__).parents[2] / "recipes" / "demo.yaml")


def test_arms_wait_for_the_warm_start_and_share_the_cores(recipe: Recipe) -> None:
    stages = {stage.name: stage for stage in recipe.stages}
    assert needed(recipe, stages["vision"]) == set()
    assert needed(recipe, stages["sft"]) == {"vision"}
    assert {name for name in stages if needed(recipe, stages[name]) == {"sft"}} == set(stages) - {"vision", "sft"}
    assert [beside(recipe, stage) for stage in recipe.stages] == [1, 1, 2, 2, 2, 2]


def test_a_reference_stage_is_waited_for(recipe: Recipe) -> None:
    arm = recipe.stages[-1]
    other = arm.model_copy(
        update={
            "loss": arm.loss.model_copy(update={"kl": 0.03}),
            "kl": arm.kl.model_copy(update={"reference": "sft_complete"}),
        }
    )
    assert needed(recipe, other) == {"sft", "sft_complete"}


def test_one_process_a_stage(tmp_path: Path) -> None:
    first = hold(tmp_path / "sft")
    with pytest.raises(UserError, match="is training there; wait for it, or stop it"):
        hold(tmp_path / "sft")
    first.close()
    hold(tmp_path / "sft").close()
