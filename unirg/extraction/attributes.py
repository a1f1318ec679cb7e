"""Side, place and severity of a finding, from the modifiers that stand with it in the sentence."""

from .phrases import Item

MODIFIERS = frozenset(("side", "place", "both_sides", "severity"))
_FINDINGS = frozenset(("finding", "only_denied"))
_JOINTS = frozenset(("and", "or", "comma", "with", "doubt", "deny", "denied", "doubted"))
_SIDES = frozenset(("side", "both_sides"))
_PLACES = frozenset(("place", "both_sides"))
Window = tuple[list[Item], list[Item]]


def windows(items: list[Item]) -> dict[int, Window]:
    """For each finding's index in `items`: the modifiers before it and those after it, in order of the text.

    What stands between two findings belongs to the first up to the last joint ("and", a comma, "with", a cue) and to
    the second from there on. Without a joint it stays with the first ("opacity in the left base ...").
    """
    found: dict[int, Window] = {}
    gap: list[Item] = []
    previous: int | None = None
    for n, item in enumerate(items):
        kind = item.kind
        if kind in _FINDINGS:
            before, joint = gap, None
            if previous is not None:
                cut = next((k for k in range(len(gap) - 1, -1, -1) if gap[k].kind in _JOINTS), None)
                joint = gap[0] if len(gap) == 1 else None
                before = [] if cut is None else gap[cut + 1 :]
                found[previous][1].extend(gap if cut is None else gap[:cut])
            own = [each for each in before if each.kind in MODIFIERS]
            if joint is not None and joint.kind in ("or", "doubt") and previous is not None:
                own = list(found[previous][0])  # "left basilar atelectasis or infiltrate"
            found[n] = (own, [])
            gap, previous = [], n
        elif kind == "end":
            if previous is not None:
                found[previous][1].extend(gap)
                gap, previous = [], None
            elif any(each.kind == "predicate" for each in gap):
                gap = []
        elif kind in MODIFIERS or kind in _JOINTS or kind == "predicate":
            gap.append(item)
    if previous is not None:
        found[previous][1].extend(gap)
    return found


def side(before: list[Item], after: list[Item]) -> str | None:
    """ "left", "right" or "bilateral" (also where both are named); words before the finding win."""
    for window in (before, after):
        named = {"bilateral" if item.kind == "both_sides" else item.value for item in window if item.kind in _SIDES}
        if named:
            return named.pop() if len(named) == 1 else "bilateral"
    return None


def place(before: list[Item], after: list[Item]) -> str | None:
    """The place named nearest: the last before the finding, else the first after it."""
    return next((item.value for item in (*reversed(before), *after) if item.kind in _PLACES), None)


def severity(before: list[Item], after: list[Item]) -> str | None:
    """The severity named nearest: the last before the finding, else the first after it."""
    return next((item.value for item in (*reversed(before), *after) if item.kind == "severity"), None)
