"""Findings that a reader may call by each other's name: a near miss, where any other pair is simply wrong."""

KIN = (
    {"opacity", "infiltrate", "consolidation", "pneumonia", "infection", "atelectasis", "aspiration"},
    {"atelectasis", "volume_loss", "low_lung_volumes"},
    {"nodule", "mass", "lesion", "malignancy", "nodular_opacity", "granuloma", "cavity"},
    {"edema", "congestion", "heart_failure"},
    {"effusion", "blunted_angle", "pleural_thickening"},
    {"fibrosis", "interstitial_disease", "scarring", "bronchiectasis"},
    {"emphysema", "copd", "bulla", "hyperinflation"},
    {"cardiomegaly", "heart_failure", "pericardial_effusion"},
    {"enlarged_mediastinum", "lymphadenopathy"},
    {"aortic_calcification", "aortic_tortuosity"},
    {"scoliosis", "kyphosis", "degenerative_change"},
    {"device", "device_malposition"},
)

SEVERITY = {"trace": 0, "minimal": 0, "small": 1, "mild": 1, "moderate": 2, "large": 3, "severe": 3}
"""The extractor's severities in order, from 0 to 3."""


def are_kin(one: str, other: str) -> bool:
    """Whether two different findings share a family."""
    return any(one in family and other in family for family in KIN)
