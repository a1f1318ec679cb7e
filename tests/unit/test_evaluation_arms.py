"""Evaluation of reports and arms on invented studies: keys, controls, comparisons, errors."""

import json
from pathlib import Path

import pytest

from unirg.errors import UserError
from unirg.evaluation.arms import best_constants, evaluate_arms, shuffle
from unirg.evaluation.evaluate import Arm, EvaluationConfig, compare, evaluate_predictions, measure
from unirg.evaluation.table import figure_groups
from unirg.scoring.contract import RewardConfig
from unirg.study import Study

NORMAL = "Findings: No pleural effusion. No pneumothorax."
EFFUSION = "Findings: Left pleural effusion. No pneumothorax."
BOTH = "Findings: Left pleural effusion. Pulmonary edema. No pneumothorax."

REWARDS = '''
def overlap(candidates, references, **columns):
    """Share of the reference's words; None on the first study."""
    found = []
    for candidate, reference, study in zip(candidates, references, columns["study_id"]):
        words = set(reference.split())
        found.append(None if study == "s0" else len(words & set(candidate.split())) / len(words))
    return found


def says_something(candidates, references, **columns):
    return [float(bool(candidate)) for candidate in candidates]


def positive_f1(candidates, references, **columns):
    return [1.0] * len(candidates)
'''


@pytest.fixture
def studies() -> list[Study]:
    """Ten studies: four with an effusion and edema of which the report omits the edema, six normal."""
    abnormal = {"effusion": 1, "effusion/left": 1, "effusion/right": 0, "edema": 1, "pneumothorax": 0}
    normal = {"effusion": 0, "edema": 0, "pneumothorax": 0}
    return [
        Study(
            f"s{i}",
            findings=(EFFUSION if i < 4 else NORMAL).removeprefix("Findings: "),
            labels=abnormal if i < 4 else normal,
            extra={"complete": BOTH if i < 4 else NORMAL, "film": "drawn"},
        )
        for i in range(10)
    ]


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)
    return path


def everywhere(studies: list[Study], report: str) -> dict[str, str]:
    return {study.id: report for study in studies}


def own(studies: list[Study]) -> dict[str, str]:
    return {study.id: f"Findings: {study.findings}" for study in studies}


def complete(studies: list[Study]) -> dict[str, str]:
    return {study.id: study.extra["complete"] for study in studies}


def test_the_reference_that_omits_and_the_complete_one_disagree(studies: list[Study]) -> None:
    copied = evaluate_predictions(studies, own(studies))["metrics"]
    assert copied["positive_f1"]["mean"] == 1.0
    assert copied["positive_f1/complete"]["mean"] == pytest.approx(8 / 12)  # 4 of 8 findings, none too much
    assert copied["truth_recall"]["mean"] == 0.5 and copied["truth_precision"]["mean"] == 1.0
    perfect = evaluate_predictions(studies, complete(studies))["metrics"]
    assert perfect["positive_f1"]["mean"] == pytest.approx(8 / 12)  # says what the report omits
    assert perfect["truth_f1"]["mean"] == perfect["truth_core_f1"]["mean"] == 1.0


def test_configured_metrics_are_taken_against_both_references_and_keep_none(
    studies: list[Study], rewards: Path
) -> None:
    metrics = [RewardConfig(name=f"{rewards}:overlap"), RewardConfig(name=f"{rewards}:says_something")]
    found = evaluate_predictions(studies, own(studies), metrics)["metrics"]
    assert found["overlap"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "judged": 9}
    assert found["overlap/complete"]["mean"] < 1.0
    assert found["says_something"]["judged"] == 10
    assert "says_something/complete" not in found  # the reference makes no difference to it


def test_metric_with_its_own_reference_column_is_given_once(studies: list[Study], rewards: Path) -> None:
    metrics = [RewardConfig(name=f"{rewards}:overlap", label="to_complete", reference="complete")]
    found = evaluate_predictions(studies, complete(studies), metrics)["metrics"]
    assert found["to_complete"]["mean"] == 1.0 and "to_complete/complete" not in found


def test_metric_that_takes_a_counted_name_is_refused(studies: list[Study], rewards: Path) -> None:
    with pytest.raises(UserError, match=r"'positive_f1'.*label"):
        evaluate_predictions(studies, own(studies), [RewardConfig(name=f"{rewards}:positive_f1")])


def test_ids_that_do_not_match_are_named(studies: list[Study]) -> None:
    with pytest.raises(UserError, match=r"1 of 10 studies have no report.*s9"):
        evaluate_predictions(studies, {study.id: NORMAL for study in studies[:-1]})
    with pytest.raises(UserError, match=r"no study.*stranger"):
        evaluate_predictions(studies, own(studies) | {"stranger": NORMAL})


def test_studies_without_labels_or_complete_references_have_no_such_figures() -> None:
    plain = [Study("a", findings="No effusion."), Study("b", findings="Cardiomegaly.")]
    found = evaluate_predictions(plain, {"a": "No effusion.", "b": "Cardiomegaly."})["metrics"]
    assert found["positive_f1"]["mean"] == 1.0
    assert not [key for key in found if key.startswith("truth") or key.endswith("/complete")]


