"""What a reward may return, and which columns it receives."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from unirg.scoring.contract import RewardConfig, RewardError, ScoreBatch, study_columns, validated_scores
from unirg.study import Study

IDS = ["a", "b", "c"]


@pytest.mark.parametrize(
    "returned",
    [[1, 0.5, None], (True, 0.5, None), [np.float32(1), np.float64(0.5), None]],
)
def test_numbers_of_any_kind_become_floats(returned):
    scores = validated_scores("r", returned, IDS)
    assert scores == [1.0, 0.5, None]
    assert all(type(score) in (float, type(None)) for score in scores)


@pytest.mark.parametrize("returned", [np.array([1.0, 0.5, 2.0]), torch.tensor([1.0, 0.5, 2.0])])
def test_arrays_are_taken(returned):
    assert validated_scores("r", returned, IDS) == [1.0, 0.5, 2.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("inf"), 10**400, "0.5", [0.5], 1j])
def test_what_is_not_a_finite_number_is_named_with_its_study(bad):
    with pytest.raises(RewardError, match=r"reward 'mine'.*index 1 \(study b\)"):
        validated_scores("mine", [1.0, bad, 0.0], IDS)


@pytest.mark.parametrize("returned", [[1.0, 1.0], [1.0] * 4, []])
def test_another_length_says_both_lengths(returned):
    with pytest.raises(RewardError, match=f"'mine' returned {len(returned)} scores for 3 candidates"):
        validated_scores("mine", returned, IDS)


@pytest.mark.parametrize("returned", [None, 1.0, "0.1", {"a": 1.0}])
def test_what_is_no_list_is_an_error(returned):
    with pytest.raises(RewardError, match="expected a list of 3"):
        validated_scores("mine", returned, IDS)


def test_columns_hold_every_field_and_every_further_column():
    studies = [Study(id="a", labels={"effusion": 1}, extra={"complete": "x"}), Study(id="b", institution="north")]
    columns = study_columns(studies)
    assert columns["study_id"] == ["a", "b"]
    assert columns["labels"] == [{"effusion": 1}, {}]
    assert columns["institution"] == [None, "north"]
    assert columns["complete"] == ["x", None]


def test_a_further_column_cannot_hide_a_field():
    with pytest.raises(ValueError, match="study b: further column 'labels'"):
        study_columns([Study(id="a"), Study(id="b", extra={"labels": 1})])


def test_a_batch_of_unequal_lists_is_refused():
    with pytest.raises(ValueError, match="2 candidates has 1 labels"):
        ScoreBatch(["x", "y"], ["", ""], {"labels": [{}]})


def test_log_label_is_the_last_part_of_the_name():
    assert RewardConfig(name="bleu").log_label == "bleu"
    assert RewardConfig(name="dir/mine.py:short").log_label == "short"
    assert RewardConfig(name="bleu", label="b").log_label == "b"


def test_the_contract_needs_no_torch():
    code = "import sys, unirg.scoring.contract, unirg.scoring.engine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
