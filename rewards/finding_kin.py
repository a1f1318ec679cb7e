"""Findings that a reader may call by each other's name: a near miss, where any other pair is simply wrong."""

KIN = (
    {"opacity", "infiltrate", "consolidation", "pneumonia", "atelectasis", "aspiration"},
    {"nodule", "mass", "granuloma", "cavity"},
    {"edema", "congestion", "heart_failure"},
    {"effusion", "pleural_thickening"},
    {"fibrosis", "scarring", "bronchiectasis"},
    {"emphysema", "hyperinflation"},
    {"cardiomegaly", "heart_failure"},
    {"enlarged_mediastinum", "lymphadenopathy"},
    {"aortic_calcification", "aortic_tortuosity"},
    {"scoliosis", "kyphosis", "degenerative_change"},
)

SEVERITY = {"trace": 0, "minimal": 0, "small": 1, "mild": 1, "moderate": 2, "large": 3, "severe": 3}
"""The extractor's severities in order, from 0 to 3."""


def are_kin(one: str, other: str) -> bool:
    """Whether two different findings share a family."""
    return any(one in family and other in family for family in KIN)