def test_undefined_figures_are_null_in_json(studies: list[Study]) -> None:
    normal = studies[4:]
    found = evaluate_predictions(normal, everywhere(normal, NORMAL))
    assert found["metrics"]["positive_f1"] == {"mean": None, "low": None, "high": None, "judged": 0}
    json.dumps(found, allow_nan=False)


def test_shuffling_gives_every_study_anothers_report(studies: list[Study]) -> None:
    reports = {study.id: study.id for study in studies}
    shuffled = shuffle(studies, reports, seed=3)
    assert sorted(shuffled.values()) == sorted(reports.values())
    assert all(shuffled[study.id] != study.id for study in studies)
    assert shuffled == shuffle(studies, reports, seed=3) != shuffle(studies, reports, seed=4)


def test_every_figure_has_its_own_best_constant(studies: list[Study], rewards: Path) -> None:
    metric = RewardConfig(name=f"{rewards}:overlap")
    best = best_constants(studies, [NORMAL, EFFUSION, BOTH], "positive_f1", [metric])
    assert best["positive_f1"] == EFFUSION
    assert best["positive_f1/complete"] == BOTH
    assert best["negation_f1"] == NORMAL
    assert best["overlap"] == EFFUSION  # has the words of both references
    with pytest.raises(UserError, match=r"'positve_f1'.*positive_f1"):
        best_constants(studies, [NORMAL], "positve_f1")


def test_arms_beside_their_controls(studies: list[Study], rewards: Path) -> None:
    arms = {
        "sft": Arm(own(studies), sees="the reports", seconds=10.0),
        "grpo": Arm(complete(studies), sampled=own(studies), truncated=dict.fromkeys(own(studies), False)),
    }
    config = EvaluationConfig(
        metrics=[RewardConfig(name=f"{rewards}:overlap")], headline="truth_f1", baseline="sft", draws=200
    )
    found = evaluate_arms(studies, arms, config, split="test", constants={"truth_f1": EFFUSION, "negation_f1": NORMAL})
    json.dumps(found, allow_nan=False)
    assert found["film"] == "drawn" and found["studies"] == 10
    assert found["arms"]["sft"]["sees"] == "the reports" and "sampled" not in found["arms"]["sft"]
    assert found["arms"]["grpo"]["sampled"]["truth_f1"]["mean"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["arms"]["grpo"]["shuffled"]["truth_f1"]["mean"] < 1.0
    assert "length" not in found["arms"]["grpo"]["shuffled"]
    assert found["controls"]["perfect reporter"]["metrics"]["truth_f1"]["mean"] == 1.0
    floor = found["controls"]["best constant report"]
    assert floor["report"] == EFFUSION
    negations = measure(studies, {study.id: NORMAL for study in studies}).statistics["negation_f1"].value
    assert floor["metrics"]["negation_f1"]["mean"] == pytest.approx(negations, abs=1e-6) and negations > 0
    gain = found["versus"]["grpo"]["truth_f1"]
    assert gain["difference"] == pytest.approx(1 / 3, abs=1e-6) and gain["relative"] == pytest.approx(0.5, abs=1e-6)
    assert 0 < gain["low"] <= gain["difference"] <= gain["high"]
    assert set(found["versus"]) == {"grpo"} and "overlap" in found["identities"]


def test_per_finding_scores_come_from_what_is_known_of_the_film(studies: list[Study]) -> None:
    found = evaluate_predictions(studies, own(studies))["per_finding"]
    assert found["effusion"]["f1"]["mean"] == 1.0 and found["effusion"]["present"] == 4
    assert found["edema"]["recall"] == 0.0 and found["edema"]["precision"] is None and found["edema"]["reported"] == 0


def test_comparison_takes_only_figures_that_both_have(studies: list[Study]) -> None:
    reports = own(studies)
    cut = dict.fromkeys(reports, False)
    differences = compare(measure(studies, reports), measure(studies, reports, truncated=cut), draws=50)
    assert "truncated" not in differences
    assert differences["positive_f1"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "relative": 0.0}


def test_figures_are_grouped_by_what_they_are_taken_against(studies: list[Study], rewards: Path) -> None:
    metrics = [RewardConfig(name=f"{rewards}:overlap"), RewardConfig(name=f"{rewards}:says_something")]
    config = EvaluationConfig(metrics=metrics, draws=10)
    groups = figure_groups(evaluate_arms(studies, {"sft": Arm(own(studies))}, config, split="test"))
    assert groups["against the studies' labels"] == ["truth_f1", "truth_core_f1"]
    assert "overlap" in groups["against the studies' own reports"]
    assert "overlap/complete" in groups["against complete references"]
    assert groups["metrics with a reference of their own"] == ["says_something"]
    assert groups["outputs"] == ["length", "duplicates", "normal"]
