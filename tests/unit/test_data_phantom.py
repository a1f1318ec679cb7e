"""The phantom corpus: films, reports, labels and what they have to do with each other."""

import pickle

import numpy as np
import pytest

from unirg.data import PhantomData, drawn_films, fingerprint, load_studies
from unirg.data.phantom import KINDS, LATERAL
from unirg.data.phantom_films import DRAWABLE, draw_film
from unirg.errors import UserError
from unirg.extraction import extract
from unirg.prompt import report_text
from unirg.study import Study

SMALL = PhantomData(train=400, dev=20, test=100, unseen=300)
OMITTED = ("atelectasis", "cardiomegaly", "edema", "nodule", "opacity")


@pytest.fixture(scope="module")
def train() -> list[Study]:
    return load_studies(SMALL, "train")


@pytest.fixture(scope="module")
def unseen() -> list[Study]:
    return load_studies(SMALL, "unseen")


def stated(report: str) -> dict[str, set[str]]:
    """What the extractor reads, among the corpus's kinds: polarity -> findings and finding/side."""
    found: dict[str, set[str]] = {"positive": set(), "negative": set(), "uncertain": set()}
    for mention in extract(report):
        if mention.finding in KINDS:
            found[mention.polarity].add(mention.finding)
            if mention.finding in LATERAL:
                sides = ("left", "right") if mention.side == "bilateral" else (mention.side,)
                found[mention.polarity].update(f"{mention.finding}/{side}" for side in sides if side)
    return found


def test_a_perfect_reporter_scores_perfectly_under_the_extractor(train: list[Study], unseen: list[Study]) -> None:
    wrong = [
        (study.extra["style"], name, study.extra["complete"])
        for study in train + unseen
        for name in study.labels
        if (name in stated(study.extra["complete"])["positive"]) != (study.labels[name] == 1)
    ]
    assert len(wrong) <= 0.01 * len(train + unseen) * len(train[0].labels), wrong[:3]


def test_reports_deny_nothing_that_is_there(train: list[Study], unseen: list[Study]) -> None:
    for study in train + unseen:
        denied = stated(report_text(study))["negative"]
        assert not {name for name in denied if study.labels[name] == 1}, report_text(study)
        assert denied  # every style says what is normal


def test_reports_omit_half_of_the_five_kinds_and_always_say_the_others(train: list[Study]) -> None:
    for kind in KINDS:
        there = [study for study in train if study.labels[kind] == 1]
        said = np.mean([kind in stated(report_text(study))["positive"] for study in there])
        assert 0.3 < said < 0.7 if kind in OMITTED else said == 1, (kind, said)


def test_omitting_report_is_the_complete_one_less_sentences(train: list[Study]) -> None:
    complete = load_studies(SMALL.model_copy(update={"reports": "complete"}), "train")
    for omitting, whole in zip(train, complete, strict=True):
        assert report_text(whole) == whole.extra["complete"] == omitting.extra["complete"]
        assert (omitting.labels, omitting.id, omitting.institution) == (whole.labels, whole.id, whole.institution)
        assert omitting.findings is not None and whole.findings is not None
        kept = [part for part in whole.findings.split(". ") if part.rstrip(".") in omitting.findings]
        assert [part.rstrip(".") for part in kept] == [part.rstrip(".") for part in omitting.findings.split(". ")]


def test_labels_are_complete_and_their_sides_agree(train: list[Study]) -> None:
    keys = set(KINDS) | {f"{kind}/{side}" for kind in LATERAL for side in ("left", "right")}
    for study in train:
        assert set(study.labels) == keys
        for kind in LATERAL:
            assert study.labels[kind] == max(study.labels[f"{kind}/left"], study.labels[f"{kind}/right"])
    normal = np.mean([not any(study.labels.values()) for study in train])
    assert 0.2 < normal < 0.4


