"""RaTEScore: medical entities of two reports matched by meaning (Zhao et al., EMNLP 2024; upstream RaTEScore 0.6.0).

A report becomes a list of entities (string, type). In each direction every entity takes its nearest on the other side
by cosine similarity of their embeddings; the direction's value is the mean of the similarities weighted by W[type,
type] and lowered by the negation weight where one side affirms and the other negates. The score is the harmonic mean of
both directions.

Taken as it stands, the metric can be milked by a policy: upstream gives 0.5 wherever either report has no entity, so
that silence beats trying, and counts a repeated sentence again. Here a candidate without entities scores 0, a study
whose reference has none is masked, each (string, type) counts once per report, and both directions are held to [0, 1].
`official_edges: true` gives upstream's value instead.

Two backends feed the one algorithm: `offline` (the project's own extractor and a fixed embedding of strings; no
downloads; NOT comparable with published figures) and `official` (the published models). Upstream leaves open which type
wins where a string occurs with two; here it is the type of the entity that is being matched, then the first.
"""

from typing import Any, Protocol

import numpy as np

from . import ratescore_weights
from .ratescore_official import OfficialModels
from .ratescore_offline import OfflineModels

TIE = 1e-6  # cosines closer than this are one string met twice
_INDEX = {name: index for index, name in enumerate(ratescore_weights.TYPES)}
_NEGATED = np.array([name.startswith("NON-") for name in ratescore_weights.TYPES])
_ANATOMY = np.array([name == "ANATOMY" for name in ratescore_weights.TYPES])

Entity = tuple[str, str]


class Models(Protocol):
    """What a backend supplies. `identity` says what it is made of."""

    @property
    def identity(self) -> dict[str, Any]: ...

    def setup(self, device: str = "cpu") -> None: ...

    def entities(self, reports: list[str]) -> list[list[Entity]]: ...

    def embed(self, strings: list[str]) -> np.ndarray: ...


class RateScore:
    """Medical entities matched by meaning and type, negation included (RaTEScore; offline by default).

    Lies in [0, 1]. Options: `backend` offline or official; `weights` long or short (upstream's two weight matrices);
    `official_edges` (see the module); and for the official backend `ner` and `embedder` (a folder or a hub id)
    and `sentences` pyrush (upstream's splitter, which must be installed) or rule (see `ratescore_sentences`).
    """

    needs = (
        "nothing; backend=official: PyRuSH, and the weights of RaTE-NER-Deberta and BioLORD-2023-C, by folder or hub id"
    )

    def __init__(
        self,
        backend: str = "offline",
        weights: str = "long",
        official_edges: bool = False,
        ner: str = "Angelakeke/RaTE-NER-Deberta",
        embedder: str = "FremyCompany/BioLORD-2023-C",
        sentences: str = "pyrush",
    ) -> None:
        if weights not in ratescore_weights.WEIGHTS:
            raise ValueError(f"weights '{weights}' is neither long nor short")
        if backend not in ("offline", "official"):
            raise ValueError(f"backend '{backend}' is neither offline nor official")
        self.backend, self.weights, self.official_edges = backend, weights, official_edges
        self.models: Models = OfflineModels() if backend == "offline" else OfficialModels(ner, embedder, sentences)

    @property
    def shares(self) -> str | None:
        """Rewards of the same two models belong into one process; the offline backend has nothing to share."""
        return self.models.shares if isinstance(self.models, OfficialModels) else None

    def setup(self, device: str = "cpu") -> None:
        """Load the backend's models, once per process. Raises RewardError naming one that cannot be loaded."""
        self.models.setup(device)

    @property
    def identity(self) -> dict[str, Any]:
        """Backend with its models, weight matrix, and how the edge cases are handled."""
        edges = "official" if self.official_edges else "candidate without entities 0, entities counted once"
        algorithm = {"metric": "RaTEScore", "algorithm": "0.6.0", "weights": self.weights, "edges": edges}
        return algorithm | {"backend": self.backend} | self.models.identity

    def score(self, candidates: list[str], references: list[str], **columns: Any) -> list[float | None]:
        """See the class."""
        texts = list(dict.fromkeys([*candidates, *references]))
        found = dict(zip(texts, self.models.entities(texts), strict=True))
        if not self.official_edges:
            found = {text: _once(entities) for text, entities in found.items()}
        strings = list(dict.fromkeys(string for entities in found.values() for string, _ in entities))
        vectors = dict(zip(strings, self.models.embed(strings), strict=True)) if strings else {}
        return [
            self._pair(found[candidate], found[reference], vectors)
            for candidate, reference in zip(candidates, references, strict=True)
        ]

    def _pair(self, candidate: list[Entity], reference: list[Entity], vectors: dict[str, np.ndarray]) -> float | None:
        if not candidate or not reference:
            if self.official_edges:
                return 0.5
            return None if not reference else 0.0
        from_reference, from_candidate = both_directions(
            np.stack([vectors[string] for string, _ in reference]),
            np.array([_INDEX[kind] for _, kind in reference]),
            np.stack([vectors[string] for string, _ in candidate]),
            np.array([_INDEX[kind] for _, kind in candidate]),
            self.weights,
        )
        if not self.official_edges:
            from_reference, from_candidate = (min(1.0, max(0.0, x)) for x in (from_reference, from_candidate))
        total = from_reference + from_candidate
        return 2 * from_reference * from_candidate / total if total else 0.0


def both_directions(
    vectors_RE: np.ndarray, types_R: np.ndarray, vectors_CE: np.ndarray, types_C: np.ndarray, weights: str
) -> tuple[float, float]:
    """The directions reference to candidate and candidate to reference.

    Shapes: R and C entities, E embedding width; types index `ratescore_weights.TYPES`. Neither side may be empty.
    """
    cosines_RC = _unit(vectors_RE) @ _unit(vectors_CE).T
    return _direction(cosines_RC, types_R, types_C, weights), _direction(cosines_RC.T, types_C, types_R, weights)


def _direction(cosines_AB: np.ndarray, types_A: np.ndarray, types_B: np.ndarray, weights: str) -> float:
    nearest_AB = cosines_AB >= cosines_AB.max(axis=1, keepdims=True) - TIE
    same_AB = types_A[:, None] == types_B[None, :]
    match_A = np.argmax(nearest_AB * (1 + same_AB), axis=1)
    cosines_A = cosines_AB[np.arange(len(types_A)), match_A]
    matched_A = types_B[match_A]
    weights_A = ratescore_weights.WEIGHTS[weights][types_A, matched_A]
    flipped_A = (_NEGATED[types_A] != _NEGATED[matched_A]) & ~_ANATOMY[types_A] & ~_ANATOMY[matched_A]
    factors_A = np.where(flipped_A, ratescore_weights.NEGATION[weights], 1.0)
    total = weights_A.sum()
    return float((cosines_A * weights_A * factors_A).sum() / total) if total else 0.0


def _unit(vectors_NE: np.ndarray) -> np.ndarray:
    return vectors_NE / np.maximum(np.linalg.norm(vectors_NE, axis=1, keepdims=True), 1e-12)


def _once(entities: list[Entity]) -> list[Entity]:
    """Each (string, type) once, whatever its case."""
    kept = {(string.casefold().strip(), kind): (string, kind) for string, kind in reversed(entities)}
    return list(reversed(kept.values()))
