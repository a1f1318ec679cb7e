"""MeSH: the human annotations of Open-i's chest films, as findings with side, place and severity.

Each report carries "major" headings such as "Opacity/lung/base/left/mild": a head, then qualifiers in any order. Heads
and qualifiers were counted on the collection; those that say nothing of the extractor's findings are passed over.
"""

from collections.abc import Iterable, Mapping

from unirg.data.phantom_films import Finding

_HEADS = {
    "Airspace Disease": "opacity",
    "Arthritis": "degenerative_change",
    "Atherosclerosis": "aortic_calcification",
    "Blister": "bulla",
    "Bone Diseases, Metabolic": "osteopenia",
    "Bronchiectasis": "bronchiectasis",
    "Bullous Emphysema": "emphysema",
    "Calcified Granuloma": "granuloma",
    "Cardiomegaly": "cardiomegaly",
    "Catheters, Indwelling": "device",
    "Cavitation": "cavity",
    "Cicatrix": "scarring",
    "Consolidation": "consolidation",
    "Cystic Fibrosis": "cystic_fibrosis",
    "Density": "opacity",
    "Diaphragmatic Eventration": "hernia",  # as ChestX-ray14's labels and the extractor count it
    "Emphysema": "emphysema",
    "Fractures, Bone": "fracture",
    "Granuloma": "granuloma",
    "Granulomatous Disease": "granuloma",
    "Heart Failure": "heart_failure",
    "Hernia, Hiatal": "hernia",
    "Hydropneumothorax": "pneumothorax",
    "Hyperostosis, Diffuse Idiopathic Skeletal": "degenerative_change",
    "Implanted Medical Device": "device",
    "Infiltrate": "infiltrate",
    "Kyphosis": "kyphosis",
    "Lung Diseases, Interstitial": "interstitial_disease",
    "Mass": "mass",
    "Mediastinal Emphysema": "pneumomediastinum",
    "Medical Device": "device",
    "Nodule": "nodule",
    "Opacity": "opacity",
    "Osteophyte": "degenerative_change",
    "Osteoporosis": "osteopenia",
    "Pericardial Effusion": "pericardial_effusion",
    "Pleural Effusion": "effusion",
    "Pneumonia": "pneumonia",
    "Pneumoperitoneum": "pneumoperitoneum",
    "Pneumothorax": "pneumothorax",
    "Pulmonary Atelectasis": "atelectasis",
    "Pulmonary Congestion": "congestion",
    "Pulmonary Disease, Chronic Obstructive": "copd",
    "Pulmonary Edema": "edema",
    "Pulmonary Emphysema": "emphysema",
    "Pulmonary Fibrosis": "fibrosis",
    "Scoliosis": "scoliosis",
    "Spondylosis": "degenerative_change",
    "Stents": "device",
    "Subcutaneous Emphysema": "subcutaneous_emphysema",
    "Surgical Instruments": "device",
    "Tube, Inserted": "device",
    "Volume Loss": "volume_loss",
}
# Heads that are a finding only with a qualifier, or another one with it.
_QUALIFIED = {
    ("Aorta", "tortuous"): "aortic_tortuosity",
    ("Aorta, Thoracic", "tortuous"): "aortic_tortuosity",
    ("Calcinosis", "aorta"): "aortic_calcification",
    ("Calcinosis", "aorta, thoracic"): "aortic_calcification",
    ("Calcinosis", "lung"): "granuloma",
    ("Cardiac Shadow", "enlarged"): "cardiomegaly",
    ("Cervical Vertebrae", "degenerative"): "degenerative_change",
    ("Costophrenic Angle", "blunted"): "blunted_angle",
    ("Density", "round"): "nodular_opacity",
    ("Diaphragm", "elevated"): "elevated_diaphragm",
    ("Diaphragm", "flattened"): "hyperinflation",
    ("Heart", "enlarged"): "cardiomegaly",
    ("Lumbar Vertebrae", "degenerative"): "degenerative_change",
    ("Lung", "hyperdistention"): "hyperinflation",
    ("Lung", "hypoinflation"): "low_lung_volumes",
    ("Lymph Nodes", "enlarged"): "lymphadenopathy",
    ("Markings", "interstitial"): "opacity",
    ("Mediastinum", "enlarged"): "enlarged_mediastinum",
    ("Mediastinum", "prominent"): "enlarged_mediastinum",
    ("Opacity", "round"): "nodular_opacity",
    ("Pulmonary Artery", "enlarged"): "pulmonary_artery_enlargement",
    ("Pulmonary Artery", "prominent"): "pulmonary_artery_enlargement",
    ("Shoulder", "degenerative"): "degenerative_change",
    ("Spine", "degenerative"): "degenerative_change",
    ("Thickening", "pleura"): "pleural_thickening",
    ("Thoracic Vertebrae", "degenerative"): "degenerative_change",
}
_PLACES = {
    "apex": "apex",
    "upper lobe": "upper",
    "middle lobe": "mid",
    "lingula": "mid",
    "hilum": "hilum",
    "lower lobe": "lower",
    "base": "lower",
    "retrocardiac": "lower",
}
_SEVERITIES = {
    "borderline": "mild",
    "mild": "mild",
    "small": "small",
    "moderate": "moderate",
    "large": "large",
    "severe": "severe",
}
LATERAL = frozenset(
    (
        *("atelectasis", "blunted_angle", "consolidation", "effusion", "elevated_diaphragm", "fracture", "infiltrate"),
        *(
            "mass",
            "nodular_opacity",
            "nodule",
            "opacity",
            "pleural_thickening",
            "pneumonia",
            "pneumothorax",
            "scarring",
        ),
    )
)
"""Findings of which a side is known or asked."""
FINDINGS = tuple(sorted({*_HEADS.values(), *_QUALIFIED.values()}))
"""The findings that a MeSH annotation can state."""


