"""Ranks that die, stall or are stopped, under torchrun, with weights on every rank and with weights in shards."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import digests, environment, job, prepare, wait_for
from unirg import run as run_folder

pytestmark = pytest.mark.faults
STEPS = 20
OPTIONS = (
    "policy.lora=null",
    "stages.sft.start=policy",
    f"stages.sft.steps={STEPS}",
    "stages.sft.keep=last",
    "stages.sft.evaluate_every=null",
    "stages.sft.checkpoint_every=2",
    "stages.sft.studies_per_forward=1",
    "distributed.timeout=20",  # the loading, too, is watched: on busy cores it took more than six seconds
)


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def strategy(request: pytest.FixtureRequest) -> str:
    return f"distributed.strategy={request.param}"


@pytest.fixture(scope="module")
def alone(strategy: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on two ranks that nothing happened to."""
    run = prepare(tmp_path_factory.mktemp("alone"), "run", *OPTIONS, strategy)
    with job(run) as undisturbed:
        assert undisturbed.process.wait(300) == 0, undisturbed.said
    return run


def test_a_rank_is_killed_and_another_stalls(alone: Path, strategy: str, tmp_path: Path) -> None:
    """torchrun starts all ranks again, twice, and they go on by themselves. The one that stalls is named by the one
    that waits for it."""
    run = prepare(tmp_path, "run", *OPTIONS, strategy)
    with job(run, "--max-restarts", "2") as disturbed:
        wait_for(lambda: disturbed.steps() >= 3)
        os.kill(disturbed.rank(1), signal.SIGKILL)
        wait_for(lambda: "goes on from step" in disturbed.said)
        before = disturbed.steps()
        wait_for(lambda: disturbed.steps() > before + 5)
        stalled = disturbed.rank(1)
        os.kill(stalled, signal.SIGSTOP)
        assert disturbed.process.wait(300) == 0, disturbed.said
        assert f"process {stalled}) has" in disturbed.said
        said = next(line for line in disturbed.said.splitlines() if f"process {stalled}) has" in line)
        assert "rank 1 (host" in said and "of stage sft for" in said and "rank 0 waits at" in said, said
        assert disturbed.said.count("goes on from step") == 2
    assert disturbed.steps() == STEPS
    assert digests(run) == digests(alone) and digests(run)


def test_a_signal_to_torchrun(alone: Path, strategy: str, tmp_path: Path) -> None:
    """The ranks stop together, with a checkpoint that they, or another number of ranks, can go on from."""
    number = signal.SIGUSR1 if "ddp" in strategy else signal.SIGTERM
    run = prepare(tmp_path, "run", *OPTIONS, strategy, "stages.sft.checkpoint_every=1000")
    with job(run) as stopped:
        wait_for(lambda: stopped.steps() >= 3)
        stopped.process.send_signal(number)
        assert stopped.process.wait(120) != 0
    name = signal.Signals(number).name
    assert stopped.said.count(f"sft: stopped by {name}: the same command goes on from step") == 2
    step = int((stopped.folder / "latest").read_text().strip().rpartition("-")[2])
    assert step in (stopped.steps(), stopped.steps() + 1)
    if number == signal.SIGUSR1:
        with job(run) as resumed:
            assert resumed.process.wait(300) == 0, resumed.said
        assert digests(run) == digests(alone)
    else:
        command = [sys.executable, "-m", "unirg.stages", str(run), "sft"]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0 and f"goes on from step {step}" in done.stdout, done.stderr
        ours, theirs = (run_folder.read_metrics(r / "stages" / "sft") for r in (run, alone))
        # Float32 sums in another order, which AdamW amplifies.
        for record, expected in zip(ours, theirs, strict=True):
            assert record["loss"] == pytest.approx(expected["loss"], rel=2e-3)


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_is_closed(nohup: bool, tmp_path: Path) -> None:
    """The script stops its ranks with a checkpoint; under nohup neither it, nor torchrun, nor they take notice."""
    run = prepare(tmp_path, "run", *OPTIONS, "stages.sft.checkpoint_every=1000", "evaluation.stages=[]")
    script = Path(__file__).parents[2] / "recipes" / "launch" / "torchrun.sh"
    command = [*["nohup"][: int(nohup)], str(script), str(run / "recipe.yaml")]
    variables = {"GPUS": "2", "PYTHON": sys.executable}
    # These tests may be under nohup themselves.
    default = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    settings: dict[str, Any] = {"cwd": tmp_path, "env": environment() | variables, "preexec_fn": default}
    with (tmp_path / "said").open("w") as said:
        started = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True, **settings)
    stage = run / "stages" / "sft"
    wait_for(lambda: len(run_folder.read_metrics(stage)) >= 3)
    os.killpg(started.pid, signal.SIGHUP)
    assert started.wait(120) == (0 if nohup else 128 + signal.SIGHUP), (tmp_path / "said").read_text()
    assert run_folder.final_folder(run, "grpo").exists() == nohup
    assert (stage / "latest").exists() != nohup  # of a stage that has ended its policy alone is left
