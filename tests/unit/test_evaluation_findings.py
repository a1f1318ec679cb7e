"""Finding counts on invented reports, by hand."""

import pytest

from unirg.evaluation.findings import (
    Counts,
    count_against_labels,
    count_against_text,
    count_by_finding,
    output_statistics,
    report_items,
)


def counted(counts: Counts) -> tuple[int, int, int]:
    return int(counts.tp_N.sum()), int(counts.fp_N.sum()), int(counts.fn_N.sum())


def test_positives_negations_and_sides_are_counted_apart() -> None:
    candidate = "Small left pleural effusion. Cardiomegaly. No pneumothorax."
    reference = "Small right pleural effusion. No pneumothorax. No pulmonary edema."
    counts = count_against_text([candidate], [reference])
    assert counted(counts["positive"]) == (1, 1, 0)  # effusion; cardiomegaly is too much
    assert counted(counts["core"]) == (0, 2, 1)  # the effusion is on the other side
    assert counted(counts["negation"]) == (1, 0, 1)  # edema is not denied


def test_a_bilateral_finding_is_two_items_with_side_and_one_without() -> None:
    counts = count_against_text(["Left pleural effusion."], ["Bilateral pleural effusions."])
    assert counted(counts["positive"]) == (1, 0, 0)
    assert counted(counts["core"]) == (1, 0, 1)


def test_a_sided_mention_takes_the_place_of_one_without_side() -> None:
    items = report_items("Findings: Left pleural effusion. Impression: Pleural effusion.")
    assert items.core == {"effusion/left"}


def test_a_finding_that_is_present_on_one_side_is_not_negative() -> None:
    items = report_items("Left pleural effusion. No right pleural effusion.")
    assert items.positive == {"effusion"} and items.negative == frozenset()


def test_what_the_reference_is_unsure_of_is_left_out_of_both_sides() -> None:
    reference = "Possible pneumonia. No pneumothorax."
    assert report_items(reference).uncertain == {"pneumonia"}
    for candidate in ("Pneumonia. No pneumothorax.", "No pneumonia. No pneumothorax.", "No pneumothorax."):
        counts = count_against_text([candidate], [reference])
        assert counted(counts["positive"]) == (0, 0, 0)
        assert counted(counts["negation"]) == (1, 0, 0)


def test_only_known_labels_are_counted() -> None:
    labels = {"effusion": 1, "effusion/left": 1, "effusion/right": 0, "edema": 0, "nodule": -1}
    said = "Left pleural effusion. Pulmonary edema. Pulmonary nodule. Rib fracture."  # fracture: not known
    counts = count_against_labels([said], [labels])
    assert counted(counts["label"]) == (1, 1, 0)
    assert counted(counts["label_core"]) == (1, 1, 0)


def test_wrong_side_costs_the_core_and_not_the_label() -> None:
    labels = {"effusion": 1, "effusion/left": 1, "effusion/right": 0}
    counts = count_against_labels(["Right pleural effusion."], [labels])
    assert counted(counts["label"]) == (1, 0, 0)
    assert counted(counts["label_core"]) == (0, 1, 1)


def test_labels_without_sides_judge_the_finding_alone() -> None:
    counts = count_against_labels(["Left pleural effusion."], [{"effusion": 1}])
    assert counted(counts["label_core"]) == (1, 0, 0)


def test_a_label_that_is_known_by_side_alone_counts_for_the_finding() -> None:
    assert counted(count_against_labels(["No acute findings."], [{"effusion/left": 1}])["label"]) == (0, 0, 1)


def test_findings_that_labels_give_as_absent_come_from_labels_not_from_the_text() -> None:
    # The reference omits the effusion that was drawn: the label still counts it.
    by_finding = count_by_finding(["Left pleural effusion."], ["No pneumothorax."], [{"effusion": 1}])
    assert counted(by_finding["effusion"]) == (1, 0, 0)
    by_text = count_by_finding(["Left pleural effusion."], ["No pneumothorax."], [{}])
    assert counted(by_text["effusion"]) == (0, 1, 0)


def test_micro_f1_of_a_small_corpus() -> None:
    counts = count_against_text(
        ["Cardiomegaly.", "Left pleural effusion. Pulmonary edema."], ["Cardiomegaly. Pulmonary edema.", "No effusion."]
    )
    assert counted(counts["positive"]) == (1, 2, 1)
    assert counts["positive"].f1.value == pytest.approx(2 / 5)
    assert counts["positive"].precision.value == pytest.approx(1 / 3)
    assert counts["positive"].recall.value == pytest.approx(1 / 2)


def test_outputs() -> None:
    texts = ["No effusion.", "No effusion.", "No effusion.", "Left pleural effusion today."]
    found = output_statistics(texts, [False, True, False, False])
    assert found["length"].value == pytest.approx(10 / 4)
    assert found["duplicates"].value == pytest.approx(1 - 2 / 4)  # 2 distinct outputs of 4
    assert found["normal"].value == pytest.approx(3 / 4)
    assert found["truncated"].value == pytest.approx(1 / 4)
    assert "truncated" not in output_statistics(texts)


def test_counts_of_no_study_are_empty_and_their_f1_undefined() -> None:
    counts = count_against_text([], [])["positive"]
    assert counted(counts) == (0, 0, 0) and counts.f1.value != counts.f1.value
