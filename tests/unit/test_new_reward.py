"""The package that `unirg rewards new` writes works as it stands, and nothing is ever written over."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from unirg.errors import UserError
from unirg.scoring.new_reward import LONGEST, new_reward

RUFF = [sys.executable, "-m", "ruff"]


# One letter and the longest name: a line that ruff would break or join depends on the name's length.
@pytest.mark.parametrize("name", ["my_reward", "q", "a" * LONGEST])
def test_what_is_written_passes_ruff(tmp_path: Path, name: str) -> None:
    folder = new_reward(name, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == sorted(["pyproject.toml", f"{name}.py", f"test_{name}.py"])
    for command in (["check", "--select", "E,F,W,I,UP,B,SIM,RUF"], ["check"], ["format", "--check"]):
        done = subprocess.run([*RUFF, *command, "--no-cache", str(folder)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_its_own_test_passes_and_can_fail(tmp_path: Path) -> None:
    folder = new_reward("my_reward", tmp_path)

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    done = run()
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout
    path = folder / "my_reward.py"
    path.write_text(path.read_text().replace("return None", "return float('nan')"))
    done = run()
    assert "test_it_keeps_the_contract" in done.stdout and "2 failed" in done.stdout


def test_it_registers_its_reward(tmp_path: Path) -> None:
    project = tomllib.loads((new_reward("my_reward", tmp_path) / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["unirg.rewards"] == {"my_reward": "my_reward:my_reward"}
    assert project["tool"]["setuptools"]["py-modules"] == ["my_reward"]
    # Only with this does setuptools install it editable by a path. By its import hook, the folder my_reward/, which is
    # a namespace package to a Python started beside it (`python -m unirg`), would hide the module.
    assert project["tool"]["setuptools"]["package-dir"] == {"": "."}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("My_Reward", "cannot name a reward"),
        ("my-reward", "cannot name a reward"),
        ("1st", "cannot name a reward"),
        ("_mine", "cannot name a reward"),
        ("mine_", "cannot name a reward"),
        ("my__own", "cannot name a reward"),
        ("../up", "cannot name a reward"),
        ("", "cannot name a reward"),
        ("größe", "cannot name a reward"),
        ("a" * (LONGEST + 1), f"at most {LONGEST} characters"),
        ("lambda", "word of Python's own"),
        ("match", "word of Python's own"),
        ("test_mine", "collected as a test"),
        ("bleu", "installed already"),
        ("json", "can be imported already"),
        ("unirg", "can be imported already"),
    ],
)
def test_names_that_cannot_serve_are_refused_with_the_reason(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        new_reward(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(tmp_path: Path) -> None:
    folder = new_reward("my_reward", tmp_path)
    (folder / "my_reward.py").write_text("# a day's work")
    with pytest.raises(UserError, match="exists already; nothing was written"):
        new_reward("my_reward", tmp_path)
    assert (folder / "my_reward.py").read_text() == "# a day's work"
    (tmp_path / "other").write_text("a file")
    with pytest.raises(UserError, match="exists already"):
        new_reward("other", tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        new_reward("mine", tmp_path / "nowhere")
