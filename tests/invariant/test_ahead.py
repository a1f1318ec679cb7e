"""One step ahead: each batch comes from the policy of one update earlier, and nothing else about a run changes."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet
import pytest
import torch

from tests.invariant.test_trajectories import assert_same, command, environment, run_stages, start, trajectory, weights
from unirg import run as run_folder
from unirg.data import load_studies
from unirg.evaluation.evaluate import measure
from unirg.grpo.loop import GAP
from unirg.policy import load_policy
from unirg.recipe.load import RecipeError, load_recipe
from unirg.rollout import generate_reports, request_seed
from unirg.rollout.hf import HFSampler

# A rate that does not depend on how many steps there are to come.
RATE = ["stages.grpo.optimiser.schedule=constant", "stages.grpo.optimiser.warmup=0"]
# Evaluations are made by the sampler too, in between: they take no batch under way for theirs.
OPTIONS = ["stages.grpo.ahead=true", "stages.grpo.steps=6", "stages.grpo.evaluate_every=2", *RATE]


@pytest.fixture(scope="module")
def ahead(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = start(tmp_path_factory.mktemp("ahead"), "run", *OPTIONS)
    run_stages(run)
    return run


def reports(run: Path, step: int) -> dict[str, list[str]]:
    """What was sampled for a step, by study."""
    table = pyarrow.parquet.read_table(run / "rollouts" / "grpo" / f"step-{step:06d}.parquet").to_pylist()
    found: dict[str, list[str]] = {}
    for row in table:
        found.setdefault(row["study_id"], []).append(row["candidate"])
    return found


def sampled_by(run: Path, folder: Path, step: int) -> dict[str, list[str]]:
    """What the policy in `folder` says of the step's studies, with the step's seeds."""
    recipe = load_recipe(run / "recipe.yaml")
    policy = load_policy(recipe.policy, recipe.prompt, folder=folder)
    wanted = reports(run, step)
    studies = {study.id: study for study in load_studies(recipe.data, "train") if study.id in wanted}
    seeds = [[request_seed(recipe.seed, "grpo", "sample", step - 1, 0, name, g) for g in range(4)] for name in wanted]
    groups = HFSampler(policy).sample(
        [policy.encode(studies[name]) for name in wanted], seeds, temperature=1.0, max_new_tokens=12
    )
    return {name: [sample.text for sample in group] for name, group in zip(wanted, groups, strict=True)}


def test_a_step_that_leads_far_does_not_make_the_sampler_another_model(tmp_path: Path) -> None:
    few = ["stages.vision.steps=1", "stages.sft.steps=1", "stages.grpo.steps=3", "stages.grpo.ahead=true", *RATE]
    run = start(tmp_path, "far", *few, "stages.grpo.optimiser.learning_rate=0.05")
    run_stages(run)
    gaps = [r["sampling/sampling_logp_difference/mean"] for r in trajectory(run) if r["stage"] == "grpo"]
    assert gaps[0] < 1e-4 and max(gaps) > GAP


def test_every_batch_is_the_policy_of_one_update_earlier(ahead: Path, tmp_path: Path) -> None:
    one = start(tmp_path, "one", "stages.grpo.steps=1", *RATE)
    run_stages(one)
    before, after = run_folder.final_folder(ahead, "sft"), run_folder.final_folder(one, "grpo")
    for step, folder in ((1, before), (2, before), (3, after)):
        assert reports(ahead, step) == sampled_by(ahead, folder, step)
    assert reports(ahead, 3) != sampled_by(ahead, before, 3)  # one update is enough to tell them apart
    gaps = [
        record["sampling/sampling_logp_difference/max"] for record in trajectory(ahead) if record["stage"] == "grpo"
    ]
    assert gaps[0] < 1e-4 < min(gaps[1:])  # and the loss knows of it


def test_evaluations_are_of_the_policy_as_it_stands(ahead: Path) -> None:
    recipe = load_recipe(ahead / "recipe.yaml")
    policy = load_policy(recipe.policy, recipe.prompt, folder=run_folder.final_folder(ahead, "grpo"))
    studies = load_studies(recipe.data, "dev")
    texts = {r.id: r.text for r in generate_reports(policy, studies, max_new_tokens=12)}
    figures = {record["step"]: record for record in trajectory(ahead) if "eval/length" in record}
    assert list(figures) == [2, 4, 6] and figures[4]["eval/length"] != figures[6]["eval/length"]
    assert figures[6]["eval/length"] == pytest.approx(measure(studies, texts).statistics["length"].value)


def test_killed_then_stopped_and_gone_on_to_the_last_bit(ahead: Path, tmp_path: Path) -> None:
    """Killed, it goes on from a checkpoint that has the next batch; stopped in mid-step, from one with the step's."""
    run = start(tmp_path, "run", *OPTIONS, "stages.grpo.checkpoint_every=2")
    folder = run / "stages" / "grpo"
    for number, reached in (
        (signal.SIGKILL, lambda: (folder / "latest").exists()),
        (signal.SIGTERM, lambda: len(run_folder.read_metrics(folder)) >= 3),
    ):
        process = subprocess.Popen(command(run), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 200
        while not reached():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.002)
        process.send_signal(number)
        process.wait()
        assert not run_folder.final_folder(run, "grpo").exists()
        newest = folder / (folder / "latest").read_text().strip()
        carried = json.loads((newest / "state.json").read_text())["carried"]
        assert carried["batch"] == int(newest.name.removeprefix("step-"))
    assert "goes on from step" in run_stages(run)
    assert trajectory(run) == trajectory(ahead)
    ours, expected = weights(run), weights(ahead)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())


def test_a_stop_does_not_leave_the_thread_that_samples(tmp_path: Path) -> None:
    """Before the first step there is nothing to save, and so nothing that waits for it; left in torch's C++ code when
    the interpreter ends, it would abort the process: a scheduler would see a crash, not a stop."""
    few = ["stages.vision.steps=1", "stages.sft.steps=1", "stages.grpo.ahead=true"]
    run = start(tmp_path, "run", *few, "stages.grpo.group_size=16", "stages.grpo.sampling.max_new_tokens=400")
    with subprocess.Popen(
        command(run), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        said = next(line for line in process.stdout if "packed and dense" in line)  # the next batch is under way
        process.send_signal(signal.SIGTERM)
        said += process.stdout.read()
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "stopped by SIGTERM" in said


def test_two_ranks(ahead: Path, tmp_path: Path) -> None:
    run = start(tmp_path, "run", *OPTIONS)
    run_stages(run, ranks=2)
    assert_same(run, ahead, 2e-3, steps=14)  # as without it: sums in another order


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["stages.grpo.loss.correction=none"], "ahead samples with older weights"),
        (["stages.grpo.resample=1"], "resample asks for more reports while"),
        (["rollout.engine=vllm"], "a colocated vLLM takes turns"),
        (["distributed.strategy=fsdp2"], "which is not sharded"),
    ],
)
def test_what_it_cannot_go_with_is_refused(overrides: list[str], why: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=why):
        start(tmp_path, "run", *OPTIONS, *overrides)
