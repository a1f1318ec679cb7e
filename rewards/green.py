"""GREEN: matched findings against significant errors, as a language model lists them (Ostmeier et al., EMNLP 2024).

    score = matched / (matched + significant errors of types a to f), and 0 where nothing is matched

Insignificant errors do not count. The model was trained on one fixed prompt, whose text belongs to its authors and
which must be used as it is, so it is read from a file that you name and none is shipped: in the repository
Stanford-AIMI/GREEN it is what `make_prompt` returns, with {reference} and {candidate} where the two texts go. As
upstream, both texts are cut to 300 words; unlike upstream, `<` and `[` in them get a space behind, so that no report
can speak to the model in its control tokens.

The model's answer has a section of significant errors, one of insignificant errors and one of matched findings.
Upstream reads it leniently: what is missing or misformed counts as no error, so a broken answer may score 1. `parser:
strict`, the default, takes whole answers alone and masks the rest; `parser: official` reads as upstream does, for
tables.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .judge import Judge
from .judge_cache import answer_key

WORDS = 300
SECTIONS = ("Clinically Significant Errors", "Clinically Insignificant Errors", "Matched Findings")
_PLACE = re.compile(r"\{(reference|candidate)\}")


@dataclass(kw_only=True)
class Green(Judge):
    """GREEN: matched findings / (matched findings + significant errors), listed by its model behind an endpoint.

    `prompt`: a file with GREEN's prompt, holding {reference} and {candidate}; `parser`: strict or official. Lies in
    [0, 1]. The other options are those of `Judge`.
    """

    needs = "GREEN's model behind an OpenAI-compatible chat endpoint, and a file with its prompt"

    prompt: str
    parser: str = "strict"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parser not in ("strict", "official"):
            raise ValueError(f"parser '{self.parser}' is neither strict nor official")
        path = Path(self.prompt).expanduser()
        try:
            self._template = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"the prompt file {path} cannot be read: {error}") from error
        if sorted(_PLACE.findall(self._template)) != ["candidate", "reference"]:
            raise ValueError(f"the prompt file {path} must hold {{reference}} once and {{candidate}} once")

    @property
    def wording(self) -> str:
        """See Judge."""
        return answer_key(self._template, self.parser)

    @property
    def identity(self) -> dict[str, Any]:
        """Parser, judge, endpoint and version of the prompt."""
        return {"metric": "GREEN", "parser": self.parser, "words": WORDS} | super().identity

    def messages(self, reference: str, candidate: str) -> list[dict[str, str]]:
        """The prompt, filled in, as one user turn."""
        texts = {"reference": _cut(reference), "candidate": _cut(candidate)}
        return [{"role": "user", "content": _PLACE.sub(lambda place: texts[place[1]], self._template)}]

    def counts(self, text: str) -> list[int] | None:
        """Matched findings, then the significant errors a to f."""
        return strict_counts(text) if self.parser == "strict" else official_counts(text)

    def value(self, counts: list[int]) -> float:
        """See the module."""
        return counts[0] / sum(counts) if counts[0] else 0.0


def strict_counts(answer: str) -> list[int] | None:
    """Matched findings and six significant errors of a whole answer; None for any other.

    The three sections must each stand once, in their order. A section of errors is either lines "(letter) type:
    number. ..." with no letter twice (one left out counts 0), or a single line that begins with No; the matched
    findings begin with a number and a full stop, or with No.
    """
    parts = re.split(r"^[ \t]*\[(.+?)\]:", answer.replace("</s>", ""), flags=re.MULTILINE)
    headers, bodies = parts[1::2], parts[2::2]
    sections = [(name, body.strip()) for name, body in zip(headers, bodies, strict=True) if name != "Explanation"]
    if tuple(name for name, _ in sections) != SECTIONS:
        return None
    errors, ignored, matched = (_listed(body) if i < 2 else _leading(body) for i, (_, body) in enumerate(sections))
    return None if errors is None or ignored is None or matched is None else matched + errors


def official_counts(answer: str) -> list[int]:
    """Matched findings and six significant errors as green_score reads them: a section ends at its first blank line,
    and a number that is not found is 0."""
    answer = answer.rpartition("[Explanation]:")[2]
    matched = re.match(r"\d+\b(?=\.)", _official_section(answer, SECTIONS[2]))
    section = _official_section(answer, SECTIONS[0])
    lines = re.findall(r"\(([a-f])\) (.*)", section) or re.findall(r"\(([1-6])\) (.*)", section)
    errors = [0] * 6
    for mark, line in sorted(lines):
        if number := re.search(r"(?<=: )\d+\b(?=\.)", line):
            errors["abcdef".find(mark) if mark.isalpha() else int(mark) - 1] = int(number[0])
    return [int(matched[0]) if matched else 0, *errors]


def _official_section(answer: str, name: str) -> str:
    found = re.search(rf"\[{name}\]:\s*(.*?)(?:\n\s*\n|\Z)", answer, re.DOTALL)
    return "" if found is None or found[1].startswith("No") else found[1]


def _listed(body: str) -> list[int] | None:
    """The six numbers of a section of errors."""
    lines = [line.strip() for line in body.splitlines() if line.strip()]
    if len(lines) == 1 and re.match(r"No(ne)?\b", lines[0]):
        return [0] * 6
    found = [re.fullmatch(r"\(([a-f])\) [^:]+: (\d{1,2})\.(?!\d).*", line) for line in lines]
    numbers = {line[1]: int(line[2]) for line in found if line}
    if not lines or len(numbers) != len(lines):
        return None
    return [numbers.get(letter, 0) for letter in "abcdef"]


def _leading(body: str) -> list[int] | None:
    """The number of matched findings."""
    if re.match(r"No(ne)?\b", body):
        return [0]
    number = re.match(r"(\d{1,2})\.(?!\d)", body)
    return [int(number[1])] if number else None


def _cut(report: str) -> str:
    return " ".join(report.split()[:WORDS])
