"""Signals that ask a run to stop: SIGTERM, SIGUSR1 (what SLURM can send before a job's time is up) and Ctrl-C.

A run that is asked drops the step under way, writes a checkpoint of the last whole one and ends with 128 + the signal's
number. Asked before it ends, or in a part that must not be cut in two, it goes on to where that is whole.
A Ctrl-C after that ends it at once.
"""

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_asked = 0
_at_once = True


class Stopped(BaseException):
    """A signal asked the run to stop, and it can. Not an Exception: no reward's or reader's `except` is to take it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.goes_on = "from the last checkpoint"
        """Where the same command goes on, in words."""

    @property
    def status(self) -> int:
        """The process's exit status."""
        return 128 + self.number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}: the same command goes on {self.goes_on}"


@contextmanager
def handled() -> Iterator[None]:
    """While it lasts, the signals ask for a stop. A signal that this process was told to ignore stays ignored."""
    global _asked, _at_once
    if threading.current_thread() is not threading.main_thread():  # Python gives signals to the main thread alone
        yield
        return
    _asked, _at_once = 0, True
    before = {number: signal.getsignal(number) for number in HANDLED}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked, _at_once = 0, True


@contextmanager
def unhandled() -> Iterator[None]:
    """While it lasts, the signals end the process, as they do without this module: for what would not hear them."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    for number in (number for number, handler in before.items() if handler is _ask):
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def going_on(where: str) -> Iterator[None]:
    """A stop in this part is told with `where` the same command goes on."""
    try:
        yield
    except Stopped as stopped:
        stopped.goes_on = where
        raise


def asked() -> int:
    """The number of the signal that asked for a stop; 0 where none has."""
    return _asked


def at_once(allowed: bool) -> bool:
    """Whether a signal stops what runs, wherever it is, by raising Stopped; or waits until someone looks (`asked`). One
    that waited is raised here. Returns what was allowed before."""
    global _at_once
    before, _at_once = _at_once, allowed
    if allowed and _asked:
        raise Stopped(_asked)
    return before


def end_with_parent() -> None:
    """Has the kernel send SIGTERM when the process that started this one dies, however it dies: without it nobody would
    stop this one, which holds its stage's folder and its device. Linux alone; elsewhere nothing happens."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def ended_by(status: int) -> str:
    """How a child process of this program ended, in words, from its exit status."""
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    if status - 128 in HANDLED:
        return f"was stopped by {signal.Signals(status - 128).name}"
    return "failed (its error stands above)"


def _ask(number: int, frame: FrameType | None) -> None:
    global _asked
    if _asked:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        return  # a scheduler may say it twice, once to each process and once to the group
    _asked = number
    if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
        # Somebody waits for it; and not by print(), which may be under way.
        os.write(2, b"\nstopping where the run can go on; Ctrl-C again ends it at once\n")
    if _at_once:
        raise Stopped(number)
