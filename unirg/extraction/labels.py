"""Mentions -> the label sets that the field compares reports by."""

from functools import lru_cache

from .mentions import Mention, extract

# For each label of a scheme, the findings that state it.
CHEXPERT14: dict[str, tuple[str, ...]] = {
    "No Finding": (),
    "Enlarged Cardiomediastinum": ("enlarged_mediastinum",),
    "Cardiomegaly": ("cardiomegaly",),
    "Lung Lesion": ("nodule", "nodular_opacity", "mass", "lesion", "malignancy", "cavity"),
    "Lung Opacity": ("opacity", "infiltrate", "interstitial_disease"),
    "Edema": ("edema", "congestion", "heart_failure"),
    "Consolidation": ("consolidation",),
    "Pneumonia": ("pneumonia", "infection"),
    "Atelectasis": ("atelectasis",),
    "Pneumothorax": ("pneumothorax",),
    "Pleural Effusion": ("effusion",),
    "Pleural Other": ("pleural_thickening", "pleural_scarring", "fibrosis"),
    "Fracture": ("fracture",),
    "Support Devices": ("device",),
}
CXR14: dict[str, tuple[str, ...]] = {
    "Atelectasis": ("atelectasis",),
    "Cardiomegaly": ("cardiomegaly",),
    "Effusion": ("effusion",),
    "Infiltration": ("infiltrate",),
    "Mass": ("mass",),
    "Nodule": ("nodule",),
    "Pneumonia": ("pneumonia",),
    "Pneumothorax": ("pneumothorax",),
    "Consolidation": ("consolidation",),
    "Edema": ("edema",),
    "Emphysema": ("emphysema",),
    "Fibrosis": ("fibrosis",),
    "Pleural_Thickening": ("pleural_thickening",),
    "Hernia": ("hernia",),
}
SCHEMES = {"chexpert14": CHEXPERT14, "cxr14": CXR14}
_HARDWARE = frozenset(("device", "postsurgical_change"))
_VALUE = {"positive": 1, "uncertain": -1, "negative": 0}
_STRENGTH = {1: 2, -1: 1, 0: 0}


def label_vector(report: str, scheme: str) -> dict[str, int | None]:
    """Label -> 1 present, 0 absent, -1 uncertain, None not mentioned; where mentions differ, 1 wins over -1 over 0.

    `scheme` is "chexpert14" (the CheXpert labeler's 14 names, Irvin et al. 2019) or "cxr14" (NIH ChestX-ray14's,
    Wang et al. 2017). "No Finding" is 1 where nothing but devices and surgery is affirmed or doubted, else None. As in
    the CheXpert labeler, "lungs are clear" leaves "Lung Opacity" unmentioned. Raises ValueError for another scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme!r} is unknown: expected one of {', '.join(SCHEMES)}")
    return dict(_vector(report, scheme))


@lru_cache(maxsize=16384)
def _vector(report: str, scheme: str) -> tuple[tuple[str, int | None], ...]:
    mentions = extract(report)
    strongest: dict[str, int] = {}
    for mention in mentions:
        if _implied_opacity(mention):
            continue
        value = _VALUE[mention.polarity]
        if _STRENGTH[value] >= _STRENGTH[strongest.get(mention.finding, 0)]:
            strongest[mention.finding] = value
    labels: list[tuple[str, int | None]] = []
    for label, findings in SCHEMES[scheme].items():
        values = [strongest[finding] for finding in findings if finding in strongest]
        labels.append((label, max(values, key=_STRENGTH.__getitem__) if values else None))
    if scheme == "chexpert14":
        labels[0] = ("No Finding", 1 if is_normal(report) else None)
    return tuple(labels)


def _implied_opacity(mention: Mention) -> bool:
    return mention.finding == "opacity" and mention.polarity == "negative" and "lung" in mention.text.lower()


def is_normal(report: str) -> bool:
    """Whether nothing is affirmed or doubted but devices and surgery; an empty report counts as normal."""
    return all(mention.polarity == "negative" or mention.finding in _HARDWARE for mention in extract(report))
