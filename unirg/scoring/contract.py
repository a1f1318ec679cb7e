"""The reward contract: what a reward receives, what it returns, and what a recipe says of it.

A reward is a function

    def my_reward(candidates: list[str], references: list[str], **columns) -> list[float | None]

or a class whose instances have a `score` method of that signature. `candidates[i]` is a report the policy wrote,
`references[i]` the study's own report ("" where it has none), and every column is a list aligned with them
(`study_id`, `labels`, `findings`, ..., and the data's own further columns). The answer is one number per candidate,
larger meaning better, or None where the reward cannot judge: such a sample is masked, never scored zero.

A class may also have `setup()`, called once per process before the first score (load a model there; a parameter
`device`, where it has one, receives the recipe's), and these attributes: `identity` (a dict that says which variant,
backend and versions the numbers come from, kept with every run), `needs` (a sentence on what must be installed),
`deduplicate` (False where the score of a candidate depends on the others of its batch; identical candidates of one
study are otherwise scored once), `shares` (a name, or several: rewards that have one in common, and a device, run in
one process, because they share a model) and `evaluation_only` (the reason, in words, why nobody should train on it:
training refuses it).

A class that keeps what it reads in a reference may have `prepare(references)`, which reads references of candidates to
come. Training calls it with a step's references before there are candidates, mostly while the step before is learnt
from. It must not change a score.

Some published figures are of a corpus and no mean of scores: micro and macro F1, or the reciprocal of a mean. Where a
class has a method `corpus_terms`, of `score`'s signature, evaluations print them too, with intervals. It answers
`{figure: terms}`, with one entry for each candidate: a pair (numerator, denominator), or a list of such pairs, one for
each class, or None where it cannot judge. The figure is the sum of the corpus's numerators by that of its denominators;
of several pairs, the mean of the ratios. So a corpus can be resampled without asking a model again.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field, model_validator

from unirg.errors import UserError
from unirg.section import Section

if TYPE_CHECKING:
    from unirg.study import Study

Terms = list[tuple[float, float]] | None
"""What one candidate adds to a figure of the corpus: (numerator, denominator) of each class, or None."""

STUDY_COLUMNS = (
    "findings",
    "impression",
    "indication",
    "comparison",
    "technique",
    "labels",
    "institution",
    "patient",
    "demographics",
    "modality",
    "language",
)


class RewardError(UserError):
    """A reward that cannot be found, built or run, or that broke the contract. The message names the reward."""


class ScoreFunction(Protocol):
    """What every reward boils down to."""

    def __call__(self, candidates: list[str], references: list[str], **columns: Any) -> Sequence[float | None]: ...


class RewardConfig(Section):
    """One reward of a recipe."""

    name: str
    """An installed reward (`unirg rewards` lists them), `path/to/file.py:function`, or `package.module:function`."""
    weight: float = 1.0
    """Its share in the composite reward."""
    label: str | None = None
    """Its name in logs and tables; the reward's own name where not given."""
    options: dict[str, Any] = {}
    """Keyword arguments for the reward, e.g. `{variant: coco4}`."""
    reference: str | None = None
    """The data column to use as the reference text (e.g. `impression`); the study's whole report where not given."""
    device: str = Field("cpu", pattern=r"^(cpu|cuda:auto|cuda:\d+(,cuda:\d+)*)$")
    """Where its model runs: `cpu`, `cuda:1`, a pool such as `cuda:6,cuda:7` that ranks are dealt out to, or
    `cuda:auto`, a GPU that no rank trains on where there is one, else the rank's own."""
    batch_size: int | None = Field(None, gt=0)
    """At most so many candidates in one call; default all of a batch. A failure costs the candidates of its call."""
    timeout: float = Field(600.0, gt=0)
    """Seconds that one call may take in a worker process; then the process is killed. With `server`, also how long a
    server that is away is waited for."""
    on_error: Literal["mask", "raise"] = "mask"
    """What follows in training when a call has failed twice: its samples are masked and counted, or the run stops. It
    stops in any case, with a checkpoint, after three batches in a row in which a reward of non-zero weight failed on
    every report, or no reward could judge any."""
    worker: bool = True
    """Score in a worker process during training, where a crash or a hang cannot take the run along, and while the
    policy computes; false scores in the training process."""
    server: str | None = None
    """A scoring server that scores in place of this machine, such as `http://node7:8100`; it is started with the same
    name and options by `unirg rewards serve`. Reports, references and columns are sent there."""

    @model_validator(mode="after")
    def _one_place(self) -> "RewardConfig":
        if self.server is None:
            return self
        if not self.worker:
            raise ValueError(f"reward '{self.log_label}': with a `server`, `worker: false` has no meaning")
        address = re.fullmatch(r"https?://(?:[\w.-]+|\[[0-9A-Fa-f:]+\]):(\d{1,5})", self.server, re.ASCII)
        if address is None or not 0 < int(address[1]) < 1 << 16:
            raise ValueError(f"reward '{self.log_label}': server '{self.server}': expected http://HOST:PORT")
        return self

    @property
    def log_label(self) -> str:
        """`label`, or the last part of `name`."""
        return self.label or self.name.rpartition(":")[2]


