"""Stages: what waits for what, who shares the cores, and that no two processes train one stage."""

import errno
import fcntl
from pathlib import Path

import pytest

from unirg import run as run_folder
from unirg.errors import UserError
from unirg.process import hold
from unirg.recipe.load import load_recipe
from unirg.recipe.schema import Recipe
from unirg.stages import beside, needed


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe(Path(__file__).parents[2] / "recipes" / "demo.yaml")


def test_arms_wait_for_the_warm_start_and_share_the_cores(recipe: Recipe) -> None:
    stages = {stage.name: stage for stage in recipe.stages}
    assert needed(recipe, stages["vision"]) == set()
    assert needed(recipe, stages["sft"]) == {"vision"}
    assert {name for name in stages if needed(recipe, stages[name]) == {"sft"}} == set(stages) - {"vision", "sft"}
    assert [beside(recipe, stage) for stage in recipe.stages] == [1, 1, 2, 2, 2, 2]


def test_a_reference_stage_is_waited_for(recipe: Recipe) -> None:
    arm = recipe.stages[-1]
    other = arm.model_copy(
        update={
            "loss": arm.loss.model_copy(update={"kl": 0.03}),
            "kl": arm.kl.model_copy(update={"reference": "sft_complete"}),
        }
    )
    assert needed(recipe, other) == {"sft", "sft_complete"}


def test_one_process_a_stage(tmp_path: Path) -> None:
    first = hold(tmp_path / "sft")
    with pytest.raises(UserError, match="is training there; wait for it, or stop it"):
        hold(tmp_path / "sft")
    first.close()
    hold(tmp_path / "sft").close()


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Lustre mounted without them; there is none here."""

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    hold(tmp_path / "sft").close()
    assert "its file system has no locks (Function not implemented); see to it" in capsys.readouterr().out
    run_folder.update_manifest(tmp_path, seed=1)
    assert run_folder.read_manifest(tmp_path)["seed"] == 1


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run: cannot be written \(Not a directory\); choose another `output`"):
        hold(tmp_path / "file" / "run")
