"""From a report's text to the sentences that tell what the images show."""

import re
from collections.abc import Iterator

_ODD = {
    0x2018: "'",
    0x2019: "'",
    0x201B: "'",
    0x02BC: "'",
    0x060C: ",",
    0xFF0C: ",",
    0x3002: ".",
    0xFF0E: ".",
    0xFF1A: ":",
}

# Headings whose text asks or tells of something other than these images.
_OTHER = (
    r"(?:clinical )?indications?(?: for (?:the )?(?:exam|examination|study))?|(?:clinical |patient |medical )?history|"
    r"clinical (?:information|data|details|question)|reason for (?:the )?(?:exam|examination|study)|comparisons?|"
    r"techniques?|procedures?|examinations?|exam|study|views?|protocol|recommendations?|dates?|signs? and symptoms?|"
    r"referring physician|accession(?: number)?|prior stud(?:y|ies)"
)
_SHOWN = r"findings?(?: and impression)?|impressions?|conclusions?|interpretation|opinion|report|results?|summary"
# Headings that are part of the statement: "Lungs: clear."
_ORGANS = (
    r"lungs?(?: and pleura| and airways)?|pleura|pleural spaces?|heart(?: and mediastinum)?|mediastinum|cardiac|"
    r"bones?(?: and soft tissues?)?|chest|diaphragm|upper abdomen|abdomen|lines?(?:,? and tubes?)?|"
    r"tubes?(?:,? and lines?)?|support devices|devices|airways?|vessels|cardiovascular|musculoskeletal|"
    r"osseous structures"
)
_HEADING = re.compile(
    rf"(?:(?<=^)|(?<=[.\n;?!*])|(?<=[.\n;?!*]\s))[ \t*#>-]*(?:({_OTHER})|{_SHOWN}|(?P<organ>{_ORGANS}))\**[ \t]*:",
    re.MULTILINE,
)

# A full stop ends a sentence unless a digit follows it ("3.2 cm"); a line's end does where a sentence or item begins.
_BREAK = re.compile(
    r"(?<!\bvs)[.?!;\u3002\uff0e]+(?=[\s\"')\]]|$)|(?<=[A-Za-z])\.(?=\d{1,2}\.\s|[A-Za-z]{3})|"
    r"\n\s*\n|\n(?=\s*(?:\d{1,2}[.)]|[-*\u2022])\s)|\n(?=[ \t]*[A-Z][a-z])"
)


def fold(text: str) -> str:
    """Lower case with plain quotes and stops; exactly as long as `text`, so that positions carry over."""
    folded = text.lower()
    if len(folded) != len(text):  # a few letters grow when lowered, e.g. U+0130
        folded = "".join(low if len(low := letter.lower()) == 1 else letter for letter in text)
    return folded if folded.isascii() else folded.translate(_ODD)


def sentences(report: str, folded: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each sentence of a report, without those under a heading such as "Indication:"."""
    for start, end in _shown(folded):
        for match in _BREAK.finditer(report, start, end):
            if match.start() > start:
                yield start, match.start()
            start = match.end()
        if end > start:
            yield start, end


def _shown(folded: str) -> Iterator[tuple[int, int]]:
    start, shown = 0, True
    if ":" in folded:
        for match in _HEADING.finditer(folded):
            if shown and match.start() > start:
                yield start, match.start()
            start = match.end() if match["organ"] is None else match.start("organ")
            shown = match.group(1) is None
    if shown:
        yield start, len(folded)
