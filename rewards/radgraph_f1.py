"""RadGraph F1 with the official package's model (Delbrouck et al. 2022; radgraph 0.1.18), behind `entity_f1`.

The package annotates reports; the F1 of the annotations is computed here. An entity without a relation is the item
(words, label) at every level; one with relations is

- `simple` (RG_E): (words, label);
- `partial` (RG_ER): (words, label, True), what most papers call RadGraph F1;
- `complete`: (words, label, relation, words of its target), one item per relation.

Words are compared in lower case, as the package's repository does since July 2026 (its release on the package index, of
the same number, does not). No item on either side is 0, never 1, as upstream. A blank report is never shown to the
model, which would fail on it, and a report is cut after `WORDS` words, as time grows with their square.
"""

from importlib.metadata import version
from typing import Any

LEVELS = ("simple", "partial", "complete")
WORDS = 400
CACHE = 20_000

Annotation = dict[str, dict[str, Any]]  # entity number -> {"tokens", "label", "relations": [[relation, number], ...]}


class RadGraphF1:
    """Scores by one level, with one model of the package (`radgraph-xl`, `radgraph`, ...); annotations are cached."""

    def __init__(self, level: str, model: str, model_folder: str | None) -> None:
        self.level, self.model, self.model_folder = level, model, model_folder
        self._annotator: Any = None
        self._annotations: dict[str, Annotation] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """Level, model, package version and case rule."""
        named = {
            "metric": "RadGraph F1",
            "backend": "radgraph",
            "level": self.level,
            "model": self.model,
            "case": "lower",
        }
        return named | ({"radgraph": version("radgraph")} if self._annotator is not None else {})

    def setup(self) -> None:
        """Load the model, from `model_folder` (the package's `model_cache_dir`) where given.

        Raises ImportError saying what to install.
        """
        if self._annotator is not None:
            return
        try:
            from radgraph import RadGraph
        except ImportError as error:
            raise ImportError("backend radgraph needs the radgraph package: pip install 'unirg[radgraph]'") from error
        folder = {"model_cache_dir": self.model_folder} if self.model_folder else {}
        self._annotator = RadGraph(model_type=self.model, **folder)

    def score(self, candidates: list[str], references: list[str]) -> list[float | None]:
        """F1 per pair; None where the reference is blank."""
        self._annotate([*candidates, *references])
        scores: list[float | None] = []
        for candidate, reference in zip(candidates, references, strict=True):
            if not reference.strip():
                scores.append(None)
            elif not candidate.strip():
                scores.append(0.0)
            else:
                scores.append(annotation_f1(self._annotations[candidate], self._annotations[reference], self.level))
        return scores

    def _annotate(self, reports: list[str]) -> None:
        self.setup()
        if len(self._annotations) > CACHE:
            self._annotations.clear()
        new = [text for text in dict.fromkeys(reports) if text.strip() and text not in self._annotations]
        if new:
            answers = self._annotator([" ".join(text.split()[:WORDS]) for text in new])
            self._annotations |= {text: answers[str(index)]["entities"] for index, text in enumerate(new)}


def annotation_f1(candidate: Annotation, reference: Annotation, level: str) -> float:
    """F1 of the two sets of items; 0 where either has none."""
    stated, wanted = _items(candidate, level), _items(reference, level)
    return 2 * len(stated & wanted) / (len(stated) + len(wanted)) if stated and wanted else 0.0


def _items(annotation: Annotation, level: str) -> set[tuple[Any, ...]]:
    items: set[tuple[Any, ...]] = set()
    for entity in annotation.values():
        item = (entity["tokens"].lower(), entity["label"])
        if not entity["relations"] or level == "simple":
            items.add(item)
        elif level == "partial":
            items.add((*item, True))
        else:
            targets = [(relation, annotation[number]["tokens"].lower()) for relation, number in entity["relations"]]
            items |= {(*item, *target) for target in targets}
    return items
