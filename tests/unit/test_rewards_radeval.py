"""`radeval:NAME`: RadEval's metrics behind the contract, by a stand-in and by the package where there is one."""

import importlib.util
import math
import sys
import types

import pytest

from unirg.scoring.contract import RewardConfig, RewardError
from unirg.scoring.registry import installed, load_reward

NAN = float("nan")


class Length:
    """A metric with one figure: the candidate's share of the reference's words."""

    is_api_based = False

    def __init__(self, scale=1.0):
        self.scale = scale

    def compute(self, refs, hyps, per_sample=False, detailed=False, on_progress=None):
        assert per_sample and all(text.strip() for text in [*refs, *hyps])
        return {"length": [self.scale * len(h.split()) / len(r.split()) for r, h in zip(refs, hyps)]}


class Two(Length):
    def compute(self, refs, hyps, per_sample=False, detailed=False, on_progress=None):
        return {"two_a": [0.25] * len(refs), "two_b": (0.75 for _ in refs)}


class Remote(Length):
    is_api_based = True


class Odd(Length):
    """Not finite for some candidates."""

    def compute(self, refs, hyps, per_sample=False, detailed=False, on_progress=None):
        return {"odd": [{"nan": NAN, "inf": math.inf, "none": None}.get(h, 0.5) for h in hyps]}


class Drops(Length):
    """Leaves out the pairs it cannot score, as RaTEScore does, so that its list is too short."""

    def compute(self, refs, hyps, per_sample=False, detailed=False, on_progress=None):
        return {"drops": [len(h) / 100 for h in hyps if h != "?"]}


STAND_INS = {"length": Length, "two": Two, "remote": Remote, "odd": Odd, "drops": Drops, "radcliq": Length}


@pytest.fixture
def radeval(monkeypatch):
    """RadEval's registry, with metrics of our own in it."""
    registry = types.ModuleType("radeval.metrics._registry")
    registry.METRIC_REGISTRY = {name: ("", "") for name in [*STAND_INS, "broken"]}

    def get_metric_class(name):
        if name == "broken":
            raise ImportError("No module named 'stanza'")
        return STAND_INS[name]

    registry.get_metric_class = get_metric_class
    for name in ("radeval", "radeval.metrics"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    monkeypatch.setattr("unirg_rewards.radeval_bridge.version", lambda package: f"{package}-version")


def test_a_metric_is_named_as_it_is_there(radeval):
    reward = load_reward("radeval:length", {"settings": {"scale": 2.0}})
    assert reward.score(["a b", "a"], ["a b c d", "a"]) == [1.0, 2.0]
    assert reward.identity["metric"] == "RadEval length" and reward.identity["radeval"] == "radeval-version"
    assert RewardConfig(name="radeval:length").log_label == "length"


def test_blank_reports_never_reach_the_metric(radeval):
    scores = load_reward("radeval:length").score(["", " \n", "a", "a", ""], ["a", "a", "", "a b", " "])
    assert scores == [0.0, 0.0, None, 0.5, None]
    assert load_reward("radeval:length").score([""], ["a"]) == [0.0]


def test_of_several_figures_one_must_be_named(radeval):
    with pytest.raises(RewardError, match="two_a, two_b; give one as `key`"):
        load_reward("radeval:two").score(["a"], ["a"])
    with pytest.raises(RewardError, match="'two_c' is none of them"):
        load_reward("radeval:two", {"key": "two_c"}).score(["a"], ["a"])
    assert load_reward("radeval:two", {"key": "two_b"}).score(["a", "b"], ["a", "a"]) == [0.75, 0.75]


def test_what_is_not_finite_is_masked(radeval):
    assert load_reward("radeval:odd").score(["nan", "inf", "none", "x"], ["a"] * 4) == [None, None, None, 0.5]


def test_a_list_that_is_too_short_never_shifts_scores(radeval):
    assert load_reward("radeval:drops").score(["ab", "?", "abcd"], ["a"] * 3) == [0.02, None, 0.04]


def test_a_distance_is_negated_and_silence_is_worse_than_any_report(radeval):
    reward = load_reward("radeval:radcliq")
    near, far, silent = reward.score(["a b", "a b c d", ""], ["a b"] * 3)
    assert silent < far < near < 0
    assert reward.identity["negated"]


def test_metrics_that_send_reports_away_need_leave(radeval):
    with pytest.raises(RewardError, match="allow_remote"):
        load_reward("radeval:remote").setup()
    assert load_reward("radeval:remote", {"allow_remote": True}).score(["a"], ["a"]) == [1.0]


def test_unknown_names_options_and_broken_metrics_are_said(radeval):
    with pytest.raises(RewardError, match=r"no metric 'lenght'; it has: .*length"):
        load_reward("radeval:lenght").setup()
    with pytest.raises(RewardError, match="no option 'keys'"):
        load_reward("radeval:length", {"keys": "a"})
    with pytest.raises(RewardError, match=r"radeval:broken cannot be loaded.*stanza"):
        load_reward("radeval:broken").setup()


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "radeval", None)
    reward = load_reward("radeval:bleu")  # naming it imports nothing
    with pytest.raises(RewardError, match="pip install radeval"):
        reward.setup()


def test_the_family_is_listed_with_what_it_needs():
    [listed] = [reward for reward in installed() if reward.name == "radeval"]
    assert listed.error is None and "radeval package" in listed.needs and "radeval:NAME" in listed.measures


@pytest.mark.skipif(importlib.util.find_spec("radeval") is None, reason="the radeval package is not installed")
def test_radevals_own_bleu_and_rouge():
    candidates, references = ["No effusion.", "", "Heart is normal in size."], ["No effusion. Heart is normal."] * 3
    evaluator = pytest.importorskip("radeval").RadEval(metrics=["bleu", "rouge"], per_sample=True, show_progress=False)
    expected = evaluator(refs=references[::2], hyps=candidates[::2])
    for name, key in (("bleu", "bleu"), ("rouge", "rougeL")):
        scores = load_reward(f"radeval:{name}", {"key": key}).score(candidates, references)
        assert scores[::2] == expected[key] and scores[1] == 0.0
    with pytest.raises(RewardError, match="rouge1, rouge2, rougeL"):
        load_reward("radeval:rouge").score(candidates, references)
