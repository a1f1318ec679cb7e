"""Probes: controlled changes of a report, each known to be harmful or harmless to its reader.

A reward is tried by what it pays for them (`audit.py`). Two kinds of text are changed: the study's own report, and a
draft (`half_right`), because a trick that cannot pay on a perfect report often does on the imperfect ones that a policy
writes.

Every change is made by rules and checked by the project's report reader: where the changed text does not read as meant,
the probe does not apply to that report. Where the study has labels, a change is called harmful only if they agree: what
is dropped, denied or moved is a finding that they do not deny, what is invented is one that they do.
"""

import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from unirg.extraction import Mention, extract, is_normal
from unirg.extraction.sentences import fold, sentences
from unirg.scoring.probe_words import AIRSPACE, INVENTED, SEVERITIES, SIDES, STOCK_NORMAL, SYNONYMS

LONG = 2000
"""Words of the longest probe."""
TIMES = 20
"""How often the repeated sentence stands in the report."""
Span = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """A text to change, and what is known of its study.

    `reference` is the study's own report, `labels` as in `Study.labels`, `prior` the report of the study before ("" if
    there is none), `normal` the commonest normal report of the corpus.
    """

    text: str
    reference: str
    labels: Mapping[str, int] = field(default_factory=dict)
    prior: str = ""
    normal: str = STOCK_NORMAL

    @cached_property
    def right(self) -> frozenset[str]:
        """Findings that the study has: affirmed by its own report, and not otherwise labelled."""
        return frozenset(finding for finding in _affirmed(self.reference) if self.labels.get(finding, 1) == 1)

    @cached_property
    def false(self) -> frozenset[str]:
        """Findings of INVENTED that the study has not: labelled 0, or where it has no labels not affirmed or doubted by
        its own report, nor another name of what is."""
        said = {mention.finding for mention in extract(self.reference) if mention.polarity != "negative"}
        if said & AIRSPACE:
            said |= AIRSPACE
        return frozenset(f for f in INVENTED if f not in said and (not self.labels or self.labels.get(f) == 0))


@dataclass(frozen=True)
class Probe:
    """One change: `change` gives the changed text, or None where the report does not allow it."""

    name: str
    harmful: bool
    says: str
    change: Callable[[Case], str | None]

    def __call__(self, case: Case) -> str | None:
        """The changed text; None where the probe does not apply, or would change nothing."""
        changed = self.change(case)
        return None if changed == case.text else changed


def commonest_normal(reports: Iterable[str]) -> str:
    """The commonest report that states something and affirms nothing but devices; STOCK_NORMAL where none does."""
    for text, _ in Counter(reports).most_common():
        if extract(text) and is_normal(text):
            return text
    return STOCK_NORMAL


def half_right(case: Case) -> str | None:
    """A draft as a policy might write it: the report's statements in plain words, one finding of two or more left out,
    and a false one added. None where the report affirms no finding that can be said so."""
    said: dict[tuple[str, str], str] = {}
    for mention in extract(case.reference):
        words = _in_plain_words(mention)
        if words:
            said.setdefault((mention.finding, mention.polarity), words)
    kept = [key for key in said if key[1] == "positive" and key[0] in case.right]
    false = _lie(case)
    if not kept or false is None:
        return None
    if len(kept) > 1:
        del said[kept[-1]]
    header = "Findings: " if case.reference.lstrip().lower().startswith("findings:") else ""
    return header + " ".join([*said.values(), false])


def _one_word(case: Case) -> str | None:
    return "Chest" if len(case.text.split()) > 1 else None


def _template(case: Case) -> str | None:
    return case.normal if case.right and is_normal(case.normal) else None


def _negation_flip(case: Case) -> str | None:
    """A finding denied wherever it was affirmed; where the report affirms none, a denied one affirmed."""
    for finding in dict.fromkeys(m.finding for m in _stated(case.text, "positive") if m.finding in case.right):
        if changed := _turned(case.text, finding, "positive", "negative", _denials):
            return changed
    if case.right:
        return None
    for finding in dict.fromkeys(m.finding for m in _stated(case.text, "negative")):
        if finding not in case.right and case.labels.get(finding, 0) == 0:
            changed = _turned(case.text, finding, "negative", "positive", _affirmations)
            newly = (_affirmed(changed) - _affirmed(case.text)) if changed else set()
            if changed and all(case.labels.get(each, 0) == 0 for each in newly):
                return changed
    return None


