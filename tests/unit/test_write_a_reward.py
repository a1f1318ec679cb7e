"""docs/write_a_reward.md says what happens: its code is run, its output is compared, its recipe is read."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from unirg.cli import main
from unirg.recipe.load import load_recipe
from unirg.scoring.new_reward import new_reward

PAGE = (Path(__file__).parents[2] / "docs" / "write_a_reward.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
SHOWN = [text for kind, text in BLOCKS if not kind]
REFERENCE = '{"id": "s1", "report": "Small left pleural effusion. No pneumothorax."}\n'
CANDIDATE = '{"id": "s1", "report": "Left pleural effusion. The heart is enlarged."}\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return new_reward("finding_share", tmp_path)


@pytest.mark.parametrize(("code", "shown"), [(PYTHON[0], SHOWN[0]), (PYTHON[1], SHOWN[1])], ids=["first", "mended"])
def test_the_check_says_of_each_version_what_the_page_shows(folder: Path, capsys, code: str, shown: str) -> None:
    (folder / "finding_share.py").write_text(code)
    assert main(["rewards", "check", "finding_share/finding_share.py:finding_share"]) == 0
    said = capsys.readouterr().out
    position = 0
    for line in shown.strip().splitlines():  # some of the lines, in order
        assert line in said[position:], line
        position = said.index(line, position)


def test_the_mended_version_passes_the_pages_test_and_has_the_score_it_says(folder: Path, capsys) -> None:
    (folder / "finding_share.py").write_text(PYTHON[1])
    scope: dict = {"REPORT": "Small left pleural effusion. No pneumothorax."}
    exec(PYTHON[1] + PYTHON[2], scope)
    scope["test_it_ranks_reports"]()
    for name, line in (("references", REFERENCE), ("candidates", CANDIDATE)):
        assert line.strip() in PAGE
        Path(f"{name}.jsonl").write_text(line)
    files = ["--references", "references.jsonl", "--candidates", "candidates.jsonl"]
    assert main(["score", "--rewards", "finding_share/finding_share.py:finding_share,rouge_l", *files]) == 0
    score = capsys.readouterr().out.splitlines()[1].split("\t")[1]
    assert f"prints {score} for the first" in PAGE


def test_the_recipe_is_valid(tmp_path: Path) -> None:
    (text,) = [text for kind, text in BLOCKS if kind == "yaml"]
    (tmp_path / "trial.yaml").write_text(text)
    (stage,) = load_recipe(tmp_path / "trial.yaml").stages
    assert [reward.name for reward in stage.rewards] == ["finding_share", "repetition"]


def test_the_files_for_other_trainers_work(monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = ModuleType("swift.rewards")
    rewards.orms = {}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "swift", ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.rewards", rewards)
    _, verl, easyr1, swift = PYTHON[3:]
    report = "Small left pleural effusion."
    for code, call in (
        (verl, lambda scope: scope["compute_score"]("cxr", report, report, {})),
        (easyr1, lambda scope: scope["compute_score"]([{"response": report, "ground_truth": report}])[0]["overall"]),
        (swift, lambda _: rewards.orms["finding_share"]()([report], solution=[report])[0]),  # type: ignore[attr-defined]
    ):
        scope: dict = {}
        exec(code.replace('reward("finding_share"', 'reward("entity_f1"'), scope)
        assert call(scope) == 1.0
