"""The training process's side of a reward worker: start it, ask it, kill it, start it again.

Workers are fresh interpreters. multiprocessing's own spawn would import the main module again in each of them (torch
and transformers: seconds), and scripts that train would have to be written for it; these import what their rewards
need, and no more.
"""

import contextlib
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from unirg.scoring.contract import RewardError
from unirg.scoring.job_thread import JobThread
from unirg.scoring.wire import TOKEN

SETUP_SECONDS = 1800.0
"""What a reward may take to load, a download included."""
STUCK_SECONDS = 60
"""What the transfer of one request, or of one answer, may take."""
ATTEMPTS = 2

BOOT = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from unirg.scoring.worker import main
main(int(sys.argv[1]))
"""


@dataclass(frozen=True)
class Placed:
    """What a worker loads: a reward's name, options and device."""

    name: str
    options: dict[str, Any]
    device: str


@dataclass(frozen=True)
class Answer:
    """Scores (or terms, where these were asked for), or None and the reason; the seconds that it took, and the worker's
    CPU seconds for it (less what was lost with a process on the way)."""

    scores: Any
    reason: str
    seconds: float
    cpu_seconds: float = 0.0


class WorkerFailure(Exception):
    """A request that came to nothing; the message says why."""


class Worker:
    """One worker process for some rewards (by label), and the thread that talks to it, so that callers need not wait.

    Requests are answered in order. What the rewards print goes to the file `log`, bounded, or to a temporary one.
    """

    def __init__(self, rewards: dict[str, Placed], log: Path | None = None) -> None:
        self._rewards = rewards
        self._log = tempfile.TemporaryFile() if log is None else log.open("a+b")  # noqa: SIM115 - closed by `close`
        self._log_name = "" if log is None else f" (what it printed: {log})"
        self._folder = os.getcwd()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._ready: dict[str, dict[str, Any]] = {}  # identities of what this process has set up, by label
        self._cpu_seconds = 0.0
        self._lock = threading.Lock()  # of start against close
        self._closed = False
        self._jobs = JobThread("reward worker")

    def setup(self) -> "Future[dict[str, dict[str, Any]]]":
        """Starts the process and sets all rewards up; the result is their identities by label, or a RewardError."""
        return self._jobs.later(lambda: {label: self._set_up(label) for label in self._rewards})

    def add(self, label: str, reward: Placed) -> "tuple[str, Future[dict[str, Any]]]":
        """One more reward: the label it goes by here (its equal's, where there is one; else `label`, if free), and its
        identity to come, or a RewardError."""
        name = next((known for known, other in self._rewards.items() if other == reward), label)
        if self._rewards.get(name, reward) != reward:
            name = f"{label} ({len(self._rewards)})"
        self._rewards[name] = reward
        return name, self._jobs.later(lambda: self._set_up(name))

    def prepare(self, label: str, references: list[str], timeout: float) -> "Future[Answer]":
        """Shows the reward references of candidates to come; the answer has no scores. Tried once."""
        return self._jobs.later(lambda: self._attempts(label, ("prepare", label, references), timeout, attempts=1))

    def score(
        self,
        label: str,
        candidates: list[str],
        references: list[str],
        columns: dict[str, list[Any]],
        timeout: float,
        kind: Literal["score", "corpus_terms"] = "score",
    ) -> "Future[Answer]":
        """Asks reward `label`; a failed request is repeated once, in a fresh process."""
        request = (kind, label, candidates, references, columns)
        return self._jobs.later(lambda: self._attempts(label, request, timeout))

    def close(self) -> None:
        """Kills the process with all that it started. What is asked and not answered fails."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                _kill_group(self._process)  # the thread hears of it, and does the rest
        self._jobs.end()
        self._drop()
        self._log.close()

    def _attempts(self, label: str, request: tuple[Any, ...], timeout: float, attempts: int = ATTEMPTS) -> Answer:
        started, used, scores, reason = time.perf_counter(), self._cpu_seconds, None, ""
        for _ in range(attempts):
            try:
                self._set_up(label)
                scores = self._ask(request, timeout)["scores"]
                break
            except (WorkerFailure, RewardError) as error:
                reason = str(error)
                self._drop()  # after an exception too: a CUDA context, for one, does not recover from an error
        return Answer(scores, reason, time.perf_counter() - started, self._cpu_seconds - used)

    def _set_up(self, label: str) -> dict[str, Any]:
        if label not in self._ready:
            reward = self._rewards[label]
            try:
                answer = self._ask(("setup", label, reward.name, reward.options, reward.device), SETUP_SECONDS)
            except WorkerFailure as failure:
                raise RewardError(f"reward '{label}' cannot be set up: {failure}") from failure
            self._ready[label] = answer["identity"]
        return self._ready[label]

    def _ask(self, request: tuple[Any, ...], timeout: float) -> dict[str, Any]:
        """The answer to a request, from a process that is started if there is none. Raises WorkerFailure."""
        if self._process is None:
            self._start()
        connection, process = self._connection, self._process
        assert connection is not None and process is not None
        try:
            packed = pickle.dumps(request)
        except Exception as error:  # whatever a column's own objects raise
            raise WorkerFailure(f"the columns cannot be sent to a worker ({error}); set `worker: false`") from error
        try:
            connection.send_bytes(packed)
            deadline = time.monotonic() + timeout
            while not connection.poll(max(0.0, min(0.5, deadline - time.monotonic()))):
                if _has_ended(process):
                    raise EOFError
                if time.monotonic() >= deadline:
                    raise WorkerFailure(f"no answer in {timeout:g} seconds; its process was killed{self._log_name}")
            cpu_seconds, answer = json.loads(connection.recv_bytes())
        except (EOFError, OSError, ValueError) as error:
            raise WorkerFailure(self._how_it_ended(process)) from error
        self._cpu_seconds += cpu_seconds
        if "error" in answer:
            raise WorkerFailure(answer["error"])
        return answer

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs, self._lock:
            if self._closed:
                raise WorkerFailure("the scoring engine was closed")
            for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):  # a stopped process must not stop this one
                ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", STUCK_SECONDS, 0))
            self._process = subprocess.Popen(
                [sys.executable, "-c", BOOT, str(theirs.fileno()), json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a group of its own, to be killed whole; Ctrl-C is this process's to answer
                cwd=self._folder,
                env=worker_environment(),
            )
            self._connection = Connection(ours.detach())

    def _how_it_ended(self, process: "subprocess.Popen[bytes]") -> str:
        """In words; the guard is given a moment to pass on its child's status and last words."""
        deadline = time.monotonic() + 5
        while not _has_ended(process) and time.monotonic() < deadline:
            time.sleep(0.01)
        self._drop()
        status = process.returncode
        how = f"exit status {status}" if 0 <= status <= 128 else f"killed by {_signal(abs(status) % 128)}"
        if status == 128 + signal.SIGKILL:
            how += ", perhaps for want of memory"
        words = self._last_words()
        return f"its process ended ({how})" + (f"; its last words: {words}" if words else "") + self._log_name

    def _last_words(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), 400, max(0, size - 400)).decode(errors="replace")
        return " ".join(text.split())

    def _drop(self) -> None:
        """Kills the process, if there is one, and forgets it."""
        with self._lock:
            process, connection = self._process, self._connection
            self._process = self._connection = None
            self._ready.clear()
            if process is None or connection is None:
                return
            _kill_group(process)
            process.wait()
            connection.close()
            assert process.stdin is not None
            process.stdin.close()


def worker_environment() -> dict[str, str]:
    """The environment of a worker: one CPU thread unless OMP_NUM_THREADS says otherwise, no token of a scoring server
    (a plug-in has no need of it), and no rank of the run (a reward that asks accelerate or torch.distributed for its
    place would wait for the others)."""
    kept_back = (
        TOKEN,
        "RANK",
        "LOCAL_RANK",
        "GROUP_RANK",
        "ROLE_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    kept = {
        key: value for key, value in os.environ.items() if key not in kept_back and not key.startswith("TORCHELASTIC_")
    }
    return {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | kept


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Kills the process and all that it started. It must not have been waited for: its number is then still its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _has_ended(process: "subprocess.Popen[bytes]") -> bool:
    """Whether the process has ended, without reaping it."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
