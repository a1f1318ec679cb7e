"""The KL penalty's reference policy: the policy that the stage starts from, whatever that is."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from unirg.grpo.forward import answer_logps, film_stand_in
from unirg.grpo.loop import load_reference
from unirg.policy import Policy, blank_prompt
from unirg.recipe.schema import Recipe
from unirg.study import Study
from unirg.training import StageRun


def stage_run(policy: Policy, run: Path = Path("nowhere"), **grpo: Any) -> StageRun:
    """A GRPO stage that starts from the policy as built, behind another stage."""
    stage = {"name": "g", "kind": "grpo", "steps": 1, "optimiser": {"learning_rate": 1e-3}, "rewards": [{"name": "x"}]}
    first = {"name": "s", "kind": "sft", "steps": 1, "optimiser": {"learning_rate": 1e-3}}
    recipe = {"name": "x", "data": {"adapter": "phantom"}, "policy": {"tiny": {}}, "stages": [first, stage | grpo]}
    validated = Recipe.model_validate(recipe)
    accelerator: Any = SimpleNamespace()
    return StageRun(validated, validated.stages[1], run, accelerator, policy, [])


def test_the_start_is_the_policy_as_it_stands_and_stays_so(tiny_policy: Policy, studies: list[Study]) -> None:
    reference = load_reference(stage_run(tiny_policy, loss={"kl": 0.1}))
    assert reference is not None and not any(p.requires_grad for p in reference.model.parameters())
    prompts, answers = [tiny_policy.encode(studies[0])], [[tiny_policy.answer_ids("The lungs are clear.")]]
    before = answer_logps(tiny_policy, prompts, answers).logps_BT
    assert torch.equal(before, answer_logps(reference, prompts, answers).logps_BT)
    with torch.no_grad():
        for parameter in tiny_policy.model.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(before, answer_logps(tiny_policy, prompts, answers).logps_BT, atol=1e-3)
    assert torch.equal(before, answer_logps(reference, prompts, answers).logps_BT)


def test_no_penalty_no_reference(tiny_policy: Policy) -> None:
    assert load_reference(stage_run(tiny_policy, loss={"kl": 0.0})) is None


def test_that_of_an_earlier_stage_calls_its_tower_where_the_policy_does(
    tiny_policy: Policy, studies: list[Study], tmp_path: Path
) -> None:
    """Both are sharded then: a rank whose studies have no film would leave the others waiting for its weights."""
    tiny_policy.save(tmp_path / "stages/s/final")
    tiny_policy.blank = blank_prompt(tiny_policy)
    reference = load_reference(stage_run(tiny_policy, tmp_path, loss={"kl": 0.1}, kl={"reference": "s"}))
    assert reference is not None
    texts = [tiny_policy.encode(replace(study, images=())) for study in studies[:2]]
    assert film_stand_in(reference, texts) == film_stand_in(tiny_policy, texts) != []
