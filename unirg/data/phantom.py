"""Phantom: a fully synthetic corpus of drawn chest films with generated reports, for tests, demos and experiments.

What a film shows is drawn at random; its report is written in an institution's style and omits findings, as real
reports do. What was drawn is known: `labels` hold it completely, and `extra["complete"]` is the report that omits
nothing. Institution D writes only the split "unseen".
"""

import random
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from unirg.data.phantom_films import Finding, draw_film
from unirg.data.phantom_reports import STYLES, write_report
from unirg.errors import UserError
from unirg.prompt import report_text
from unirg.section import Section
from unirg.study import Study, StudyImage

KINDS = {
    # kind: (weight among abnormal findings, sides, places, severities)
    "cardiomegaly": (1.2, (None,), (None,), ("mild", "moderate", "severe")),
    "effusion": (1.2, ("left", "right", "bilateral"), (None,), ("small", "moderate", "large")),
    "pneumothorax": (0.7, ("left", "right"), (None,), ("small", "moderate", "large")),
    "opacity": (1.2, ("left", "right"), ("upper", "mid", "lower"), (None,)),
    "atelectasis": (1.2, ("left", "right", "bilateral"), ("lower",), (None,)),
    "edema": (0.9, (None,), (None,), ("mild", "moderate", "severe")),
    "nodule": (0.9, ("left", "right"), ("upper", "mid", "lower"), (None,)),
    "device": (0.9, (None,), ("catheter", "pacemaker"), (None,)),
}
LATERAL = tuple(kind for kind, (_, sides, _, _) in KINDS.items() if "left" in sides)
_COUNTS = (0.30, 0.25, 0.25, 0.13, 0.07)  # of 0, 1, 2, 3, 4 findings
_INDICATIONS = ("chest pain", "cough", "dyspnea", "fever", "shortness of breath", "preoperative", "weakness")


class PhantomData(Section):
    """Drawn films with generated reports. The films are drawings, not radiographs."""

    adapter: Literal["phantom"] = "phantom"
    """Always "phantom"."""
    train: int = Field(6000, ge=0)
    """Studies of the split "train"."""
    dev: int = Field(500, ge=0)
    """Studies of the split "dev"."""
    test: int = Field(1000, ge=0)
    """Studies of the split "test"."""
    unseen: int = Field(500, ge=0)
    """Studies of the split "unseen", written by an institution that training never saw."""
    size: int = Field(96, ge=32)
    """Width and height of a film in pixels."""
    seed: int = 0
    """Another seed is another corpus: other patients, films and words."""
    reports: Literal["omitting", "complete"] = "omitting"
    """"omitting": findings are left out as `omit` says; "complete": nothing is. Films and labels are the same."""
    omit: dict[str, Annotated[float, Field(ge=0, le=1)]] = dict.fromkeys(
        ("atelectasis", "cardiomegaly", "edema", "nodule", "opacity"), 0.5
    )
    """With what probability a report says nothing of a finding that is there, by kind; others are always reported."""
    institution_dropout: float = Field(0.1, ge=0, le=1)
    """Share of the training studies whose institution is not told, so that a prompt that names the institution can also
    be answered where it is unknown (as it is throughout the split "unseen")."""


def load_phantom(config: PhantomData, split: str) -> list[Study]:
    """The studies of a split; the first n of a split are the same whatever its size.

    Raises UserError for a split that is not one of train, dev, test, unseen, or an unknown kind in `omit`.
    """
    if split not in ("train", "dev", "test", "unseen"):
        raise UserError(f"phantom data have no split {split!r}; there are train, dev, test and unseen")
    if unknown := sorted(set(config.omit) - set(KINDS)):
        raise UserError(f"data.omit: {', '.join(unknown)} is not drawn; the kinds are {', '.join(KINDS)}")
    return [_study(config, split, index) for index in range(getattr(config, split))]


def _study(config: PhantomData, split: str, index: int) -> Study:
    rng = random.Random(f"{config.seed}/{split}/{index}")
    findings = _draw_findings(rng)
    seed = rng.randrange(2**31)
    name = "D" if split == "unseen" else rng.choice(("A", "B", "C"))
    told = None if split == "unseen" or (split == "train" and rng.random() < config.institution_dropout) else name
    # one draw per kind, used or not, so that changing one probability moves no other
    dropped = {kind for kind in KINDS if rng.random() < config.omit.get(kind, 0.0)}
    omitted = () if config.reports == "complete" else dropped & {finding[0] for finding in findings}
    texts = [write_report(STYLES[name], findings, KINDS, seed, omit) for omit in ((), omitted)]
    complete = Study("", findings=texts[0][0], impression=texts[0][1])
    return Study(
        id=f"phantom-{split}-{index:05d}",
        images=(StudyImage(partial(draw_film, tuple(findings), seed, config.size), view="frontal"),),
        indication=rng.choice(_INDICATIONS),
        findings=texts[1][0],
        impression=texts[1][1],
        institution=told,
        labels=_labels(findings),
        modality="CXR",
        language="en",
        extra={"complete": report_text(complete), "style": name, "film": "drawn"},
    )


def _draw_findings(rng: random.Random) -> list[Finding]:
    """What the film shows: distinct kinds, each with a side, place and severity where the kind has them."""
    count = rng.choices(range(len(_COUNTS)), _COUNTS)[0]
    weights = {kind: weight for kind, (weight, *_) in KINDS.items()}
    findings: list[Finding] = []
    for _ in range(count):
        kind = rng.choices(list(weights), list(weights.values()))[0]
        del weights[kind]
        _, sides, places, severities = KINDS[kind]
        findings.append((kind, rng.choice(sides), rng.choice(places), rng.choice(severities)))
    return findings


def _labels(findings: list[Finding]) -> Mapping[str, int]:
    """Complete labels: 1 or 0 for every kind, and by side for those that have one."""
    labels = dict.fromkeys(KINDS, 0) | {f"{kind}/{side}": 0 for kind in LATERAL for side in ("left", "right")}
    for kind, side, _, _ in findings:
        labels[kind] = 1
        for one in ("left", "right") if kind in LATERAL else ():
            labels[f"{kind}/{one}"] = int(side in (one, "bilateral"))
    return labels
