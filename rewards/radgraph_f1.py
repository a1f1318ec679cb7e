"""RadGraph F1 (Delbrouck et al. 2022): a report's clinical entities and relations against the reference's.

The model of the chosen archive annotates both reports (`radgraph_model`); the score is the F1 of two sets of items. An
entity without a relation is the item (words, label) at the first three levels; one with relations is

- `simple` (RG_E): (words, label);
- `partial` (RG_ER): (words, label, True), what most papers call RadGraph F1;
- `complete`: (words, label, relation, words of its target), one item per relation;
- `combined`: the mean of two F1, of entities (words, label) and of relations (entity, entity, relation). ReXrank and
  RadCliQ use this one, with model `radgraph`. A report without relations scores 0.5 against itself.

`case` says how words compare. `pypi` is radgraph 0.1.18 as released: capitals differ, but for the words of `complete`'s
relations. `lower` is its repository since July 2026 (of the same number): they never differ.
"""

from typing import Any

from .radgraph_model import Annotation, RadGraph, load_radgraph
from .radgraph_text import MODELS, split_words

LEVELS = ("simple", "partial", "complete", "combined")
CASES = ("lower", "pypi")
PRECISIONS = ("float32", "bfloat16")


class RadGraphF1:
    """Clinical entities and relations of the reference, as RadGraph's model reads both reports (RadGraph F1).

    Options: `level` partial (default), simple, complete or combined; `model` radgraph-xl (default), radgraph or
    modern-radgraph-xl; `model_folder`, where its archive is (see `radgraph_archive`; the hub where not given); `case`
    lower (default) or pypi; `max_words`, where a report is cut (every pair of entities is scored, so time grows with
    the square); `precision` float32 (default: the official answers) or bfloat16. Lies in [0, 1]. As upstream, a side
    without entities makes 0, never 1. A blank report is never shown to the model: a blank candidate scores 0, a study
    with a blank reference is masked.
    """

    needs = "a RadGraph archive: as model_folder, or StanfordAIMI/RRG_scorers from the hub"

    def __init__(
        self,
        level: str = "partial",
        model: str = "radgraph-xl",
        model_folder: str | None = None,
        case: str = "lower",
        max_words: int = 512,
        precision: str = "float32",
    ) -> None:
        known = {"level": LEVELS, "model": MODELS, "case": CASES, "precision": PRECISIONS}
        given = {"level": level, "model": model, "case": case, "precision": precision}
        for name, value in given.items():
            if value not in known[name]:
                raise ValueError(f"{name} '{value}' is none of {', '.join(known[name])}")
        if max_words < 1:
            raise ValueError(f"max_words {max_words} must be 1 or more")
        self.level, self.model, self.model_folder = level, model, model_folder
        self.case, self.max_words, self.precision = case, max_words, precision
        self._radgraph: RadGraph | None = None

    @property
    def shares(self) -> str:
        """Rewards of one model belong into one process: it is loaded once, and reports are annotated once."""
        return f"radgraph:{self.model}:{self.model_folder}:{self.precision}"

    @property
    def identity(self) -> dict[str, Any]:
        """Level, model, case rule, cap and precision; once loaded, the weights' SHA-256 and the encoder's name."""
        options = ("level", "model", "case", "max_words", "precision")
        named = {"metric": "RadGraph F1"} | {name: getattr(self, name) for name in options}
        if self._radgraph is None:
            return named
        return named | {"weights": self._radgraph.fingerprint, "encoder": self._radgraph.encoder_name}

    def setup(self, device: str = "cpu") -> None:
        """Load the model, once per process. Raises OSError saying what to fetch, ValueError for another archive."""
        if self._radgraph is None:
            self._radgraph = load_radgraph(self.model, self.model_folder, device, self.precision)

    def prepare(self, references: list[str]) -> None:
        """Annotate references, which the model remembers."""
        self.annotate(references)

    def score(self, candidates: list[str], references: list[str], **columns: Any) -> list[float | None]:
        """See the class."""
        values = self.values(candidates, references)
        return [value if reference.strip() else None for value, reference in zip(values, references)]

    def values(self, candidates: list[str], references: list[str]) -> list[float]:
        """The metric as published, which has a value for every pair: 0 where either report is blank."""
        annotations = self.annotate([*candidates, *references])
        pairs = zip(annotations, annotations[len(candidates) :])
        return [annotation_f1(candidate, reference, self.level, self.case) for candidate, reference in pairs]

    def annotate(self, reports: list[str]) -> list[Annotation]:
        """What the model reads in each report (see `radgraph_model`); {} for a blank one, which it is not shown."""
        self.setup()
        assert self._radgraph is not None
        return self._radgraph.annotate([split_words(report, self.model)[: self.max_words] for report in reports])


def annotation_f1(candidate: Annotation, reference: Annotation, level: str, case: str = "lower") -> float:
    """The score of `level` of two annotations; 0 where either has no entity."""
    if level == "combined":
        entities = _f1(*(_entities(each, case) for each in (candidate, reference)))
        return (entities + _f1(*(_relations(each, case) for each in (candidate, reference)))) / 2
    return _f1(_items(candidate, level, case), _items(reference, level, case))


def bfloat16_disagreement(
    reports: list[str], model: str = "radgraph-xl", model_folder: str | None = None, device: str = "cpu"
) -> dict[str, float]:
    """How far a bfloat16 encoder's annotations of `reports` (none blank) are from float32's: `reports` is the share
    with any difference; `simple`, `partial`, `complete` the mean F1 of the one against the other, where two empty
    annotations agree."""
    exact, rounded = (
        RadGraphF1(model=model, model_folder=model_folder, precision=precision) for precision in PRECISIONS
    )
    exact.setup(device)
    rounded.setup(device)
    pairs = list(zip(rounded.annotate(reports), exact.annotate(reports)))
    shares = {"reports": sum(one != other for one, other in pairs) / len(pairs)}
    for level in LEVELS[:3]:
        values = [1.0 if one == other else annotation_f1(one, other, level) for one, other in pairs]
        shares[level] = sum(values) / len(values)
    return shares


def _f1(stated: set[Any], wanted: set[Any]) -> float:
    return 2 * len(stated & wanted) / (len(stated) + len(wanted)) if stated and wanted else 0.0


def _entities(annotation: Annotation, case: str) -> set[tuple[Any, ...]]:
    return {(_cased(entity, case), entity["label"]) for entity in annotation.values()}


def _relations(annotation: Annotation, case: str) -> set[tuple[Any, ...]]:
    return {
        (_cased(entity, case), entity["label"], _cased(target, case), target["label"], relation)
        for entity in annotation.values()
        for relation, number in entity["relations"]
        if (target := annotation[number])
    }


def _items(annotation: Annotation, level: str, case: str) -> set[tuple[Any, ...]]:
    items: set[tuple[Any, ...]] = set()
    for entity in annotation.values():
        item = (_cased(entity, case), entity["label"])
        if not entity["relations"] or level == "simple":
            items.add(item)
        elif level == "partial":
            items.add((*item, True))
        else:
            for relation, number in entity["relations"]:
                words, target = (each["tokens"].lower() for each in (entity, annotation[number]))
                items.add((words, entity["label"], relation, target))
    return items


def _cased(entity: dict[str, Any], case: str) -> str:
    words: str = entity["tokens"]
    return words.lower() if case == "lower" else words