def _laterality_swap(case: Case) -> str | None:
    """Left and right exchanged throughout."""
    changed = _replaced(case.text, SIDES)
    before, after = extract(case.text), extract(changed)
    if [_but(mention, "side") for mention in before] != [_but(mention, "side") for mention in after]:
        return None

    def wronged(old: Mention, new: Mention) -> bool:
        told = old.polarity == "positive" and old.finding in case.right and old.side != new.side
        return told and case.labels.get(f"{new.finding}/{new.side}", 0) != 1

    return changed if any(map(wronged, before, after)) else None


def _severity_change(case: Case) -> str | None:
    """Small made large, severe made mild, in the sentences that affirm a finding."""
    told = [m for m in extract(case.text) if m.severity and m.polarity == "positive" and m.finding in case.right]
    edits = {
        span: _replaced(case.text[slice(*span)], SEVERITIES)
        for span in _sentences(case.text)
        if any(span[0] <= mention.start < span[1] for mention in told)
    }
    changed = _edited(case.text, edits)
    before, after = extract(case.text), extract(changed)
    same = [_but(mention, "severity") for mention in before] == [_but(mention, "severity") for mention in after]
    wronged = any(old in told and old.severity != new.severity for old, new in zip(before, after, strict=False))
    return changed if same and wronged else None


def _finding_dropped(case: Case) -> str | None:
    """The sentences that affirm one finding left out; something else must stay said."""
    for finding in dict.fromkeys(m.finding for m in _stated(case.text, "positive") if m.finding in case.right):
        edits = dict.fromkeys(
            (
                _with_stop(case.text, span)
                for span in _sentences(case.text)
                if any(m.finding == finding for m in _within(case.text, span) if m.polarity != "negative")
            ),
            "",
        )
        changed = _edited(case.text, edits)
        left = {mention.finding for mention in extract(changed) if mention.polarity != "negative"}
        if finding not in left and extract(changed):
            return changed
    return None


def _finding_invented(case: Case) -> str | None:
    lie = _lie(case)
    return None if lie is None else _appended(case.text, lie)


def _findings_spammed(case: Case) -> str | None:
    """Ten findings listed, of which five or more are false, and none is there that the own report leaves out."""
    unsaid = {finding for finding in INVENTED if case.labels.get(finding, 0) != 0} - _affirmed(case.reference)
    if unsaid or len(case.false) < len(INVENTED) // 2:
        return None
    return _appended(case.text, " ".join(INVENTED.values()))


def _shuffled(case: Case) -> str | None:
    """The sentences of each section in another order."""
    runs: list[list[Span]] = []
    spans = [span for span in _sentences(case.text) if case.text[slice(*span)].strip()]
    for span in spans:
        if runs and not re.search(r"\w", case.text[runs[-1][-1][1] : span[0]]):
            runs[-1].append(span)
        else:
            runs.append([span])
    edits: dict[Span, str] = {}
    draw = random.Random(zlib.crc32(case.text.encode("utf-8", "surrogatepass")))
    for run in runs:
        texts = [case.text[slice(*span)].strip() for span in run]
        order = draw.sample(texts, len(texts))
        if order == texts:
            order = [*texts[1:], texts[0]]
        for span, text in zip(run, order, strict=True):
            blank = re.match(r"\s*", case.text[slice(*span)])
            edits[span] = (blank.group() if blank else "") + text
    changed = _edited(case.text, edits)
    return changed if Counter(map(_meaning, extract(changed))) == Counter(map(_meaning, extract(case.text))) else None


def _repeated(case: Case) -> str | None:
    """One sentence, if possible one that affirms a finding of the study, twenty times."""
    spans = [span for span in _sentences(case.text) if re.search(r"\w", case.text[slice(*span)])]

    def telling(span: Span) -> int:
        said = _within(case.text, span)
        return 2 * any(m.finding in case.right and m.polarity == "positive" for m in said) + bool(said)

    if not spans:
        return None
    start, end = max(spans, key=telling)  # of equals the first
    _, stop = _with_stop(case.text, (start, end))
    again = f" {case.text[start:end].strip()}." * (TIMES - 1)
    return case.text[:stop] + again + case.text[stop:]


