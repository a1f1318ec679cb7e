"""Invented radiology reports: what is on a drawn film, in the words of one institution.

Each institution has its order, phrases, terseness, sections and habits of what it says of a normal film. A sentence's
variant is drawn once per study, so that the complete report and the one that omits findings differ in nothing else.
"""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from unirg.data.phantom_films import Finding

_REGIONS = {"lower": "lower lobe", "mid": "mid lung", "upper": "upper lobe", "apex": "apex"}


@dataclass(frozen=True)
class Style:
    """An institution's way of writing: for each kind sentences, of which one is drawn.

    Sentences are filled with {severity} ("mildly"), {plain} ("mild"), {side}, {region} and {device}, or the same with a
    capital. A kind "effusion/bilateral" is used for both sides.
    """

    order: tuple[str, ...]  # the order in which kinds are taken up
    present: Mapping[str, tuple[str, ...]]  # a finding's sentence
    absent: Mapping[str, tuple[str, ...]]  # what is said where a kind is absent; kinds not listed are passed over
    absent_pair: tuple[str, ...]  # neither effusion nor pneumothorax
    normal_impression: tuple[str, ...] = ()  # of an institution that writes impressions


STYLES: dict[str, Style] = {
    "A": Style(
        order=("cardiomegaly", "edema", "opacity", "atelectasis", "nodule", "pleura", "device"),
        present={
            "cardiomegaly": ("The heart is {severity} enlarged.", "There is {plain} cardiomegaly."),
            "edema": ("There is {plain} pulmonary edema.",),
            "opacity": ("There is an opacity in the {side} {region}.", "Airspace opacity in the {side} {region}."),
            "atelectasis": ("There is linear atelectasis at the {side} base.", "Atelectasis at the {side} base."),
            "atelectasis/bilateral": (
                "There is linear atelectasis at the bilateral bases.",
                "Atelectasis at the bilateral bases.",
            ),
            "nodule": ("There is a nodule in the {side} {region}.",),
            "effusion": ("There is a {plain} {side} pleural effusion.",),
            "effusion/bilateral": ("There are {plain} bilateral pleural effusions.",),
            "pneumothorax": ("There is a {plain} {side} pneumothorax.",),
            "device": ("A {device} is in place.",),
        },
        absent={
            "cardiomegaly": ("The heart is normal in size.", "Heart size is within normal limits."),
            "edema": ("There is no pulmonary edema.",),
            "opacity": ("There is no focal opacity.", "No focal airspace opacity."),
            "effusion": ("There is no pleural effusion.",),
            "pneumothorax": ("There is no pneumothorax.",),
        },
        absent_pair=("There is no pneumothorax or pleural effusion.", "There is no pleural effusion or pneumothorax."),
    ),
    "B": Style(
        order=("device", "pleura", "opacity", "nodule", "atelectasis", "edema", "cardiomegaly"),
        present={
            "cardiomegaly": ("{Plain} cardiomegaly.",),
            "edema": ("{Plain} edema.",),
            "opacity": ("{Side} {region} opacity.",),
            "atelectasis": ("{Side} basilar atelectasis.",),
            "nodule": ("{Side} {region} nodule.",),
            "effusion": ("{Plain} {side} effusion.",),
            "effusion/bilateral": ("{Plain} bilateral effusions.",),
            "pneumothorax": ("{Plain} {side} pneumothorax.",),
            "device": ("{Device} present.",),
        },
        absent={
            "cardiomegaly": ("Heart size normal.", "Normal heart size."),
            "opacity": ("No focal opacity.",),
            "effusion": ("No effusion.",),
            "pneumothorax": ("No pneumothorax.",),
        },
        absent_pair=("No effusion or pneumothorax.",),
        normal_impression=("No acute disease.", "No acute cardiopulmonary abnormality."),
    ),
    "C": Style(
        order=("opacity", "nodule", "atelectasis", "pleura", "cardiomegaly", "edema", "device"),
        present={
            "cardiomegaly": ("Cardiac silhouette is {severity} enlarged.",),
            "edema": ("Findings of {plain} interstitial edema are noted.", "{Plain} interstitial edema is noted."),
            "opacity": ("Increased opacity is seen in the {side} {region}.", "{Side} {region} opacity is seen."),
            "atelectasis": ("Bandlike atelectasis is seen in the {side} lung base.",),
            "atelectasis/bilateral": ("Bandlike atelectasis is seen in the bilateral lung bases.",),
            "nodule": ("A nodule projects over the {side} {region}.", "Nodule is seen in the {side} {region}."),
            "effusion": ("{Plain} {side} pleural effusion is seen.",),
            "effusion/bilateral": ("{Plain} bilateral pleural effusions are seen.",),
            "pneumothorax": ("{Plain} {side} pneumothorax is seen.",),
            "device": ("{Device} is noted.",),
        },
        absent={
            "opacity": ("The lungs are without focal opacity.", "No focal opacity is seen."),
            "nodule": ("No suspicious pulmonary nodule.",),
            "effusion": ("No pleural effusion is seen.",),
            "pneumothorax": ("No pneumothorax is seen.",),
            "cardiomegaly": ("Cardiac silhouette is not enlarged.", "Cardiac silhouette is normal in size."),
        },
        absent_pair=("No pleural effusion or pneumothorax is seen.",),
    ),
    "D": Style(
        order=("pleura", "cardiomegaly", "device", "edema", "atelectasis", "opacity", "nodule"),
        present={
            "cardiomegaly": ("The cardiac silhouette shows {plain} enlargement.", "{Plain} cardiomegaly is present."),
            "edema": ("{Plain} pulmonary edema is present.",),
            "opacity": ("Focal opacity is present in the {side} {region}.",),
            "atelectasis": ("{Side} basilar atelectasis is present.",),
            "nodule": ("A {side} {region} nodule is present.",),
            "effusion": ("A {plain} {side} pleural effusion is present.",),
            "effusion/bilateral": ("{Plain} bilateral pleural effusions are present.",),
            "pneumothorax": ("A {plain} {side} pneumothorax is present.",),
            "device": ("{Device} is again present.", "{Device} is unchanged."),
        },
        absent={
            "cardiomegaly": ("The cardiac silhouette is normal.",),
            "opacity": ("There is no airspace opacity.", "No focal opacities."),
            "effusion": ("No evidence of pleural effusion.",),
            "pneumothorax": ("No evidence of pneumothorax.",),
        },
        absent_pair=("No evidence of pneumothorax or pleural effusion.",),
        normal_impression=("No acute cardiopulmonary process.",),
    ),
}
"""Institutions A, B and C write the training studies; D is kept for the split "unseen". B and D write impressions."""

