"""What the report reader finds: polarity, side, place, severity, span. All report texts here are invented."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unirg.extraction import FINDINGS, Mention, extract, is_normal


def stated(report: str) -> set[tuple[str, str]]:
    return {(mention.finding, mention.polarity) for mention in extract(report)}


def one(report: str, finding: str) -> Mention:
    (mention,) = [mention for mention in extract(report) if mention.finding == finding]
    return mention


def says(report: str, **polarities: str) -> None:
    """Exactly these findings, each with this polarity (n, p or u)."""
    names = {"n": "negative", "p": "positive", "u": "uncertain"}
    assert stated(report) == {(finding, names[polarity]) for finding, polarity in polarities.items()}, report


@pytest.mark.parametrize(
    ("report", "polarities"),
    [
        ("No pneumothorax or effusion.", {"pneumothorax": "n", "effusion": "n"}),
        ("No consolidation, effusion, or pneumothorax.", {"consolidation": "n", "effusion": "n", "pneumothorax": "n"}),
        ("There is no evidence of edema, pneumonia or mass.", dict.fromkeys(("edema", "pneumonia", "mass"), "n")),
        ("Atelectasis without effusion or pneumothorax.", {"atelectasis": "p", "effusion": "n", "pneumothorax": "n"}),
        ("The lungs are free of consolidation.", {"consolidation": "n"}),
        ("The lungs are clear of infiltrate.", {"infiltrate": "n"}),
        ("Neither effusion nor pneumothorax is seen.", {"effusion": "n", "pneumothorax": "n"}),
        ("Negative for pneumonia.", {"pneumonia": "n"}),
        ("Does not show a pneumothorax.", {"pneumothorax": "n"}),
        ("Pneumothorax is not seen.", {"pneumothorax": "n"}),
        ("A pleural effusion is absent.", {"effusion": "n"}),
        ("The right effusion has resolved.", {"effusion": "n"}),
        ("Edema has cleared.", {"edema": "n"}),
        ("The pneumothorax is no longer identified.", {"pneumothorax": "n"}),
        ("There is no longer a pneumothorax.", {"pneumothorax": "n"}),
        ("Interval resolution of the left effusion.", {"effusion": "n"}),
        ("The chest tube has been removed.", {"device": "n"}),
        ("No pneumothorax, small left effusion.", {"pneumothorax": "n", "effusion": "p"}),
        ("No pneumothorax but a small effusion remains.", {"pneumothorax": "n", "effusion": "p"}),
        ("No effusion is seen and there is mild edema.", {"effusion": "n", "edema": "p"}),
        ("Without edema or effusion, cardiomegaly is stable.", {"edema": "n", "effusion": "n", "cardiomegaly": "p"}),
        ("Effusion, no pneumothorax.", {"effusion": "p", "pneumothorax": "n"}),
    ],
)  # fmt: skip
def test_denial_reaches_its_list_and_no_further(report, polarities):
    says(report, **polarities)


@pytest.mark.parametrize(
    ("report", "polarities"),
    [
        ("No change in the left effusion.", {"effusion": "p"}),
        ("No significant interval change in bilateral effusions.", {"effusion": "p"}),
        ("Without significant change in edema.", {"edema": "p"}),
        ("No increase in the pneumothorax.", {"pneumothorax": "p"}),
        ("Effusion not significantly changed.", {"effusion": "p"}),
        ("Pneumonia is not excluded.", {"pneumonia": "u"}),
        ("A small effusion cannot be excluded.", {"effusion": "u"}),
        ("Cannot exclude pneumonia.", {"pneumonia": "u"}),
        ("Pneumonia cannot be entirely excluded.", {"pneumonia": "u"}),
        ("No new infiltrate.", {"infiltrate": "n"}),
    ],
)
def test_what_looks_like_denial(report, polarities):
    says(report, **polarities)


@pytest.mark.parametrize(
    ("report", "polarities"),
    [
        ("Opacity may represent pneumonia.", {"opacity": "p", "pneumonia": "u"}),
        ("Possible small effusion.", {"effusion": "u"}),
        ("Likely atelectasis.", {"atelectasis": "u"}),
        ("Opacity suggesting pneumonia.", {"opacity": "p", "pneumonia": "u"}),
        ("Question of a nodule.", {"nodule": "u"}),
        ("Atelectasis versus infiltrate.", {"atelectasis": "u", "infiltrate": "u"}),
        ("Opacity, possibly due to edema.", {"opacity": "p", "edema": "u"}),
        ("Differential includes edema, mass and aspiration.", {"edema": "u", "mass": "u", "aspiration": "u"}),
        ("Small effusion suspected.", {"effusion": "u"}),
        ("Consistent with pneumonia.", {"pneumonia": "p"}),
        ("No suspicious nodule.", {"nodule": "n"}),
        ("Possible pneumonia with effusion.", {"pneumonia": "u", "effusion": "p"}),
        ("Atelectasis or infiltrate.", {"atelectasis": "p", "infiltrate": "p"}),
        ("Possible pneumonia and cardiomegaly.", {"pneumonia": "u", "cardiomegaly": "p"}),
    ],
)  # fmt: skip
def test_doubt(report, polarities):
    says(report, **polarities)


@pytest.mark.parametrize(
    ("report", "polarities"),
    [
        ("Heart size is normal.", {"cardiomegaly": "n"}),
        ("Normal heart size.", {"cardiomegaly": "n"}),
        ("The heart is not enlarged.", {"cardiomegaly": "n"}),
        ("The heart is not significantly enlarged.", {"cardiomegaly": "n"}),
        ("Heart size is at the upper limits of normal.", {"cardiomegaly": "n"}),
        ("The heart is borderline enlarged.", {"cardiomegaly": "u"}),
        ("Enlarged cardiac silhouette.", {"cardiomegaly": "p"}),
        ("The cardiac silhouette is mildly enlarged.", {"cardiomegaly": "p"}),
        ("The heart is large.", {"cardiomegaly": "p"}),
        ("Lungs are clear.", {"opacity": "n"}),
        ("Clear lungs.", {"opacity": "n"}),
        ("Cardiomediastinal silhouette is within normal limits.", {"enlarged_mediastinum": "n", "cardiomegaly": "n"}),
        ("Heart size and pulmonary vascularity are normal.", {"cardiomegaly": "n", "congestion": "n"}),
        ("The costophrenic angles are sharp.", {"effusion": "n"}),
        ("No acute cardiopulmonary process.", {"abnormality": "n"}),
        ("No acute osseous abnormality.", {"fracture": "n"}),
        ("Normal chest.", {"abnormality": "n"}),
        ("No effusion, heart size normal, mild edema.", {"effusion": "n", "cardiomegaly": "n", "edema": "p"}),
        ("The aorta is tortuous and calcified.", {"aortic_tortuosity": "p", "aortic_calcification": "p"}),
        ("Tortuous, calcified aorta.", {"aortic_tortuosity": "p", "aortic_calcification": "p"}),
        ("Normal heart size and clear lungs.", {"cardiomegaly": "n", "opacity": "n"}),
        ("The right hemidiaphragm is elevated.", {"elevated_diaphragm": "p"}),
        ("Lung volumes are low.", {"low_lung_volumes": "p"}),
        ("Hyperexpanded but clear lungs.", {"hyperinflation": "p", "opacity": "n"}),
    ],
)
def test_what_is_said_of_anatomy(report, polarities):
    says(report, **polarities)


@pytest.mark.parametrize(
    "report",
    [
        "Rule out pneumonia.",
        "Evaluate for effusion.",
        "History of pneumonia.",
        "Indication: shortness of breath, pneumonia?",
        "CLINICAL HISTORY: known effusion\nCOMPARISON: none, prior edema",
        "Comparison: pneumothorax on the film of May.",
        "",
        "No change.",
        "Stable chest radiograph.",
    ],
)
def test_questions_and_history_are_no_findings(report):
    assert extract(report) == ()
    assert is_normal(report)


def test_sections_are_told_apart():
    report = "INDICATION: pneumonia?\nFINDINGS: Left effusion.\nIMPRESSION: 1. Left effusion.2. No pneumonia."
    assert [(m.finding, m.polarity) for m in extract(report)] == [
        ("effusion", "positive"),
        ("effusion", "positive"),
        ("pneumonia", "negative"),
    ]


@pytest.mark.parametrize(
    ("report", "finding", "side", "place", "severity"),
    [
        ("Small left pleural effusion.", "effusion", "left", None, "small"),
        ("Effusion on the right, moderate.", "effusion", "right", None, "moderate"),
        ("Bilateral effusions.", "effusion", "bilateral", None, None),
        ("Right greater than left effusions.", "effusion", "bilateral", None, None),
        ("Mild bibasilar atelectasis.", "atelectasis", "bilateral", "base", "mild"),
        ("Atelectasis at the left base.", "atelectasis", "left", "base", None),
        ("In the right lower lobe, there is an opacity.", "opacity", "right", "lower lobe", None),
        ("Patchy right-sided air-space opacity.", "opacity", "right", None, None),
        ("Tiny left apical pneumothorax.", "pneumothorax", "left", "apex", "trace"),
        ("Severe cardiomegaly.", "cardiomegaly", None, None, "severe"),
        ("The heart is moderately enlarged.", "cardiomegaly", None, None, "moderate"),
        ("Significant pleural effusion.", "effusion", None, None, "large"),
        ("Acute left rib fracture.", "fracture", "left", "rib", None),
        ("Left lower consolidation.", "consolidation", "left", "lower lobe", None),
        ("The right costophrenic angle is blunted.", "blunted_angle", "right", None, None),
        ("Lingular opacity.", "opacity", "left", "lingula", None),
        ("Moderate fluid collections in both pleural spaces.", "effusion", "bilateral", None, "moderate"),
        ("No large effusion.", "effusion", None, None, None),
    ],
)
def test_side_place_severity(report, finding, side, place, severity):
    mention = one(report, finding)
    assert (mention.side, mention.place, mention.severity) == (side, place, severity)


def test_attributes_stay_with_their_finding():
    report = "Opacity in the left base and small right effusion with mild bibasilar atelectasis."
    assert [(m.finding, m.side, m.place, m.severity) for m in extract(report)] == [
        ("opacity", "left", "base", None),
        ("effusion", "right", None, "small"),
        ("atelectasis", "bilateral", "base", "mild"),
    ]


def test_a_place_after_a_list_belongs_to_all_of_it():
    for name in ("atelectasis", "effusion"):
        mention = one("Atelectasis and effusion at the left base.", name)
        assert (mention.side, mention.place) == ("left", "base")
    assert one("Left basilar atelectasis or infiltrate.", "infiltrate").side == "left"
    assert one("Small effusion and bibasilar atelectasis.", "effusion").side is None


def test_lines_headings_and_abbreviations():
    says(
        "LUNGS: Clear\nHEART: Enlarged\nNo effusion\nThere is edema",
        opacity="n",
        cardiomegaly="p",
        effusion="n",
        edema="p",
    )
    says("There is no large effusion or\nXXXX pneumothorax.", effusion="n", pneumothorax="n")
    says("Atelectasis vs. pneumonia.", atelectasis="u", pneumonia="u")
    says(
        "heart is normal . no effusion , or edema . mild atelectasis .",
        cardiomegaly="n",
        effusion="n",
        edema="n",
        atelectasis="p",
    )


def test_measurements_in_millimetres():
    assert one("A 3.2 cm mass in the right upper lobe.", "mass").size_mm == 32
    assert one("A 22 x 14 mm nodule.", "nodule").size_mm == 22
    assert one("Right lung mass measuring 5 cm.", "mass").size_mm == 50
    assert one("ETT tip 5 cm above the carina.", "device").size_mm is None


def test_device_positions():
    assert ("device_malposition", "negative") in stated("ETT in satisfactory position.")
    assert ("device_malposition", "negative") in stated("ETT tip 5 cm above the carina.")
    assert ("device_malposition", "positive") in stated("Malpositioned ETT, tip in the right bronchus.")
    assert ("device_malposition", "positive") in stated("The tube is not well positioned.")


def test_case_redactions_and_unicode():
    says("NO PNEUMOTHORAX. SMALL LEFT EFFUSION.", pneumothorax="n", effusion="p")
    says("XXXX XXXX. No XXXX effusion. Heart size XXXX normal.", effusion="n", cardiomegaly="n")
    says("There\u2019s no pneumothorax\u3002 \u0130 Small effusion", pneumothorax="n", effusion="p")


def test_is_normal():
    assert is_normal("Heart size normal. Lungs are clear. Right chest port in place.")
    assert not is_normal("Possible small effusion.")
    assert not is_normal("Scoliosis. Lungs are clear.")


VOCABULARY = (
    "no left right effusion heart lungs clear normal is not cannot be excluded , . : ; ( / versus or and may represent "
    "pneumonia 3.2 x cm XXXX Indication: History: \n \u0130 \u00df \u2019 enlarged mass bibasilar without"
)
WORDS = st.sampled_from(VOCABULARY.split(" "))


@given(st.one_of(st.text(), st.lists(WORDS).map(" ".join), st.lists(WORDS).map("".join)))
def test_any_text_can_be_read_and_spans_are_exact(report):
    mentions = extract(report)
    for mention in mentions:
        assert 0 <= mention.start < mention.end <= len(report)
        assert report[mention.start : mention.end] == mention.text
        assert mention.finding in FINDINGS
        assert mention.polarity in ("positive", "negative", "uncertain")
        assert mention.side in (None, "left", "right", "bilateral")
    assert [mention.start for mention in mentions] == sorted(mention.start for mention in mentions)


@given(
    st.lists(st.sampled_from(["effusion", "edema", "pneumothorax", "consolidation", "nodule"]), min_size=1, max_size=9)
)
def test_a_denied_list_is_denied_throughout(names):
    report = f"No {', '.join(names)}, or mass."
    assert {mention.polarity for mention in extract(report)} == {"negative"}
    assert len(extract(report)) == len(names) + 1


def test_two_thousand_repeated_words_are_read_in_full():
    assert len(extract("effusion " * 2000)) == 2000
    assert len(extract("no effusion, " * 2000)) == 2000
    assert len(extract("left " * 2000 + "effusion")) == 1
    assert len(extract("heart " * 2000 + "normal " * 2000)) <= 8 * 2000
