"""From a report to its mentions of findings: `extract`."""

from dataclasses import dataclass
from functools import lru_cache

from .attributes import MODIFIERS, Window, place, severity, side, size, windows, with_sizes
from .cues import ANATOMY, BOTH_SIDES, CUES, PLACES, PREDICATES, SEVERITIES, SIDES
from .lexicon import DENIED_ONLY, PHRASES, STATED
from .phrases import TOKEN, Item, Trie, add, scan
from .scope import ASKED, polarities
from .sentences import fold, sentences
from .statements import Statement, statements

_FLIPPED = {"positive": "negative", "negative": "positive", "uncertain": "negative"}


@dataclass(frozen=True, slots=True)
class Mention:
    """One finding that a report affirms, denies or doubts.

    `finding` is a name of `FINDINGS`; `polarity` is "positive", "negative" or "uncertain"; `side` is "left", "right" or
    "bilateral"; `place` ("lower lobe", "base", ...) and `severity` ("small", "moderate", ...) are canonical words (see
    `cues.py`); `size_mm` is the measurement given with it, in millimetres; all four are None where unsaid. `text` is
    `report[start:end]`.
    """

    finding: str
    polarity: str
    side: str | None
    place: str | None
    severity: str | None
    start: int
    end: int
    text: str
    size_mm: float | None = None


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def _enter(trie: Trie, table: dict[str, str], kind: str | None) -> None:
    for name, text in table.items():
        add(trie, _lines(text), kind or name, tuple(name.split("+")) if kind in ("finding", "only_denied") else name)


def _modifiers() -> Trie:
    trie: Trie = {}
    for table, kind in ((SIDES, "side"), (PLACES, "place"), (BOTH_SIDES, "both_sides"), (SEVERITIES, "severity")):
        _enter(trie, table, kind)
    return trie


def _all() -> Trie:
    trie = _modifiers()
    for table, kind in ((PHRASES, "finding"), (DENIED_ONLY, "only_denied"), (ANATOMY, "anatomy")):
        _enter(trie, table, kind)
    for stated, text in STATED.items():
        add(trie, _lines(text), "stated", stated)
    _enter(trie, PREDICATES, "predicate")
    _enter(trie, CUES, None)
    return trie


_TELLING = frozenset(("finding", "only_denied", "stated", "predicate", "severity"))
_TRIE = _all()
_MODIFIERS_ALONE = _modifiers()  # for those inside a finding's own phrase: "elevation of the left diaphragm"


@lru_cache(maxsize=16384)
def extract(report: str) -> tuple[Mention, ...]:
    """All findings that the report mentions, in order of the text. Cached; never raises on any str.

    Text under headings that do not tell what the images show (indication, history, comparison, technique,
    recommendation) and findings that are only asked about ("rule out pneumonia") are left out. A statement of
    normality denies what it rules out: "heart size is normal" gives cardiomegaly, negative; "lungs are clear" opacity,
    negative; "no acute cardiopulmonary process" abnormality, negative.
    """
    folded = fold(report)
    mentions = []
    for begin, end in sentences(report, folded):
        for finding, polarity, where, spot, degree, extent, first, last in _read(folded[begin:end]):
            first, last = first + begin, last + begin
            mentions.append(Mention(finding, polarity, where, spot, degree, first, last, report[first:last], extent))
    mentions.sort(key=lambda mention: mention.start)
    return tuple(mentions)


Found = tuple[str, str, str | None, str | None, str | None, float | None, int, int]


@lru_cache(maxsize=65536)
def _read(sentence: str) -> tuple[Found, ...]:
    """The mentions of one folded sentence, with positions inside it."""
    tokens = list(TOKEN.finditer(sentence))
    words = [token.group() for token in tokens]
    items = scan(words, _TRIE)
    if not any(item.kind in _TELLING for item in items):
        return ()
    items = with_sizes(items, words)
    states = polarities(items, words)
    found: list[Found] = []

    def note(finding: str, polarity: str, window: Window, first: int, last: int) -> None:
        degree, extent = (severity(*window), size(*window)) if polarity != "negative" else (None, None)
        if finding in ("device", "device_malposition"):
            extent = None  # "tip 5 cm above the carina" tells where it ends, not how large it is
        span = tokens[first].start(), tokens[last - 1].end()
        found.append((finding, polarity, side(*window), place(*window), degree, extent, *span))

    for n, window in windows(items).items():
        item, state = items[n], states[n]
        inside: list[Item] = []
        if item.last - item.first > 1 and item.value != ("low_lung_volumes",):  # its "lower" is no place
            inside = scan(words[item.first : item.last], _MODIFIERS_ALONE)
        if state == ASKED or state is None or (item.kind == "only_denied" and state != "negative"):
            continue
        if item.kind == "stated":
            finding, polarity = item.value
            state = _FLIPPED[polarity] if state == "negative" else polarity
            names: tuple[str, ...] = (finding,)
        else:
            names = item.value
        for name in names:
            note(name, state, (window[0] + inside, window[1]), item.first, item.last)
    modifiers = {item.first: item for item in items if item.kind in MODIFIERS}
    for statement in statements(items, states, words):
        near = [modifiers[at] for at in _beside(statement) if at in modifiers]
        pair = statement.subject, statement.predicate
        first, last = min(each.first for each in pair), max(each.last for each in pair)
        note(statement.finding, statement.polarity, (near, []), first, last)
    return tuple(found)


def _beside(statement: Statement) -> list[int]:
    """The words right beside the pair, where its modifiers stand: "mildly enlarged", "the right hemidiaphragm"."""
    subject, predicate = statement.subject, statement.predicate
    places = {*range(predicate.first - 3, predicate.first), predicate.last, *range(subject.first - 2, subject.first)}
    return sorted(places)
