"""METEOR: what is sent to the program, and what is asked for where it is not there."""

import sys
from types import SimpleNamespace

import pytest

from unirg.scoring.contract import RewardError
from unirg.scoring.registry import load_reward


@pytest.fixture
def sent(monkeypatch):
    """What the program is asked, where it stands for the package: it answers with the candidate's share of words."""
    asked = []

    class Program:
        def compute_score(self, references, candidates):
            assert references.keys() == candidates.keys()
            asked.extend((candidates[key][0], references[key][0]) for key in references)
            scores = [len(candidates[key][0].split()) / 10 for key in references]
            return sum(scores), scores

    monkeypatch.setitem(sys.modules, "pycocoevalcap.meteor.meteor", SimpleNamespace(Meteor=Program))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    return asked


def test_reports_are_sent_on_one_line_and_without_the_separator(sent):
    reward = load_reward("meteor")
    scores = reward.score(["No\neffusion ||| seen.\r\n", "Clear.\u2028Lungs"], ["No\n\neffusion.", "||| Clear."])
    assert sent == [("No effusion seen.", "No effusion."), ("Clear. Lungs", "Clear.")]
    assert scores == [0.3, 0.2]


def test_blank_reports_are_not_sent_and_equal_pairs_once(sent):
    reward = load_reward("meteor")
    scores = reward.score(["", "a b", "|||", "a b", "x", ""], ["ref", "ref", "ref", "ref", " \n", "|||"])
    assert scores == [0, 0.2, 0, 0.2, None, None]
    assert sent == [("a b", "ref")]
    assert reward.score(["", ""], ["ref", ""]) == [0, None]


def test_what_is_missing_is_said(sent, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RewardError, match="install a Java runtime"):
        load_reward("meteor").setup()
    monkeypatch.setitem(sys.modules, "pycocoevalcap.meteor.meteor", None)
    with pytest.raises(RewardError, match="pip install pycocoevalcap"):
        load_reward("meteor").setup()
