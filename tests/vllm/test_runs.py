"""SFT and GRPO end to end on vLLM: `unirg train` learns, on one rank and on two with sharded weights, colocated and
from a server that hangs, is killed and comes back. The trajectory is the same each time, and vLLM writes what
evaluations read."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("vllm", reason="`make test-vllm` runs these where vLLM is installed")

from tests.vllm.engines import VllmServer
from unirg.data import load_studies
from unirg.evaluation.evaluate import measure
from unirg.evaluation.predictions import read_predictions
from unirg.evaluation.run import load_run_recipe, report_writer
from unirg.rollout import generate_reports
from unirg.run import final_folder

STEPS = 10
SHORT = ("stages.grpo.steps=3", "stages.grpo.evaluate_every=3")
SIZES = {"hidden": 64, "heads": 2, "layers": 2, "mlp": 96, "vision_hidden": 32, "vision_layers": 2}
REWARD = '''
def varied(candidates, references, **columns):
    """The more different letters the better."""
    return [len(set(candidate)) / 10 for candidate in candidates]
'''


def write_recipe(folder: Path, **rollout: Any) -> Path:
    (folder / "varied.py").write_text(REWARD)
    sft = {"name": "sft", "kind": "sft", "steps": 12, "studies_per_step": 4, "evaluate_every": 6}
    stage = {
        "name": "grpo",
        "kind": "grpo",
        "steps": STEPS,
        "evaluate_every": 5,
        "studies_per_step": 4,
        "group_size": 6,
        "checkpoint_every": 4,
        "sampling": {"max_new_tokens": 12},
        "optimiser": {"learning_rate": 4e-3, "schedule": "constant", "warmup": 0},
        "rewards": [{"name": f"{folder / 'varied.py'}:varied"}],
    }
    recipe = {
        "name": "vllm",
        "output": str(folder / "run"),
        "threads": 1,
        "data": {"adapter": "phantom", "train": 12, "dev": 5, "test": 0, "unseen": 0, "size": 64},
        "prompt": {"style": "short"},
        "policy": {"tiny": {"vocabulary": 400, "image_size": 64, **SIZES}, "max_prompt_tokens": 100},
        "rollout": {"engine": "vllm", "vllm": rollout},
        "stages": [sft | {"optimiser": {"learning_rate": 4e-3}}, stage],
        # Two batches on one of two ranks, one on the other.
        "evaluation": {"splits": ["dev"], "batch_size": 2, "draws": 20},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(folder: Path, *before: str, overrides: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, *before, "-m", "unirg", "train", str(folder / "recipe.yaml"), *overrides]
    if before:
        command = [sys.executable, *before, "--module", "unirg", "train", str(folder / "recipe.yaml"), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]
    return output


def metrics(folder: Path) -> list[dict[str, float]]:
    path = folder / "run" / "stages" / "grpo" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def same_evaluations_as_by_hugging_face(folder: Path) -> None:
    """Asserts that each stage's greedy reports, and the figures of its last evaluation while it trained, are those that
    the Hugging Face engine gives its final policy."""
    run = folder / "run"
    recipe = load_run_recipe(run, ["rollout.engine=hf"])
    studies = load_studies(recipe.data, "dev")
    for stage in ("sft", "grpo"):
        with report_writer(recipe, final_folder(run, stage), studies) as (policy, sampler):
            reports = generate_reports(policy, studies, max_new_tokens=12, sampler=sampler)
        texts = {report.id: report.text for report in reports}
        written = read_predictions(run / "predictions" / "dev" / f"{stage}.jsonl")
        assert written.reports == texts and any(texts.values())
        last = json.loads((run / "stages" / stage / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("length", "positive_f1"):
            assert last[f"eval/{name}"] == pytest.approx(measure(studies, texts).statistics[name].value)


@pytest.fixture(scope="module")
def colocated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("colocated")
    write_recipe(folder)
    assert "sleep: needs CUDA" in finish(start(folder))
    return folder


def server_of(recipe: Path) -> VllmServer:
    """A server, not yet started, for the policy that the recipe begins with."""
    server = VllmServer(recipe.with_name("model"), recipe.with_name("server.log"))
    model = "import sys, yaml, unirg.stages as s; from pathlib import Path; from unirg.recipe.load import load_recipe\n"
    model += "from unirg.data import load_studies; recipe = load_recipe(Path(sys.argv[1]))\n"
    model += "s.initial_policy(recipe, None, load_studies(recipe.data, 'train')).save(Path(sys.argv[2]))"
    subprocess.run([sys.executable, "-c", model, str(recipe), str(server.model)], check=True)
    return server


def test_it_learns_from_samples_whose_log_probs_are_the_trainers(colocated: Path) -> None:
    steps = metrics(colocated)
    rewards = [step["reward"] for step in steps]
    assert len(steps) == STEPS and sum(rewards[-3:]) > sum(rewards[:3]) + 0.1
    for step in steps:
        assert step["sampling/sampling_logp_difference/max"] < 1e-4
        assert abs(step["sampling/importance_sampling_ratio/mean"] - 1) < 1e-4
        assert step["time/weights"] > 0 and step["time/sampling"] > 0
    assert (colocated / "run" / "stages" / "grpo" / "final" / "model.safetensors").exists()


def test_evaluations_are_the_hugging_face_engines(colocated: Path) -> None:
    same_evaluations_as_by_hugging_face(colocated)


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_two_ranks_with_sharded_weights_sample_the_same(colocated: Path, tmp_path: Path, strategy: str) -> None:
    """An engine on each rank, filled from shards; and then one on the first alone, for the evaluation."""
    if strategy == "zero3":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (make test-vllm)")
    write_recipe(tmp_path)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    finish(start(tmp_path, *torchrun, overrides=(f"distributed.strategy={strategy}", *SHORT)))
    for one, two in zip(metrics(colocated), metrics(tmp_path)):
        assert two["reward"] == pytest.approx(one["reward"], abs=1e-6)
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["sampling/sampling_logp_difference/max"] < 1e-4
    same_evaluations_as_by_hugging_face(tmp_path)


def test_a_server_that_hangs_and_one_that_is_killed_lose_nothing(colocated: Path, tmp_path: Path) -> None:
    """It hangs: the run ends, with who waited for whom and a checkpoint of the last whole step. It is killed and
    started again: the same command waits for it, and goes on as if nothing had been."""
    server = server_of(write_recipe(tmp_path))
    write_recipe(tmp_path, mode="server", servers=[server.url], timeout=5.0, wait=2.0)
    server.start()
    try:
        server.wait()
        process = start(tmp_path)
        while len(metrics(tmp_path)) < 2 and process.poll() is None:
            time.sleep(0.05)
        server.signal(signal.SIGSTOP)
        output, _ = process.communicate(timeout=200)
        done = len(metrics(tmp_path))
        assert process.returncode == 2 and 2 <= done < STEPS, output[-3000:]
        flat = " ".join(output.split())
        assert f"s for {server.url} (" in flat and "rank 0 waited" in flat
        assert f"goes on from step {done}" in flat
        assert (tmp_path / "run" / "stages" / "grpo" / f"step-{done:06d}").exists()

        server.kill()
        server.start()
        output = finish(start(tmp_path, overrides=("rollout.vllm.wait=300",)))
        assert f"goes on from step {done}" in output and "asking again" in output
    finally:
        server.kill()
    assert len(metrics(tmp_path)) == STEPS
    for one, two in zip(metrics(colocated), metrics(tmp_path)):
        assert two["reward"] == pytest.approx(one["reward"], abs=1e-6), one["step"]
    same_evaluations_as_by_hugging_face(tmp_path)


def test_one_step_ahead_of_a_server_that_is_killed(colocated: Path, tmp_path: Path) -> None:
    """Studies that the server took with it are sampled again when it is back, and the run ends as many steps on."""
    server = server_of(write_recipe(tmp_path))
    write_recipe(tmp_path, mode="server", servers=[server.url], timeout=20.0, wait=300.0)
    server.start()
    try:
        server.wait()
        process = start(tmp_path, overrides=("stages.grpo.ahead=true",))
        while len(metrics(tmp_path)) < 3 and process.poll() is None:
            time.sleep(0.05)
        server.kill()
        server.start()
        output = finish(process)
    finally:
        server.kill()
    steps = metrics(tmp_path)
    assert len(steps) == STEPS and "asking again" in output
    assert steps[0]["reward"] == pytest.approx(metrics(colocated)[0]["reward"], abs=1e-6)  # nothing is ahead of it
    gaps = [step["sampling/sampling_logp_difference/mean"] for step in steps]
    assert gaps[0] < 1e-4 < min(gaps[1:3])  # how large they are is the policy's doing: one step at this rate leads far
    assert sum(step["reward"] for step in steps[-3:]) > sum(step["reward"] for step in steps[:3])
    same_evaluations_as_by_hugging_face(tmp_path)
