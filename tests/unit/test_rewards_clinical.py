"""label_f1 and entity_f1: what counts as right, half right and wrong."""

import json
import os
from pathlib import Path

import pytest

from unirg.extraction import FINDINGS, extract
from unirg.scoring.registry import load_reward
from unirg_rewards.finding_kin import KIN, SEVERITY
from unirg_rewards.ratescore_offline import DISEASES

LABELS = {"effusion": 1, "effusion/left": 1, "effusion/right": 0, "cardiomegaly": 1, "pneumothorax": 0, "nodule": -1}


def label_f1(candidate, labels=LABELS, reference="No pneumothorax.", **options):
    return load_reward("label_f1", options).score([candidate], [reference], labels=[labels])[0]


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        ("Left pleural effusion. Cardiomegaly.", 1),
        ("Left pleural effusion.", 2 / 3),
        ("Left pleural effusion. Cardiomegaly. Pneumothorax.", 4 / 5),
        ("Left pleural effusion. Cardiomegaly. Lung nodule. Rib fracture.", 1),  # uncertain and unlabelled: unknown
        ("Possible left pleural effusion. Cardiomegaly.", 1),
        ("No pleural effusion. Normal heart size.", 0),
        ("", 0),
    ],
)
def test_positives_against_labels(candidate, expected):
    assert label_f1(candidate) == pytest.approx(expected)


def test_doubt_can_be_ignored():
    assert label_f1("Possible pleural effusion. Cardiomegaly.", uncertain="ignore") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        ("Left pleural effusion. Cardiomegaly.", 1),
        ("Pleural effusion. Cardiomegaly.", 3 / 4),  # the finding without its side: half an item
        ("Right pleural effusion. Cardiomegaly.", 2 / 4),
        ("Bilateral pleural effusions. Cardiomegaly.", 4 / 5),
        ("Cardiomegaly.", 2 / 3),
    ],
)
def test_sides_against_labels(candidate, expected):
    assert label_f1(candidate, sides=True) == pytest.approx(expected)


def test_both_sides_are_two_items():
    labels = {"effusion": 1, "effusion/left": 1, "effusion/right": 1}
    assert label_f1("Bilateral effusions.", labels, sides=True) == 1
    assert label_f1("Left effusion.", labels, sides=True) == pytest.approx(2 / 3)


def test_a_normal_study_is_right_without_a_finding():
    labels = {"effusion": 0, "pneumothorax": 0}
    assert label_f1("Normal chest.", labels) == 1
    assert label_f1("Left pleural effusion.", labels) == 0
    assert label_f1("  . ", labels) == 0


@pytest.mark.parametrize("labels", [{}, None, {"nodule": -1}, {"unheard_of": 1}])
def test_without_known_labels_a_study_is_masked(labels):
    assert label_f1("Left pleural effusion.", labels) is None


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        ("No pneumothorax.", 1),
        ("No pneumothorax. No consolidation.", 2 / 3),  # denied by no one else
        ("No pneumothorax or pleural effusion.", 2 / 3),  # the effusion is there
        ("Left pleural effusion.", 0),
        ("No pneumothorax. No right pleural effusion. Small left pleural effusion.", 1),
    ],
)
def test_negations_against_those_of_the_reference(candidate, expected):
    assert label_f1(candidate, polarity="negative") == pytest.approx(expected)


def test_a_reference_that_denies_what_is_there_is_not_followed():
    wrong = "No pneumothorax. No pleural effusion."
    assert label_f1("No pneumothorax.", reference=wrong, polarity="negative") == 1
    assert label_f1("No pneumothorax.", reference="", polarity="negative") is None


def test_both_polarities_pool_their_items():
    assert label_f1("Left effusion. No pneumothorax.", polarity="both") == pytest.approx(4 / 5)


def entity_f1(candidate, reference, **options):
    return load_reward("entity_f1", options).score([candidate], [reference])[0]


