"""Entities and embeddings for RaTEScore without any model: the project's extractor, and a fixed embedding of strings.

Entities. A finding that is affirmed or doubted is a DISEASE (a diagnosis: pneumonia, emphysema, ...) or an ABNORMALITY
(what is seen: opacity, effusion, ...), one that is denied the same with NON-; its string is the severity, if any, and
the vocabulary's name. Side and place make one ANATOMY of their own ("left lower lobe").

Embedding. A string is the sum of fixed random unit vectors, drawn from a hash of their name: one per word (1 for a
finding, 0.5 for any other word), one per family of findings (0.6), and its letter trigrams (0.15 together). A finding
is thus itself however it was worded, nearer to its kin than to strangers, and "left base" is nearer to "right base"
than to "cardiomegaly". Nothing here is trained.
"""

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np

from unirg.extraction import FINDINGS, extract

from .finding_kin import KIN

WIDTH = 256
DISEASES = frozenset(
    (
        "pneumonia",
        "emphysema",
        "heart_failure",
        "fibrosis",
        "hernia",
        "aspiration",
        "scoliosis",
        "kyphosis",
        "osteopenia",
        "degenerative_change",
        "bronchiectasis",
        "lymphadenopathy",
        "granuloma",
        "copd",
        "cystic_fibrosis",
        "infection",
        "interstitial_disease",
        "malignancy",
    )
)


class OfflineModels:
    """The extractor's entities, and the fixed embedding above."""

    @property
    def identity(self) -> dict[str, Any]:
        """What stands in for the published models."""
        return {"ner": "unirg.extraction", "embedder": "concepts and trigrams"}

    def setup(self, device: str = "cpu") -> None:
        """Nothing to load, on any device."""

    def entities(self, reports: list[str]) -> list[list[tuple[str, str]]]:
        """(string, type) of every entity, report by report, in the text's order."""
        return [list(_entities(report)) for report in reports]

    def embed(self, strings: list[str]) -> np.ndarray:
        """One vector (WIDTH) per string."""
        return np.stack([_embed(string) for string in strings])


@lru_cache(maxsize=16384)
def _entities(report: str) -> tuple[tuple[str, str], ...]:
    found = []
    for mention in extract(report):
        kind = "DISEASE" if mention.finding in DISEASES else "ABNORMALITY"
        words = [mention.severity, mention.finding]
        found.append((" ".join(filter(None, words)), "NON-" + kind if mention.polarity == "negative" else kind))
        if where := " ".join(filter(None, (mention.side, mention.place))):
            found.append((where, "ANATOMY"))
    return tuple(found)


@lru_cache(maxsize=16384)
def _embed(string: str) -> np.ndarray:
    vector_E = np.zeros(WIDTH)
    for word in string.split():
        vector_E += (1.0 if word in FINDINGS else 0.5) * _fixed(f"word {word}")
        for index, family in enumerate(KIN):
            if word in family:
                vector_E += 0.6 * _fixed(f"family {index}")
    padded = f" {string} "
    trigrams = [_fixed(f"letters {padded[start : start + 3]}") for start in range(len(padded) - 2)]
    letters_E = np.sum(trigrams, axis=0)
    return vector_E + 0.15 * letters_E / np.linalg.norm(letters_E)


@lru_cache(maxsize=4096)
def _fixed(name: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    vector_E = np.random.default_rng(seed).standard_normal(WIDTH)
    return vector_E / np.linalg.norm(vector_E)
