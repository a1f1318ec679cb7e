"""What a training process is beside the training: one of the ranks that torchrun started, the holder of a folder; and
how it ends."""

import atexit
import errno
import fcntl
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import NoReturn, TextIO

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from rich.console import Console

from unirg import ranks, signals, watchdog
from unirg.errors import UserError

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""What `flock` says on a file system that has no locks, as Lustre without the mount option `flock`."""

GONE = re.compile(r"Connection (closed|reset) by peer|remote process exited")
"""What gloo and NCCL say where the process at the other end has ended."""

SEEN_SECONDS = 90
"""How long a rank looks for what another host has written: NFS keeps what it knows of a folder for up to 60."""


def several() -> bool:
    """Whether this process is one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(timeout: float) -> Iterator[None]:
    """While it lasts, the ranks that torchrun started are one group, and none waits for another longer than `timeout`
    seconds (see unirg.watchdog). They leave it together; one that fails, or is asked to stop, leaves it alone. Does
    nothing where there is one process."""
    if not several():
        yield
        return
    cpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    # Later than the watchdog, which can say who is waited for.
    with (
        signals.unhandled()
    ):  # a rank that looks for the first one does so in torch's C++ code, and hears nothing there
        PartialState(cpu=cpu, timeout=timedelta(seconds=2 * timeout))
    with watchdog.watching(timeout):
        try:
            yield
            watchdog.comes_to("the end", waits=True)
            ranks.largest(0)  # the store of them all may end with the first
        except RuntimeError as error:
            if number := signals.asked():  # so were the others, and one of them has ended while this one waited for it
                raise signals.Stopped(number) from error
            if gone := GONE.search(str(error)):
                raise UserError(
                    f"rank {ranks.rank()} (host {platform.node()}): another rank has gone ({gone[0]}); what ended it "
                    "stands in its own output or the kernel's, and the same command goes on from the last checkpoint"
                ) from error
            raise
    dist.destroy_process_group()


def end(status: int) -> NoReturn:
    """Ends the process with `status`. One of several ranks ends without the interpreter's own end: a thread that is in
    torch's C++ code then cannot come back, and aborts a process whose work is done."""
    if not several():
        sys.exit(status)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def see(path: Path) -> None:
    """Returns when this rank sees what the first one has made: a network file system may show it to other hosts a while
    later. Raises UserError where it does not."""
    until = time.monotonic() + SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            raise UserError(
                f"rank {ranks.rank()} (host {platform.node()}) does not see {path}, which rank 0 has written; all "
                "hosts must share the run folder: choose another `output`"
            )
        time.sleep(0.2)


def hold(folder: Path) -> TextIO:
    """Locks a run's or a stage's folder while the returned file is open: two processes would mix their checkpoints.

    Raises UserError where another process holds it, naming that, and where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another `output`") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise UserError(f"{folder}: {holder} is training there; wait for it, or stop it") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        words = f"{folder}: its file system has no locks ({error.strerror}); see to it that no second run works there"
        Console().print(f"[yellow]{words}[/yellow]", highlight=False, soft_wrap=True)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()} (since {datetime.now():%Y-%m-%d %H:%M:%S})\n")
    lock.flush()
    return lock
