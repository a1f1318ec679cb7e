"""A scoring server in a process of its own, as `unirg rewards serve` starts it, for tests."""

import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Served:
    """A running server: `url`, `process`, and what it printed so far. A context manager; its end is killed."""

    def __init__(self, *arguments: str, port: int = 0, cwd: Path, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "unirg", "rewards", "serve", *arguments, "--port", str(port)]
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if "ready at" in line:
                self.url = line.split("ready at ")[1].split(": ")[0]
                break
        else:
            raise AssertionError(f"the server did not start: {''.join(self.lines)}")
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout or ()), daemon=True)
        self._reader.start()

    def said(self) -> str:
        """All that it printed; for a server that has ended."""
        self._reader.join(timeout=20)
        return "".join(self.lines)

    def health(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/health", timeout=20) as response:
            return json.load(response)

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(timeout=20)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def serve(rewards: Sequence[str], cwd: Path, port: int = 0, **environment: str) -> Served:
    """A server of rewards by name."""
    return Served("--rewards", ",".join(rewards), port=port, cwd=cwd, environment=environment)
