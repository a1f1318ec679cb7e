"""A judge's answers and what they cost, in one SQLite file that several processes may share.

Answers are stored as counts under a hash, so that the file holds no text of any report. SQLite's rollback journal is
used, which survives a kill at any moment and needs no shared memory, as a write-ahead log does.
"""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unirg.scoring.contract import RewardError

BUSY_S = 60.0  # how long a process waits for another's write

_TABLES = (
    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, counts TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS spent (run TEXT PRIMARY KEY, requests INTEGER NOT NULL, tokens INTEGER NOT NULL)",
)


def answer_key(*parts: str) -> str:
    """One key for these texts, in this order; unlike texts never share one."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class JudgeCache:
    """Answers by key, and requests and tokens by run. Every method may be called from any thread.

    Raises RewardError naming the file where it cannot be opened, is no SQLite file, or cannot be written.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()
        self._lock = threading.Lock()
        with self._named():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch(mode=0o600)
            # autocommit: each statement below is a transaction of its own
            self._database = sqlite3.connect(self.path, BUSY_S, isolation_level=None, check_same_thread=False)
            for statement in _TABLES:
                self._database.execute(statement)

    def answer(self, key: str) -> list[int] | None:
        """The counts stored under `key`, or None."""
        with self._named():
            row = self._database.execute("SELECT counts FROM answers WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def store(self, key: str, counts: list[int]) -> None:
        """Keep `counts` under `key`; the first of two answers stays, so that a pair's score never changes."""
        with self._named():
            self._database.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, json.dumps(counts)))

    def reserve(self, run: str, max_requests: int | None, max_tokens: int | None) -> bool:
        """Count one more request of `run`, or return False where a limit is reached. Atomic between processes."""
        within = "(?2 IS NULL OR requests < ?2) AND (?3 IS NULL OR tokens < ?3)"
        with self._named():
            self._database.execute("INSERT OR IGNORE INTO spent VALUES (?, 0, 0)", (run,))
            update = f"UPDATE spent SET requests = requests + 1 WHERE run = ?1 AND {within}"
            return self._database.execute(update, (run, max_requests, max_tokens)).rowcount == 1

    def add_tokens(self, run: str, tokens: int) -> None:
        """Count what an answered request of `run` used."""
        with self._named():
            self._database.execute("UPDATE spent SET tokens = tokens + ? WHERE run = ?", (tokens, run))

    def spent(self, run: str) -> tuple[int, int]:
        """(requests, tokens) of `run` so far, by all processes that share the file."""
        with self._named():
            row = self._database.execute("SELECT requests, tokens FROM spent WHERE run = ?", (run,)).fetchone()
        return row or (0, 0)

    @contextmanager
    def _named(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except (sqlite3.Error, OSError) as error:
                raise RewardError(
                    f"the judge's cache {self.path} cannot be used: {error}; give another path as `cache`"
                ) from error
