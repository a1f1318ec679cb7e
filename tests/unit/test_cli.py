"""The command line: what is handed over, exit statuses, and messages without tracebacks."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest

import unirg
from unirg.cli import main
from unirg.errors import UserError
from unirg.signals import Stopped

ROOT = Path(unirg.__file__).parents[1]


@pytest.mark.parametrize(
    ("command", "target", "given"),
    [
        ("train r.yaml", "unirg.stages.train", [Path("r.yaml"), []]),
        (
            "train r.yaml a.b=1 --output 12 c=-2",
            "unirg.stages.train",
            [Path("r.yaml"), ["a.b=1", "c=-2", 'output="12"']],
        ),
        ("train --output x r.yaml a=1", "unirg.stages.train", [Path("r.yaml"), ["a=1", 'output="x"']]),
        ("report runs/x", "unirg.report.build", [Path("runs/x")]),
        ("recipe show r.yaml a=1", "unirg.recipe.command.show", [Path("r.yaml"), ["a=1"]]),
        ("recipe check", "unirg.recipe.command.check", [[Path("recipes")]]),
        ("recipe check a.yaml b", "unirg.recipe.command.check", [[Path("a.yaml"), Path("b")]]),
        ("recipe docs --check", "unirg.recipe.command.docs", [Path("docs/recipe_reference.md"), True]),
        (
            "data check r.yaml --splits train,dev data.limit=3",
            "unirg.data.command.check",
            [Path("r.yaml"), ["data.limit=3"], ["train", "dev"]],
        ),
        ("data fetch openi --to d", "unirg.data.command.fetch", ["openi", Path("d")]),
        ("extract r.jsonl --labels cxr14", "unirg.extraction.command.run", [Path("r.jsonl"), False, "cxr14"]),
        (
            "evaluate runs/x rollout.engine=hf --stages sft,grpo --json",
            "unirg.evaluation.command.evaluate",
            [Path("runs/x"), None, ["sft", "grpo"], None, ["rollout.engine=hf"], True],
        ),
        (
            "generate runs/x --out o.jsonl --stage sft data.limit=3",
            "unirg.evaluation.command.generate",
            [Path("runs/x"), Path("o.jsonl"), "test", None, "sft", 0.0, ["data.limit=3"]],
        ),
        (
            "compare a.jsonl b.jsonl --data r.yaml",
            "unirg.evaluation.command.compare",
            [Path("a.jsonl"), Path("b.jsonl"), Path("r.yaml"), "test", False],
        ),
        (
            "score --rewards bleu --references r.jsonl --candidates c.jsonl --summary",
            "unirg.scoring.command.score",
            [Path("r.jsonl"), Path("c.jsonl"), "bleu", False, True],
        ),
        (
            "audit r.yaml --plot a.png data.train=9",
            "unirg.scoring.audit.audit",
            [Path("r.yaml"), ["data.train=9"], None, None, False, Path("a.png")],
        ),
        (
            "audit --rewards bleu --references r.jsonl --json",
            "unirg.scoring.audit.audit",
            [None, [], "bleu", Path("r.jsonl"), True, None],
        ),
        ("rewards --json", "unirg.scoring.command.list_rewards", [True]),
        ("rewards check bleu(variant=coco4)", "unirg.scoring.check_reward.check_reward", ["bleu(variant=coco4)", 60.0]),
    ],
)
def test_verbs_hand_over(monkeypatch: pytest.MonkeyPatch, command: str, target: str, given: list[Any]) -> None:
    """Each verb calls its function with arguments that the function's signature takes; its answer is the status."""
    module, _, name = target.rpartition(".")
    function = create_autospec(getattr(importlib.import_module(module), name), return_value=3)
    monkeypatch.setattr(f"{module}.{name}", function)
    assert main(command.split()) == (0 if name == "build" else 3)
    call = function.call_args
    assert [*call.args, *call.kwargs.values()] == given


def raising(error: BaseException) -> Any:
    def run(*args: Any, **kwargs: Any) -> int:
        raise error

    return run


