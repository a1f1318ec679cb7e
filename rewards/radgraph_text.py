"""From a report to RadGraph's words, exactly as radgraph 0.1.18 splits them.

The split belongs to the model: the first RadGraph was trained on one, RadGraph-XL and modern-RadGraph-XL on another. An
annotation counts words, so a different split is a different answer.
"""

import re

MODELS = ("radgraph", "radgraph-xl", "modern-radgraph-xl")

# A gap on either side of each of / , : . ! ? ( ) that has no blank there yet. A hyphen stays inside its word.
_GAPS = re.compile(r"(?<! )(?=[/,:.!?()])|(?<=[/,:.!?()])(?! )")
_WORD = re.compile(r"\w+|[^\w\s]+")  # a run of letters and digits, or of marks
# What reports hold as two characters, a backslash and a letter, where a line or page ended.
_ESCAPED = (("\\n", "  "), ("\\f", "  "), ("\\u2122", "      "), ("\n", " "), ('\\"', "``"))
_PARTED = (").", "%.", ".'", "%,", "%)")  # runs of marks that are two words


def split_words(report: str, model: str) -> tuple[str, ...]:
    """The report's words for `model` (one of MODELS); none for a blank report."""
    if model == "radgraph":
        return tuple(_GAPS.sub(" ", report).split())
    for escaped, blank in _ESCAPED:
        report = report.replace(escaped, blank)
    text = " ".join(_WORD.findall(report))
    for run in _PARTED:
        text = text.replace(run, f"{run[0]} {run[1]}")
    return tuple(text.split())
