"""Figures of a corpus that are no mean of scores: what a reward says of them, and what an evaluation makes of it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from unirg.evaluation.arms import evaluate_arms
from unirg.evaluation.evaluate import Arm, EvaluationConfig, evaluate_predictions
from unirg.evaluation.intervals import bootstrap_ratio, corpus_statistic, intervals, mean_statistic, paired_ratios
from unirg.scoring import command
from unirg.scoring.contract import RewardConfig, RewardError, ScoreBatch, validated_terms
from unirg.scoring.engine import ScoringEngine
from unirg.study import Study

IDS = ["a", "b", "c"]

# Words shared, of all words: pooled, by two classes of words (with an "e" and without), and of every study but s0.
OVERLAP = """
import os

class Overlap:
    def score(self, candidates, references, **columns):
        return [float(candidate == reference) for candidate, reference in zip(candidates, references)]

    def corpus_terms(self, candidates, references, *, study_id):
        rows = []
        for candidate, reference, study in zip(candidates, references, study_id):
            pairs = []
            for with_e in (True, False):
                words = {word for word in reference.split() if ("e" in word) == with_e}
                pairs.append((len(words & set(candidate.split())), len(words)))
            rows.append(None if study == "s0" else pairs)
        pooled = [row and tuple(map(sum, zip(*row))) for row in rows]
        return {"pooled": pooled, "by_class": rows}

class Dies(Overlap):
    def corpus_terms(self, candidates, references, **columns):
        os.abort()