_DEVICES = {"catheter": "central venous catheter", "pacemaker": "pacemaker"}
_ADVERBS = {"mild": "mildly", "moderate": "moderately", "severe": "severely"}


def write_report(
    style: Style, findings: Sequence[Finding], kinds: Collection[str], seed: int, omit: Collection[str] = ()
) -> tuple[str, str | None]:
    """The (findings, impression) texts of a film; the impression is None where the institution writes none.

    `kinds` are the finding kinds the corpus knows (what may be said to be absent); `omit` those of which nothing is
    said, whether present or not. The same seed gives the same words for what is said.
    """
    present = {finding[0]: finding for finding in findings}
    sentences: list[str] = []
    impressions: list[str] = []

    def variants(purpose: str, options: Sequence[str]) -> str:
        return random.Random(f"{seed}/{purpose}").choice(options)

    def take_up(kind: str) -> None:
        if kind in omit or kind not in kinds:
            return
        if kind in present:
            plural = f"{kind}/{present[kind][1]}"  # "effusion/bilateral", where it is said otherwise than of one side
            sentence = _fill(variants(kind, style.present.get(plural) or style.present[kind]), present[kind])
            sentences.append(sentence)
            impressions.append(sentence)
        elif kind in style.absent:
            sentences.append(variants(kind, style.absent[kind]))

    for kind in style.order:
        if kind != "pleura":
            take_up(kind)
        elif {"effusion", "pneumothorax"} <= set(kinds) - set(omit) - set(present):
            sentences.append(variants("pleura", style.absent_pair))
        else:
            take_up("effusion")
            take_up("pneumothorax")
    if not style.normal_impression:
        return " ".join(sentences), None
    # an impression summarises: the first two findings that this institution takes up
    summary = impressions[:2] or [variants("impression", style.normal_impression)]
    return " ".join(sentences), " ".join(summary)


def _fill(template: str, finding: Finding) -> str:
    _, side, place, severity = finding
    words = {
        "severity": _ADVERBS.get(severity or "", ""),
        "plain": severity or "",
        "side": side or "",
        "region": _REGIONS.get(place or "", ""),
        "device": _DEVICES.get(place or "", "device"),
    }
    capitals = {name.capitalize(): word.capitalize() for name, word in words.items()}
    return " ".join(template.format(**words, **capitals).split())
