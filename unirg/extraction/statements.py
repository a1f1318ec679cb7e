"""What a sentence says of anatomy: "heart size is normal", "clear lungs", "the aorta is tortuous and calcified"."""

from collections.abc import Iterator
from typing import NamedTuple

from .attributes import MODIFIERS
from .cues import SAID
from .phrases import Item
from .scope import ASKED

_BEFORE_ANATOMY = MODIFIERS | {"predicate", "and", "comma"}
_MOST = 8  # anatomy that one predicate can speak of; keeps repeated words linear in time


class Statement(NamedTuple):
    """A finding that a pair of anatomy and predicate states."""

    finding: str
    polarity: str
    subject: Item
    predicate: Item


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
            yield Statement(finding, polarity, subject, predicate)


def _doubted(meant: str) -> str:
    return "negative" if meant == "negative" else "uncertain"  # "probably normal" still denies


def _pairs(items: list[Item], words: list[str]) -> Iterator[tuple[Item, int, Item]]:
    """(anatomy, index of the predicate, predicate), within clauses that no finding interrupts."""
    waiting: list[Item] = []  # anatomy with nothing said of it yet
    subjects: list[Item] = []  # what the last predicate spoke of
    forward: list[tuple[int, Item]] = []  # predicates whose anatomy follows: "tortuous and calcified aorta"
    for n, item in enumerate(items):
        if item.kind == "anatomy":
            if forward:
                subjects.append(item)
            else:
                waiting.append(item)
            for at, predicate in forward:
                yield item, at, predicate
        elif item.kind == "predicate" or (waiting and words[item.first] == "large"):
            predicate = item if item.kind == "predicate" else item._replace(kind="predicate", value="enlarged")
            forward = forward if not subjects and items[n - 1].kind in _BEFORE_ANATOMY else []
            if waiting:
                subjects, waiting = waiting[-_MOST:], []
            elif _anatomy_follows(items, n):
                forward, subjects = [*forward[-_MOST:], (n, predicate)], []
            for subject in subjects[-_MOST:]:
                yield subject, n, predicate
        elif item.kind in ("end", "finding", "with"):
            waiting, subjects, forward = [], [], []
        elif item.kind in ("verb", "deny"):
            forward = []


def _anatomy_follows(items: list[Item], n: int) -> bool:
    """Whether anatomy stands right after the predicate at `n`, with modifiers and further predicates between."""
    last = items[n].last
    for item in items[n + 1 : n + 5]:
        if item.first - last > 2:
            return False
        if item.kind == "anatomy":
            return True
        if item.kind not in _BEFORE_ANATOMY:
            return False
        last = item.last
    return False
