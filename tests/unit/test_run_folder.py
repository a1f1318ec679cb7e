"""The run folder and what is verified before it is opened."""

from pathlib import Path

import pytest

from unirg.check import check_rewards
from unirg.errors import UserError
from unirg.run import open_run
from unirg.scoring.contract import RewardConfig
from unirg.study import Study

STUDIES = [Study(id="a", findings="Clear lungs."), Study(id="b", findings="Small left effusion.")]


def test_rewards_of_which_none_can_judge_are_an_error_and_one_of_several_is_told(capsys):
    with pytest.raises(UserError, match="label_f1: could judge none of 2 studies"):
        check_rewards([RewardConfig(name="label_f1")], STUDIES)
    check_rewards([RewardConfig(name="label_f1"), RewardConfig(name="bleu")], STUDIES)
    assert "reward label_f1: could judge none of 2 studies" in capsys.readouterr().out
    check_rewards([RewardConfig(name="bleu")], STUDIES)
    assert capsys.readouterr().out == ""


def test_a_reward_that_fails_does_so_before_training(tmp_path: Path):
    (tmp_path / "own.py").write_text("def own(candidates, references):\n    return [1 / 0 for _ in candidates]\n")
    with pytest.raises(UserError, match=r"reward 'own' failed on studies a, b"):
        check_rewards([RewardConfig(name=f"{tmp_path}/own.py:own")], STUDIES)


def test_a_run_may_be_judged_anew_but_not_learn_something_else(tmp_path: Path):
    open_run(tmp_path, "seed: 0\njobs: 1\nevaluation: {splits: [dev]}\nstages: [{name: sft, steps: 10}]\n")
    open_run(tmp_path, "seed: 0\njobs: 2\nevaluation: {splits: [dev, test]}\nstages: [{name: sft, steps: 10}]\n")
    assert "test" in (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "stages/sft/step-000005").mkdir(parents=True)
    with pytest.raises(UserError, match=r"another recipe \(differs in stages\.sft\.steps\)"):
        open_run(tmp_path, "seed: 0\njobs: 2\nevaluation: {splits: [dev]}\nstages: [{name: sft, steps: 11}]\n")
    assert "steps: 10" in (tmp_path / "recipe.yaml").read_text()


def test_a_run_that_failed_before_it_kept_a_step_may_be_put_right(tmp_path: Path):
    open_run(tmp_path, "stages: [{name: sft, studies_per_step: 64}]\n")
    open_run(tmp_path, "stages: [{name: sft, studies_per_step: 8}]\n")
    assert "studies_per_step: 8" in (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "stages/sft/final").mkdir(parents=True)
    with pytest.raises(UserError, match=r"differs in stages\.sft\.studies_per_step\)"):
        open_run(tmp_path, "stages: [{name: sft, studies_per_step: 16}]\n")


def test_a_run_whose_reward_took_too_long_goes_on_with_a_longer_timeout(tmp_path: Path):
    recipe = "stages: [{name: rl, rewards: [{name: bleu, label: null, timeout: %d, weight: %s}]}]\n"
    open_run(tmp_path, recipe % (10, "1.0"))
    open_run(tmp_path, recipe % (600, "1.0"))
    (tmp_path / "stages/rl/step-000005").mkdir(parents=True)
    with pytest.raises(UserError, match=r"differs in stages\.rl\.rewards\.bleu\.weight\)"):
        open_run(tmp_path, recipe % (600, "0.5"))


def test_a_folder_whose_recipe_cannot_be_read_is_not_taken_for_this_run(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("{not")
    with pytest.raises(UserError, match=r"recipe\.yaml: cannot be read"):
        open_run(tmp_path, "stages: []\n")
    assert (tmp_path / "recipe.yaml").read_text() == "{not"


def test_a_run_may_make_its_forwards_anew(tmp_path: Path):
    """What the first step's check advises, and what a run needs that ran out of memory or is of an older version."""
    open_run(tmp_path, "stages: [{name: rl, steps: 10}]\n")
    open_run(tmp_path, "stages: [{name: rl, steps: 10, shared_prefix: true, tokens_per_forward: 8192}]\n")
    open_run(tmp_path, "stages: [{name: rl, steps: 10, shared_prefix: false, tokens_per_forward: 512}]\n")
    assert "shared_prefix: false" in (tmp_path / "recipe.yaml").read_text()


def test_reports_written_under_another_limit_are_not_judged(tmp_path: Path):
    reports = tmp_path / "predictions" / "dev" / "sft.jsonl"
    open_run(tmp_path, "evaluation: {headline: a, max_new_tokens: 8}\n")
    reports.parent.mkdir(parents=True)
    reports.write_text("{}\n")
    open_run(tmp_path, "evaluation: {headline: b, max_new_tokens: 8}\n")
    assert reports.exists()
    open_run(tmp_path, "evaluation: {headline: b}\n")
    assert not reports.exists()


def test_a_folder_that_cannot_be_written_is_the_users_to_put_right(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run: cannot be written \(Not a directory\); choose another `output`"):
        open_run(tmp_path / "file" / "run", "seed: 0\n")
