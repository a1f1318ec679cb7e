"""Signals that ask a run to stop: a checkpoint of the last whole step, a line, a status; the rest as if nothing was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.runs import STAGES, Start, assert_same, environment, prepare, wait_for
from unirg import run as run_folder
from unirg import signals

NUMBERS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
def test_a_signal_in_this_process(number: int) -> None:
    before = signal.getsignal(number)
    with signals.handled():
        with pytest.raises(signals.Stopped) as stopped:
            os.kill(os.getpid(), number)
            time.sleep(1)
        assert stopped.value.status == 128 + number
        assert signals.asked() == number
    assert not signals.asked()
    assert signal.getsignal(number) is before


def test_a_signal_waits_for_what_must_not_be_cut() -> None:
    done = []
    with signals.handled():
        signals.at_once(False)
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):  # said more than once: still one stop
            os.kill(os.getpid(), number)
        done.append("whole")
        with pytest.raises(signals.Stopped) as stopped:
            signals.at_once(True)
        assert stopped.value.number == signal.SIGTERM
    assert done == ["whole"]


def test_a_second_interrupt_ends_at_once() -> None:
    with signals.handled():
        signals.at_once(False)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_an_ignored_signal_stays_ignored() -> None:
    """As in the background of a script, where Ctrl-C is not meant."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.handled():
            os.kill(os.getpid(), signal.SIGINT)
            assert not signals.asked()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.faults
@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
def test_a_run_that_is_asked_to_stop(start: Start, undisturbed: Path, tmp_path: Path, number: int) -> None:
    """No checkpoint is due in this run: only what the stop itself writes lets it go on."""
    run = prepare(tmp_path, "run", *(f"stages.{stage}.checkpoint_every=100" for stage in STAGES))
    for stage, after in (("sft", 3), ("grpo", 3)):
        trainer = start(run)
        wait_for(lambda stage=stage, after=after: len(run_folder.read_metrics(run / "stages" / stage)) >= after)
        trainer.signal(number)
        assert trainer.wait() == 128 + number
        step = f"the same command goes on from step {(run / 'stages' / stage / 'latest').read_text().strip()[-1]}"
        assert f"stopped by {signal.Signals(number).name}: {step} of stage {stage}" in trainer.said
    trainer = start(run)
    assert trainer.wait() == 0
    assert "goes on from step" in trainer.said
    assert_same(run, undisturbed)


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_stages_side_by_side(tmp_path: Path, number: int) -> None:
    """What starts them passes the signal on and waits for them; where it is killed, the kernel tells them to stop."""
    names, run = ("a", "b"), tmp_path / "two"
    prepare(tmp_path, "run")
    stages = ", ".join(
        f"{{name: {name}, kind: sft, start: policy, steps: 400, studies_per_step: 4, checkpoint_every: 1000, "
        "optimiser: {learning_rate: 1.0e-3}}"
        for name in names
    )
    changes = [f"stages=[{stages}]", "jobs=2", "evaluation.headline=positive_f1"]
    command = [sys.executable, "-m", "unirg", "train", str(tmp_path / "run.yaml"), *changes, "--output", str(run)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=log, stderr=log)
        wait_for(lambda: all(run_folder.read_metrics(run / "stages" / name) for name in names))
        process.send_signal(number)
        status = process.wait(timeout=60)
    said = (tmp_path / "log").read_text()
    wait_for(lambda: all((run / "stages" / name / "latest").exists() for name in names), 30)
    if number == signal.SIGTERM:
        assert status == 128 + number, said
        assert said.rstrip().endswith("stopped by SIGTERM: the same command goes on from the last checkpoint")
    for name in names:
        assert f"{name}: stopped by SIGTERM: the same command goes on from step" in (tmp_path / "log").read_text()
