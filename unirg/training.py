"""What stages of every kind share: data order, ranks that come together and stop together, seconds per phase.

A kind of stage is one function: given the step's number it runs forward and backward and returns the step's metrics.
Every random choice follows from (seed, stage, step, study), so a run that was killed repeats what it would have done.
"""

import errno
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.markup import escape

from unirg import ranks, signals, watchdog
from unirg import run as run_folder
from unirg.errors import UserError
from unirg.policy import EncodedPrompt, Policy
from unirg.recipe.schema import Recipe
from unirg.rollout import request_seed
from unirg.study import Study

console = Console()
FAILED = 1 << 16
"""What a rank that failed says where ranks meet; larger than any signal's number."""
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
"""Errors of a disk, not of the code."""


class RanksStop(UserError):
    """An error that all ranks raise at one place."""


def meet(phase: str, failure: UserError | None = None, *, stoppable: bool = True) -> None:
    """Where ranks come together before `phase`, equally often on each: they go on, or they all stop.

    Raises signals.Stopped where any was asked to stop (if `stoppable`), and where any brings a `failure`, that one, or
    on several ranks RanksStop: the first rank's has the words of all.
    """
    watchdog.comes_to(phase, waits=True)
    asked = signals.asked() if stoppable else 0
    if ranks.world() > 1:
        asked = ranks.largest(FAILED if failure else asked)
        if asked == FAILED:  # words that all say are said once
            words = dict.fromkeys(words for words in ranks.everyones(failure and str(failure)) if words)
            raise RanksStop("\n".join(words) if ranks.rank() == 0 else "stopped with rank 0, which says why")
    elif failure is not None:
        raise failure
    if asked:
        raise signals.Stopped(asked)
    watchdog.comes_to(phase)


@contextmanager
def in_words(what: str) -> Iterator[None]:
    """Errors of a disk become UserErrors about `what`."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        words = f"a file cannot be written or read ({error}); put that right, and the same command goes on"
        raise UserError(f"{what}: {words}") from error


@contextmanager
def together(phase: str, what: str, *, stoppable: bool = True) -> Iterator[None]:
    """A part that may fail on one rank alone: then all stop, at its end. Errors of the disk become `what`'s, in words.
    All ranks enter it, equally often, and none needs another within it."""
    watchdog.comes_to(phase)
    failure: UserError | None = None
    try:
        with in_words(what):
            yield
    except UserError as error:
        failure = error
    meet(f"what follows {phase}", failure, stoppable=stoppable)


@dataclass
class StageRun:
    """A stage at work: what its step function needs."""

    recipe: Recipe
    stage: Any
    run: Path
    accelerator: Accelerator
    policy: Policy
    studies: Sequence[Study]
    stoppable: bool = True
    """Whether the last step made can be in a checkpoint: not between steps that share a batch of samples."""

    @property
    def folder(self) -> Path:
        return run_folder.stage_folder(self.run, self.stage.name)

    def seed(self, *parts: object) -> int:
        """A seed that follows from the recipe's seed, the stage and `parts`."""
        return request_seed(self.recipe.seed, self.stage.name, *parts)

    def step_studies(self, batch: int) -> list[Study]:
        """The studies of the batch number `batch`, over all ranks: a fresh permutation in every epoch."""
        size, count = self.stage.studies_per_step, len(self.studies)
        chosen = []
        for position in range(batch * size, (batch + 1) * size):
            epoch, place = divmod(position, count)
            chosen.append(self.studies[int(self._order(epoch)[place])])
        return chosen

    def _order(self, epoch: int) -> np.ndarray:
        if getattr(self, "_epoch", None) != epoch:
            order = np.random.default_rng(self.seed("order", epoch)).permutation(len(self.studies))
            self._epoch, self._permutation = epoch, order
        return self._permutation

    def mine(self, items: Sequence[Any]) -> list[Any]:
        """This rank's share of a step's items; `everyones` puts shares together again, in order."""
        return list(items[self.accelerator.process_index :: self.accelerator.num_processes])

    def everyones(self, share: Sequence[Any]) -> list[Any]:
        """All ranks' items in the step's order, from each rank's share (equal in length)."""
        if self.accelerator.num_processes == 1:
            return list(share)
        world = self.accelerator.num_processes
        ranks = gather_object([list(share)])
        return [ranks[i % world][i // world] for i in range(len(share) * world)]

    def micro_batches(self, items: Sequence[Any]) -> Iterable[Sequence[Any]]:
        """The rank's share in whole groups, `studies_per_forward` at a time."""
        size = self.stage.studies_per_forward or len(items)
        for first in range(0, len(items), size):
            yield items[first : first + size]

    def warn(self, text: str) -> None:
        """A line that the user should see, from the main process."""
        say(self.accelerator, self.stage.name, f"[yellow]{escape(text)}[/yellow]")

    def meet(self, phase: str, failure: UserError | None = None) -> None:
        """Where ranks come together before `phase`: see `meet`. They do not stop between steps that share a batch."""
        meet(phase, failure, stoppable=self.stoppable)

    @contextmanager
    def together(self, phase: str) -> Iterator[None]:
        """A part of a step that may fail on one rank alone, by a study, a reward or a disk: see `together`."""
        with together(phase, f"stage {self.stage.name}", stoppable=self.stoppable):
            yield

    @contextmanager
    def uninterrupted(self, phase: str) -> Iterator[None]:
        """What is whole or not there: a signal waits for its end."""
        watchdog.comes_to(phase)
        before = signals.at_once(False)
        try:
            yield
        finally:
            signals.at_once(before)

    def encode(self, studies: Sequence[Study]) -> list[EncodedPrompt]:
        """The prompts of this rank's studies. A film that has become unreadable since the run began stops all ranks, by
        name: to leave its study out would be another run."""
        with self.together("reading films"):
            return [self.policy.encode(study) for study in studies]

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of a share of the step's loss: shares of all micro-batches and ranks add up to it."""
        if self.policy.engine is None:
            loss.backward()
        else:  # it takes means over ranks
            self.policy.engine.backward(loss * self.accelerator.num_processes)


class Stopwatch:
    """Seconds per phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def metrics(self) -> dict[str, float]:
        return {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}


def say(accelerator: Accelerator, stage: str, text: str) -> None:
    if accelerator.is_main_process:
        console.print(f"[bold]{stage}[/bold]  {text}", highlight=False, soft_wrap=True)
