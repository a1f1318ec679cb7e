"""Who waits for whom: every rank says where it is, and reads where the others are when nothing has moved for too long.

The board is the key-value store of the process group, over a connection of its own; a thread writes to it, so a rank
whose training hangs still says where. One that is stopped or gone says nothing, and that is seen too. Without this,
ranks that wait in a collective are silent until the engine's own timeout, whose message names no one.
"""

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
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


@dataclass
class _Watch:
    """What the two threads of a watched rank share."""

    timeout: float
    ended: threading.Event = field(default_factory=threading.Event)
    looked: float = 0.0
    """When the others' places were last read (a monotonic clock),"""
    verdict: str | None = None
    """and what was to be said of them; None where those behind move."""

    @property
    def pulse(self) -> float:
        """Seconds between two reports of a rank that does not move."""
        return min(10.0, self.timeout / 10)


def comes_to(phase: str, *, waits: bool = False, step: str | None = None) -> None:
    """Notes that this rank is in `phase` now, or `waits` for the others before it; `step` in words, where it is new."""
    _place.update(
        count=_place.get("count", 0) + 1,
        phase=phase,
        waits=waits,
        step=step or _place.get("step", "its start"),
        since=time.monotonic(),
    )


def goes_on() -> None:
    """Notes that this rank moves within a long phase: its time there is counted anew."""
    _place["since"] = time.monotonic()


@contextmanager
def watching(timeout: float) -> Iterator[None]:
    """While it lasts, a rank that has been at one place for `timeout` seconds, as have those behind it, ends its
    process with status 124, after a line that names the ranks that are behind and those that wait for them. One rank
    alone is not watched."""
    if ranks.world() == 1:
        yield
        return
    _place.clear()
    comes_to("start")
    watch = _Watch(timeout)
    # Two, since a store whose host is stopped may keep the one that asks it for ever.
    jobs = [threading.Thread(target=job, args=[watch], name="watchdog", daemon=True) for job in (_post, _judge)]
    for job in jobs:
        job.start()
    try:
        yield
    finally:
        watch.ended.set()
        for job in jobs:
            job.join(2)  # in the store's C++ code when the interpreter ends, it would abort the process


def _judge(watch: _Watch) -> None:
    """Ends the process where this rank has waited too long for others that do not move."""
    while not watch.ended.wait(min(1.0, watch.pulse)):
        late = _place["since"] + watch.timeout
        if time.monotonic() < late:
            continue
        verdict = watch.verdict
        if watch.looked < late:
            verdict = None
        if verdict is None and time.monotonic() > max(late, watch.looked) + watch.pulse + ANSWER_SECONDS:
            shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            holder = "torchrun on the first host" if shared else "rank 0"
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            where = _where(_report(), 0.0)
            verdict = f"{where}; {holder}, which holds the ranks' store ({address}), does not answer"
        if verdict is not None and not watch.ended.is_set():
            end = "The run ends here; started again, it goes on from its last checkpoint"
            print(f"{verdict}. {end}", file=sys.stderr, flush=True)
            os._exit(STATUS)  # the main thread waits in a collective that nothing else ends


def _post(watch: _Watch) -> None:
    """Writes where this rank is, again and again; one that stays at its place reads where the others are."""
    board, said, due = None, -1, 0.0
    heard: dict[int, tuple[dict[str, Any], float]] = {}
    while not watch.ended.wait(PACE):
        now, here = time.monotonic(), _place["count"]
        if here == said and now < due:
            continue
        try:
            board = board or _board()
            board.set(f"rank/{ranks.rank()}", json.dumps(_report()))
            if here == said:
                _listen(board, heard)
                verdict = _verdict(heard, watch.timeout)
                watch.verdict, watch.looked = verdict, time.monotonic()
            said, due = here, now + watch.pulse
        except dist.DistError:  # the store's host is slow, stopped or gone
            board = None


def _board() -> dist.Store:
    """The store that the ranks met at, reached anew: the process group's own connection may be busy with waiting."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=ANSWER_SECONDS / 2))
    return dist.PrefixStore(f"unirg/watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _report() -> dict[str, Any]:
    place = dict(_place)
    now = time.monotonic()
    place["for"] = now - place.pop("since")
    return place | {"rank": ranks.rank(), "host": platform.node(), "pid": os.getpid(), "beat": now}


def _listen(board: dist.Store, heard: dict[int, tuple[dict[str, Any], float]]) -> None:
    """Takes over what each rank last said, and when that was new here: hosts' clocks need not agree. A rank that never
    said anything is left out."""
    there = [rank for rank in range(ranks.world()) if rank in heard or board.check([f"rank/{rank}"])]
    now = time.monotonic()
    for rank, said in zip(there, board.multi_get([f"rank/{rank}" for rank in there]), strict=True):
        report = json.loads(said)
        if rank not in heard or heard[rank][0]["beat"] != report["beat"]:
            heard[rank] = (report, now)


def _verdict(heard: dict[int, tuple[dict[str, Any], float]], timeout: float) -> str | None:
    """In words: who is behind, since when, last heard of when; and who waits for them. None where one of those behind
    came to its place less than `timeout` seconds ago."""
    now = time.monotonic()
    silent = [rank for rank in range(ranks.world()) if rank not in heard]
    behind = min(report["count"] for report, _ in heard.values())
    late = [rank for rank, (report, _) in sorted(heard.items()) if report["count"] == behind]
    if any(heard[rank][0]["for"] + now - heard[rank][1] < timeout for rank in late):
        return None
    parts = [_where(heard[rank][0], now - heard[rank][1]) for rank in late]
    if silent:
        parts.append(f"{ranks.numbers(silent)} never said anything")
    if waiting := sorted(set(heard) - set(late)):
        wait = heard[waiting[0]][0]
        parts.append(f"{ranks.numbers(waiting)} wait{'s' * (len(waiting) == 1)} at '{wait['phase']}'")
    return "; ".join(parts)


def _where(report: dict[str, Any], heard: float) -> str:
    what = f"has waited before '{report['phase']}'" if report["waits"] else f"has been in '{report['phase']}'"
    return (
        f"rank {report['rank']} (host {report['host']}, process {report['pid']}) {what} of {report['step']} for "
        f"{report['for'] + heard:.0f} s" + (f" (last heard of {heard:.0f} s ago)" if heard >= 2 else "")
    )
