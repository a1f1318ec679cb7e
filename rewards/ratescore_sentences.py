"""Sentences as RaTEScore cuts them: each is tagged by itself, so that a score depends on where a report is cut.

Upstream cuts with medSpaCy's `medspacy_pyrush`, which is PyRuSH with medSpaCy's rules on spaCy's English tokens.
`pyrush` is just that, and exact. `rule` needs nothing beyond this file: it cuts after `.`, `!`, `?` and at line ends.
Of Open-i's texts (10,337 findings, impressions and whole reports) it cuts 17% otherwise than PyRuSH, mostly at the
numbers of lists and at doubled full stops; and nearly all texts in capitals, of which PyRuSH cuts few.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.metadata import distribution, version

from unirg.scoring.contract import RewardError

from .text_encoder import Recent

SPLITTERS = ("pyrush", "rule")
REPORTS = 20_000  # whose sentences are kept; PyRuSH takes milliseconds a report
INSTALL = (
    "pip install spacy==3.8.18 loguru && "
    "pip install --no-deps medspacy==1.3.1 PyRuSH==1.0.13 PyFastNER==1.0.10 quicksectx==0.4.1"
)
RULES = "resources/en/rush_rules.tsv"
_BREAK = re.compile(r"(?<=[.!?])\s+|\s*\n\s*")

Cut = Callable[[str], list[str]]


def split_by_rule(report: str) -> list[str]:
    """Sentences of three characters or more, by the rule."""
    return [sentence for piece in _BREAK.split(report) if len(sentence := piece.strip()) >= 3]


@lru_cache(maxsize=1)
def load_pyrush() -> Cut:
    """Upstream's splitter, once per process; it answers sentences of three characters or more.

    Raises RewardError saying what to install.
    """
    try:
        spacy, loguru = import_module("spacy"), import_module("loguru")
        import_module("PyRuSH")  # registers the pipe
        rules = distribution("medspacy").locate_file(RULES)
    except ImportError as error:  # metadata's PackageNotFoundError is one
        raise RewardError(
            f"ratescore's sentences are cut by PyRuSH, as upstream, and {error.name} is not installed: {INSTALL}; or "
            "give the option `sentences: rule`, whose scores are a little off the published metric's"
        ) from error
    loguru.logger.disable("PyRuSH")  # it writes a line for every token
    nlp = spacy.blank("en")
    nlp.add_pipe("medspacy_pyrush", config={"rules_path": str(rules)})
    kept: Recent[list[str]] = Recent(REPORTS)

    def cut(report: str) -> list[str]:
        sentences = (str(sentence).strip() for sentence in nlp(report).sents)
        return [sentence for sentence in sentences if len(sentence) >= 3]

    return lambda report: kept.look_up([report], lambda reports: map(cut, reports))[report]


def load_splitter(name: str) -> tuple[Cut, str]:
    """The splitter of a name in SPLITTERS, and what the identity says of it. Raises what `load_pyrush` raises."""
    if name == "rule":
        return split_by_rule, "rule"
    return load_pyrush(), f"PyRuSH {version('PyRuSH')}, medspacy {version('medspacy')}, spacy {version('spacy')}"
