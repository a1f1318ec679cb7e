"""Label sets: published per-sentence labels, the CheXpert labeler's samples, and agreement with human gold."""

import csv
import importlib.util
import os
from pathlib import Path

import pytest

from unirg.errors import UserError
from unirg.extraction import label_vector
from unirg.extraction.labels import CHEXPERT14, CXR14


@pytest.mark.parametrize(
    ("report", "label"),
    [  # CheXbert's label for each sentence, all "present", as published with RadEval's tests (MIT)
        ("Mild cardiomegaly is present.", "Cardiomegaly"),
        ("Patchy right lower lobe consolidation.", "Consolidation"),
        ("Patchy right air space opacity.", "Lung Opacity"),
        ("Small left pleural effusion is seen.", "Pleural Effusion"),
        ("Left apical pneumothorax is present.", "Pneumothorax"),
        ("Bibasilar subsegmental atelectatic change.", "Atelectasis"),
        ("Pulmonary edema is present.", "Edema"),
        ("A right upper lobe lung lesion is identified.", "Lung Lesion"),
        ("Acute displaced left rib fracture is present.", "Fracture"),
        ("Endotracheal tube and enteric tube are in place.", "Support Devices"),
        ("No focal airspace opacity. Mild right lower lobe pneumonia.", "Pneumonia"),
    ],
)
def test_chexbert_probes(report, label):
    vector = label_vector(report, "chexpert14")
    assert [name for name, value in vector.items() if value == 1 and name != "No Finding"] == [label]


def test_label_order_and_missing_labels():
    vector = label_vector("Left effusion. No pneumothorax. Possible pneumonia.", "cxr14")
    assert list(vector) == list(CXR14)
    assert vector == dict.fromkeys(CXR14) | {"Effusion": 1, "Pneumothorax": 0, "Pneumonia": -1}
    assert list(label_vector("", "chexpert14")) == list(CHEXPERT14)
    with pytest.raises(ValueError, match="chexpert14, cxr14"):
        label_vector("", "padchest")


def test_affirmed_wins_over_doubted_over_denied():
    assert label_vector("No edema. Possible edema.", "cxr14")["Edema"] == -1
    assert label_vector("Mild edema. Possible edema. No edema.", "cxr14")["Edema"] == 1


def test_a_vector_is_the_callers_own():
    label_vector("Edema.", "cxr14")["Edema"] = 0
    assert label_vector("Edema.", "cxr14")["Edema"] == 1


def test_no_finding():
    assert label_vector("Lungs are clear. Right port in place.", "chexpert14")["No Finding"] == 1
    assert label_vector("Scoliosis.", "chexpert14")["No Finding"] is None


@pytest.fixture
def reference() -> Path:
    if "UNIRG_REFERENCE" not in os.environ:
        pytest.skip("UNIRG_REFERENCE (the reference data) is not set")
    return Path(os.environ["UNIRG_REFERENCE"])


def test_the_chexpert_labelers_own_samples(reference):
    with (reference / "chexpert_labeler" / "labeled_reports.csv").open(newline="") as lines:
        for row in csv.DictReader(lines):
            report = row.pop("Reports")
            expected = {label: int(float(value)) if value else None for label, value in row.items()}
            assert label_vector(report, "chexpert14") == expected, report


def test_agreement_with_human_gold_on_reports_not_tuned_on(reference):
    path = Path(__file__).parents[2] / "benchmarks" / "extraction.py"
    spec = importlib.util.spec_from_file_location("benchmark_extraction", path)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    try:
        rows = benchmark.load(reference / "openi_gold" / "openi_gold_dev.csv", None)
    except UserError as error:
        pytest.skip(str(error))
    held_out = [row for row in rows if not benchmark.is_tuning(row[0])]

    def ours(report: str) -> dict[str, bool]:
        return {label: value == 1 for label, value in label_vector(report, "cxr14").items()}

    scores = benchmark.scores(benchmark.count(held_out, ours))
    baseline = benchmark.scores(benchmark.count(held_out, benchmark.baseline))
    assert scores["micro"]["f1"] >= 0.87
    assert scores["micro without Hernia"]["f1"] >= 0.89
    assert scores["micro"]["f1"] > baseline["micro"]["f1"] + 0.04
