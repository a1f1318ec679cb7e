"""Probes: each does what it says, and only where the report allows it."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unirg.extraction import extract, is_normal
from unirg.scoring.probe_words import INVENTED, SYNONYMS
from unirg.scoring.probes import PROBES, STOCK_NORMAL, Case, commonest_normal, half_right

BY_NAME = {probe.name: probe for probe in PROBES}
ILL = (
    "Findings: There is a small left pleural effusion. The heart is mildly enlarged. No pneumothorax. "
    "Impression: Small left pleural effusion."
)
NORMAL = "Findings: The heart is normal in size. There is no pleural effusion. The lungs are clear."


def changed(name: str, text: str, **more) -> str | None:
    return BY_NAME[name](Case(text, more.pop("reference", text), **more))


def said(text: str, *attributes: str) -> list[tuple]:
    return [tuple(getattr(mention, name) for name in attributes) for mention in extract(text)]


STATEMENT = ("finding", "polarity", "side", "place", "severity")


@pytest.mark.parametrize(("finding", "sentence"), INVENTED.items())
def test_invented_sentences_say_their_finding_alone(finding, sentence):
    assert said(sentence, "finding", "polarity") == [(finding, "positive")]


@pytest.mark.parametrize(
    ("name", "text"),
    [("empty", ""), ("whitespace", " \n\t "), ("one word", "Chest"), ("headers only", "Findings: Impression:")],
)
def test_texts_that_say_nothing(name, text):
    assert changed(name, ILL) == text
    assert not extract(text)
    assert changed(name, text) is None  # where nothing would change there is no probe


def test_negation_flip_denies_a_finding_wherever_it_was_affirmed():
    text = changed("negation flip", ILL)
    assert text is not None
    assert set(said(text, "finding", "polarity")) == {
        ("effusion", "negative"),
        ("cardiomegaly", "positive"),
        ("pneumothorax", "negative"),
    }
    assert "Impression: No small left pleural effusion" in text


@pytest.mark.parametrize(
    "sentence",
    [
        "The heart is enlarged.",
        "Small left pneumothorax is seen.",
        "A nodule projects over the right upper lobe.",
        "Moderate cardiomegaly.",
        "There are moderate bilateral effusions.",
        "Atelectasis at the left base.",
    ],
)
def test_negation_flip_of_many_ways_to_affirm(sentence):
    (finding,) = {name for (name,) in said(sentence, "finding")}
    text = changed("negation flip", f"{sentence} No fracture.")
    assert text is not None and set(said(text, "finding", "polarity")) == {
        (finding, "negative"),
        ("fracture", "negative"),
    }


@pytest.mark.parametrize(
    ("sentence", "finding"),
    [
        ("No pneumothorax.", "pneumothorax"),
        ("There is no evidence of pleural effusion.", "effusion"),
        ("Cardiac silhouette is not enlarged.", "cardiomegaly"),
        ("Heart size is within normal limits.", "cardiomegaly"),
        ("The lungs are without focal opacity.", "opacity"),
    ],
)
def test_on_a_normal_study_the_flip_affirms_what_was_denied(sentence, finding):
    text = changed("negation flip", sentence)
    assert text is not None and (finding, "positive") in said(text, "finding", "polarity")
    assert changed("negation flip", sentence, labels={finding: 1}) is None  # that would be a correction


def test_laterality_swap_changes_sides_alone():
    text = changed("laterality swap", ILL)
    assert text == ILL.replace("left", "right")
    assert said(text, "finding", "polarity", "place", "severity") == said(
        ILL, "finding", "polarity", "place", "severity"
    )


def test_laterality_swap_needs_a_wrong_side():
    assert changed("laterality swap", "Bilateral effusions. No left pneumothorax.") is None
    both = {"effusion": 1, "effusion/left": 1, "effusion/right": 1}
    assert changed("laterality swap", "Left effusion.", labels=both) is None
    assert changed("laterality swap", "Left effusion.", labels=both | {"effusion/right": 0}) == "Right effusion."
    assert changed("laterality swap", "LEFT effusion, Right nodule.") == "RIGHT effusion, Left nodule."


def test_severity_change_changes_severities_alone():
    text = changed("severity change", ILL)
    assert text is not None
    assert text == ILL.replace("small", "large").replace("Small", "Large").replace("mildly", "severely")
    assert ("effusion", "large") in said(text, "finding", "severity")
    assert changed("severity change", "Left effusion. No large pneumothorax.") is None


def test_finding_dropped_leaves_the_rest():
    text = changed("finding dropped", ILL)
    assert text is not None
    rest = [statement for statement in said(ILL, *STATEMENT) if statement[0] != "effusion"]
    assert said(text, *STATEMENT) == rest
    assert changed("finding dropped", "Small left effusion.") is None  # nothing would be left
    assert changed("finding dropped", NORMAL) is None
    assert changed("finding dropped", "Left effusion. No fracture.", labels={"effusion": 0}) is None


def test_finding_invented_adds_one_false_sentence():
    text = changed("finding invented", ILL)
    assert text is not None and text.startswith(ILL)
    (new,) = [finding for (finding,) in said(text.removeprefix(ILL), "finding")]
    assert new not in {finding for (finding,) in said(ILL, "finding")}
    assert changed("finding invented", NORMAL, labels=dict.fromkeys(INVENTED, 1)) is None
    only = changed("finding invented", NORMAL, labels=dict.fromkeys(INVENTED, 1) | {"fracture": 0})
    assert only == f"{NORMAL} {INVENTED['fracture']}"


def test_an_invented_finding_is_no_other_name_of_what_is_there():
    assert not {"opacity", "atelectasis"} & Case("Right pneumonia.", "Right pneumonia.").false


def test_spam_is_false_and_hits_nothing_that_the_report_left_out():
    text = changed("findings spammed", ILL)
    assert text is not None and set(INVENTED) <= {finding for (finding,) in said(text, "finding")}
    known = dict.fromkeys(INVENTED, 0) | {"effusion": 1, "cardiomegaly": 1}
    assert changed("findings spammed", ILL, labels=known) is not None
    assert changed("findings spammed", ILL, labels=known | {"nodule": 1}) is None


def test_the_template_is_for_studies_with_findings():
    assert changed("normal template", ILL, normal=NORMAL) == NORMAL
    assert changed("normal template", NORMAL, normal=STOCK_NORMAL) is None
    assert changed("normal template", "Left effusion.", labels={"effusion": 0}) is None


def test_the_commonest_normal_report():
    assert commonest_normal([ILL, ILL, NORMAL, "No effusion.", NORMAL, "", ""]) == NORMAL
    assert commonest_normal([ILL, ""]) == STOCK_NORMAL
    assert extract(STOCK_NORMAL) and is_normal(STOCK_NORMAL)


def test_sentences_are_shuffled_within_their_sections():
    text = changed("sentences shuffled", f"{ILL} No edema.")
    assert text is not None
    findings, impression = text.removeprefix("Findings: ").split(" Impression: ")
    assert sorted(re.split(r"(?<=\.) ", findings)) == sorted(
        ["There is a small left pleural effusion.", "The heart is mildly enlarged.", "No pneumothorax."]
    )
    assert impression == "No edema. Small left pleural effusion."
    assert changed("sentences shuffled", "Left effusion.") is None


def test_a_right_sentence_stands_twenty_times():
    text = changed("sentence repeated", "The lungs are clear. Left effusion. No edema.")
    assert text == "The lungs are clear. " + "Left effusion. " * 20 + "No edema."
    assert changed("sentence repeated", NORMAL).count("The heart is normal in size.") == 20


def test_a_paraphrase_has_other_words_and_reads_alike():
    for text in (ILL, NORMAL, "Pacemaker in place. Severe right lower lobe opacity is seen."):
        other = changed("paraphrase", text)
        assert other is not None and other != text
        assert Counter(said(other, *STATEMENT)) == Counter(said(text, *STATEMENT))
    assert changed("paraphrase", "Left nodule.") is None


@pytest.mark.parametrize("phrase", SYNONYMS)
def test_every_synonym_is_of_use(phrase):
    """In one of a few sentences it is read alike."""
    frames = ("{} effusion", "The {} shows edema.", "The {}.", "{}.", "An effusion {}.", "{} enlarged", "The heart {}.")
    hits = [BY_NAME["paraphrase"](Case(text, text)) for text in (frame.format(phrase) for frame in frames)]
    assert any(hit and phrase not in hit for hit in hits)


def test_the_prior_is_copied_where_it_says_other_findings():
    assert changed("prior copied", ILL, prior="Left nodule.") == "Left nodule."
    assert changed("prior copied", ILL, prior="Effusion. Cardiomegaly.") is None
    assert changed("prior copied", ILL) is None


def test_two_thousand_words():
    assert len(changed("2,000 words", ILL).split()) == 2000
    assert changed("2,000 words", "word " * 2500) is None
    assert changed("2,000 words", " ") is None


def test_a_draft_is_half_right():
    draft = half_right(Case(ILL, ILL))
    assert draft is not None and draft.startswith("Findings: ")
    read = said(draft, *STATEMENT)
    assert ("effusion", "positive", "left", None, "small") in read
    assert ("pneumothorax", "negative", None, None, None) in read
    assert "cardiomegaly" not in {finding for finding, *_ in read}  # one of two findings is left out
    assert len([1 for finding, polarity, *_ in read if polarity == "positive" and finding != "effusion"]) == 1
    assert half_right(Case(NORMAL, NORMAL)) is None


def test_on_a_draft_what_is_right_is_attacked_and_what_is_false_left_alone():
    reference = "Left effusion. No edema."
    draft = half_right(Case(reference, reference))
    flipped = changed("negation flip", draft, reference=reference)
    assert ("effusion", "negative") in said(flipped, "finding", "polarity")
    assert {f for f, p in said(flipped, "finding", "polarity") if p == "positive"} == {
        f for f, p in said(draft, "finding", "polarity") if p == "positive" and f != "effusion"
    }


SENTENCES = (
    "Small left pleural effusion.",
    "No pneumothorax.",
    "The heart is mildly enlarged.",
    "Possible right lower lobe pneumonia.",
    "Lungs are clear.",
    "There is no edema or fracture.",
    "Impression:",
    "3.2 cm left nodule",
)
TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(alphabet=st.characters(), max_size=20),  # lone surrogates too
    st.lists(st.sampled_from((*SENTENCES, "İ", "\x00", "left", "No")), max_size=7).map(" ".join),
)


@settings(max_examples=120, deadline=None)
@given(
    text=TEXTS,
    reference=TEXTS,
    prior=TEXTS,
    labels=st.dictionaries(st.sampled_from([*INVENTED]), st.sampled_from([0, 1, -1])),
)
def test_any_text_is_changed_or_left_and_the_same_each_time(text, reference, prior, labels):
    case = Case(text, reference, labels, prior)
    again = Case(text, reference, labels, prior)
    assert half_right(case) == half_right(again)
    for probe in PROBES:
        result = probe(case)
        assert result is None or (isinstance(result, str) and result != text)
        assert probe(again) == result


@settings(max_examples=60, deadline=None)
@given(report=st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=6, unique=True).map(" ".join))
def test_harmless_probes_say_the_same_and_clinical_ones_do_not(report):
    meant = Counter(said(report, *STATEMENT))
    for probe in PROBES:
        result = probe(Case(report, report))
        if result is None or probe.name in ("sentence repeated", "2,000 words"):
            continue
        assert (Counter(said(result, *STATEMENT)) == meant) is not probe.harmful or not meant, probe.name