def test_institutions(train: list[Study], unseen: list[Study]) -> None:
    assert {study.extra["style"] for study in train} == {"A", "B", "C"}
    assert {study.extra["style"] for study in unseen} == {"D"}
    assert {study.institution for study in unseen} == {None}
    told = [study for study in train if study.institution is not None]
    assert all(study.institution == study.extra["style"] for study in told)
    assert 0.05 < 1 - len(told) / len(train) < 0.15
    assert all(study.institution for study in load_studies(SMALL, "test"))
    texts = {style: {report_text(s) for s in train if s.extra["style"] == style} for style in "ABC"}
    assert all(len(reports) > 50 for reports in texts.values())
    assert not texts["A"] & texts["B"] and not texts["A"] & texts["C"] and not texts["B"] & texts["C"]
    assert {style: all("Impression:" in text for text in texts[style]) for style in "ABC"} == dict(
        A=False, B=True, C=False
    )


def test_corpus_is_deterministic_and_a_longer_one_begins_with_a_shorter_one(train: list[Study]) -> None:
    again = load_studies(SMALL.model_copy(update={"train": 500}), "train")
    assert fingerprint(again[:400]) == fingerprint(train)
    other = load_studies(SMALL.model_copy(update={"seed": 1}), "train")
    assert fingerprint(other) != fingerprint(train)
    assert not {study.id for study in load_studies(SMALL, "test")} & {study.id for study in train}


def test_films_survive_pickling_and_are_equal_each_time(train: list[Study]) -> None:
    for study in train[:5]:
        copy = pickle.loads(pickle.dumps(study))
        assert np.array_equal(np.asarray(copy.images[0].load()), np.asarray(study.images[0].load()))
    sizes = {study.images[0].load().size for study in load_studies(PhantomData(dev=3, size=128), "dev")}
    assert sizes == {(128, 128)}


ONE_SIDED = {
    *(
        "effusion",
        "blunted_angle",
        "pneumothorax",
        "opacity",
        "infiltrate",
        "consolidation",
        "pneumonia",
        "atelectasis",
    ),
    *("nodule", "mass", "granuloma", "scarring", "fibrosis", "fracture", "lymphadenopathy", "pleural_thickening"),
    "elevated_diaphragm",
}


@pytest.mark.parametrize("name", DRAWABLE)
@pytest.mark.parametrize("size", [96, 100])
def test_every_finding_shows_on_its_own_side_and_nothing_else_changes(name: str, size: int) -> None:
    for side in ("left", "right"):
        clear = draw_film([], seed=3, size=size).astype(float)
        changed = np.abs(draw_film([(name, side, "mid", "large")], seed=3, size=size) - clear) > 15
        assert changed.shape == (size, size)
        assert np.count_nonzero(changed) >= 5
        if name in ONE_SIDED:  # the patient's right is on the film's left
            elsewhere = changed[:, : size // 2 - 1] if side == "left" else changed[:, size // 2 + 1 :]
            assert not elsewhere.any()


def test_a_finding_that_cannot_be_drawn_leaves_the_film_clear() -> None:
    assert np.array_equal(draw_film([("osteopenia", None, None, None)], seed=1), draw_film([], seed=1))


@pytest.mark.parametrize("name", ["effusion", "pneumothorax", "cardiomegaly", "edema", "atelectasis", "opacity"])
def test_more_severe_changes_more_of_the_film(name: str) -> None:
    def area(severity: str) -> float:
        pairs = [(draw_film([(name, "left", "lower", severity)], seed), draw_film([], seed)) for seed in range(8)]
        return float(np.mean([np.abs(with_it.astype(float) - without).sum() for with_it, without in pairs]))

    assert area("small") < area("moderate") < area("large")


def test_unknown_split_and_unknown_kind_are_named() -> None:
    with pytest.raises(UserError, match=r"'val'.*train, dev, test and unseen"):
        load_studies(SMALL, "val")
    with pytest.raises(UserError, match=r"data\.omit: edma .*edema"):
        load_studies(PhantomData(omit={"edma": 0.5}), "dev")


def test_drawn_films_are_said_to_be_drawn(train: list[Study]) -> None:
    assert drawn_films(SMALL)
    assert all(study.extra["film"] == "drawn" for study in train)
