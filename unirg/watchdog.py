"""Who waits for whom: every rank says where it is, and reads where the others are when nothing has moved for too long.

The board is the key-value store of the process group, over a connection of its own; a thread writes to it, so a rank
whose training hangs still says where. One that is stopped or gone says nothing, and that is seen too. Without this,
ranks that wait in a collective are silent until the engine's own timeout, whose message names no one.
"""

import json
import os
import platform
import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from unirg import ranks

STATUS = 124
"""The exit status of a rank that has waited too long, as of `timeout`."""
PACE = 0.2
"""Seconds after which a rank that has moved says so; one that has not says again that it is there, every tenth of the
timeout."""
ANSWER_SECONDS = 20
"""How long the store may take to say where the others are."""

_place: dict[str, Any] = {}
"""Where this rank is: `count` of the places it has come to (equal on all ranks at one place), `phase`, `waits` for the
others there, `step`, `since` when (a monotonic clock)."""


def comes_to(phase: str, *, waits: bool = False, step: str | None = None) -> None:
    """Notes that this rank is in `phase` now, or `waits` for the others before it; `step` in words, where it is new."""
    _place.update(
        count=_place.get("count", 0) + 1,
        phase=phase,
        waits=waits,
        step=step or _place.get("step", "its start"),
        since=time.monotonic(),
    )


@contextmanager
def watching(timeout: float) -> Iterator[None]:
    """While it lasts, a rank that has been at one place for `timeout` seconds ends its process with status 124, after a
    line that names the ranks that are behind and those that wait for them. One rank alone is not watched."""
    if ranks.world() == 1:
        yield
        return
    _place.clear()
    comes_to("start")
    ended, late = threading.Event(), threading.Event()
    verdicts: queue.SimpleQueue[str] = queue.SimpleQueue()
    # Two, since a store whose host is stopped may keep the one that asks it for ever.
    for job in (partial(_post, timeout, ended, late, verdicts), partial(_watch, timeout, ended, late, verdicts)):
        threading.Thread(target=job, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _watch(timeout: float, ended: threading.Event, late: threading.Event, verdicts: "queue.SimpleQueue[str]") -> None:
    while not ended.wait(min(10.0, timeout / 10)):
        if time.monotonic() - _place["since"] < timeout:
            continue
        late.set()
        try:
            verdict = verdicts.get(timeout=ANSWER_SECONDS)
        except queue.Empty:
            shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            holder = "torchrun on the first host" if shared else "rank 0"
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            verdict = f"{_where(_report())}; {holder}, which holds the ranks' store ({address}), does not answer"
        if not ended.is_set():
            end = "The run ends here; started again, it goes on from its last checkpoint"
            print(f"{verdict}. {end}", file=sys.stderr, flush=True)
            os._exit(STATUS)  # the main thread waits in a collective that nothing else ends


def _post(timeout: float, ended: threading.Event, late: threading.Event, verdicts: "queue.SimpleQueue[str]") -> None:
    """Writes where this rank is, again and again, and reads the others where it is late."""
    board, said, due = None, -1, 0.0
    while not ended.is_set():
        try:
            board = board or _board()
            if _place["count"] != said or time.monotonic() >= due or late.is_set():
                report = _report()
                board.set(f"rank/{ranks.rank()}", json.dumps(report))
                said, due = report["count"], time.monotonic() + min(10.0, timeout / 10)
            if late.is_set():
                verdicts.put(_verdict(_reports(board)))
                return
        except dist.DistError:  # the store's host is slow, stopped or gone
            board = None
        late.wait(PACE)


def _board() -> dist.Store:
    """The store that the ranks met at, reached anew: the process group's own connection may be busy with waiting."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=ANSWER_SECONDS / 2))
    return dist.PrefixStore(f"unirg/watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _report() -> dict[str, Any]:
    place = dict(_place)
    place["for"] = time.monotonic() - place.pop("since")
    return place | {"rank": ranks.rank(), "host": platform.node(), "pid": os.getpid(), "time": time.time()}


def _reports(board: dist.Store) -> dict[int, dict[str, Any]]:
    """What each rank last said; one that never said anything is left out."""
    return {
        rank: json.loads(board.get(f"rank/{rank}")) for rank in range(ranks.world()) if board.check([f"rank/{rank}"])
    }


def _verdict(reports: dict[int, dict[str, Any]]) -> str:
    """In words: who is behind, since when, last heard of when; and who waits for them."""
    silent = [rank for rank in range(ranks.world()) if rank not in reports]
    behind = min(report["count"] for report in reports.values())
    late = [report for report in reports.values() if report["count"] == behind]
    parts = [_where(report) for report in sorted(late, key=lambda report: report["rank"])]
    if silent:
        parts.append(f"{ranks.numbers(silent)} never said anything")
    if waiting := sorted(set(reports) - {report["rank"] for report in late}):
        wait = reports[waiting[0]]
        parts.append(f"{ranks.numbers(waiting)} wait{'s' * (len(waiting) == 1)} at '{wait['phase']}'")
    return "; ".join(parts)


def _where(report: dict[str, Any]) -> str:
    heard = time.time() - report["time"]
    what = f"has waited before '{report['phase']}'" if report["waits"] else f"has been in '{report['phase']}'"
    return (
        f"rank {report['rank']} (host {report['host']}, process {report['pid']}) {what} of {report['step']} for "
        f"{report['for'] + heard:.0f} s" + (f" (last heard of {heard:.0f} s ago)" if heard >= 2 else "")
    )
