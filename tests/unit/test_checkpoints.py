"""Checkpoints and metrics after a kill at any moment: whole or not there, and nothing of a run's past in its future."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from unirg import checkpoint
from unirg import run as run_folder
from unirg.errors import UserError
from unirg.policy import Policy
from unirg.recipe.schema import Recipe
from unirg.steps import optimise
from unirg.training import StageRun


def save(folder: Path, step: int, value: float, **options: Any) -> None:
    weights, optimiser = trained(value)
    checkpoint.save(folder, step, weights, optimiser, {"best": value}, **options)


def trained(value: float) -> tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]:
    """Two parameters of which every element is `value`, and an optimiser whose moments follow from it."""
    weights = {
        "layer.w": torch.nn.Parameter(torch.full((2, 3), float(value))),
        "layer.b": torch.nn.Parameter(torch.ones(3)),
    }
    optimiser = torch.optim.AdamW(weights.values(), lr=0.0, weight_decay=0.0)
    for parameter in weights.values():
        parameter.grad = torch.full_like(parameter, value)
    optimiser.step()
    return weights, optimiser


def loaded(folder: Path, warnings: list[str] | None = None) -> tuple[float, int]:
    """The value that the folder's checkpoint was saved with, which weights, optimiser and state agree on, and its
    step."""
    weights, optimiser = trained(-1.0)
    told: list[str] = []
    state = checkpoint.load(folder, weights, optimiser, warn=told.append)
    assert state is not None
    expected, moments = trained(state["best"])
    assert torch.equal(weights["layer.w"], expected["layer.w"])
    for ours, theirs in zip(weights.values(), expected.values(), strict=True):
        assert optimiser.state[ours].keys() == moments.state[theirs].keys()
        for key, value in moments.state[theirs].items():
            assert torch.equal(optimiser.state[ours][key], value)
    if warnings is None:
        assert told == []
    else:
        warnings += told
    return state["best"], state["step"]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_are_kept(tmp_path: Path, keep: int) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step, step, keep=keep)
    assert [name for name in files(tmp_path) if name != "latest"] == [f"step-00000{n}" for n in (2, 4, 6, 8)][-keep:]
    assert loaded(tmp_path) == (8.0, 8)


def test_a_checkpoint_is_readable_without_this_program(tmp_path: Path) -> None:
    """Tensors and JSON; nothing that runs code when it is read."""
    save(tmp_path, 2, 2.0)
    folder = tmp_path / "step-000002"
    tensors = ["optimiser-0000-000.safetensors", "weights-0000-000.safetensors"]
    assert files(folder) == ["checksums.json", *tensors[:1], "state.json", *tensors[1:]]
    assert set(load_file(folder / tensors[1])) == {"layer.w", "layer.b"}
    assert {"layer.w/exp_avg", "layer.b/step"} < set(load_file(folder / tensors[0]))
    assert json.loads((folder / "state.json").read_text()) == {"step": 2, "best": 2.0}
    listed = json.loads((folder / "checksums.json").read_text())
    assert set(listed) == set(files(folder)) - {"checksums.json"}


def test_large_shares_go_to_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 1)
    save(tmp_path, 2, 2.0)
    assert len(list((tmp_path / "step-000002").glob("weights-*"))) == 2
    assert loaded(tmp_path) == (2.0, 2)


def test_a_kill_while_one_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, 2, 2.0)
    (tmp_path / ".step-000004.part").mkdir()
    (tmp_path / ".step-000004.part" / "weights-0000-000.safetensors").write_bytes(b"half")
    assert loaded(tmp_path) == (2.0, 2)
    save(tmp_path, 4, 4.0)
    assert loaded(tmp_path) == (4.0, 4)


def test_a_kill_between_the_rename_and_latest(tmp_path: Path) -> None:
    """The one that `latest` names is whole, and what comes after it is repeated."""
    save(tmp_path, 2, 2.0)
    save(tmp_path, 4, 4.0)
    (tmp_path / "latest").write_text("step-000002\n")
    assert loaded(tmp_path) == (2.0, 2)


def test_a_repeated_step_outlasts_later_ones_of_the_killed_run(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step, step)
    save(tmp_path, 4, 4.5)
    assert loaded(tmp_path) == (4.5, 4)


KINDS = ["weights-0000-000.safetensors", "optimiser-0000-000.safetensors", "state.json", "checksums.json"]


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def bit_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_short, emptied, bit_flipped, Path.unlink])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    kind: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    save(tmp_path, 2, 2.0)
    save(tmp_path, 4, 4.0)
    damage(tmp_path / "step-000004" / kind)
    warnings: list[str] = []
    assert loaded(tmp_path, warnings) == (2.0, 2)
    assert len(warnings) == 1 and str(tmp_path / "step-000004") in warnings[0]
    assert kind in warnings[0] or "checksums.json" in warnings[0]


@pytest.mark.parametrize("at", range(0, 400, 7))
def test_no_bit_of_the_checksums_can_flip_unseen(at: int, tmp_path: Path) -> None:
    """Or it does no harm: the other file's name, size and sum are as they were."""
    save(tmp_path, 2, 2.0)
    path = tmp_path / "step-000002" / "checksums.json"
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1 << at % 8
    path.write_bytes(content)
    try:
        assert loaded(tmp_path, []) == (2.0, 2)
    except UserError as error:
        assert "no checkpoint is whole" in str(error)