@dataclass
class ScoreBatch:
    """Candidates to score: three kinds of lists, all of one length N.

    `columns` maps a column's name to its N values; see `study_columns`. `truncated` (bool per candidate: it hit the
    length limit) is the one column that belongs to the candidate and not to its study.
    """

    candidates: list[str]
    references: list[str]
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ValueError where a list has another length than the candidates."""
        lengths = {"references": len(self.references)} | {name: len(values) for name, values in self.columns.items()}
        for name, length in lengths.items():
            if length != len(self.candidates):
                raise ValueError(f"a batch of {len(self.candidates)} candidates has {length} {name}")

    def study_ids(self) -> list[str]:
        """The studies' ids, or the candidates' positions where the batch has no `study_id` column."""
        return [str(name) for name in self.columns.get("study_id", range(len(self.candidates)))]


def study_columns(studies: "Sequence[Study]") -> dict[str, list[Any]]:
    """The columns that rewards receive for `studies`, in their order: `study_id`, STUDY_COLUMNS, then every key of
    any study's `extra` (None where a study lacks it). A further column may not take the name of a study's field.

    Raises ValueError naming the study whose `extra` has such a key.
    """
    columns: dict[str, list[Any]] = {"study_id": [study.id for study in studies]}
    columns |= {name: [getattr(study, name) for study in studies] for name in STUDY_COLUMNS}
    reserved = {*columns, "candidates", "references", "truncated"}
    for study in studies:
        if clash := sorted(reserved & set(study.extra)):
            raise ValueError(f"study {study.id}: further column '{clash[0]}' has the name of a column that rewards get")
    extras = dict.fromkeys(key for study in studies for key in study.extra)
    return columns | {key: [study.extra.get(key) for study in studies] for key in extras}


def validated_scores(name: str, returned: Any, study_ids: Sequence[str]) -> list[float | None]:
    """What reward `name` returned for these samples, as plain floats and Nones.

    Lists, tuples and arrays (anything with `tolist`) of numbers are taken; True and False count as 1 and 0.
    Raises RewardError where the length differs or an element is neither a finite number nor None.
    """
    if hasattr(returned, "tolist"):
        returned = returned.tolist()
    if not isinstance(returned, (list, tuple)):
        found = "nothing" if returned is None else f"a {type(returned).__name__}"
        raise RewardError(
            f"reward '{name}' returned {found}, expected a list of {len(study_ids)}, for each candidate a number, or "
            "None where it cannot judge"
        )
    if len(returned) != len(study_ids):
        raise RewardError(
            f"reward '{name}' returned {len(returned)} scores for {len(study_ids)} candidates; expected one each "
            "(None where it cannot judge)"
        )
    for index, value in enumerate(returned):
        if value is not None and not _is_finite(value):
            raise RewardError(
                f"reward '{name}' returned {value!r:.80} at index {index} (study {study_ids[index]}); expected a "
                "finite number, or None where it cannot judge"
            )
    return [None if value is None else float(value) for value in returned]


def validated_terms(name: str, returned: Any, study_ids: Sequence[str]) -> dict[str, list[Terms]]:
    """What reward `name` returned as `corpus_terms` of these samples, a single pair as a list of one.

    Raises RewardError where it is no mapping, or where a figure has not one entry for each sample, pairs that are no
    two finite numbers, or another number of pairs in one sample than in another.
    """
    expected = "(numerator, denominator), a list of such pairs, or None"
    if not isinstance(returned, Mapping):
        kind = type(returned).__name__
        raise RewardError(f"reward '{name}': corpus_terms returned {kind}, expected a mapping of figures to terms")
    checked: dict[str, list[Terms]] = {}
    for figure, rows in returned.items():
        if not isinstance(figure, str) or not figure or "/" in figure:
            raise RewardError(f"reward '{name}': corpus_terms has a figure called {figure!r}; expected text without /")
        what = f"reward '{name}': corpus_terms '{figure}'"
        if not isinstance(rows, (list, tuple)) or len(rows) != len(study_ids):
            given = f"has {len(rows)} entries" if isinstance(rows, (list, tuple)) else f"is a {type(rows).__name__}"
            raise RewardError(f"{what} {given}, expected a list of {len(study_ids)}, one for each candidate")
        terms: list[Terms] = []
        for study_id, row in zip(study_ids, rows, strict=True):
            pairs = [row] if isinstance(row, (list, tuple)) and row and isinstance(row[0], Real) else row
            if pairs is not None and not (isinstance(pairs, (list, tuple)) and pairs and all(map(_is_pair, pairs))):
                raise RewardError(f"{what} is {row!r:.80} for study {study_id}; expected {expected}")
            terms.append(None if pairs is None else [(float(top), float(bottom)) for top, bottom in pairs])
        if len(sizes := {len(pairs) for pairs in terms if pairs is not None}) > 1:
            raise RewardError(
                f"{what} has {' and '.join(map(str, sorted(sizes)))} pairs; expected as many of each study"
            )
        checked[figure] = terms
    return checked


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_finite, value))


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False
