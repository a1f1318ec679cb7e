"""`unirg evaluate`, `generate` and `compare` on a synthetic run folder; generation itself is replaced."""

import io
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

import unirg.rollout
from unirg.cli import main
from unirg.errors import UserError
from unirg.evaluation import command
from unirg.evaluation import run as runs
from unirg.evaluation.table import DRAWN_FILMS, render_evaluation
from unirg.prompt import report_text
from unirg.recipe.load import dump_recipe, load_recipe
from unirg.run import final_folder, update_manifest
from unirg.study import Study

RECIPE = {
    "name": "small",
    "data": {"adapter": "phantom", "train": 20, "dev": 8, "test": 12, "unseen": 4, "size": 32},
    "policy": {"tiny": {}},
    "stages": [
        {"kind": "sft", "name": "warm", "steps": 1, "optimiser": {"learning_rate": 0.001}, "sees": "the reports"},
        {"kind": "sft", "name": "more", "steps": 1, "optimiser": {"learning_rate": 0.001}},
        {"kind": "sft", "name": "unfinished", "steps": 1, "optimiser": {"learning_rate": 0.001}},
    ],
    "evaluation": {"splits": ["test"], "baseline": "warm", "draws": 50},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two finished stages."""
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe(tmp_path / "recipe.yaml")))
    for stage in ("warm", "more"):
        final_folder(folder, stage).mkdir(parents=True)
        (final_folder(folder, stage) / "model.safetensors").write_bytes(b"")
    update_manifest(folder, stages={"warm": {"seconds": 12.0, "cpu_seconds": 11.0}})
    return folder


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the policy: stage "warm" writes reports as they are, "more" the complete ones; one entry per batch."""
    calls: list[str] = []

    def generate(policy: str, studies: Sequence[Study], *, temperature: float, **_: Any) -> list[SimpleNamespace]:
        calls.append(f"{policy} {temperature:g}")
        texts = [s.extra["complete"] if policy == "more" else report_text(s) for s in studies]
        return [SimpleNamespace(id=s.id, text=text, truncated=False) for s, text in zip(studies, texts, strict=True)]

    monkeypatch.setattr(unirg.rollout, "generate_reports", generate)
    monkeypatch.setattr(runs, "report_writer", lambda recipe, folder, _: nullcontext((folder.parent.name, None)))
    return calls


def test_evaluate_writes_reports_figures_samples_and_page(
    run: Path, generated: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.evaluate(run, as_json=True) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((run / "evaluation" / "test.json").read_text())
    assert generated == ["warm 0", "warm 1", "more 0", "more 1"]
    assert list(printed["arms"]) == ["warm", "more"]  # the unfinished stage is left out
    assert printed["arms"]["warm"]["sees"] == "the reports" and printed["arms"]["warm"]["seconds"] == 12.0
    assert printed["arms"]["more"]["metrics"]["truth_f1"]["mean"] == 1.0
    assert printed["versus"]["more"]["truth_f1"]["difference"] > 0
    assert (run / "predictions" / "test" / "more.sampled.jsonl").exists()
    page = (run / "report.html").read_text()
    assert DRAWN_FILMS in page and "data:image/png;base64," in page


def test_the_recipe_can_be_overridden(run: Path, generated: list[str]) -> None:
    """And is not written anew: where its servers are now is nothing that a later run should find in it."""
    before = (run / "recipe.yaml").read_text()
    assert main(["evaluate", str(run), "--stages", "more", "evaluation.sampled=false"]) == 0
    assert generated == ["more 0"] and (run / "recipe.yaml").read_text() == before


def test_reports_on_disk_are_used_again_unless_the_policy_is_newer(run: Path, generated: list[str]) -> None:
    runs.evaluate_run(run, "test")
    generated.clear()
    runs.evaluate_run(run, "test")
    assert generated == []
    path = run / "predictions" / "test" / "more.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]) + '{"id": "x", "rep')
    runs.evaluate_run(run, "test")
    assert generated == ["more 0"]  # goes on with the rest
    generated.clear()
    newer = path.stat().st_mtime + 60
    os.utime(final_folder(run, "more") / "model.safetensors", (newer, newer))
    runs.evaluate_run(run, "test", stages=["warm", "more"])
    assert generated == ["more 0", "more 1"]


def test_wrong_names_and_folders_are_refused_before_any_work(run: Path, generated: list[str], tmp_path: Path) -> None:
    for options, message in (
        ({"stages": ["mor"]}, r"no stage 'mor'.*warm, more"),
        ({"stages": ["warm", "unfinished"]}, r"'unfinished' is not finished"),
        ({"baseline": "sft"}, r"--baseline sft"),
    ):
        with pytest.raises(UserError, match=message):
            runs.evaluate_run(run, "test", **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not a run folder"):
        command.evaluate(tmp_path / "nowhere")
    assert generated == []


def test_table_fits_120_columns_and_says_what_must_be_said(run: Path, generated: list[str]) -> None:
    evaluation = runs.evaluate_run(run, "test")
    evaluation["arms"] |= {f"{name}_arm": evaluation["arms"]["more"] for name in ("third", "fourth", "fifth")}
    evaluation["versus"] |= {f"{name}_arm": evaluation["versus"]["more"] for name in ("third", "fourth", "fifth")}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render_evaluation(evaluation))
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 120
    assert "…" not in text  # nothing is cut
    wanted = [DRAWN_FILMS, "the reports", "12 s", "perfect reporter", "best constant", "negations F1", "films shuffled"]
    wanted += [
        "sampled",
        "label F1",
        "against complete references",
        "difference from warm",
        "cardiomegaly",
        "duplicate reports",
    ]
    assert [words for words in wanted if words not in text] == []


def test_generate_skips_what_is_there(run: Path, generated: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert command.generate(run, out, stage="more") == 0
    lines = out.read_text().splitlines()
    out.write_text("\n".join(lines[:3]) + "\n")
    assert command.generate(run, out, stage="more") == 0
    assert out.read_text().splitlines() == lines and len(lines) == 12
    model = final_folder(run, "warm")
    with pytest.raises(UserError, match="--data"):
        command.generate(model, tmp_path / "o.jsonl")
    assert command.generate(model, tmp_path / "o.jsonl", data=tmp_path / "recipe.yaml", split="dev") == 0
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 8
    with pytest.raises(UserError, match="no stage 'best'"):
        command.generate(run, out, stage="best")


def test_compare_with_and_without_the_data(
    run: Path, generated: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    command.generate(run, a, stage="warm")
    command.generate(run, b, stage="more")
    capsys.readouterr()
    assert command.compare(a, b, as_json=True) == 0
    bare = json.loads(capsys.readouterr().out)["differences"]
    assert command.compare(a, b, data=run / "recipe.yaml", as_json=True) == 0
    known = json.loads(capsys.readouterr().out)["differences"]
    assert known["truth_f1"]["difference"] > 0 and "truth_f1" not in bare
    assert bare["positive_f1"] == known["positive_f1"] and bare["positive_f1/complete"]["difference"] > 0
    assert command.compare(a, b) == 0
    assert "b.jsonl minus a.jsonl" in capsys.readouterr().out


def test_compare_refuses_files_of_different_studies(run: Path, generated: list[str], tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    command.generate(run, a, stage="warm")
    b.write_text("".join(a.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=r"differ in 1 ids \(first: 'phantom-test-00000', only in .*a.jsonl\)"):
        command.compare(a, b)
    b.write_text(a.read_text().replace('"reference"', '"other"'))
    with pytest.raises(UserError, match=r"b.jsonl: 'phantom-test-00000' has no \"reference\""):
        command.compare(a, b)
