"""Side, place and severity of a finding, from the modifiers that stand with it in the sentence."""

from .phrases import Item

MODIFIERS = frozenset(("side", "place", "both_sides", "severity", "size"))
_FINDINGS = frozenset(("finding", "only_denied", "stated"))
_JOINTS = frozenset(("and", "or", "comma", "with", "doubt", "deny", "denied", "doubted"))
_SIDES = frozenset(("side", "both_sides"))
_PLACES = frozenset(("place", "both_sides"))
_MOST = 12  # modifiers that one finding can have before it; keeps repeated words linear in time
Window = tuple[list[Item], list[Item]]


def windows(items: list[Item]) -> dict[int, Window]:
    """For each finding's index in `items`: the modifiers before it and those after it, in order of the text.

    What stands between two findings belongs to the first up to the last joint ("and", a comma, "with", a cue) and to
    the second from there on. Without a joint it stays with the first ("opacity in the left base ...").
    """
    found: dict[int, Window] = {}
    gap: list[Item] = []
    previous: int | None = None
    joined: list[tuple[int, int]] = []  # findings with nothing but "and" or "or" between them
    for n, item in enumerate(items):
        kind = item.kind
        if kind in _FINDINGS:
            stated = previous is not None or any(each.kind == "predicate" for each in gap)
            joints = [k for k, each in enumerate(gap) if each.kind in (_JOINTS if stated else ())]
            cut = joints[-1] + 1 if joints else len(gap) if previous is not None else 0
            before = gap[cut:][-_MOST:]
            if previous is not None:
                found[previous][1].extend(_modifiers(gap[:cut]))
            if previous is not None and len(gap) == 1 and gap[0].kind in ("or", "doubt"):
                before = found[previous][0]  # "left basilar atelectasis or infiltrate"
            if previous is not None and not before and len(gap) == 1 and gap[0].kind in ("and", "or"):
                joined.append((previous, n))
            found[n] = (_modifiers(before), [])
            gap, previous = [], n
        elif kind == "end":
            if previous is not None:
                found[previous][1].extend(_modifiers(gap))
                gap, previous = [], None
            elif any(each.kind == "predicate" for each in gap):
                gap = []
        elif kind in MODIFIERS or kind in _JOINTS or kind == "predicate":
            gap.append(item)
    if previous is not None:
        found[previous][1].extend(_modifiers(gap))
    for one, next_one in reversed(joined):
        if not any(found[one]):
            found[one][1].extend(found[next_one][1])  # "atelectasis and effusion at the left base"
    return found


def _modifiers(items: list[Item]) -> list[Item]:
    return [item for item in items if item.kind in MODIFIERS]


def side(before: list[Item], after: list[Item]) -> str | None:
    """ "left", "right" or "bilateral" (also where both are named); words before the finding win."""
    for window in (before, after):
        named = {"bilateral" if item.kind == "both_sides" else item.value for item in window if item.kind in _SIDES}
        if named:
            return named.pop() if len(named) == 1 else "bilateral"
    return "left" if place(before, after) == "lingula" else None


def place(before: list[Item], after: list[Item]) -> str | None:
    """The place named nearest: the last before the finding, else the first after it."""
    return next((item.value for item in (*reversed(before), *after) if item.kind in _PLACES), None)


def severity(before: list[Item], after: list[Item]) -> str | None:
    """The severity named nearest: the last before the finding, else the first after it."""
    return next((item.value for item in (*reversed(before), *after) if item.kind == "severity"), None)


def size(before: list[Item], after: list[Item]) -> float | None:
    """The measurement named nearest, in millimetres."""
    return next((item.value for item in (*reversed(before), *after) if item.kind == "size"), None)


_MILLIMETRES = {"mm": 1.0, "cm": 10.0, "millimeter": 1.0, "millimeters": 1.0, "centimeter": 10.0, "centimeters": 10.0}


def with_sizes(items: list[Item], words: list[str]) -> list[Item]:
    """`items` with the sentence's measurements added in order: "3.2 cm", or of "22 x 14 mm" the greatest."""
    sizes = []
    for n, word in enumerate(words):
        if word not in _MILLIMETRES or n == 0 or not words[n - 1][0].isdecimal():
            continue
        first = n - 1
        while first >= 2 and words[first - 1] in ("x", "by") and words[first - 2][0].isdecimal():
            first -= 2
        value = max(float(number) for number in words[first:n:2]) * _MILLIMETRES[word]
        sizes.append(Item("size", value, first, n + 1))
    return sorted([*items, *sizes], key=lambda item: item.first) if sizes else items
