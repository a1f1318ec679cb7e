"""A reward whose author says that it is for evaluation only: a metric, and no training reward."""

import pytest

from unirg.scoring.contract import RewardConfig, RewardError, ScoreBatch
from unirg.scoring.engine import ScoringEngine
from unirg.scoring.registry import check_trainable


def test_a_reward_for_evaluation_only_is_no_training_reward(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "class Vain:\n"
        "    evaluation_only = 'it counts adjectives'\n"
        "    def score(self, candidates, references, **columns):\n"
        "        return [0.5] * len(candidates)\n"
    )
    vain, bleu = RewardConfig(name=f"{file}:Vain"), RewardConfig(name="bleu")
    check_trainable([bleu])
    with pytest.raises(RewardError, match=r"'Vain' is for evaluation only: it counts adjectives; .*evaluation.metrics"):
        check_trainable([bleu, vain])
    engine = ScoringEngine([vain])  # where it is a metric, it scores
    assert engine.collect(engine.submit(ScoreBatch(["a"], ["b"])))["Vain"] == [0.5]


@pytest.mark.parametrize("reward", ["cider", "meteor"])
def test_cider_and_meteor_are_for_evaluation_only(reward, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"report": "a b"}\n{"report": "c"}\n')
    options = {"corpus": str(corpus)} if reward == "cider" else {}
    with pytest.raises(RewardError, match=f"'{reward}' is for evaluation only"):
        check_trainable([RewardConfig(name=reward, options=options)])
