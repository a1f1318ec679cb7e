"""A run that is stopped goes on as if it had never stopped, whatever step it is stopped at."""

import signal
from pathlib import Path

import pytest

from tests.faults.runs import Start, assert_same, prepare


@pytest.mark.faults
def test_stopped_after_every_step(start: Start, undisturbed: Path, tmp_path: Path) -> None:
    """Every start makes one step, which a signal follows before its evaluation and its line in the log; the two steps
    that share a batch of samples are made together. Adapters with dropout, dev evaluations, the best of them kept,
    resampled groups: each would show a random number or a count that a stop loses."""
    run = prepare(tmp_path, "run")
    starts = 0
    while (status := (trainer := start(run, signal=signal.SIGTERM, after=1)).wait()) != 0:
        starts += 1
        assert status == 128 + signal.SIGTERM, trainer.said
        assert "stopped by SIGTERM: the same command goes on from step" in trainer.said
        assert starts < 20
    assert starts == 3 + 6 + 3
    assert_same(run, undisturbed)
