"""The engine: one score per candidate and reward, in order, whoever fails."""

import pytest

from unirg.scoring.contract import RewardConfig, RewardError, ScoreBatch
from unirg.scoring.engine import ScoringEngine, score_summary

FILE = """
calls = []

def length(candidates, references, **columns):
    calls.append(list(candidates))
    return [float(len(text)) for text in candidates]

def truth(candidates, references, **columns):
    return [float(len(text)) if text else None for text in references]

def fails(candidates, references, **columns):
    raise KeyError("thing")

def short(candidates, references, **columns):
    return [1.0]

def rank(candidates, references, **columns):
    return [float(index) for index in range(len(candidates))]

rank.deduplicate = False
"""


@pytest.fixture
def rewards(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(FILE)
    return path


def _engine(path, *names, **more):
    return ScoringEngine([RewardConfig(name=f"{path}:{name}", **more) for name in names])


def _score(engine):
    return engine.collect(engine.submit(BATCH))


BATCH = ScoreBatch(
    ["aa", "b", "aa", "aa", "aa"],
    ["r1", "r1", "r1", "r2", "r1"],
    {"study_id": ["1", "1", "1", "2", "1"], "truncated": [False, False, False, False, True], "complete": ["x"] * 5},
)


def test_identical_candidates_of_a_study_are_scored_once_and_come_back_in_order(rewards):
    engine = _engine(rewards, "length")
    assert engine.collect(engine.submit(BATCH)) == {"length": [2.0, 1.0, 2.0, 2.0, 2.0]}
    calls = engine._rewards["length"].written.__globals__["calls"]
    assert calls == [["aa", "b", "aa", "aa"]]  # study 1 twice "aa" is one; study 2 and the truncated one are others


def test_a_reward_that_compares_candidates_sees_them_all(rewards):
    engine = _engine(rewards, "rank")
    assert engine.collect(engine.submit(BATCH))["rank"] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_batches_are_collected_in_any_order_and_once(rewards):
    engine = _engine(rewards, "length")
    first, second = engine.submit(ScoreBatch(["a"], [""])), engine.submit(ScoreBatch(["bbb"], [""]))
    assert engine.collect(second) == {"length": [3.0]}
    assert engine.collect(first) == {"length": [1.0]}
    with pytest.raises(KeyError):
        engine.collect(first)


def test_a_column_serves_as_reference_and_its_gaps_are_no_reference(rewards):
    engine = _engine(rewards, "truth", reference="complete")
    batch = ScoreBatch(["a", "b"], ["ref", "ref"], {"study_id": ["1", "2"], "complete": ["long text", None]})
    assert engine.collect(engine.submit(batch)) == {"truth": [9.0, None]}
    assert engine.identities()["truth"]["reference"] == "complete"


def test_an_unknown_reference_column_is_named(rewards):
    engine = _engine(rewards, "truth", reference="compleat")
    with pytest.raises(RewardError, match="'compleat' as reference; the data has: study_id"):
        engine.submit(ScoreBatch(["a"], ["b"], {"study_id": ["1"]}))


def test_a_failure_names_the_reward_and_the_studies(rewards):
    with pytest.raises(
        RewardError, match=r"reward 'fails' failed on studies 1, 2: KeyError: 'thing' \(.*own.py:12, in fails\)"
    ):
        _score(_engine(rewards, "length", "fails"))


def test_a_broken_contract_names_the_reward(rewards):
    with pytest.raises(RewardError, match="short' returned 1 scores for 4"):
        _score(_engine(rewards, "short"))


def test_two_rewards_of_one_label_are_refused():
    with pytest.raises(RewardError, match="two rewards are called 'bleu'"):
        ScoringEngine([RewardConfig(name="bleu"), RewardConfig(name="bleu", options={"variant": "coco4"})])


def test_an_empty_batch_has_no_scores(rewards):
    engine = _engine(rewards, "length")
    assert engine.collect(engine.submit(ScoreBatch([], [], {"study_id": []}))) == {"length": []}


def test_identities_say_the_variant():
    engine = ScoringEngine([RewardConfig(name="bleu", label="b4", options={"variant": "coco4"})])
    identity = {"name": "bleu", "options": {"variant": "coco4"}, "metric": "BLEU", "variant": "coco4"}
    assert engine.identities() == {"b4": identity}


def test_summary_leaves_masked_samples_out():
    figures = score_summary({"a": [1.0, None, 3.0, None], "b": [None, None]})
    assert figures["rewards/a/mean"] == 2.0
    assert figures["rewards/a/std"] == pytest.approx(2**0.5)  # torch.tensor([1.0, 3.0]).std(), which TRL logs
    assert figures["rewards/a/masked"] == 0.5
    assert figures["rewards/b/masked"] == 1.0
    assert "rewards/b/mean" not in figures
