"""The training side of a scoring server (`unirg rewards serve`): asks it as a Worker is asked, and outlives it.

A server that is away, silent or cut off in mid-answer is asked again, with growing pauses, until it has been away for
the reward's `timeout`; then the call has failed. After that each call tries once, so that a run goes on, until one
succeeds. What a server refuses (another token, other options, a reward that has changed) is not asked again.
"""

import http.client
import socket
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Literal
from urllib.parse import urlsplit

from unirg.scoring.contract import RewardConfig, RewardError, validated_scores, validated_terms
from unirg.scoring.job_thread import JobThread
from unirg.scoring.wire import LARGEST, SILENT_SECONDS, TOKEN, is_loopback, pack, read_token, unlike_json, unpack
from unirg.scoring.worker_process import Answer, WorkerFailure

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 15.0


class ServedReward:
    """A reward that the server `config.server` computes. The server is asked what the reward is at once.

    Calls are made one after another, in a thread; those of other rewards and trainers go on beside them. Raises
    RewardError where the server refuses the reward, or is away for `config.timeout` seconds.
    """

    def __init__(self, config: RewardConfig) -> None:
        assert config.server is not None
        self._label, self._server, self._patience = config.log_label, config.server, config.timeout
        self._address = urlsplit(config.server)
        self._token = read_token()
        if self._token is None and not is_loopback(self._address.hostname or ""):
            raise RewardError(
                f"reward '{self._label}': {self._server} is another machine, whose server wants a token; set the "
                f"environment variable {TOKEN} to it"
            )
        if odd := unlike_json(config.options):
            raise RewardError(f"reward '{self._label}': its options cannot be sent to {self._server}: they hold {odd}")
        self._asked = {"name": config.name, "options": config.options}
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()  # of a call's start against close
        self._closed = threading.Event()
        self._heard = 0.0  # when the server last gave a sign of life
        self._given_up = False
        try:
            said = self._ask("/setup", self._asked)
        except WorkerFailure as failure:
            raise RewardError(f"reward '{self._label}' cannot be set up: {failure}") from failure
        try:
            self._identity: dict[str, Any] = dict(said["identity"])
            self.deduplicate = bool(said["deduplicate"])
            self.has_corpus_terms = bool(said["has_corpus_terms"])
            self.evaluation_only: str | None = said["evaluation_only"]
        except (LookupError, TypeError, ValueError) as error:
            raise RewardError(f"reward '{self._label}': {self._server} is no scoring server of this version") from error
        self._jobs = JobThread("served reward")

    @property
    def identity(self) -> dict[str, Any]:
        """What the server's reward says of itself, and where it was computed."""
        return self._identity | {"server": self._server}

    def score(
        self,
        label: str,
        candidates: list[str],
        references: list[str],
        columns: dict[str, list[Any]],
        timeout: float,
        kind: Literal["score", "corpus_terms"] = "score",
    ) -> "Future[Answer]":
        """Asks the server, whose worker has `timeout` seconds for it, twice where it fails. The answer's seconds are
        those from the call's turn here to its end, so the server's other clients are in them."""

        def call() -> Answer:
            started = time.perf_counter()
            try:
                scores, reason = self._scores(candidates, references, columns, timeout, kind)
            except (WorkerFailure, RewardError) as error:
                scores, reason = None, str(error)
            return Answer(scores, reason, time.perf_counter() - started)

        return self._jobs.later(call)

    def close(self) -> None:
        """Ends the call under way. What was asked and not answered fails."""
        with self._lock:
            self._closed.set()
            if self._socket is not None:
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
        self._jobs.end()

    def _scores(
        self, candidates: list[str], references: list[str], columns: dict[str, list[Any]], timeout: float, kind: str
    ) -> tuple[Any, str]:
        for name, values in columns.items():
            if odd := unlike_json(values):
                raise WorkerFailure(
                    f"column '{name}' holds {odd}, which JSON does not keep: it cannot be sent to {self._server}"
                )
        said = self._ask(
            "/score",
            self._asked
            | {"identity": self._identity, "kind": kind, "timeout": timeout}
            | {"candidates": candidates, "references": references, "columns": columns},
        )
        if said.get("scores") is None:
            return None, f"{said.get('reason')} (at {self._server})"
        ids = [str(name) for name in columns.get("study_id", range(len(candidates)))]
        checked = validated_scores if kind == "score" else validated_terms
        return checked(self._label, said["scores"], ids), ""

    def _ask(self, path: str, message: dict[str, Any]) -> dict[str, Any]:
        """The server's answer, waiting for it where it is away. Raises WorkerFailure."""
        body = pack(message)
        if len(body) > LARGEST:
            raise WorkerFailure(f"a request of {len(body) >> 20} MiB; at most {LARGEST >> 20}: set a `batch_size`")
        away, pause, told = 0.0, FIRST_PAUSE, False
        while True:
            started = time.monotonic()
            try:
                answer = self._post(path, body)
                self._given_up = False
                return answer
            except (OSError, http.client.HTTPException, _CutOff) as error:
                reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            if self._closed.is_set():
                raise WorkerFailure("the scoring engine was closed")
            away += time.monotonic() - max(started, self._heard)
            if self._given_up or away + pause > self._patience:
                self._given_up = True
                raise WorkerFailure(f"the scoring server {self._server} is away ({reason})")
            if not told:
                said = f"reward '{self._label}': waiting for the scoring server {self._server} ({reason})"
                print(f"{said}, {self._patience:g} seconds at most", file=sys.stderr, flush=True)
                told = True
            self._closed.wait(pause)
            away, pause = away + pause, min(2 * pause, LONGEST_PAUSE)

    def _post(self, path: str, body: bytes) -> dict[str, Any]:
        """One request. Raises WorkerFailure where it is refused; what else it raises means that the server is away."""
        headers = {"Content-Type": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        secure = self._address.scheme == "https"
        make = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = make(self._address.hostname or "", self._address.port, timeout=SILENT_SECONDS)
        try:
            connection.connect()
            with self._lock:
                if self._closed.is_set():
                    raise WorkerFailure("the scoring engine was closed")
                self._socket = connection.sock
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            raw = self._whole(response)
            return self._said(response.status, raw)
        finally:
            with self._lock:
                self._socket = None
            connection.close()

    def _whole(self, response: http.client.HTTPResponse) -> bytes:
        """The body. Blanks before it are signs of life."""
        self._heard = time.monotonic()
        pieces, size = [], 0
        while piece := response.read1(1 << 16):
            self._heard = time.monotonic()
            pieces.append(piece.lstrip() if not size else piece)
            size += len(pieces[-1])
            if size > LARGEST:
                raise WorkerFailure(f"{self._server} answered with more than {LARGEST >> 20} MiB")
        return b"".join(pieces)

    def _said(self, status: int, raw: bytes) -> dict[str, Any]:
        try:
            said = unpack(raw)
        except (ValueError, RecursionError):
            said = None
        if status >= 500 or (status == 200 and not isinstance(said, dict)):
            raise _CutOff(f"HTTP {status}, and no whole answer")
        if status == 200:
            return said
        reason = said.get("error") if isinstance(said, dict) else "is there a scoring server?"
        raise WorkerFailure(f"{self._server} refused (HTTP {status}): {str(reason)[:2000]}")


class _CutOff(Exception):
    """The server, or what stands before it, ended the answer before its end."""