"""


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    (tmp_path / "overlap.py").write_text(OVERLAP)
    return tmp_path / "overlap.py"


def random_terms(studies: int, classes: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    totals = rng.integers(0, 3, size=(studies, classes)) * (rng.random(classes) < 0.5)  # some classes never occur
    return np.stack([rng.integers(0, totals + 1), totals], axis=2).astype(float)


def test_a_mean_over_classes_is_resampled_as_a_whole() -> None:
    terms_NC2 = random_terms(40, 14)
    never = int((terms_NC2[:, :, 1].sum(axis=0) == 0).sum())
    assert never > 0
    statistic = corpus_statistic([None, *terms_NC2.tolist(), None])
    assert statistic.judged == int((terms_NC2[:, :, 1].sum(axis=1) > 0).sum())

    def macro(studies: np.ndarray) -> float:
        hits_C, totals_C = studies.sum(axis=0).T
        return float(np.mean([hit / total if total else 0.0 for hit, total in zip(hits_C, totals_C)]))

    rng, drawn = np.random.default_rng(3), []
    for _ in range(200):
        rows = rng.integers(42, size=42)
        drawn.append(macro(terms_NC2[rows[(rows > 0) & (rows < 41)] - 1]))
    beside = mean_statistic([0.5] * 42)  # resampled in one product with the other
    mean, found = intervals([beside, statistic], seed=3, draws=200)
    assert mean == (0.5, 0.5, 0.5)
    assert found == pytest.approx((macro(terms_NC2), *np.percentile(drawn, (2.5, 97.5))))


def test_one_class_is_a_ratio_of_sums() -> None:
    assert corpus_statistic([[(1, 2)], None, [(0, 6)]]).value == pytest.approx(1 / 8)
    ours = intervals([corpus_statistic([[(1, 2)], [(3, 4)], [(0, 6)]])])[0]
    assert ours == bootstrap_ratio([1, 3, 0], [2, 4, 6])


def test_what_no_study_could_be_judged_by_is_undefined() -> None:
    for terms in ([None, None], [[(0, 0), (0, 0)]], []):
        assert math.isnan(corpus_statistic(terms).value)
        assert all(math.isnan(value) for value in intervals([corpus_statistic(terms)], draws=5)[0])


def test_two_runs_are_compared_on_the_same_draws() -> None:
    terms = random_terms(30, 5).tolist()
    worse = [[(hits / 2, total) for hits, total in row] for row in terms]
    (found,) = paired_ratios([corpus_statistic(worse)], [corpus_statistic(terms)], draws=100)
    value = corpus_statistic(terms).value
    assert found.mean == pytest.approx(value / 2) and found.relative == pytest.approx(1)
    assert 0 < found.low < found.mean < found.high


def test_a_pair_may_stand_alone_and_numbers_be_of_any_kind() -> None:
    given = {"f": [(1, np.float32(2)), None, [(True, 3), (0.5, 4)]]}
    with pytest.raises(RewardError, match=r"'mine': corpus_terms 'f' has 1 and 2 pairs"):
        validated_terms("mine", given, IDS)
    given["f"][2] = [[0.5, 4]]
    assert validated_terms("mine", given, IDS) == {"f": [[(1.0, 2.0)], None, [(0.5, 4.0)]]}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned list, expected a mapping"),
        ({"f": [(1, 2)] * 2}, "'f' has 2 entries, expected a list of 3"),
        ({"f": 0.5}, "'f' is a float, expected a list of 3"),
        ({"f": [(1, 2), (1, 2), 0.5]}, "'f' is 0.5 for study c; expected .numerator, denominator., a list"),
        ({"f": [(1, 2), (1, 2, 3), None]}, r"is \(1, 2, 3\) for study b"),
        ({"f": [(1, math.nan), None, None]}, "for study a"),
        ({"f": [[], None, None]}, "for study a"),
        ({"f": ["ab", None, None]}, "for study a"),
        ({"f/complete": [None] * 3}, "a figure called 'f/complete'"),
        ({3: [None] * 3}, "a figure called 3"),
    ],
)
def test_what_is_no_term_is_named(returned: object, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        validated_terms("mine", returned, IDS)


BATCH = ScoreBatch(["here we are", "we"], ["here we go", "are we"], {"study_id": ["s1", "s2"]})


def test_workers_give_the_terms_that_are_given_here(rewards: Path) -> None:
    config = RewardConfig(name=f"{rewards}:Overlap")
    bleu = RewardConfig(name="bleu")  # has none
    here = ScoringEngine([config, bleu]).corpus_terms(BATCH)
    assert here == {"Overlap": {"pooled": [[(2, 3)], [(1, 2)]], "by_class": [[(2, 2), (0, 1)], [(1, 2), (0, 0)]]}}
    with ScoringEngine([config, bleu], supervised=True) as engine:
        there = engine.corpus_terms(BATCH)
    assert json.loads(json.dumps(here)) == there


def test_a_worker_that_dies_of_it_leaves_the_figures_out_or_stops(
    rewards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RewardConfig(name=f"{rewards}:Dies")
    with ScoringEngine([config], supervised=True) as engine:
        assert engine.corpus_terms(BATCH) == {}
        assert "killed by SIGABRT" in capsys.readouterr().err
        assert engine.collect(engine.submit(BATCH)) == {"Dies": [0.0, 0.0]}  # and it goes on scoring
    strict = config.model_copy(update={"on_error": "raise"})
    with ScoringEngine([strict], supervised=True) as engine, pytest.raises(RewardError, match="'Dies' failed on"):
        engine.corpus_terms(BATCH)


@pytest.fixture
def studies() -> list[Study]:
    texts = ["left effusion", "right effusion", "the lungs", "clear"]
    return [
        Study(f"s{i}", findings=text, labels={"effusion": 1}, extra={"complete": f"{text} seen"})
        for i, text in enumerate(texts)
    ]


def test_an_evaluation_has_them_beside_the_mean_against_either_reference(rewards: Path, studies: list[Study]) -> None:
    reports = {study.id: f"Findings: {study.findings}" for study in studies}
    found = evaluate_predictions(studies, reports, [RewardConfig(name=f"{rewards}:Overlap")], draws=50)["metrics"]
    assert found["Overlap"]["mean"] == 1
    assert found["Overlap.pooled"] == {"mean": 1, "low": 1, "high": 1, "judged": 3}
    # s1 to s3 have 3 + 3 + 2 words and "Findings:"; all but "seen", which has an e, are said
    assert "Overlap.pooled/complete" in found and found["Overlap.pooled/complete"]["mean"] < 1
    assert found["Overlap.pooled/complete"]["low"] <= found["Overlap.pooled/complete"]["mean"]


def test_one_can_be_the_headline_that_decides(rewards: Path, studies: list[Study]) -> None:
    config = EvaluationConfig(
        metrics=[RewardConfig(name=f"{rewards}:Overlap", label="overlap")],
        headline="overlap.by_class",
        baseline="poor",
        draws=20,
    )
    arms = {
        "poor": Arm({study.id: "Findings:" for study in studies}),
        "rich": Arm({study.id: f"Findings: {study.findings}" for study in studies}),
    }
    evaluation = evaluate_arms(studies, arms, config, split="dev")
    assert evaluation["versus"]["rich"]["overlap.by_class"]["difference"] > 0
    assert "overlap.by_class" in evaluation["arms"]["rich"]["shuffled"]


def test_score_sums_over_all_its_batches(
    rewards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("s0", "x", "x"), ("s1", "here we go", "here we are"), ("s2", "are we", "we"), ("s3", "", "x")]
    for number, name in ((1, "references"), (2, "candidates")):
        lines = [json.dumps({"id": row[0], "report": row[number]}) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    files = tmp_path / "references.jsonl", tmp_path / "candidates.jsonl"
    monkeypatch.setattr(command, "BATCH", 2)
    assert command.score(*files, f"{rewards}:Overlap", as_json=True, summary=True) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert all(set(json.loads(line)) == {"id", "Overlap"} for line in lines)
    summary = json.loads(last)["summary"]
    assert list(summary) == ["Overlap", "Overlap.pooled", "Overlap.by_class"]
    assert summary["Overlap.pooled"]["mean"] == pytest.approx(3 / 5)
    assert (summary["Overlap.pooled"]["judged"], summary["Overlap.pooled"]["studies"]) == (2, 4)
    assert summary["Overlap.by_class"]["mean"] == pytest.approx((3 / 4 + 0 / 1) / 2)
    assert command.score(*files, f"{rewards}:Overlap", summary=True) == 0
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[-3:]]
    assert lines == [["Overlap", "0.2500"], [".pooled", "0.6000"], [".by_class", "0.3750"]]
