"""Pairs of ranks that meet and end, again and again, each rank a fork of this process: what the imports cost is paid
once. `python ends.py PAIRS CASE` prints how the ranks ended, as JSON: a list of two exit statuses for each pair."""

import json
import os
import signal
import socket
import sys
import time

from unirg import ranks, signals, watchdog
from unirg.errors import UserError
from unirg.process import end, joined
from unirg.training import meet, together

TIMEOUT = 5.0


def work(case: str) -> None:
    rank = ranks.rank()
    for step in range(5):
        ranks.everyones(step)
    if case == "failing" and rank == 1:
        raise UserError("one rank alone")
    if case == "failing together":
        with together("a part", "all"):
            if rank == 1:
                raise UserError("one rank, and so all")
    if case == "stopped":
        os.kill(os.getpid(), signal.SIGTERM)
        meet("a place")
    if case == "killed":
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        meet("a place")
    if case == "stopped while the other waits" and rank == 0:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    if case == "stopped while the other waits":
        meet("a place")
    if case in ("long", "stalling") and rank == 0:
        watchdog.comes_to("work")
        until = time.monotonic() + 2.5 * TIMEOUT
        while time.monotonic() < until:
            time.sleep(0.05)
            if case == "long":
                watchdog.goes_on()


def rank_of_pair(case: str) -> int:
    try:
        with signals.handled():
            signals.at_once("while" in case)
            with joined(TIMEOUT):
                work(case)
    except signals.Stopped as stopped:
        return stopped.status
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def pair(case: str) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(2):
        if (pid := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
            end(rank_of_pair(case))
        pids.append(pid)
    if case == "stopped while the other waits":
        ended = os.waitpid(pids[0], 0)[1]
        os.kill(pids[1], signal.SIGTERM)  # as torchrun does
        return [os.waitstatus_to_exitcode(ended), os.waitstatus_to_exitcode(os.waitpid(pids[1], 0)[1])]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


if __name__ == "__main__":
    watchdog.PACE = 0.001  # its thread is nearly always at the store, also when the process ends
    print(json.dumps([pair(sys.argv[2]) for _ in range(int(sys.argv[1]))]))
