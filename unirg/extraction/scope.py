"""Polarity: which of a sentence's findings are affirmed, denied or doubted.

One pass from left to right carries the forward cues ("no", "possible") to the findings after them; backward cues ("is
not seen", "cannot be excluded") reach the findings before them. After Chapman et al., NegEx (2001) and ConText (2009),
with lists read as radiologists write them: a comma or "and" ends a reach only where a new statement begins.
"""

from .attributes import MODIFIERS
from .cues import FRESH
from .phrases import Item

ASKED = "asked"
_REACH = {"deny": "negative", "doubt": "uncertain", "asked": ASKED}
_STATES = frozenset(("finding", "only_denied", "stated", "predicate"))
_RANK = {"positive": 0, "uncertain": 1, "negative": 2, ASKED: 3}
_FRESH = frozenset(FRESH.split("|"))


def polarities(items: list[Item], words: list[str]) -> list[str | None]:
    """The polarity of each item that is a finding or a predicate, or "asked"; None for all other items.

    Args:
        items: what `phrases.scan` found, in order.
        words: the sentence's words.
    """
    result: list[str | None] = [None] * len(items)
    reach = "positive"
    reached = 0  # how many findings the present reach has covered
    clause: list[int] = []  # findings of the present clause, for backward cues
    verb = False  # a verb has closed the present reach's list ("no effusion is seen and ...")
    doubt_next = listing = False
    followed = _followed(items)
    last_or = max((n for n, item in enumerate(items) if item.kind == "or"), default=-1)
    for n, item in enumerate(items):
        kind = item.kind
        if kind in _STATES:
            result[n] = reach
            if kind == "stated" and _direct(items, n):
                result[n] = "negative"
            elif kind == "predicate":
                result[n] = "negative" if _direct(items, n) else "positive" if reach == "negative" else reach
            if kind == "predicate":
                if item.value in ("normal", "clear") and result[n] == "positive":
                    reach = "positive"  # "no effusion, heart normal, ...": a fresh statement
                continue
            if doubt_next:
                result[n] = _stronger(result[n], "uncertain")
                doubt_next = False
            clause.append(n)
            reached += 1
        elif kind in _REACH:
            if kind == "doubt" and words[item.first] in ("versus", "vs"):
                _raise(result, clause[-1:], "uncertain")
                doubt_next = True
            elif kind == "doubt" and reach in ("negative", ASKED):
                pass  # "no possible effusion", "without suspicious nodule" stay denied
            elif kind == "doubt" and clause and not followed[n]:
                _raise(result, clause[-1:], "uncertain")  # "pneumonia suspected"
            else:
                reach, reached, verb = _REACH[kind], 0, False
                listing = words[item.first] == "differential"  # a list of possibilities, whatever joins it
        elif kind == "denied":
            _raise(result, clause, "negative")
            clause, reach, reached = [], "positive", 0
        elif kind == "doubted":
            for index in clause:
                if result[index] != ASKED:
                    result[index] = "uncertain"
            clause, reach, reached = [], "positive", 0
        elif kind == "end":
            reach, reached, clause, verb = "positive", 0, [], False
        elif kind == "with":
            if reached and reach != ASKED:
                reach, reached = "positive", 0
        elif kind == "verb":
            verb = reached > 0
        elif kind in ("comma", "and") and reached and not listing and _fresh(items, n, words, reach, verb, last_or):
            reach, reached, clause, verb = "positive", 0, [], False
    return result


def _fresh(items: list[Item], n: int, words: list[str], reach: str, verb: bool, last_or: int) -> bool:
    """Whether the comma or "and" at `n` begins a new statement rather than goes on with the list."""
    if reach == "positive" or last_or > n:
        return False
    if verb or reach == "uncertain" or _list_closed(items, n):
        return True
    after = items[n].last
    return after < len(words) and words[after] in _FRESH


def _list_closed(items: list[Item], n: int) -> bool:
    """Whether the comma at `n` comes after the last member of an "A or B" list."""
    before = [item.kind for item in items[max(0, n - 5) : n] if item.kind not in MODIFIERS]
    return items[n].kind == "comma" and before[-2:] == ["or", "finding"]


def _followed(items: list[Item]) -> list[bool]:
    """For each item, whether a finding or predicate stands after it in its clause."""
    result, ahead = [], False
    for item in reversed(items):
        result.append(ahead)
        ahead = item.kind in _STATES or (ahead and item.kind != "end")
    return result[::-1]


def _direct(items: list[Item], n: int) -> bool:
    """Whether a denial stands right before the predicate at `n` ("not enlarged"), or before its "or"."""
    for item in reversed(items[max(0, n - 3) : n]):
        if item.kind in ("deny", "not"):
            return True
        if item.kind not in ("severity", "or", "predicate", "pass"):
            return False
    return False


def _stronger(old: str | None, new: str) -> str:
    return new if old is None or _RANK[new] > _RANK[old] else old


def _raise(result: list[str | None], indices: list[int], polarity: str) -> None:
    for index in indices:
        result[index] = _stronger(result[index], polarity)
