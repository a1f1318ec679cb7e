"""What runs in a reward worker: a guard process, and its child, which loads rewards and scores.

`Worker` (worker_process.py) starts it with four things: standard input, on which nothing is ever written and which
closes when the training process ends, however it ends; standard output, a file for what rewards print; a socket for
requests; and the import path of the training process.

The guard does what a process that is stuck in a reward's C code cannot do for itself. It kills the whole group when
standard input closes, it keeps of what is printed only the latest, `KEPT` to 2 `KEPT` bytes, and it passes on how its
child ended. It imports next to nothing; the child imports what its rewards need.

Requests are pickled tuples, answered in order: ("setup", label, name, options, device), ("prepare", label, references)
and ("score", label, candidates, references, columns), or "corpus_terms" in place of "score". Answers are JSON, so that
nothing a reward makes is unpickled by the training process: [CPU seconds that the request took, answer], where an
answer is {"identity": {...}}, {"scores": [...] or the terms, or nothing where references were prepared} or
{"error": text}.
"""

import contextlib
import json
import os
import resource
import select
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

KEPT = 1 << 19
LONGEST = 2000
"""Characters of an error that are passed on."""


def main(socket: int) -> None:
    """Becomes the guard, and in a fork the worker, which answers requests from the file descriptor `socket`. Ends the
    process."""
    printed, prints = os.pipe()
    child = os.fork()
    if child:
        os.close(prints)
        os.close(socket)
        guard(child, printed)
    os.close(printed)
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (prints, 1), (prints, 2)):
        os.dup2(source, target)
        os.close(source) if source != prints else None
    os.close(prints)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    status = 1
    try:
        serve(Connection(socket))
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def guard(child: int, printed: int) -> None:
    """Copies the pipe `printed` to standard output until the process `child` has ended, then exits with its status, or
    with 128 plus the signal that killed it."""
    watched, status = [0, printed], None
    while True:
        ready, _, _ = select.select(watched, [], [], 0.2 if status is None else 0)
        if 0 in ready:  # the training process is no more
            os.killpg(0, signal.SIGKILL)
        chunk = os.read(printed, 1 << 16) if printed in ready else b""
        with contextlib.suppress(OSError):  # a full disk costs words, not the run
            keep(chunk)
        if printed in ready and not chunk:  # closed by all who could print
            watched.remove(printed)
        if status is not None and not chunk:
            os._exit(status)
        ended, code = os.waitpid(child, os.WNOHANG) if status is None else (0, 0)
        if ended:
            code = os.waitstatus_to_exitcode(code)
            status = code if code >= 0 else 128 - code


def keep(chunk: bytes) -> None:
    """Adds to standard output, a file; beyond 2 `KEPT` bytes only the latest `KEPT` of it stay."""
    os.write(1, chunk)
    size = os.lseek(1, 0, os.SEEK_CUR)
    if size > 2 * KEPT:
        latest = os.pread(1, KEPT, size - KEPT)
        os.ftruncate(1, 0)
        os.lseek(1, 0, os.SEEK_SET)
        os.write(1, latest)


def serve(connection: Connection) -> None:
    """Answers requests until the other end closes."""
    import faulthandler

    from unirg.scoring.registry import Reward, load_reward

    faulthandler.enable()  # a segmentation fault says where
    rewards: dict[str, Reward] = {}

    def answer(kind: str, label: str, *given: Any) -> dict[str, Any]:
        if kind == "setup":
            name, options, device = given
            reward = load_reward(name, options)
            reward.setup(device)
            rewards[label] = reward
            return {"identity": reward.identity}
        if kind == "prepare":
            rewards[label].prepare(*given)
            return {"scores": []}
        candidates, references, columns = given
        asked = rewards[label].corpus_terms if kind == "corpus_terms" else rewards[label].score
        return {"scores": asked(candidates, references, **columns)}

    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        before = cpu_seconds()
        try:
            said = json.dumps(answer(*request), default=str)
        except BaseException as error:  # sys.exit() too: whatever a reward does, the request has an answer
            said = json.dumps({"error": described(error)})
        connection.send_bytes(f"[{cpu_seconds() - before}, {said}]".encode())


def cpu_seconds() -> float:
    """CPU seconds of this process so far, all threads, and of the ended processes that it started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def described(error: BaseException) -> str:
    """An error in one line: its type, its message and where it was raised; a RewardError speaks for itself."""
    from unirg.scoring.contract import RewardError

    if isinstance(error, RewardError):
        return str(error)[:LONGEST]
    said = f"{type(error).__name__}: {str(error)[:LONGEST]}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    if isinstance(error, SyntaxError) or not frames:  # the one names its own line, the other is nobody's
        return said
    return f"{said} ({frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name})"
