"""Prompt: from a study to chat messages, and from a report's text back to its sections.

The layout is that of UniRG (arXiv 2601.17151, the report generation prompt): context in, "Findings: ... Impression:
..." out. Which sections are asked for follows the study's reference: both, findings alone, or impression alone; a study
without a reference is asked for both.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from unirg.section import Section
from unirg.study import Study, StudyImage


class PromptConfig(Section):
    """How a study is put before the policy."""

    style: Literal["unirg", "short"] = "unirg"
    """"unirg": the published UniRG prompt; "short": the same content in few tokens, for tiny policies."""
    images: bool = True
    """Put the images before the policy. Without them a text-only model can be the policy, and any other shows what the
    text alone gives away."""
    institution: bool = False
    """Name the study's institution, so that the policy need not guess whose style is wanted ("unknown" where the study
    has none)."""


@dataclass(frozen=True)
class Sections:
    """A report's text by section; "" where a section is missing. `rest` is what stands under neither header."""

    findings: str
    impression: str
    rest: str


def report_text(study: Study) -> str:
    """The study's own report in the one layout that references, targets and predictions share.

    "Findings: ... Impression: ...", or the one section there is; "" without either. White space is normalised.
    """
    sections = {"Findings": study.findings, "Impression": study.impression}
    return " ".join(f"{name}: {' '.join(text.split())}" for name, text in sections.items() if text and text.strip())


def prompt_images(study: Study, config: PromptConfig) -> tuple[StudyImage, ...]:
    """The images in the order of the prompt's image parts: the study's own, then the prior study's."""
    if not config.images:
        return ()
    return study.images + (study.prior.images if study.prior else ())


def build_messages(study: Study, config: PromptConfig) -> list[dict[str, Any]]:
    """One user turn in the chat form of the transformers library: the images (as placeholders), then the text."""
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in prompt_images(study, config)]
    text = _unirg(study, config) if config.style == "unirg" else _short(study, config)
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _wanted(study: Study) -> list[str]:
    """The sections to ask for: those of the reference, both where there is none."""
    there = {"findings": study.findings, "impression": study.impression}
    return [name for name, text in there.items() if text and text.strip()] or list(there)


def _context(study: Study, config: PromptConfig) -> list[tuple[str, str]]:
    """What is known beside the images, as (name, text), without empty entries."""
    entries: list[tuple[str, str | None]] = []
    if config.institution:
        entries.append(("institution", study.institution or "unknown"))
    entries += [(name, study.demographics.get(name)) for name in ("age", "sex")]
    entries += [
        ("indication", study.indication),
        ("comparison", study.comparison),
        ("technique", study.technique),
    ]
    if study.prior:
        if config.images and study.images and study.prior.images:
            count = len(study.prior.images)
            entries.append(("prior images", "the last one" if count == 1 else f"the last {count}"))
        entries.append(("prior report", report_text(study.prior)))
    return [(name, " ".join(text.split())) for name, text in entries if text and text.strip()]


def _unirg(study: Study, config: PromptConfig) -> str:
    """The published wording of UniRG (arXiv 2601.17151), its context in named lines."""
    context = " ".join(f"{name.capitalize()}: {text}" for name, text in _context(study, config)) or "None."
    given = "the image and the context" if prompt_images(study, config) else "the context"
    layout = " ".join(f"{name.capitalize()}: [write the {name}]" for name in _wanted(study))
    return (
        f"This is a radiology report generation task. Here is the context: {context} Given {given}, provide the report "
        f"in the following format: {layout} Now write the report in the format above."
    )


def _short(study: Study, config: PromptConfig) -> str:
    context = [f"{name}: {text}" for name, text in _context(study, config)]
    return "; ".join([*context, f"write {' and '.join(_wanted(study))}"])


_HEADERS = {
    "findings": "findings",
    "finding": "findings",
    "impression": "impression",
    "impressions": "impression",
    "conclusion": "impression",
    **dict.fromkeys(("examination", "exam", "indication", "history", "clinical history", "context"), "rest"),
    **dict.fromkeys(("technique", "comparison", "comparisons", "recommendation", "recommendations"), "rest"),
}
_NAMES = "|".join(sorted((re.escape(name) for name in _HEADERS), key=len, reverse=True))
# A header is a section's name, in any decoration (**Findings:**, ## Findings, [Findings]), followed by a colon, by a
# dash between spaces, or by the end of a line that holds nothing else. "Findings are ..." is prose.
_HEADER = re.compile(
    rf"(?P<lead>(?:(?<=\n)|(?<=\A))[^\w\n]*|\b)(?P<name>{_NAMES})\b"
    rf"(?P<tail>[*_#\])]*[^\S\n]*:[\s*_]*|[*_#\])]*[^\S\n]+[-\u2013\u2014]+(?=\s|\Z)[\s*_]*|[*_#\])]*[^\S\n]*(?:\n|\Z))",
    re.IGNORECASE,
)


def parse_report(text: str) -> Sections:
    """Split whatever a policy wrote into its sections; never raises on any string.

    Headers may come in any case and decoration, repeat (their texts are joined in order) or be missing (all is `rest`).
    "Conclusion" counts as impression; indication, technique and the like go to `rest`, as does text before any header.
    """
    texts: dict[str, list[str]] = {"findings": [], "impression": [], "rest": []}
    section, start = "rest", 0
    for match in _HEADER.finditer(text):
        if not _is_header(text, match):
            continue
        texts[section].append(text[start : match.start()])
        section, start = _HEADERS[match["name"].lower()], match.end()
    texts[section].append(text[start:])
    joined = {name: " ".join(" ".join(pieces).split()) for name, pieces in texts.items()}
    return Sections(**{name: _undecorate(words) for name, words in joined.items()})


def _is_header(text: str, match: re.Match[str]) -> bool:
    """Whether a name that reads like a header is one: "findings:" and "impression:" anywhere; other names, and names
    without a colon, only capitalised, at a line's start or after a sentence's end."""
    before = text[: match.start("name")].rstrip(" \t*_#>[(")
    opens = not before or before[-1] in "\n\r.!?;:"
    line_only = ":" not in match["tail"] and not match["tail"].strip(" \t\n*_#])")
    if line_only:  # "Findings" alone: only where the line starts with it
        return not before or before[-1] in "\n\r"
    wanted = _HEADERS[match["name"].lower()] != "rest" and ":" in match["tail"]
    return wanted or opens or match["name"][0].isupper()


def _undecorate(words: str) -> str:
    """Without markdown emphasis left over at the ends."""
    return words.strip("*_# ") if words.strip("*_# ") else ""
