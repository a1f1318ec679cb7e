"""The scoring engine: submit a batch of candidates, collect one list of scores per reward.

Scores are computed in the calling process, when a batch is submitted. Callers should submit, do other work, and then
collect, and rely on nothing in between.
"""

import itertools
import math
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from unirg.scoring.contract import RewardConfig, RewardError, ScoreBatch
from unirg.scoring.registry import Reward, load_reward

Answer = TypeVar("Answer")


class ScoringEngine:
    """The rewards of a stage, loaded and ready.

    Raises RewardError where a reward cannot be loaded, or two have the same label.
    """

    def __init__(self, configs: Sequence[RewardConfig]) -> None:
        labels = [config.log_label for config in configs]
        if repeated := [label for label, count in Counter(labels).items() if count > 1]:
            raise RewardError(f"two rewards are called '{repeated[0]}' in logs; give each a `label` of its own")
        self._configs = dict(zip(labels, configs, strict=True))
        self._rewards = {label: load_reward(config.name, config.options) for label, config in self._configs.items()}
        for label, reward in self._rewards.items():
            _say_which(label, [], reward.setup)
        self._handles = itertools.count()
        self._done: dict[int, dict[str, list[float | None]]] = {}

    def submit(self, batch: ScoreBatch) -> int:
        """Hand over a batch; the answer is the handle to collect its scores with.

        Raises RewardError naming the reward and the studies where a reward fails or breaks the contract.
        """
        handle = next(self._handles)
        self._done[handle] = {label: self._score(label, reward, batch) for label, reward in self._rewards.items()}
        return handle

    def collect(self, handle: int) -> dict[str, list[float | None]]:
        """The scores of a submitted batch by reward label, in the batch's order. Each handle is collected once:
        KeyError after that, or for a handle that was never given."""
        return self._done.pop(handle)

    def identities(self) -> dict[str, dict[str, Any]]:
        """What each label's numbers are (reward, options, variant, backend, versions), for a run's manifest."""
        return {
            label: reward.identity | ({"reference": reference} if (reference := self._configs[label].reference) else {})
            for label, reward in self._rewards.items()
        }

    def _score(self, label: str, reward: Reward, batch: ScoreBatch) -> list[float | None]:
        references = _references(label, self._configs[label].reference, batch)
        rows, position = _distinct(batch, references, merge=reward.deduplicate)

        def chosen(values: list[Any]) -> list[Any]:
            return [values[row] for row in rows]

        columns = {name: chosen(values) for name, values in batch.columns.items()}
        scores = _say_which(
            label,
            chosen(batch.study_ids()),
            lambda: reward.score(chosen(batch.candidates), chosen(references), **columns),
        )
        return [scores[index] for index in position]


def score_summary(scores: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    """Per-reward figures to log: `rewards/<label>/mean` and `/std` (of a sample, as TRL's; 0 of one value) over the
    samples it judged (absent where it judged none), and `/masked`, the share it could not judge."""
    figures: dict[str, float] = {}
    for label, values in scores.items():
        judged = [value for value in values if value is not None]
        if judged:
            mean = sum(judged) / len(judged)
            figures[f"rewards/{label}/mean"] = mean
            squares = sum((value - mean) ** 2 for value in judged)
            figures[f"rewards/{label}/std"] = math.sqrt(squares / max(1, len(judged) - 1))
        figures[f"rewards/{label}/masked"] = 1 - len(judged) / len(values) if values else 0.0
    return figures


def _references(label: str, column: str | None, batch: ScoreBatch) -> list[str]:
    if column is None:
        return batch.references
    if column not in batch.columns:
        known = ", ".join(sorted(batch.columns))
        raise RewardError(f"reward '{label}' takes column '{column}' as reference; the data has: {known}")
    return [text or "" for text in batch.columns[column]]


def _distinct(batch: ScoreBatch, references: list[str], *, merge: bool) -> tuple[list[int], list[int]]:
    """Rows to score, and for every row of the batch its index among them. With `merge`, two rows are one where
    candidate, reference, study and truncation agree: every other column belongs to the study."""
    count = len(batch.candidates)
    if not merge or "study_id" not in batch.columns:
        return list(range(count)), list(range(count))
    truncated = batch.columns.get("truncated", [False] * count)
    keys = list(zip(batch.candidates, references, batch.columns["study_id"], truncated, strict=True))
    first_row: dict[tuple[Any, ...], int] = {}
    for row, key in enumerate(keys):
        first_row.setdefault(key, row)
    index_of = {key: index for index, key in enumerate(first_row)}
    return list(first_row.values()), [index_of[key] for key in keys]


def _say_which(label: str, study_ids: list[str], action: Callable[[], Answer]) -> Answer:
    """Run `action`; whatever it raises comes out as a RewardError that names the reward and the studies."""
    try:
        return action()
    except RewardError:
        raise
    except Exception as error:
        ids = list(dict.fromkeys(study_ids))
        shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        on = f" on studies {shown}" if ids else ""
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno}, in {where.name})"
        raise RewardError(f"reward '{label}' failed{on}: {said}") from error