def test_user_error_is_its_message_and_status_2(monkeypatch, capsys) -> None:
    monkeypatch.setattr("unirg.stages.train", raising(UserError("study 7: no image")))
    assert main(["train", "r.yaml"]) == 2
    assert capsys.readouterr().err == "study 7: no image\n"


def test_other_errors_keep_their_traceback(monkeypatch) -> None:
    monkeypatch.setattr("unirg.stages.train", raising(ValueError("a fault of ours")))
    with pytest.raises(ValueError, match="a fault of ours"):
        main(["train", "r.yaml"])


def test_stopped_training_says_how_to_go_on(monkeypatch, capsys) -> None:
    monkeypatch.setattr("unirg.stages.train", raising(Stopped(15)))
    assert main(["train", "r.yaml"]) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM: the same command goes on from the last checkpoint\n"


def test_interrupted_training_says_how_to_go_on(monkeypatch, capsys) -> None:
    monkeypatch.setattr("unirg.stages.train", raising(KeyboardInterrupt()))
    assert main(["train", "r.yaml"]) == 130
    assert capsys.readouterr().err == "interrupted: the same command goes on from the last checkpoint\n"


@pytest.mark.parametrize(
    "command", ["", "fly", "train", "train r.yaml --speed 3", "train r.yaml --output", "report x y=1", "recipe"]
)
def test_wrong_arguments_are_status_2(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as raised:
        main(command.split())
    assert raised.value.code == 2
    assert "usage: unirg" in capsys.readouterr().err


def test_broken_recipe_fails_at_once_without_a_traceback(tmp_path: Path, capsys) -> None:
    (tmp_path / "r.yaml").write_text("name: x\nstagez: []\n", encoding="utf-8")
    assert main(["train", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "run")]) == 2
    complaint = capsys.readouterr().err
    assert f"{tmp_path}/r.yaml:2: stagez: unknown key; did you mean 'stages'?" in complaint
    assert "Traceback" not in complaint
    assert not (tmp_path / "run").exists()


def test_every_shipped_recipe_is_valid_and_resolves_to_itself(tmp_path: Path) -> None:
    from unirg.recipe.load import dump_recipe, load_recipe

    recipes = sorted((ROOT / "recipes").rglob("*.yaml"))
    assert recipes
    for path in recipes:
        recipe = load_recipe(path)
        (tmp_path / "resolved.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(tmp_path / "resolved.yaml") == recipe, path


def test_recipe_check_reads_folders_and_names_every_bad_file(tmp_path: Path, capsys) -> None:
    good = sorted((ROOT / "recipes").rglob("*.yaml"))[0]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "good.yaml").write_text(f"base: {good}\n", encoding="utf-8")
    (tmp_path / "bad.yaml").write_text(f"base: {good}\nsede: 1\n", encoding="utf-8")
    assert main(["recipe", "check", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert f"{tmp_path}/deep/good.yaml: ok" in out
    assert err == f"{tmp_path}/bad.yaml:2: sede: unknown key; did you mean 'seed'?\n"
    assert main(["recipe", "check", str(tmp_path / "deep")]) == 0
    (tmp_path / "empty").mkdir()
    assert main(["recipe", "check", str(tmp_path / "empty")]) == 2


def test_reference_page_is_up_to_date(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["recipe", "docs", "--check"]) == 0


def test_stale_reference_page_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    assert main(["recipe", "docs", str(page), "--check"]) == 1
    assert main(["recipe", "docs", str(page)]) == 0
    assert main(["recipe", "docs", str(page), "--check"]) == 0
    page.write_text(page.read_text(encoding="utf-8") + "an edit\n", encoding="utf-8")
    assert main(["recipe", "docs", str(page), "--check"]) == 1


def test_python_m_unirg_answers_help_without_torch() -> None:
    """torchrun starts the same command line; help and bad arguments cost no import of torch."""
    code = "import sys, unirg.cli; print('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
    shown = subprocess.run([sys.executable, "-m", "unirg", "--version"], capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (0, f"{unirg.__version__}\n")


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    """`unirg ... | head`: the pipe is closed before anything is written."""
    (tmp_path / "r.jsonl").write_text('{"id": "s1", "report": "No effusion."}\n', encoding="utf-8")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "unirg", "extract", str(tmp_path / "r.jsonl"), "--json"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
