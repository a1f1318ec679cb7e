"""Recipes whose keys contradict each other are refused: no option is passed over in silence."""

from typing import Any

import pytest
from pydantic import ValidationError

from unirg.recipe.schema import Recipe

OPTIMISER = {"learning_rate": 1e-3}
SERVED = {"engine": "vllm", "vllm": {"mode": "server", "servers": ["http://127.0.0.1:8000"]}}


def recipe(*stages: dict[str, Any], **keys: Any) -> Recipe:
    own = [{"name": f"s{i}", "steps": 1, "optimiser": OPTIMISER, **stage} for i, stage in enumerate(stages)]
    return Recipe.model_validate(
        {"name": "x", "data": {"adapter": "phantom"}, "policy": {"tiny": {}}, "stages": own, **keys}
    )


def grpo(**keys: Any) -> dict[str, Any]:
    return {"kind": "grpo", "rewards": [{"name": "bleu"}], **keys}


@pytest.mark.parametrize(
    ("stages", "keys", "message"),
    [
        ([{"kind": "sft", "keep": "best"}], {}, "keep: best needs evaluate_every"),
        ([{"kind": "vision", "evaluate_every": 5}], {}, "a vision stage writes no reports"),
        ([grpo(group_size=4, train_on=6)], {}, "train_on 6 is more than group_size 4"),
        ([grpo(rewards=[{"name": "bleu", "weight": 0}])], {}, "every reward has weight 0"),
        ([{"kind": "sft"}, grpo(kl={"reference": "s0"})], {}, "loss.kl is 0"),
        ([{"kind": "sft"}], {"evaluation": {"stages": ["s1"]}}, r"evaluation.stages names 's1'"),
        ([{"kind": "vision"}], {"evaluation": {"stages": ["s0"]}}, r"no stage that writes reports"),
        ([{"kind": "sft"}], {"evaluation": {"baseline": "s1"}}, r"evaluation.baseline names 's1'"),
        ([{"kind": "sft", "start": "s0"}], {}, "start names 's0', which is no earlier stage"),
        ([grpo(), grpo(start="policy")], {"rollout": SERVED, "jobs": 2}, "have the weights of one stage at a time"),
    ],
)
def test_keys_that_would_do_nothing_are_errors(
    stages: list[dict[str, Any]], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe(*stages, **keys)


def test_the_same_keys_in_their_place() -> None:
    told = recipe(
        {"kind": "vision"},
        {"kind": "sft", "keep": "best", "evaluate_every": 1},
        grpo(group_size=4, train_on=4, kl={"reference": "s1"}, loss={"kl": 0.1}),
        evaluation={"stages": ["s1", "s2"], "baseline": "s1"},
    )
    assert [told.start_of(stage) for stage in told.stages] == ["policy", "s0", "s1"]
