"""A reward whose author says that it is for evaluation only: a metric, and no training reward."""

import pytest

from unirg.recipe.schema import Recipe
from unirg.run import final_folder
from unirg.scoring.adapters import easyr1_reward, swift_reward, trl_reward, verl_batch_reward, verl_reward
from unirg.scoring.contract import RewardConfig, RewardError, ScoreBatch
from unirg.scoring.engine import ScoringEngine
from unirg.scoring.registry import check_trainable
from unirg.stages import run_stage


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


def test_a_stage_that_names_one_ends_before_its_first_step(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"report": "a b"}\n{"report": "c"}\n')
    tiny = {"vocabulary": 400, "hidden": 32, "heads": 2, "layers": 1, "mlp": 32, "vision_hidden": 16, "image_size": 32}
    stage = {"name": "grpo", "kind": "grpo", "steps": 1, "optimiser": {"learning_rate": 1e-3}}
    rewards = [{"name": "bleu"}, {"name": "cider", "options": {"corpus": str(corpus)}}]
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "data": {"adapter": "phantom", "train": 4, "dev": 0, "test": 0, "size": 32},
            "policy": {"tiny": tiny},
            "stages": [stage | {"rewards": rewards}],
        }
    )
    with pytest.raises(RewardError, match=r"'cider' is for evaluation only: .*evaluation\.metrics"):
        run_stage(recipe, tmp_path / "run", recipe.stages[0])
    assert not list((tmp_path / "run").glob("**/metrics.jsonl"))
    assert not final_folder(tmp_path / "run", "grpo").exists()


@pytest.mark.parametrize("wrapper", [trl_reward, verl_reward, verl_batch_reward, easyr1_reward, swift_reward])
def test_other_trainers_are_refused_one_too(wrapper):
    with pytest.raises(RewardError, match=r"'meteor' is for evaluation only, not to train on: it holds a Java"):
        wrapper("meteor")
