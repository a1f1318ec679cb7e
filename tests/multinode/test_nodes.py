"""Two hosts train, a third serves the rewards: the same run as one process makes, whatever happens on the way."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.invariant import test_trajectories as trajectories
from tests.nodes import HOST, Node, cluster
from tests.slurm import write_commands
from unirg import run as run_folder

pytestmark = pytest.mark.skipif("UNIRG_MULTINODE" not in os.environ, reason="takes minutes: make test-multinode")
ROOT = Path(__file__).parents[2]
VLLM = ROOT / ".venv-vllm/bin/python"
TOKEN = {"UNIRG_REWARDS_TOKEN": "between-these-hosts"}


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    with cluster(3) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = trajectories.start(tmp_path_factory.mktemp("alone"), "run")
    trajectories.run_stages(run)
    return run


@contextmanager
def serving(node: Node, run: Path) -> Iterator[None]:
    """The rewards of the run's recipe, served by the node."""
    command = ["-m", "unirg", "rewards", "serve", str(run / "recipe.yaml"), "--host", node.address]
    server = node.start([sys.executable, *command], run.parent, TOKEN)
    assert server.stdout is not None
    said: list[str] = []
    while "ready at" not in "".join(said[-1:]):
        said.append(server.stdout.readline())
        assert said[-1], "".join(said)
    try:
        yield
    finally:
        server.terminate()
        server.wait(timeout=60)


def launch(nodes: Sequence[Node], run: Path) -> list["subprocess.Popen[str]"]:
    """The run's part on each node, one rank each, as a user without a scheduler starts it."""
    script = ROOT / "recipes/launch/torchrun.sh"
    where = TOKEN | {"NODES": str(len(nodes)), "HEAD": nodes[0].address, "GPUS": "1", "PYTHON": sys.executable}
    return [
        node.start([str(script), str(run / "recipe.yaml")], run.parent, where | {"NODE": str(i)})
        for i, node in enumerate(nodes)
    ]


def wait_for(stage: Path, steps: int, processes: Sequence["subprocess.Popen[str]"]) -> None:
    """Waits until the stage has made so many steps."""
    deadline = time.monotonic() + 300
    while len(run_folder.read_metrics(stage)) < steps:
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def served(tmp_path: Path, node: Node, *overrides: str) -> Path:
    reward = f"[{{name: 'tests_reward.py:closeness', server: 'http://{node.address}:8100'}}]"
    return trajectories.start(tmp_path, "run", f"stages.grpo.rewards={reward}", *overrides)


def finish(trainers: Sequence["subprocess.Popen[str]"]) -> None:
    for trainer in trainers:
        said = trainer.communicate(timeout=400)[0]
        assert trainer.returncode == 0, said


def test_two_nodes_train_as_one_process(nodes: list[Node], alone: Path, tmp_path: Path) -> None:
    run = served(tmp_path, nodes[2], "distributed.strategy=fsdp2")
    with serving(nodes[2], run):
        finish(launch(nodes[:2], run))
    trajectories.assert_same(run, alone, 2e-3)  # sums in another order, as of two ranks on one host
    for rank in (0, 1):
        assert (run / f"rollouts/grpo/step-000004-rank{rank}.parquet").exists()


def test_a_cable_that_is_pulled_ends_the_run_on_both_nodes(nodes: list[Node], alone: Path, tmp_path: Path) -> None:
    """Neither waits for ever, and the same commands go on from the last checkpoint to the same end."""
    run = served(tmp_path, nodes[2], "distributed.timeout=20")
    with serving(nodes[2], run):
        trainers = launch(nodes[:2], run)
        wait_for(run / "stages/sft", 3, trainers)
        nodes[1].plug("down")
        for trainer in trainers:
            said = trainer.communicate(timeout=200)[0]
            assert trainer.returncode != 0, said
        assert not run_folder.final_folder(run, "grpo").exists()
        nodes[1].plug("up")
        finish(launch(nodes[:2], run))
    trajectories.assert_same(run, alone, 2e-3)


def job(nodes: Sequence[Node], folder: Path, **variables: str) -> dict[str, Any]:
    """How SLURM would start the batch script for a job on these nodes."""
    write_commands(folder, 'ip netns exec "$HOSTS-$((${node##*.} - 1))"')
    variables |= {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "HOSTS": nodes[0].name.rpartition("-")[0],
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": ",".join(node.address for node in nodes),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_GPUS_ON_NODE": "1",
        "REWARDS": "1",
    }
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return {"cwd": folder, "env": os.environ | HOST | {"PYTHON": sys.executable} | variables} | output


def batch(folder: Path, *overrides: str) -> list[str]:
    """The batch script with a recipe whose reward is scored by a node of the job."""
    shutil.rmtree(trajectories.start(folder, "run"))
    reward = "[{name: 'tests_reward.py:closeness', server: 'http://${oc.env:UNIRG_REWARDS_HOST}:8100'}]"
    recipe = [str(folder / "run.yaml"), f"stages.grpo.rewards={reward}", *overrides]
    return [str(ROOT / "recipes/launch/slurm.sbatch"), *recipe]


def test_a_slurm_job_goes_on_after_its_time_is_up(nodes: list[Node], alone: Path, tmp_path: Path) -> None:
    command, settings, run = batch(tmp_path), job(nodes, tmp_path), tmp_path / "run"
    first = subprocess.Popen(command, **settings)
    wait_for(run / "stages/sft", 3, [first])
    first.send_signal(signal.SIGUSR1)
    said = first.communicate(timeout=200)[0]
    assert first.returncode == 0 and (tmp_path / "requeued").read_text() == "7\n", said
    assert "stopped by SIGUSR1: the same command goes on from step" in said
    assert not run_folder.final_folder(run, "grpo").exists()
    second = subprocess.run(command, timeout=400, check=False, **settings)
    assert second.returncode == 0 and "goes on from step" in second.stdout, second.stdout
    trajectories.assert_same(run, alone, 2e-3)
    assert (tmp_path / "requeued").read_text() == "7\n"


@pytest.mark.skipif(not VLLM.exists(), reason="no vLLM: make test-vllm sets it up")
def test_a_slurm_job_with_a_node_that_samples(alone: Path, tmp_path: Path) -> None:
    with cluster(4) as nodes:
        own = {"SAMPLERS": "1", "MODEL": str(run_folder.final_folder(alone, "sft")), "PYTHON": str(VLLM)}
        settings = job(nodes, tmp_path, VLLM_OPTIONS="--max-model-len 512 --max-num-seqs 16", **own)
        command = batch(tmp_path, "policy.max_prompt_tokens=400", "rollout.vllm.wait=300")
        done = subprocess.run(command, timeout=500, check=False, **settings)
    assert done.returncode == 0, done.stdout
    records = run_folder.read_metrics(tmp_path / "run/stages/grpo")
    assert len(records) == 4
    assert (
        max(record["sampling/sampling_logp_difference/max"] for record in records) < 1e-4
    )  # the trainer's own weights