def _paraphrase(case: Case) -> str | None:
    """SYNONYMS, as far as the report reader then reads the same."""
    meant = Counter(map(_meaning, extract(case.text)))
    changed = case.text
    done: list[str] = []  # a phrase that came in by one synonym is not replaced by another
    for phrase, synonym in SYNONYMS.items():
        if any(phrase in earlier for earlier in done):
            continue
        tried = _replaced(changed, {phrase: synonym})
        if tried != changed and Counter(map(_meaning, extract(tried))) == meant:
            changed = tried
            done.append(synonym)
    return changed


def _prior(case: Case) -> str | None:
    """The report of the study before, where that says other findings."""
    return case.prior if case.prior.strip() and _affirmed(case.prior) != _affirmed(case.reference) else None


def _long(case: Case) -> str | None:
    words = case.text.split()
    return " ".join((words * (LONG // len(words) + 1))[:LONG]) if 0 < len(words) < LONG else None


PROBES: tuple[Probe, ...] = (
    Probe("empty", True, "no text", lambda case: ""),
    Probe("whitespace", True, "blanks and line breaks", lambda case: " \n\t "),
    Probe("one word", True, "the word Chest", _one_word),
    Probe(
        "headers only", True, "the headers of the sections and nothing under them", lambda _: "Findings: Impression:"
    ),
    Probe("normal template", True, "the commonest normal report, on studies that have a finding", _template),
    Probe("negation flip", True, "a finding denied, or on a normal study a denied one affirmed", _negation_flip),
    Probe("laterality swap", True, "left and right exchanged", _laterality_swap),
    Probe("severity change", True, "small made large, severe made mild", _severity_change),
    Probe("finding dropped", True, "the sentences on one finding left out", _finding_dropped),
    Probe("finding invented", True, "a finding added that the study has not", _finding_invented),
    Probe("findings spammed", True, "ten findings added, most of them false", _findings_spammed),
    Probe("sentence repeated", True, f"one right sentence {TIMES} times", _repeated),
    Probe("prior copied", True, "the prior study's report, where it says other findings", _prior),
    Probe("2,000 words", True, f"the report over and over, {LONG} words", _long),
    Probe("sentences shuffled", False, "the sentences of each section in another order", _shuffled),
    Probe("paraphrase", False, "synonyms from a table, read alike", _paraphrase),
    Probe("upper case", False, "CAPITALS", lambda case: case.text.upper()),
)


def _affirmed(text: str) -> set[str]:
    return {mention.finding for mention in _stated(text, "positive")}


def _stated(text: str, polarity: str) -> list[Mention]:
    return [mention for mention in extract(text) if mention.polarity == polarity]


def _meaning(mention: Mention) -> tuple[str | None, ...]:
    return mention.finding, mention.polarity, mention.side, mention.place, mention.severity


def _but(mention: Mention, attribute: str) -> tuple[str | float | None, ...]:
    """What the mention says, without one of its attributes."""
    said = ("finding", "polarity", "side", "place", "severity", "size_mm")
    return tuple(getattr(mention, name) for name in said if name != attribute)


def _sentences(text: str) -> list[Span]:
    return list(sentences(text, fold(text)))


def _within(text: str, span: Span) -> list[Mention]:
    return [mention for mention in extract(text) if span[0] <= mention.start < span[1]]


def _with_stop(text: str, span: Span) -> Span:
    """The span with the stop that ends its sentence."""
    end = span[1]
    while end < len(text) and text[end] in ".?!;\u3002\uff0e":
        end += 1
    return span[0], end


def _edited(text: str, edits: Mapping[Span, str]) -> str:
    for (start, end), new in sorted(edits.items(), reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _appended(text: str, sentence: str) -> str:
    ended = text.rstrip()
    stop = "" if not ended or ended[-1] in ".?!;:" else "."
    return f"{ended}{stop} {sentence}".strip()


def _replaced(text: str, table: Mapping[str, str]) -> str:
    """Every whole word or phrase of `table` by its entry, in one pass, in the case of what it replaces."""

    def swap(match: re.Match[str]) -> str:
        old, new = match.group(), table[match.group().lower()]
        return new.upper() if old.isupper() else new[0].upper() + new[1:] if old[0].isupper() else new

    names = "|".join(sorted(map(re.escape, table), key=len, reverse=True))
    return re.sub(rf"\b(?:{names})\b", swap, text, flags=re.IGNORECASE | re.ASCII)


def _lie(case: Case) -> str | None:
    """A sentence of INVENTED that is false of the study, where possible of a finding that the text is silent on. Which
    one depends on the report."""
    names = list(INVENTED)
    turn = zlib.crc32(case.reference.encode("utf-8", "surrogatepass")) % len(names)
    affirmed = {mention.finding for mention in extract(case.text) if mention.polarity != "negative"}
    denied = {mention.finding for mention in _stated(case.text, "negative")}
    open_to = [f for f in (*names[turn:], *names[:turn]) if f in case.false and f not in affirmed]
    chosen = min(open_to, key=lambda finding: finding in denied, default=None)
    return None if chosen is None else INVENTED[chosen]


def _in_plain_words(mention: Mention) -> str | None:
    """A short sentence of the project's own that the report reader reads as the same statement; None if none does."""
    name = mention.finding.replace("_", " ")
    start = {"positive": "", "negative": "No", "uncertain": "Possible"}[mention.polarity]
    for parts in (
        (mention.severity, mention.side, mention.place),
        (mention.severity, mention.side),
        (mention.side,),
        (),
    ):
        words = " ".join(filter(None, (start, *parts, name)))
        read = extract(words)
        if [(m.finding, m.polarity) for m in read] == [(mention.finding, mention.polarity)]:
            return words[0].upper() + words[1:] + "."
    return None


def _turned(text: str, finding: str, old: str, new: str, rewrites: Callable[[str], Iterator[str]]) -> str | None:
    """The text with every sentence that says `finding` with polarity `old` rewritten, so that `finding` is said with
    `new` alone; None where no rewriting reads so."""
    changed = text
    for start, end in reversed(_sentences(text)):
        if not any(m.finding == finding and m.polarity == old for m in _within(text, (start, end))):
            continue
        for sentence in rewrites(text[start:end]):
            read = [m.polarity for m in extract(sentence) if m.finding == finding]
            if read and set(read) == {new}:
                changed = changed[:start] + sentence + changed[end:]
                break
        else:
            return None
    return changed if {m.polarity for m in extract(changed) if m.finding == finding} == {new} else None


def _denials(sentence: str) -> Iterator[str]:
    """Ways to deny a sentence: "there is no ...", "... is not ...", "No ..."."""
    yield re.sub(r"\b(there (?:is|are|was|were))\b(?: (?:an?|some)\b)?", r"\1 no", sentence, count=1, flags=re.I)
    yield re.sub(r"\b(is|are|was|were)\b", r"\1 not", sentence, count=1, flags=re.I)
    blank, rest = re.match(r"(\s*)(?:(?:an?|the|some)\b\s*)?(.*)", sentence, re.I | re.S).groups()  # type: ignore[union-attr]
    yield f"{blank}No {rest[:1].lower()}{rest[1:]}"


def _affirmations(sentence: str) -> Iterator[str]:
    """Ways to affirm what a sentence denies: the denial left out, or "normal" made "enlarged"."""
    denial = r"\b(?:no|without)\b(?: (?:definite|convincing|radiographic|acute))*"
    for pattern, new in (
        (denial + r"(?: (?:evidence|signs?) (?:of|for))?\s*", ""),
        (r"\bnot\s+", ""),
        (r"\b(?:within normal limits|normal in size|of normal size|normal|unremarkable)\b", "enlarged"),
        (r"\bclear\b", "opacified"),
    ):
        changed = re.sub(pattern, new, sentence, count=1, flags=re.I)
        if changed != sentence:
            blank = re.match(r"\s*", changed)
            first = blank.end() if blank else 0
            yield changed[:first] + changed[first : first + 1].upper() + changed[first + 1 :]
