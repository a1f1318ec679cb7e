"""kill -9 at random moments of a run: what it ends with is what it would have ended with."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.runs import STAGES, Start, assert_same, prepare
from unirg import run as run_folder

KILLS = 20
SEED = 5


@pytest.mark.faults
def test_killed_twenty_times(start: Start, tmp_path: Path) -> None:
    """In half of the starts at any moment of the first second or two, while policy, data and workers are loaded or a
    first step is made; in the others up to 300 ms after a step, within the next, an evaluation or a checkpoint."""
    longer = ("stages.sft.steps=36", "stages.grpo.steps=36")
    undisturbed, run = (prepare(tmp_path, name, *longer) for name in ("undisturbed", "run"))
    assert start(undisturbed).wait() == 0
    moments = random.Random(SEED)

    def steps() -> int:
        return sum(len(run_folder.read_metrics(run / "stages" / stage)) for stage in STAGES)

    kills = 0
    while kills < KILLS:
        before, begun = steps(), time.monotonic()
        trainer = start(run)
        loading = moments.random() < 0.5
        until = begun + (moments.uniform(0, 2) if loading else 30)
        while steps() < before + (2 if loading else 1) and time.monotonic() < until and not finished(run):
            time.sleep(0.01)
        time.sleep(0 if loading else moments.uniform(0, 0.3))
        if finished(run):
            trainer.wait()
            break
        trainer.signal(signal.SIGKILL)
        assert trainer.wait() == 128 + signal.SIGKILL
        kills += 1
    assert kills == KILLS, f"finished after {kills} kills"
    trainer = start(run)
    assert trainer.wait() == 0, trainer.said
    assert_same(run, undisturbed)


def finished(run: Path) -> bool:
    return run_folder.final_folder(run, STAGES[-1]).exists()
