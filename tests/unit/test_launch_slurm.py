"""The batch script: what becomes of a job whose training stops, fails or ends, and of its servers.

SLURM's commands are played by scripts, and training and servers by short ones; `tests/multinode` has the real ones.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm import write_commands

SCRIPT = Path(__file__).parents[2] / "recipes" / "launch" / "slurm.sbatch"
TRAINS_UNTIL_STOPPED = "trap 'exit 138' USR1; trap 'exit 143' TERM; echo up >>log; while :; do sleep 0.05; done"


class Job:
    """A job's folder. `train` is what stands in for torchrun.sh, `serve` for python."""

    def __init__(self, folder: Path, train: str, serve: str = "") -> None:
        self.folder = folder
        self.launch = folder / "my launch"
        self.launch.mkdir()
        self.write("my launch/torchrun.sh", train)
        self.write("python", f'[ "$1" != -c ] || {{ echo 0123456789abcdef; exit; }}\n{serve}')
        write_commands(folder)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
        (self.folder / name).chmod(0o755)

    def start(self, *arguments: str, nodes: str = "n1", **variables: str) -> "subprocess.Popen[str]":
        job = {"SLURM_JOB_ID": "31007", "SLURM_JOB_NODELIST": nodes, "LAUNCH": str(self.launch)}
        path = {"PATH": f"{self.folder}:{os.environ['PATH']}"}
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            cwd=self.folder,
            env=os.environ | job | path | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def wait_for(self, line: str) -> None:
        deadline = time.monotonic() + 60
        while line not in self.lines("log"):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_job_whose_time_is_up_goes_back_into_the_queue(tmp_path: Path) -> None:
    job = Job(tmp_path, TRAINS_UNTIL_STOPPED)
    running = job.start("x.yaml")
    job.wait_for("up")
    running.send_signal(signal.SIGUSR1)
    assert running.wait(60) == 0
    assert job.lines("requeued") == ["31007"]


def test_a_job_whose_time_ends_before_it_has_stopped_goes_back_as_well(tmp_path: Path) -> None:
    job = Job(tmp_path, TRAINS_UNTIL_STOPPED.replace("exit 138", "echo slow >>log"))
    running = job.start("x.yaml")
    job.wait_for("up")
    running.send_signal(signal.SIGUSR1)
    job.wait_for("slow")
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 0
    assert job.lines("requeued") == ["31007"]


@pytest.mark.parametrize(
    ("number", "train", "status"),
    [
        (signal.SIGTERM, TRAINS_UNTIL_STOPPED, 143),
        (signal.SIGUSR1, TRAINS_UNTIL_STOPPED.replace("exit 138", "exit 0"), 0),
    ],
    ids=["told to end", "the run ends as its time is up"],
)
def test_a_job_that_is_not_queued_again(number: int, train: str, status: int, tmp_path: Path) -> None:
    job = Job(tmp_path, train)
    running = job.start("x.yaml")
    job.wait_for("up")
    running.send_signal(number)
    assert running.wait(60) == status
    assert job.lines("requeued") == []


def test_a_job_that_slurm_does_not_take_back_has_failed(tmp_path: Path) -> None:
    job = Job(tmp_path, TRAINS_UNTIL_STOPPED)
    job.write("scontrol", '[ "$1" != requeue ] || exit 1; echo n1')
    running = job.start("x.yaml")
    job.wait_for("up")
    running.send_signal(signal.SIGUSR1)
    said = running.communicate(timeout=60)[0]
    assert running.returncode == 138
    assert "not in the queue again; submit the same one" in said


def test_training_that_fails_is_started_as_often_as_said(tmp_path: Path) -> None:
    job = Job(tmp_path, 'echo "${RESTARTS-} ${NODE-}" >>log; exit 7')
    running = job.start("x.yaml", RESTARTS="1", NODE="of the user's own")
    said = running.communicate(timeout=60)[0]
    assert running.returncode == 7
    assert job.lines("log") == [" ", " "]  # neither is torchrun.sh's
    assert "status 7, 1 restarts are left" in said


def test_nodes_train_sample_and_score(tmp_path: Path) -> None:
    """Each part gets its nodes; arguments with spaces, and variables, reach all of them."""
    train = """printf '%s\\n' "$SLURMD_NODENAME of $NODES, head $HEAD, $GPUS ranks" "$@" >>"log$SLURM_PROCID"
while [ ! -e sampler ] || [ ! -e scorer ]; do sleep 0.05; done"""
    serve = """case $3 in rollout-server) name=sampler ;; *) name=scorer ;; esac
printf '%s\\n' "$SLURMD_NODENAME" "$@" "$UNIRG_REWARDS_HOST" >"$name.part" && mv "$name.part" "$name"
exec sleep 1000"""
    job = Job(tmp_path, train, serve)
    wanted = {"SAMPLERS": "1", "REWARDS": "1", "MODEL": "a model", "SLURM_GPUS_ON_NODE": "4"}
    running = job.start("my x.yaml", "output=my run", nodes="n1,n2,n3,n4", **wanted)
    assert running.wait(60) == 0  # the servers would take longer
    told = ["my x.yaml", "output=my run", "rollout.engine=vllm", "rollout.vllm.mode=server"]
    told += ["rollout.vllm.servers=[http://n3:8000]"]
    assert job.lines("log0") == ["n1 of 2, head n1, 4 ranks", *told]
    assert job.lines("log1") == ["n2 of 2, head n1, 4 ranks", *told]
    assert job.lines("sampler")[:6] == ["n3", "-m", "unirg", "rollout-server", "a model", "--host"]
    served = ["-m", "unirg", "rewards", "serve", *told, "--host", "n4", "--port", "8100"]
    assert job.lines("scorer") == ["n4", *served, "n4"]


def test_a_server_that_ends_is_started_again(tmp_path: Path) -> None:
    job = Job(tmp_path, "while [ ! -e again ]; do sleep 0.05; done", "[ -e once ] && touch again; touch once; exit 5")
    job.write("sleep", 'exec /usr/bin/env -i /bin/sleep "${1/10/0.01}"')  # the pause before it
    running = job.start("x.yaml", nodes="n1,n2", REWARDS="1")
    said = running.communicate(timeout=60)[0]
    assert running.returncode == 0, said
    assert "the server on n2 ended with status 5" in said


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        ([], {"LAUNCH": "elsewhere"}, "there is no elsewhere/torchrun.sh"),
        ([], {"SAMPLERS": "1"}, "no node is left to train"),
        (["--output", "run"], {"REWARDS": "1", "SLURM_JOB_NODELIST": "n1,n2"}, "say output=DIR"),
    ],
)
def test_what_cannot_be_run_is_told_before_anything_starts(
    arguments: list[str], variables: dict[str, str], said: str, tmp_path: Path
) -> None:
    job = Job(tmp_path, "touch trained")
    running = job.start("x.yaml", *arguments, **variables)
    assert said in running.communicate(timeout=60)[0]
    assert running.returncode == 2
    assert not (tmp_path / "trained").exists()
