"""The package's own tests: `pytest` here, once it is installed."""

import pytest
from example_report_rewards.length import words_near
from example_report_rewards.sides import SaysSide

from unirg.scoring.contract_check import check_contract
from unirg.scoring.registry import load_reward


def test_words_near():
    assert words_near(["a b", "a b c d", "a"], ["a b c", "a b", " "], tolerance=1) == [1.0, 0.0, None]


def test_says_side():
    reward = SaysSide("de")
    reward.setup()
    both = {"effusion/left": 1, "opacity/right": 1, "nodule/left": 0}
    assert reward.score(["Erguss links.", "Left.", "x"], [""] * 3, labels=[both, both, {}]) == [0.5, 0.0, None]
    with pytest.raises(ValueError, match="'fr' is none of en, de"):
        SaysSide("fr").setup()


@pytest.mark.parametrize("name", ["words_near", "says_side"])
def test_the_contract_is_kept(name):
    reward = load_reward(name)
    reward.setup()
    assert [finding.text for finding in check_contract(reward) if finding.kind == "wrong"] == []