REFERENCE = "Small left pleural effusion. No pneumothorax."


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        ("No pneumothorax. There is a small left effusion.", 1),
        ("Small left pleural effusion.", 2 / 3),
        ("No effusion. No pneumothorax.", 2 / 4),
        ("Small right effusion. No pneumothorax.", (1 + 5.5 / 8.5) * 2 / 4),  # 4 + 0 + 1.5 of 8.5
        ("Small effusion. No pneumothorax.", (1 + 7 / 8.5) * 2 / 4),  # the side unsaid: half its weight
        ("Large left effusion. No pneumothorax.", (1 + 7.5 / 8.5) * 2 / 4),  # two steps of three away
        ("Possible small left effusion. No pneumothorax.", (1 + 0.5) * 2 / 4),
        ("Small left effusion at the base. No pneumothorax.", 1),  # detail that the reference lacks
    ],
)
def test_partial_credit(candidate, expected):
    assert entity_f1(candidate, REFERENCE) == pytest.approx(expected)


def test_levels_bound_what_counts():
    candidate = "Large right pleural effusion. No pneumothorax."
    assert entity_f1(candidate, REFERENCE, level="finding") == 1
    assert entity_f1(candidate, REFERENCE, level="side") == pytest.approx((1 + 4 / 7) * 2 / 4)
    assert entity_f1("Lung mass.", "Lung nodule.", level="side") == 0
    assert entity_f1("Lung mass.", "Lung nodule.") == pytest.approx(0.5)


def test_every_name_that_rewards_treat_apart_is_one_that_the_extractor_finds():
    assert {name for family in KIN for name in family} | DISEASES <= set(FINDINGS)
    severities = {extract(f"{word} effusion")[0].severity for word in ("trace", "small", "moderate", "large", "severe")}
    assert severities <= set(SEVERITY) and len(severities) == 5


def test_polarities_apart():
    candidate = "Small left pleural effusion. No consolidation."
    assert entity_f1(candidate, REFERENCE, polarity="positive") == 1
    assert entity_f1(candidate, REFERENCE, polarity="negative") == 0
    assert entity_f1("No edema.", "No pneumothorax.", polarity="positive") == 1  # nothing found, nothing there


def test_the_same_said_again_or_in_less_detail_changes_nothing():
    again = REFERENCE + " Impression: Pleural effusion. Left effusion. Small left effusion. " + REFERENCE
    assert entity_f1(again, REFERENCE) == 1
    assert entity_f1(REFERENCE, again) == 1


def test_two_sides_are_both_sides():
    assert entity_f1("Left effusion. Right effusion.", "Bilateral pleural effusions.") == 1


def test_silence_and_nothing_to_judge_by():
    assert entity_f1("", REFERENCE) == 0
    assert entity_f1(" ", "No pneumothorax.", polarity="positive") == 0
    assert entity_f1(REFERENCE, "") is None
    assert entity_f1(REFERENCE, "Thank you for the referral.") is None


def _reference_folder():
    if "UNIRG_REFERENCE" not in os.environ:
        pytest.skip("UNIRG_REFERENCE (the reference data) is not set")
    return Path(os.environ["UNIRG_REFERENCE"])


def _in_order(scores, ranking):
    """Whether the scores keep an expected ranking such as "C1 > C2" or "C1 = C2"."""
    first, relation, second = ranking.split()
    difference = scores[first] - scores[second]
    return abs(difference) < 1e-9 if relation == "=" else difference * (1 if relation == ">" else -1) > 1e-9


def test_entity_f1_orders_the_radjudge_cases_better_than_word_overlap():
    groups = json.loads((_reference_folder() / "radjudge" / "radjudge_20.json").read_text())
    # The cases of this category differ in the patient's history alone, which no text metric sees.
    cases = [case for group in groups if group["category"] != "Patient Context Sensitivity" for case in group["tests"]]
    assert len(cases) == 18

    def right(name, **options):
        score = load_reward(name, options).score
        count = 0
        for case in cases:
            names = list(case["candidates"])
            texts = [case["candidates"][key]["text"] for key in names]
            scores = dict(zip(names, score(texts, [case["ground_truth"]] * len(names))))
            expected = case["expected_ranking"]
            count += all(_in_order(scores, each) for each in ([expected] if isinstance(expected, str) else expected))
        return count

    overlap = max(right("bleu"), right("bleu", variant="sentence4"), right("rouge_l"))
    assert right("entity_f1") >= overlap + 3
    assert right("entity_f1", polarity="positive") >= overlap + 6
