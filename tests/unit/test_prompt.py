"""Prompt layout, report text and the way back."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unirg.prompt import PromptConfig, Sections, build_messages, parse_report, prompt_images, report_text
from unirg.study import Study, StudyImage

PICTURE = StudyImage(source=lambda: None)  # never loaded here


def text_of(study: Study, **settings: object) -> str:
    return build_messages(study, PromptConfig(**settings))[0]["content"][-1]["text"]


def test_unirg_prompt_is_the_published_one() -> None:
    study = Study("s", (PICTURE,), indication="Cough.", comparison="None.", findings="Clear.", impression="Normal.")
    assert build_messages(study, PromptConfig()) == [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {
                    "type": "text",
                    "text": "This is a radiology report generation task. Here is the context: Indication: Cough. "
                    "Comparison: None. Given the image and the context, provide the report in the following format: "
                    "Findings: [write the findings] Impression: [write the impression] Now write the report in the "
                    "format above.",
                },
            ],
        }
    ]


@pytest.mark.parametrize("style", ["unirg", "short"])
def test_prompt_asks_for_the_sections_of_the_reference_and_both_without_one(style: str) -> None:
    findings = text_of(Study("s", findings="Clear.", impression=" "), style=style)
    impression = text_of(Study("s", impression="Normal."), style=style)
    neither = text_of(Study("s"), style=style)
    assert "findings" in findings and "impression" not in findings
    assert "impression" in impression and "findings" not in impression
    assert "findings" in neither and "impression" in neither


@pytest.mark.parametrize("style", ["unirg", "short"])
def test_prompt_never_shows_the_reference_or_the_labels(style: str) -> None:
    study = Study("s", findings="Zebra.", impression="Quagga.", labels={"okapi": 1}, extra={"complete": "Tapir."})
    text = text_of(study, style=style, institution=True).lower()
    assert not any(word in text for word in ("zebra", "quagga", "okapi", "tapir"))


def test_institution_is_named_only_when_asked_and_unknown_where_missing() -> None:
    assert "B7" not in text_of(Study("s", institution="B7"))
    assert "institution: B7" in text_of(Study("s", institution="B7"), style="short", institution=True)
    assert "institution: unknown" in text_of(Study("s"), style="short", institution=True)


def test_prior_study_gives_its_images_last_and_its_report() -> None:
    first, second = StudyImage(source=lambda: None, view="frontal"), StudyImage(source=lambda: None, view="prior")
    study = Study("s", (first,), prior=Study("p", (second,), findings="Old scar."))
    content = build_messages(study, PromptConfig())[0]["content"]
    assert [part["type"] for part in content] == ["image", "image", "text"]
    assert prompt_images(study, PromptConfig()) == (first, second)
    assert "Prior report: Findings: Old scar." in content[-1]["text"]


@pytest.mark.parametrize(
    ("findings", "impression", "expected"),
    [
        ("Clear.", "Normal.", "Findings: Clear. Impression: Normal."),
        ("Clear.\n  Dry.", None, "Findings: Clear. Dry."),
        ("", "Normal.", "Impression: Normal."),
        (" ", None, ""),
    ],
)
def test_report_text(findings: str | None, impression: str | None, expected: str) -> None:
    assert report_text(Study("s", findings=findings, impression=impression)) == expected


@pytest.mark.parametrize(
    ("text", "findings", "impression", "rest"),
    [
        ("FINDINGS: Clear. IMPRESSION: Normal.", "Clear.", "Normal.", ""),
        ("findings: clear impression: normal", "clear", "normal", ""),
        ("**Findings:** Clear.\n\n**Impression:** Normal.", "Clear.", "Normal.", ""),
        ("## Findings\nClear.\n## Impression\nNormal.", "Clear.", "Normal.", ""),
        ("FINDINGS - Clear.\nIMPRESSION - Normal.", "Clear.", "Normal.", ""),
        ("Impression: Normal. Findings: Clear.", "Clear.", "Normal.", ""),
        ("Findings: Clear. Findings: Dry.", "Clear. Dry.", "", ""),
        ("Indication: Cough. Findings: Clear. Technique: AP.", "Clear.", "", "Cough. AP."),
        ("Sure! Findings: Clear.", "Clear.", "", "Sure!"),
        ("Findings are normal.", "", "", "Findings are normal."),
        ("The findings - if any - are old.", "", "", "The findings - if any - are old."),
        ("Conclusion: Normal.", "", "Normal.", ""),
        ("Findings:", "", "", ""),
        ("", "", "", ""),
    ],
)
def test_parse_report(text: str, findings: str, impression: str, rest: str) -> None:
    assert parse_report(text) == Sections(findings, impression, rest)


@given(st.text())
def test_parse_report_takes_any_text_and_invents_no_character(text: str) -> None:
    sections = parse_report(text)
    kept = "".join((sections.findings, sections.impression, sections.rest))
    assert set(kept) - set(text) <= {" "}


MARKUP = st.text(alphabet="FINDGSimpreson :*#-\n\t.", max_size=60)


@given(
    st.lists(
        st.sampled_from(["Findings", "IMPRESSION", "finding", ":", " - ", "\n", "**", "]", "x", "\u2014"]) | MARKUP
    )
)
def test_parse_report_never_raises_on_header_fragments(pieces: list[str]) -> None:
    parse_report("".join(pieces))


SENTENCES = st.lists(
    st.text(alphabet=string.ascii_lowercase.replace("i", "") + " ", min_size=1, max_size=20)
    .map(str.strip)
    .filter(bool),
    min_size=1,
    max_size=4,
).map(lambda parts: " ".join(" ".join(part.split()).capitalize() + "." for part in parts))
"""Sentences without the letter i, hence without a header."""


@given(st.none() | SENTENCES, st.none() | SENTENCES)
def test_parse_report_undoes_report_text(findings: str | None, impression: str | None) -> None:
    sections = parse_report(report_text(Study("s", findings=findings, impression=impression)))
    assert sections == Sections(findings or "", impression or "", "")
