"""Checkpoints and metrics after a kill at any moment: whole or not there, and nothing of a run's past in its future."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unirg import run as run_folder
from unirg.policy import Policy
from unirg.recipe.schema import Recipe
from unirg.training import StageRun, optimise


def save(folder: Path, step: int, value: float) -> None:
    run_folder.save_checkpoint(folder, step, {"w": torch.full((2,), value)}, {"lr": 1.0}, {"best": value})


def loaded(folder: Path) -> tuple[float, int]:
    kept = run_folder.load_checkpoint(folder)
    assert kept is not None
    return float(kept[0]["w"][0]), kept[2]["step"]


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step, step)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000004", "step-000006"]
    assert loaded(tmp_path) == (6.0, 6)


def test_a_kill_while_one_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, 2, 2.0)
    (tmp_path / ".step-000004.part").mkdir()
    (tmp_path / ".step-000004.part" / "weights.safetensors").write_bytes(b"half")
    assert loaded(tmp_path) == (2.0, 2)
    save(tmp_path, 4, 4.0)
    assert loaded(tmp_path) == (4.0, 4)


def test_a_repeated_step_outlasts_later_ones_of_the_killed_run(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step, step)
    save(tmp_path, 4, 4.5)
    assert loaded(tmp_path) == (4.5, 4)


def test_a_finished_stage_keeps_its_policy_and_metrics_alone(tmp_path: Path) -> None:
    save(tmp_path, 2, 2.0)
    save(tmp_path / "best", 2, 2.0)
    (tmp_path / ".step-000004.part").mkdir()
    (tmp_path / "final").mkdir()
    run_folder.append_metrics(tmp_path, {"step": 1})
    run_folder.clear_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "metrics.jsonl"]


def test_metrics_cut_short_or_past_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    for step in range(1, 6):
        run_folder.append_metrics(tmp_path, {"step": step, "loss": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    run_folder.forget_metrics_after(tmp_path, 3)
    run_folder.append_metrics(tmp_path, {"step": 4, "loss": 0.25})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("figures", "kept"),
    [([0.1, 0.3, 0.2], 2), ([float("nan"), 0.2, 0.1], 2), ([0.2, float("nan"), 0.1], 1), ([float("nan")] * 3, 3)],
)
def test_the_best_evaluation_decides(figures: list[float], kept: int, tmp_path: Path) -> None:
    """`kept`: the step whose weights the stage ends with; the last where no evaluation says anything."""
    stage = {"name": "s", "kind": "sft", "steps": 3, "evaluate_every": 1, "keep": "best", "checkpoint_every": 9}
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "data": {"adapter": "phantom"},
            "policy": {"tiny": {}},
            "stages": [stage | {"optimiser": {"learning_rate": 0.1, "schedule": "constant", "warmup": 0}}],
        }
    )
    accelerator: Any = SimpleNamespace(
        is_main_process=True, process_index=0, log=lambda *a, **k: None, wait_for_everyone=lambda: None
    )
    policy: Any = Policy
    work = StageRun(recipe, recipe.stages[0], tmp_path, accelerator, policy, [])
    layer = torch.nn.Linear(1, 1)
    after: list[torch.Tensor] = []
    measured = iter(figures)

    def step_metrics(step: int) -> dict[str, float]:
        layer.weight.sum().backward()
        return {"loss": 0.0}

    def evaluate() -> dict[str, float]:
        after.append(layer.weight.detach().clone())
        return {"positive_f1": next(measured)}

    optimise(work, layer, step_metrics, evaluate=evaluate)
    assert len({float(weight) for weight in after}) == 3
    assert torch.equal(layer.weight, after[kept - 1])
