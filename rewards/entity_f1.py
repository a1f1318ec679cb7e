"""Entity F1: the clinical statements of a report against those of the reference report.

Backend `offline`. The project's extractor reads both reports. A statement is a finding with its polarity and, as far as
said, side, place and severity. Per report each statement counts once, and one that says less of the same finding
("effusion" in the impression, after "small left effusion") is part of the fuller one; so repeating earns nothing.
Statements are paired one to one, the best pairs first, and a pair earns credit in [0, 1]:

- the finding must be the same (`level: full` gives half for a near miss as `finding_kin` has them, e.g. mass for
  nodule), and the polarity too (half between affirmed and doubted, nothing between either and denied);
- of what the reference says of it, the finding weighs 4, the side 3, place and severity 1.5 each; an unsaid attribute
  earns half its weight, a wrong one nothing, one of two sides half, and a severity by its distance on the scale of
  `finding_kin.SEVERITY`. Detail that the reference lacks costs nothing and earns nothing.

`level` bounds what counts: `finding`, `side` (finding and side), or `full` (all of it). F1 = 2 credit / (statements of
the candidate + statements of the reference).

Backend `radgraph`: what the reward `radgraph_f1` gives; its levels are there.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Any

from unirg.extraction import Mention, extract

from .finding_kin import SEVERITY, are_kin
from .radgraph_f1 import LEVELS as RADGRAPH_LEVELS
from .radgraph_f1 import RadGraphF1

ATTRIBUTES = {"finding": {}, "side": {"side": 3.0}, "full": {"side": 3.0, "place": 1.5, "severity": 1.5}}
FINDING = 4.0
KIN = 0.5
UNSAID = 0.5
DOUBT = 0.5


class EntityF1:
    """Findings with polarity, side, place and severity against the reference report's, as F1 with partial credit.

    Options: `polarity` both (default), positive (affirmed or doubted) or negative; `backend` offline (default) or
    radgraph; `level` finding, side or full (default) offline, and simple, partial (default) or complete for radgraph;
    and for radgraph `model` (radgraph-xl by default) and `model_folder`, as for the reward `radgraph_f1`. Lies in
    [0, 1]. A candidate without a word scores 0; a study whose reference states nothing is masked. Where reference and
    candidate have no statement of the wanted polarity the score is 1 (a normal study, answered without a finding).
    """

    needs = "nothing; backend=radgraph: what radgraph_f1 needs"

    def __init__(
        self,
        polarity: str = "both",
        level: str | None = None,
        backend: str = "offline",
        model: str = "radgraph-xl",
        model_folder: str | None = None,
    ) -> None:
        if backend not in ("offline", "radgraph"):
            raise ValueError(f"backend '{backend}' is neither offline nor radgraph")
        if polarity not in ("both", "positive", "negative"):
            raise ValueError(f"polarity '{polarity}' is none of both, positive, negative")
        if backend == "radgraph" and polarity != "both":
            raise ValueError("backend radgraph has no polarity of its own; leave polarity=both")
        levels = tuple(ATTRIBUTES) if backend == "offline" else RADGRAPH_LEVELS
        self.level = level or ("full" if backend == "offline" else "partial")
        if self.level not in levels:
            raise ValueError(f"level '{self.level}' is none of {', '.join(levels)} (backend {backend})")
        self.polarity = polarity
        self.radgraph = RadGraphF1(self.level, model, model_folder) if backend == "radgraph" else None

    def setup(self, device: str = "cpu") -> None:
        """Load RadGraph, where it is the backend. Raises OSError saying what to fetch."""
        if self.radgraph:
            self.radgraph.setup(device)

    @property
    def shares(self) -> str | None:
        """The model, where there is one (see `radgraph_f1`)."""
        return self.radgraph.shares if self.radgraph else None

    @property
    def identity(self) -> dict[str, Any]:
        """Backend, level and polarity."""
        if self.radgraph:
            return {"backend": "radgraph"} | self.radgraph.identity
        counted = {"polarity": self.polarity, "level": self.level}
        return {"metric": "entity F1", "backend": "offline", "extractor": "unirg.extraction"} | counted

    def prepare(self, references: list[str]) -> None:
        """Annotate references, where RadGraph does it."""
        if self.radgraph:
            self.radgraph.prepare(references)

    def score(self, candidates: list[str], references: list[str], **columns: Any) -> list[float | None]:
        """See the class."""
        if self.radgraph:
            return self.radgraph.score(candidates, references)
        return [self._pair(*pair) for pair in zip(candidates, references, strict=True)]

    def _pair(self, candidate: str, reference: str) -> float | None:
        if not extract(reference):
            return None
        if not any(letter.isalnum() for letter in candidate):
            return 0.0
        wanted = statements(reference, self.polarity, self.level)
        stated = statements(candidate, self.polarity, self.level)
        if not wanted and not stated:
            return 1.0
        return 2 * _paired_credit(stated, wanted, self.level) / (len(stated) + len(wanted))


@lru_cache(maxsize=16384)
def statements(report: str, polarity: str, level: str) -> tuple[Mention, ...]:
    """The distinct statements of a report, reduced to what `level` counts; see the module.

    Positions and text of the mentions are dropped, as the same statement may stand in several places.
    """
    counted = ATTRIBUTES[level]
    found = set()
    for mention in extract(report):
        if polarity == "both" or (mention.polarity == "negative") == (polarity == "negative"):
            side, place, severity = (getattr(mention, name) if name in counted else None for name in ATTRIBUTES["full"])
            found.add(Mention(mention.finding, mention.polarity, side, place, severity, start=0, end=0, text=""))
    lefts = [each for each in found if each.side == "left" and replace(each, side="right") in found]
    found |= {replace(each, side="bilateral") for each in lefts}
    fullest = [each for each in found if not any(_is_part(each, other) for other in found if other != each)]
    return tuple(sorted(fullest, key=str))


def _is_part(one: Mention, other: Mention) -> bool:
    """Whether `other` says all that `one` says, and more."""
    return (
        (one.finding, one.polarity) == (other.finding, other.polarity)
        and (one.side in (None, other.side) or (other.side == "bilateral"))
        and one.place in (None, other.place)
        and one.severity in (None, other.severity)
    )


def _paired_credit(stated: tuple[Mention, ...], wanted: tuple[Mention, ...], level: str) -> float:
    """The credit of the pairs, each statement in one pair at most, the best pairs first and equal statements before
    others."""
    pairs = [
        (-credit, one != other, i, j)
        for i, one in enumerate(stated)
        for j, other in enumerate(wanted)
        if (credit := _credit(one, other, level)) > 0
    ]
    used_stated, used_wanted, total = set(), set(), 0.0
    for lost, _, i, j in sorted(pairs):
        if i not in used_stated and j not in used_wanted:
            used_stated.add(i)
            used_wanted.add(j)
            total -= lost
    return total


def _credit(stated: Mention, wanted: Mention, level: str) -> float:
    credit = 1.0
    if stated.finding != wanted.finding:
        if level != "full" or not are_kin(stated.finding, wanted.finding):
            return 0.0
        credit = KIN
    if stated.polarity != wanted.polarity:
        if "negative" in (stated.polarity, wanted.polarity):
            return 0.0
        credit *= DOUBT
    earned = total = FINDING
    for name, weight in ATTRIBUTES[level].items():
        truth, said = getattr(wanted, name), getattr(stated, name)
        if truth is not None:
            total += weight
            earned += weight * (UNSAID if said is None else _agreement(name, said, truth))
    return credit * earned / total


def _agreement(name: str, said: str, truth: str) -> float:
    if said == truth:
        return 1.0
    if name == "side":
        return 0.5 if "bilateral" in (said, truth) else 0.0
    if name == "severity" and said in SEVERITY and truth in SEVERITY:
        return 1 - abs(SEVERITY[said] - SEVERITY[truth]) / max(SEVERITY.values())
    return 0.0
