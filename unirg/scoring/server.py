"""The scoring server: HTTP in front of a supervised engine, for the trainers of several nodes (see wire.py).

It serves the rewards that it was started with and no others: what a request names is compared, never loaded. Each
request is one call of one reward, and waits in a thread of its own; the workers take calls in turn, whoever they come
from, so that what they keep about a reference serves all trainers.
"""

import hmac
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from unirg.scoring.contract import RewardConfig, RewardError, ScoreBatch
from unirg.scoring.engine import ScoringEngine
from unirg.scoring.wire import BEAT_SECONDS, LARGEST, SILENT_SECONDS, TOKEN, canonical, is_loopback, pack, unpack

LONGEST = 2000
"""Characters of a refusal."""
SAID_ONCE = 100
"""So many different refusals are told."""
PATHS = "there is POST /setup, POST /score and GET /health"


class Refusal(Exception):
    """A request that is not served: its HTTP status, and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason if len(reason) <= LONGEST else f"{reason[:LONGEST]} ...")
        self.status = status


class ScoringServer(ThreadingHTTPServer):
    """Bound to `host` and `port` (0: any that is free) as soon as it is made, so that models are not loaded for an
    address that is taken; it takes connections from `open` on. `say` is told of failures and refusals.

    Raises RewardError: an address that cannot be bound, or that other machines can reach while there is no token.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, token: str | None, say: Callable[[str], None]) -> None:
        try:
            self.address_family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise RewardError(f"--host {host}: no address of this machine ({error.strerror})") from error
        if token is None and not is_loopback(str(address[0])):
            raise RewardError(
                f"--host {host} can be reached from other machines, and there is no token: give one by --token-file or "
                f"the environment variable {TOKEN}, and its trainers the same by that variable; or listen on 127.0.0.1"
            )
        super().__init__((str(address[0]), port), Handler, bind_and_activate=False)
        try:
            self.server_bind()
        except OSError as error:
            self.server_close()
            raise RewardError(f"{host}:{port} cannot be listened on ({error.strerror}); try another --port") from error
        self._token, self._say, self.ending = token, say, False
        self.counts: Counter[str] = Counter(requests=0, reports=0, failed=0, refused=0)
        self._refusals: set[str] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def open(self, engine: ScoringEngine, configs: Mapping[str, RewardConfig]) -> None:
        """Takes requests in a thread of its own, for the engine's rewards, whose configs are given by label."""
        self.engine, self._configs, self.identities = engine, configs, engine.identities()
        try:
            self.server_activate()
        except OSError as error:  # another server of ours was loading its models for this port, and was sooner
            raise RewardError(f"{self.url} is taken by now ({error.strerror}); try another --port") from error
        self._thread = threading.Thread(target=self.serve_forever, name="scoring server", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Takes no more requests. Those under way get no whole answer, so that their clients ask again."""
        self.ending = True
        if self._thread is not None:
            self.shutdown()
        self.server_close()

    def knows(self, authorization: str) -> bool:
        """Whether the header has the token, where there is one."""
        expected = f"Bearer {self._token}"
        return self._token is None or hmac.compare_digest(authorization.encode(), expected.encode())

    def count(self, reports: int, failure: str = "") -> None:
        """Counts a call, and tells of one that failed."""
        with self._lock:
            self.counts.update(requests=1, reports=reports, failed=bool(failure))
        if failure:
            self._say(failure)

    def refuse(self, client: str, refusal: Refusal) -> None:
        """Counts a refusal, and tells of each kind once: a mistaken client asks often."""
        said = f"refused {client}: {refusal}"
        with self._lock:
            self.counts["refused"] += 1
            fresh = said not in self._refusals and len(self._refusals) < SAID_ONCE
            if fresh:
                self._refusals.add(said)
        if fresh:
            self._say(said)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def label_of(self, message: Mapping[str, Any]) -> str:
        """The label of the reward that a request asks for. Raises Refusal, which names what differs."""
        name, options = message.get("name"), message.get("options")
        if not isinstance(name, str) or not isinstance(options, dict):
            raise Refusal(400, "expected a reward's `name` and `options`")
        by_label = {label: config.options for label, config in self._configs.items() if config.name == name}
        if not by_label:
            raise Refusal(404, f"this server has no reward '{name}'; it serves {', '.join(self._configs)}")
        for label, served in by_label.items():
            if canonical(served) == canonical(options):
                return label
        differing = "; or ".join(differences(served, options) for served in by_label.values())
        raise Refusal(409, f"this server has '{name}' with other options: {differing}")


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: ScoringServer
    server_version, sys_version = "unirg", ""
    timeout = SILENT_SECONDS

    def do_GET(self) -> None:
        """GET /health, for whoever asks: it says nothing of rewards or reports."""
        if self.path == "/health":
            self._answer(200, {"ready": True} | self.server.counts)
        else:
            self._answer(404, {"error": PATHS})

    def do_POST(self) -> None:
        """POST /setup and /score."""
        try:
            message = self._message()
            label = self.server.label_of(message)
            if self.path == "/setup":
                reward = self.server.engine.rewards[label]
                traits = {"deduplicate": reward.deduplicate, "evaluation_only": reward.evaluation_only}
                traits |= {"has_corpus_terms": reward.has_corpus_terms}
                self._answer(200, {"identity": self.server.identities[label]} | traits)
            else:
                self._score(label, *self._call(label, message))
        except Refusal as refusal:
            self.server.refuse(self.client_address[0], refusal)
            self._answer(refusal.status, {"error": str(refusal)})

    def log_message(self, *_: Any) -> None:
        """Requests are counted, not listed."""

    def _message(self) -> dict[str, Any]:
        """The request's body, which is read (and not kept) also where it is refused: who is still sending hears no
        refusal. Raises Refusal."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise Refusal(411, "expected a Content-Length")
        if len(length) > 15 or int(length) > LARGEST:
            raise Refusal(413, f"a request of more than {LARGEST >> 20} MiB; set the reward's `batch_size`")
        known = self.server.knows(self.headers.get("Authorization", ""))
        left, pieces = int(length), []
        while left and (piece := self.rfile.read(min(left, 1 << 16))):
            left -= len(piece)
            if known:
                pieces.append(piece)
        if not known:
            raise Refusal(401, f"another token than this server's; a trainer's stands in its {TOKEN}")
        if self.path not in ("/setup", "/score"):
            raise Refusal(404, PATHS)
        try:
            message = unpack(b"".join(pieces))
        except (ValueError, RecursionError) as error:
            raise Refusal(400, f"expected JSON, got what is none ({type(error).__name__})") from error
        if not isinstance(message, dict):
            raise Refusal(400, f"expected an object, got a {type(message).__name__}")
        return message

    def _call(self, label: str, message: dict[str, Any]) -> tuple[str, float, ScoreBatch]:
        """Kind, timeout and batch of a /score request. Raises Refusal."""
        identity = self.server.identities[label]
        known = message.get("identity")
        if not isinstance(known, dict):
            raise Refusal(400, "expected the `identity` that /setup gave")
        if canonical(known) != canonical(identity):
            raise Refusal(409, f"'{label}' is not what it was when this run began: {differences(identity, known)}")
        kind, timeout = message.get("kind"), message.get("timeout")
        if kind not in ("score", "corpus_terms"):
            raise Refusal(400, f"kind is {kind!r}, expected score or corpus_terms")
        if not isinstance(timeout, float) or not timeout > 0:
            raise Refusal(400, f"timeout is {timeout!r}, expected seconds")
        try:
            batch = ScoreBatch(_texts(message, "candidates"), _texts(message, "references"), _columns(message))
        except ValueError as error:
            raise Refusal(400, str(error)) from error
        return kind, timeout, batch

    def _score(self, label: str, kind: str, timeout: float, batch: ScoreBatch) -> None:
        """Answers with the reward's scores; with blanks first, while they are waited for."""
        future = self.server.engine.ask(label, batch, timeout, kind)  # type: ignore[arg-type] # one of the two
        self._begin(200)
        while not wait([future], BEAT_SECONDS).done:
            try:
                self.wfile.write(b" ")
            except OSError:  # nobody waits for it any more
                future.cancel()
                return
        if self.server.ending:  # what it says now is that its worker was ended
            return
        answer, size = future.result(), len(batch.candidates)
        failure = f"{label} failed on {size} reports: {answer.reason}" if answer.scores is None else ""
        self.server.count(size, failure)
        self.wfile.write(pack({"scores": answer.scores, "reason": answer.reason}))

    def _answer(self, status: int, message: Mapping[str, Any]) -> None:
        self._begin(status)
        self.wfile.write(pack(message))

    def _begin(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()


def _texts(message: Mapping[str, Any], name: str) -> list[str]:
    values = message.get(name)
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise Refusal(400, f"{name}: expected a list of texts")
    return values


def _columns(message: Mapping[str, Any]) -> dict[str, list[Any]]:
    columns = message.get("columns")
    if not isinstance(columns, dict) or not all(isinstance(values, list) for values in columns.values()):
        raise Refusal(400, "columns: expected an object of lists")
    return columns


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    """Which keys differ between server and trainer, in words."""

    def shown(side: Mapping[str, Any], key: str) -> str:
        return canonical(side[key]) if key in side else "not given"

    keys = [key for key in {**here, **there} if shown(here, key) != shown(there, key)]
    return ", ".join(f"{key} is {shown(here, key)} here, {shown(there, key)} there" for key in keys)
