"""The scoring engine: submit a batch of candidates, collect one list of scores per reward.

There are two ways to run rewards. By default they run in the calling process, when a batch is collected, and whatever
goes wrong is a RewardError: right for a command that someone waits for. Supervised, as training runs them, each reward
runs as its config says, normally in a worker process that scores while the caller goes on (between submit and collect),
that is killed where it hangs and started again where it died; a call that fails twice masks its samples (`on_error`).
Either way a reward that names a `server` is scored there (client.py).
"""

import itertools
import math
import os
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from unirg.scoring.client import ServedReward
from unirg.scoring.contract import RewardConfig, RewardError, ScoreBatch, Terms
from unirg.scoring.registry import Reward, load_reward
from unirg.scoring.worker import described
from unirg.scoring.worker_process import ATTEMPTS, Answer, Placed, Worker

Call = Callable[[], Answer]
"""Waits for a worker's answer, or computes it here."""


@dataclass
class _Part:
    """What one reward does of a batch: for every row of the batch its index among the distinct rows, and the calls made
    for these, in order, each with its study ids."""

    position: list[int]
    calls: list[tuple[list[str], Call]] = field(default_factory=list)


class ScoringEngine:
    """The rewards of a stage, loaded and ready; `logs` is a folder for what supervised rewards print.

    `beside` is another supervised engine, which outlives this one: its workers serve this one too where they hold what
    a reward shares. A supervised engine holds processes: use it as a context manager, or close it. Raises RewardError
    where a reward cannot be loaded or set up, its server refuses it, or two have the same label.
    """

    def __init__(
        self,
        configs: Sequence[RewardConfig],
        *,
        supervised: bool = False,
        logs: Path | None = None,
        beside: "ScoringEngine | None" = None,
    ) -> None:
        labels = [config.log_label for config in configs]
        if repeated := [label for label, count in Counter(labels).items() if count > 1]:
            raise RewardError(f"two rewards are called '{repeated[0]}' in logs; give each a `label` of its own")
        self._configs = dict(zip(labels, configs, strict=True))
        self._rewards: dict[str, Reward | ServedReward] = {}
        self._supervised, self._caller = supervised, threading.get_ident()
        self._workers: dict[str, Worker | ServedReward] = {}  # by label; some are one and the same
        self._beside = beside
        self._names: dict[str, str] = {}  # what workers of `beside` call this engine's rewards
        self._links: dict[str, set[tuple[str, str]]] = {}  # what rewards in workers share, each with its device
        self._identities: dict[str, dict[str, Any]] = {}
        self._handles = itertools.count()
        self._parts: dict[int, dict[str, _Part]] = {}
        self._prepared: list[tuple[str, Call]] = []
        self._failed = dict.fromkeys(labels, 0)
        # That rewards took: here, in workers, and at servers.
        self._seconds: defaultdict[Worker | ServedReward | None, float] = defaultdict(float)
        self._cpu_seconds = 0.0  # of workers
        self._waited = 0.0
        try:
            for label, config in self._configs.items():
                reward = self._rewards[label] = self._load(label, config)
                if config.batch_size is not None and not reward.deduplicate:
                    raise RewardError(f"reward '{label}' compares a batch's candidates: it cannot have a batch_size")
            self._set_up(logs)
        except BaseException:
            self.close()
            raise

    def prepare(self, references: list[str], columns: Mapping[str, list[Any]]) -> None:
        """Lets rewards read the references of candidates to come, given as one row for each study: workers at once, and
        those in this process before they score. What fails here is said, and left to the scoring.

        Raises RewardError where a reward's reference column does not exist.
        """
        batch = ScoreBatch([""] * len(references), references, dict(columns))
        for label, reward in self._rewards.items():
            if isinstance(reward, Reward) and reward.prepares:
                worker, config = self._workers.get(label), self._configs[label]
                texts = list(dict.fromkeys(_references(label, config.reference, batch)))
                call: Call = partial(_prepare_here, reward, texts)
                if isinstance(worker, Worker):
                    call = worker.prepare(self._names.get(label, label), texts, config.timeout).result
                self._prepared.append((label, call))

    def submit(self, batch: ScoreBatch) -> int:
        """Hand over a batch; the answer is the handle to collect its scores with. Any thread may call it.

        Raises RewardError where a reward's reference column does not exist.
        """
        handle, started = next(self._handles), time.perf_counter()
        parts: dict[str, _Part] = {}
        for label, reward in self._rewards.items():
            config = self._configs[label]
            references = _references(label, config.reference, batch)
            rows, position = _distinct(batch, references, merge=reward.deduplicate)
            part = parts[label] = _Part(position)
            size = config.batch_size or max(1, len(rows))
            for first in range(0, len(rows), size):
                part.calls.append(self._call(label, batch, references, rows[first : first + size]))
        self._parts[handle] = parts
        if threading.get_ident() == self._caller:
            self._waited += time.perf_counter() - started
        return handle

    def collect(self, handle: int) -> dict[str, list[float | None]]:
        """The scores of a submitted batch by reward label, in the batch's order. Each handle is collected once:
        KeyError after that, or for a handle that was never given.

        A reward that fails or breaks the contract raises RewardError, naming the reward and the studies. In a
        supervised engine it has to fail twice, and its `on_error` to be `raise`; else its samples have None, a line on
        stderr says why, and `step_figures` counts them.
        """
        parts, started = self._parts.pop(handle), time.perf_counter()
        for label, prepared in self._prepared:  # workers answer in order, so that theirs came before the scores
            self._count(label, answer := prepared())
            if answer.scores is None:
                print(f"reward '{label}' could not prepare references: {answer.reason}", file=sys.stderr, flush=True)
        self._prepared.clear()
        collected: dict[str, list[float | None]] = {}
        for label in sorted(self._rewards, key=lambda label: label in self._workers):  # workers may still be at it
            scores: list[float | None] = []
            lost: list[bool] = []
            for study_ids, call in parts[label].calls:
                answer = self._answer(label, study_ids, call)
                scores += [None] * len(study_ids) if answer.scores is None else answer.scores
                lost += [answer.scores is None] * len(study_ids)
                self._count(label, answer)
            collected[label] = [scores[index] for index in parts[label].position]
            self._failed[label] += sum(lost[index] for index in parts[label].position)
        self._waited += time.perf_counter() - started
        return {label: collected[label] for label in self._rewards}

    def corpus_terms(self, batch: ScoreBatch) -> dict[str, dict[str, list[Terms]]]:
        """By label and figure the terms of those rewards that have figures of a corpus (see the contract).

        Waits for them. Raises as `collect` does; a reward whose failure is masked is left out.
        """
        found: dict[str, dict[str, list[Terms]]] = {}
        for label, reward in self._rewards.items():
            if reward.has_corpus_terms:
                references = _references(label, self._configs[label].reference, batch)
                rows = list(range(len(batch.candidates)))
                study_ids, call = self._call(label, batch, references, rows, "corpus_terms")
                if (answer := self._answer(label, study_ids, call)).scores is not None:
                    found[label] = answer.scores
        return found

    def ask(
        self, label: str, batch: ScoreBatch, timeout: float, kind: Literal["score", "corpus_terms"]
    ) -> "Future[Answer]":
        """One call of one reward in its worker, for a scoring server: nothing is merged, split or masked. Unlike the
        rest, it may be called from any thread."""
        return self._workers[label].score(label, batch.candidates, batch.references, batch.columns, timeout, kind)

    def step_figures(self) -> dict[str, float]:
        """What happened since this was last asked, to log: `rewards/<label>/failed`, candidates masked because their
        reward failed; `time/rewards`, the seconds that a caller who does nothing in between would wait: this process's
        own and the busiest worker's; `time/scoring_hidden`, the share of these that nobody waited for; and
        `time/workers_cpu`, the CPU seconds of the workers' answers."""
        figures = {f"rewards/{label}/failed": float(count) for label, count in self._failed.items()}
        here = self._seconds.pop(None, 0.0)
        scoring = here + max(self._seconds.values(), default=0.0)
        figures["time/scoring_hidden"] = max(0.0, 1 - self._waited / scoring) if scoring else 0.0
        figures |= {"time/rewards": scoring, "time/workers_cpu": self._cpu_seconds}
        self._failed = dict.fromkeys(self._failed, 0)
        self._seconds.clear()
        self._cpu_seconds = self._waited = 0.0
        return figures

    def identities(self) -> dict[str, dict[str, Any]]:
        """What each label's numbers are (reward, options, variant, backend, versions), for a run's manifest."""
        return {
            label: self._identities[label] | ({"reference": config.reference} if config.reference else {})
            for label, config in self._configs.items()
        }

    @property
    def rewards(self) -> Mapping[str, Reward | ServedReward]:
        """The rewards by label."""
        return self._rewards

    @property
    def compares(self) -> bool:
        """Whether a reward compares the candidates of a batch: each study's must then be submitted together."""
        return not all(reward.deduplicate for reward in self._rewards.values())

    def close(self) -> None:
        """Ends the worker processes that this engine started. What was submitted and not collected is lost."""
        lent = set() if self._beside is None else set(self._beside._workers.values())
        for worker in set(self._workers.values()) - lent:
            worker.close()

    def __enter__(self) -> "ScoringEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self, label: str, config: RewardConfig) -> Reward | ServedReward:
        if config.server is None:
            return load_reward(config.name, config.options)
        served = self._workers[label] = ServedReward(config)
        self._identities[label] = served.identity
        return served

    def _set_up(self, logs: Path | None) -> None:
        """Starts the workers, side by side, and sets up all rewards that are scored here."""
        local = {label: reward for label, reward in self._rewards.items() if isinstance(reward, Reward)}
        placed: dict[str, Placed] = {}
        for label, reward in local.items():
            placed[label] = Placed(reward.name, reward.options, place(label, self._configs[label].device))
        lodged: dict[str, Future[dict[str, Any]]] = {}
        for label, reward in local.items():
            if self._supervised and self._configs[label].worker:
                # What holds no model shares one process: its calls are short, and each process has to be started.
                shares = reward.shares or ((label,) if hasattr(reward.written, "setup") else ("",))
                self._links[label] = {(name, placed[label].device) for name in shares}
                if (host := self._host(label)) is not None:
                    self._workers[label] = host
                    self._names[label], lodged[label] = host.add(label, placed[label])
        groups = linked({label: own for label, own in self._links.items() if label not in lodged})
        if logs is not None and groups:
            logs.mkdir(parents=True, exist_ok=True)
        identities = []
        for number, group in enumerate(groups, start=1):
            worker = Worker(
                {label: placed[label] for label in group}, None if logs is None else logs / f"worker-{number}.log"
            )
            self._workers |= dict.fromkeys(group, worker)
            identities.append(worker.setup())
        for label, reward in local.items():
            if label not in self._workers:
                try:
                    reward.setup(placed[label].device)
                    self._identities[label] = reward.identity
                except Exception as error:
                    raise RewardError(f"reward '{label}' cannot be set up: {described(error)}") from error
        for future in identities:
            self._identities |= future.result()
        self._identities |= {label: future.result() for label, future in lodged.items()}

    def _host(self, label: str) -> Worker | None:
        """The worker of `beside` that has what this reward shares."""
        if self._beside is not None:
            for other, links in self._beside._links.items():
                worker = self._beside._workers[other]
                if links & self._links[label] and isinstance(worker, Worker):
                    return worker
        return None

    def _count(self, label: str, answer: Answer) -> None:
        self._seconds[self._workers.get(label)] += answer.seconds
        self._cpu_seconds += answer.cpu_seconds

    def _answer(self, label: str, study_ids: list[str], call: Call) -> Answer:
        """The call's answer. Where it failed and is to be masked, that is said."""
        answer = call()
        if answer.scores is None:
            failure = _failure(label, study_ids, answer.reason)
            if self._configs[label].on_error == "raise" or not self._supervised:
                raise failure
            print(f"{failure}; {len(study_ids)} candidates are masked", file=sys.stderr, flush=True)
        return answer

    def _call(
        self,
        label: str,
        batch: ScoreBatch,
        references: list[str],
        rows: list[int],
        kind: Literal["score", "corpus_terms"] = "score",
    ) -> tuple[list[str], Call]:
        """The study ids of `rows` of the batch, and what gives the reward's answer on them."""

        def chosen(values: list[Any]) -> list[Any]:
            return [values[row] for row in rows]

        study_ids, candidates, truths = chosen(batch.study_ids()), chosen(batch.candidates), chosen(references)
        columns = {name: chosen(values) for name, values in batch.columns.items()}
        if worker := self._workers.get(label):
            timeout = self._configs[label].timeout
            name = self._names.get(label, label)
            return study_ids, worker.score(name, candidates, truths, columns, timeout, kind).result

        def here() -> Answer:
            started, reason = time.perf_counter(), ""
            for _ in range(ATTEMPTS if self._supervised else 1):
                try:
                    asked = getattr(self._rewards[label], kind)
                    return Answer(asked(candidates, truths, **columns), "", time.perf_counter() - started)
                except Exception as error:  # whatever a reward raises
                    reason = described(error)
                    if not self._supervised:
                        raise _failure(label, study_ids, reason) from error
            return Answer(None, reason, time.perf_counter() - started)

        return study_ids, here


