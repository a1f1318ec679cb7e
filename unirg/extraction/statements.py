"""What a sentence says of anatomy: "heart size is normal", "clear lungs", "the aorta is tortuous and calcified"."""

from collections.abc import Iterator
from typing import NamedTuple

from .attributes import MODIFIERS
from .cues import SAID
from .phrases import Item
from .scope import ASKED

_MOST = 8  # anatomy that one predicate can speak of; keeps repeated words linear in time


class Statement(NamedTuple):
    """A finding that a pair of anatomy and predicate states. `at` is the predicate's index among the items."""

    finding: str
    polarity: str
    predicate: Item
    at: int
    first: int
    last: int


def statements(items: list[Item], states: list[str | None], words: list[str]) -> Iterator[Statement]:
    """All that the sentence states by pairs of anatomy and predicate (`cues.SAID`).

    Args:
        items: what `phrases.scan` found, in order.
        states: each item's polarity, from `scope.polarities`; the pair's own meaning is turned by it.
        words: the sentence's words.
    """
    for subject, at, predicate in _pairs(items, words):
        state = states[at] or "positive"
        for finding, meant in SAID[subject.value].get(predicate.value, ()):
            if state == ASKED or (state == "negative" == meant):
                continue  # "not clear" says too little
            polarity = meant if state == "positive" else "negative" if state == "negative" else _doubted(meant)
            span = min(subject.first, predicate.first), max(subject.last, predicate.last)
            yield Statement(finding, polarity, predicate, at, *span)


def _doubted(meant: str) -> str:
    return "negative" if meant == "negative" else "uncertain"  # "probably normal" still denies


def _pairs(items: list[Item], words: list[str]) -> Iterator[tuple[Item, int, Item]]:
    """(anatomy, index of the predicate, predicate), within clauses that no finding interrupts."""
    waiting: list[Item] = []  # anatomy with nothing said of it yet
    subjects: list[Item] = []  # what the last predicate spoke of
    forward: tuple[int, Item] | None = None  # a predicate whose anatomy follows: "normal heart and mediastinum"
    for n, item in enumerate(items):
        if item.kind == "anatomy":
            if forward is None:
                waiting.append(item)
            else:
                subjects.append(item)
                yield item, *forward
        elif item.kind == "predicate" or (waiting and words[item.first] == "large"):
            predicate = item if item.kind == "predicate" else item._replace(kind="predicate", value="enlarged")
            following = next((each for each in items[n + 1 : n + 3] if each.kind not in MODIFIERS), None)
            forward = None
            if waiting:
                subjects, waiting = waiting[-_MOST:], []
            elif following is not None and following.kind == "anatomy" and following.first - item.last <= 2:
                forward, subjects = (n, predicate), []
            for subject in subjects[-_MOST:]:
                yield subject, n, predicate
        elif item.kind in ("end", "finding", "with"):
            waiting, subjects, forward = [], [], None
        elif item.kind in ("verb", "deny"):
            forward = None