def test_where_none_is_whole_nothing_is_trained_anew(tmp_path: Path) -> None:
    save(tmp_path, 2, 2.0)
    save(tmp_path, 4, 4.0)
    for step in (2, 4):
        bit_flipped(tmp_path / f"step-00000{step}" / "state.json")
    with pytest.raises(UserError, match=r"no checkpoint is whole .*step-000004.*step-000002.*remove .* from its start"):
        loaded(tmp_path, [])


def test_a_latest_that_names_nothing(tmp_path: Path) -> None:
    save(tmp_path, 2, 2.0)
    (tmp_path / "latest").write_text("step-000009\n")
    warnings: list[str] = []
    assert loaded(tmp_path, warnings) == (2.0, 2)
    assert "step-000009: is not there" in warnings[0]
    shutil.rmtree(tmp_path / "step-000002")
    with pytest.raises(UserError, match="no checkpoint is whole"):
        loaded(tmp_path, [])


def test_a_checkpoint_of_another_policy_is_no_damage(tmp_path: Path) -> None:
    save(tmp_path, 2, 2.0)
    with pytest.raises(ValueError, match=r"does not fit the policy: 2 tensors differ, such as layer\.v"):
        weights = {"layer.v": torch.nn.Parameter(torch.zeros(2)), "layer.b": torch.nn.Parameter(torch.zeros(3))}
        checkpoint.load(tmp_path, weights, None, warn=print)


def test_an_earlier_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "step-000002").mkdir()
    (tmp_path / "step-000002" / "optimiser.pt").write_bytes(b"")
    with pytest.raises(UserError, match="written by an earlier version"):
        loaded(tmp_path, [])


def test_a_finished_stage_keeps_its_policy_and_metrics_alone(tmp_path: Path) -> None:
    save(tmp_path, 2, 2.0)
    save(tmp_path / "best", 2, 2.0)
    (tmp_path / ".step-000004.part").mkdir()
    (tmp_path / "final").mkdir()
    run_folder.append_metrics(tmp_path, {"step": 1})
    checkpoint.clear(tmp_path)
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
    layer, after = trained_with_evaluations(tmp_path, figures, checkpoint_every=9)
    assert len({float(weight) for weight in after}) == 3
    assert torch.equal(layer.weight, after[kept - 1])


def test_the_best_that_a_checkpoint_names_outlasts_better_ones_of_a_killed_run(tmp_path: Path) -> None:
    """Figures of a GPU may come out otherwise the second time: then that one is the best after all."""
    after: list[torch.Tensor] = []
    with pytest.raises(ZeroDivisionError):
        trained_with_evaluations(tmp_path, [0.2, 0.1, 0.1, 0.3, 0.4, "killed"], after, checkpoint_every=3)
    layer, _ = trained_with_evaluations(tmp_path, [0.1, 0.1, 0.1], checkpoint_every=3, steps=6)
    assert torch.equal(layer.weight, after[0])


def test_a_damaged_best_gives_way_to_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after: list[torch.Tensor] = []
    with pytest.raises(ZeroDivisionError):
        trained_with_evaluations(tmp_path / "run", [0.1, 0.2, 0.0, "killed"], after, checkpoint_every=3)
    damage(tmp_path / "run" / "stages" / "s" / "best" / "step-000002")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    layer, _ = trained_with_evaluations(tmp_path / "run", [0.0], checkpoint_every=3, steps=4)
    assert torch.equal(layer.weight, after[0])
    assert "step-000002: weights-0000-000.safetensors has 0 bytes, expected" in capsys.readouterr().out
    assert run_folder.read_manifest(tmp_path / "run")["stages"]["s"]["best"] == 0.1
    damage(tmp_path / "other" / "stages" / "s" / "best" / "step-000001")
    with pytest.raises(UserError, match=r"best: no checkpoint is whole .*step-000002.*step-000001"):
        trained_with_evaluations(tmp_path / "other", [0.0], checkpoint_every=3, steps=4)


def damage(step: Path) -> None:
    (step / "weights-0000-000.safetensors").write_bytes(b"")


def trained_with_evaluations(
    folder: Path,
    figures: Sequence[float | str],
    after: list[torch.Tensor] | None = None,
    *,
    checkpoint_every: int,
    steps: int | None = None,
) -> tuple[torch.nn.Linear, list[torch.Tensor]]:
    """A layer at the end of a stage whose evaluations give `figures`, one a step, until one is a word; and its weight
    at each of them."""
    stage = {"name": "s", "kind": "sft", "steps": steps or len(figures), "evaluate_every": 1, "keep": "best"}
    stage |= {"checkpoint_every": checkpoint_every}
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "data": {"adapter": "phantom"},
            "policy": {"tiny": {}},
            "stages": [stage | {"optimiser": {"learning_rate": 0.1, "schedule": "constant", "warmup": 0}}],
        }
    )
    accelerator: Any = SimpleNamespace(
        is_main_process=True, process_index=0, num_processes=1, log=lambda *a, **k: None, wait_for_everyone=lambda: None
    )
    policy: Any = Policy
    work = StageRun(recipe, recipe.stages[0], folder, accelerator, policy, [])
    layer = torch.nn.Linear(1, 1)
    after = [] if after is None else after
    measured = iter(figures)

    def step_metrics(step: int) -> dict[str, float]:
        layer.weight.sum().backward()
        return {"loss": 0.0}

    def evaluate() -> dict[str, float]:
        assert layer.weight.grad is None  # its room is the evaluation's
        after.append(layer.weight.detach().clone())
        figure = next(measured)
        if isinstance(figure, str):
            raise ZeroDivisionError(figure)
        return {"positive_f1": figure}

    optimise(work, layer, step_metrics, evaluate=evaluate)
    return layer, after