def linked(links: Mapping[str, set[Any]]) -> list[list[str]]:
    """The labels in groups: two belong to one where they have a link in common, or each has one with a third."""
    groups: list[tuple[set[Any], list[str]]] = []
    for label, own in links.items():
        touched = [group for group in groups if group[0] & own]
        groups = [group for group in groups if group not in touched]
        groups.append((own.union(*(each for each, _ in touched)), [*(one for _, few in touched for one in few), label]))
    return [labels for _, labels in groups]


def place(label: str, device: str) -> str:
    """The device that a config's `device` means for this process (see RewardConfig.device), one of `cpu` and `cuda:N`.

    Raises RewardError where there is no CUDA device for `cuda:auto`.
    """
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    if device != "cuda:auto":
        pool = device.split(",")
        return pool[rank % len(pool)]
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise RewardError(f"reward '{label}': device is cuda:auto, and there is no CUDA device; take cpu")
    return f"cuda:{ranks + rank % (count - ranks)}" if count > ranks else f"cuda:{rank % count}"


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


def _prepare_here(reward: Reward, references: list[str]) -> Answer:
    started, reason = time.perf_counter(), ""
    try:
        reward.prepare(references)
    except Exception as error:  # whatever a reward raises
        reason = described(error)
    return Answer(None if reason else [], reason, time.perf_counter() - started)


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


def _failure(label: str, study_ids: Sequence[str], reason: str) -> RewardError:
    """The error that names the reward and the studies."""
    ids = list(dict.fromkeys(study_ids))
    shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    return RewardError(f"reward '{label}' failed on studies {shown}: {reason}")