def parse_heading(heading: str) -> Finding | None:
    """One heading as (finding, side, place, severity); None where it is none of the findings ("normal" too)."""
    head, *qualifiers = (part.strip() for part in heading.split("/"))
    name = next((_QUALIFIED[head, q] for q in qualifiers if (head, q) in _QUALIFIED), _HEADS.get(head))
    if name is None:
        return None
    sides = {q for q in qualifiers if q in ("left", "right", "bilateral")}
    side = (
        ("left" if "lingula" in qualifiers else None) if not sides else sides.pop() if len(sides) == 1 else "bilateral"
    )
    place = next((_PLACES[q] for q in qualifiers if q in _PLACES), None)
    severity = next((_SEVERITIES[q] for q in qualifiers if q in _SEVERITIES), None)
    return name, side, place, severity


def parse_headings(headings: Iterable[str]) -> list[Finding]:
    """The findings of a report's headings, each once; hydropneumothorax gives both of its halves."""
    findings: list[Finding] = []
    for heading in headings:
        if finding := parse_heading(heading):
            findings.append(finding)
            if heading.startswith("Hydropneumothorax"):
                findings.append(("effusion", *finding[1:]))
    return list(dict.fromkeys(findings))


def mesh_labels(headings: Iterable[str]) -> Mapping[str, int]:
    """Labels of one report: 1 where a heading states the finding, else 0, as the annotators read whole reports.

    By side too ("effusion/left") for `LATERAL` findings, but not where a stated finding has no side: that is unknown.
    Empty for a report that was not annotated ("No Indexing").
    """
    headings = list(headings)
    if not headings or headings == ["No Indexing"]:
        return {}
    labels = dict.fromkeys(FINDINGS, 0) | {
        f"{name}/{side}": 0 for name in sorted(LATERAL) for side in ("left", "right")
    }
    sideless = set()
    for name, side, _, _ in parse_headings(headings):
        labels[name] = 1
        if name not in LATERAL:
            continue
        if side is None:
            sideless.add(name)
        for one in ("left", "right"):
            if side in (one, "bilateral"):
                labels[f"{name}/{one}"] = 1
    for name in sideless:
        for one in ("left", "right"):
            if labels[f"{name}/{one}"] == 0:
                del labels[f"{name}/{one}"]
    return labels
