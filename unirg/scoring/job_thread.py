"""A thread that does jobs in order, for callers that need not wait."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class JobThread:
    """A daemon, where the executors of concurrent.futures are waited for at exit: a program may end in mid-job."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def later(self, action: Callable[[], Any]) -> "Future[Any]":
        """What `action` returns or raises, once its turn has come. Cancelled before that, it is left out."""
        future: Future[Any] = Future()
        self._jobs.put((future, action))
        return future

    def end(self) -> None:
        """Waits for what was given so far; takes no more."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, action = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(action())
            except BaseException as error:
                future.set_exception(error)
