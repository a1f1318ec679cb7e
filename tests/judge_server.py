"""An OpenAI-compatible chat endpoint on loopback that does what a script says, well or badly."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from unirg.scoring.registry import Reward, load_reward
from unirg_rewards.judge_errors import GRADES, TYPES

TOKENS = 100  # what every answer says it used
REFERENCE = "Small left pleural effusion. No pneumothorax."
CANDIDATE = "Large right pleural effusion."


@dataclass
class JudgeServer:
    """`script(body, number)` says what the request numbered from 0 gets: a text to answer with, a status, "hang",
    "drop" (the connection closes unanswered), "cut" (it closes inside the answer), or bytes to send as the body."""

    script: Callable[[dict[str, Any], int], str | int | bytes]
    headers: dict[str, str] = field(default_factory=dict)
    """Sent with every answer that is an error."""
    usage: bool = True
    base_url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


def answer(**errors: int) -> str:
    """A well-formed answer of `judge_errors`' judge. `answer(location=2, insignificant_severity=1)`."""
    counts = {grade: dict.fromkeys(TYPES, 0) for grade in GRADES}
    for name, count in errors.items():
        grade = "insignificant" if name.startswith("insignificant_") else "significant"
        counts[grade][name.removeprefix("insignificant_")] = count
    return json.dumps(counts)


def judge_reward(folder: Path, server: JudgeServer, **options: Any) -> Reward:
    """`judge_errors` with that server as judge and its cache in `folder`."""
    settings = {"base_url": server.base_url, "model": "j", "cache": str(folder / "c.sqlite")}
    return load_reward("judge_errors", settings | options)


def scores_of(reward: Reward, count: int = 1) -> list[float | None]:
    """The scores of `count` unlike candidates."""
    return reward.score([f"{CANDIDATE} {i}" for i in range(count)], [REFERENCE] * count)


@contextmanager
def serve(
    script: Callable[[dict[str, Any], int], str | int | bytes] | str | int, **settings: Any
) -> Iterator[JudgeServer]:
    """A server that runs the script, or gives every request the same, until the block ends."""
    judge = JudgeServer(script if callable(script) else lambda body, number: script, **settings)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with judge.lock:
                number = len(judge.bodies)
                judge.bodies.append(body | {"path": self.path})
                judge.keys.append(self.headers["Authorization"])
                judge.at_once += 1
                judge.most_at_once = max(judge.most_at_once, judge.at_once)
            try:
                self._do(judge.script(body, number))
            finally:
                with judge.lock:
                    judge.at_once -= 1

        def _do(self, action: str | int | bytes) -> None:
            if action == "hang":
                judge.over.wait(30)
            elif action == "cut":
                self._send(200, b'{"choices": [', length=500)
            elif isinstance(action, int):
                self._send(action, b'{"error": {"message": "scripted"}}', **judge.headers)
            elif isinstance(action, bytes):
                self._send(200, action)
            elif action != "drop":
                completion: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": action}}]}
                completion |= {"usage": {"total_tokens": TOKENS}} if judge.usage else {}
                self._send(200, json.dumps(completion).encode())

        def _send(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(length or len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    judge.base_url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        judge.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
