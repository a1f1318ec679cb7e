"""How ranks end: together, or one before the others, with their own exit status; and how long one may be waited for."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.runs import environment

pytestmark = pytest.mark.faults


def ends(pairs: int, case: str) -> tuple[list[list[int]], str]:
    command = [sys.executable, str(Path(__file__).with_name("ends.py")), str(pairs), case]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_ranks_that_are_done_end_well() -> None:
    """Each time a thread of theirs talks to the ranks' store when the interpreter would end: of 24 such processes two
    aborted."""
    assert ends(30, "whole")[0] == [[0, 0]] * 30


@pytest.mark.parametrize(
    ("case", "statuses"),
    [("failing together", [2, 2]), ("stopped", [143, 143]), ("stopped while the other waits", [143, 143])],
)
def test_ranks_that_end_before_their_time_keep_their_status(case: str, statuses: list[int]) -> None:
    found, said = ends(3, case)
    assert found == [statuses] * 3
    assert "Traceback" not in said
    assert said.count("one rank, and so all") == said.count("stopped with rank 0") == 3 * (case == "failing together")


def test_a_rank_that_fails_alone_keeps_its_status() -> None:
    assert [second for _, second in ends(3, "failing")[0]] == [2, 2, 2]


def test_a_rank_whose_other_is_killed_says_so() -> None:
    found, said = ends(3, "killed")
    assert found == [[-9, 2]] * 3
    assert said.count("rank 1 (host ") == said.count("another rank has gone (Connection ") == 3


def test_a_long_part_is_waited_for_as_long_as_it_moves() -> None:
    """Two and a half times the timeout: with signs of life both ranks end well; without, the one that has stopped is
    named."""
    assert ends(1, "long")[0] == [[0, 0]]
    found, said = ends(1, "stalling")
    # Each ends by its own watch. Where the one that stalls is first, the other may see only that it has gone.
    assert found in ([[124, 124]], [[124, 2]])
    assert "Traceback" not in said and said.count("another rank has gone") == found[0].count(2)
    assert re.search(r"rank 0 \(host .*\) has been in 'work' of its start for \d+ s; rank 1 \(host", said), said
