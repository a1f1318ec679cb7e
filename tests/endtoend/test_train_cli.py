"""`unirg train` on a user's own studies: from a recipe to a report, a second start, and input that is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from unirg.cli import main

REPORTS = (
    "There is a small left pleural effusion. The heart is enlarged.",
    "The lungs are clear. No pneumothorax or pleural effusion.",
    "Right lower lobe opacity, which may be pneumonia. Heart size is normal.",
    "Pacemaker in place. Mild cardiomegaly.",
)
REWARDS = [{"name": "bleu", "weight": 0.3, "options": {"variant": "sentence4"}}, {"name": "entity_f1", "weight": 0.7}]

Rows = dict[str, list[dict[str, Any]]]


def invented_rows() -> Rows:
    """Studies by split, four to one film each; the film's name is the study's id."""
    return {
        split: [
            {"id": f"{split}-{i}", "images": [f"{split}-{i}.png"], "indication": "Cough.", "findings": REPORTS[i % 4]}
            for i in range(count)
        ]
        for split, count in (("train", 8), ("dev", 4))
    }


def recipe(folder: Path) -> dict[str, Any]:
    optimiser = {"learning_rate": 1e-3}
    sizes = {"hidden": 64, "heads": 2, "layers": 2, "mlp": 96, "vision_hidden": 32, "vision_layers": 2}
    return {
        "name": "small",
        "output": str(folder / "run"),
        "threads": 1,
        "data": {"adapter": "jsonl", "files": {split: str(folder / f"{split}.jsonl") for split in ("train", "dev")}},
        "prompt": {"style": "short"},
        "policy": {"tiny": {"vocabulary": 400, "image_size": 64, **sizes}, "max_prompt_tokens": 120},
        "stages": [
            {
                "name": "sft",
                "kind": "sft",
                "steps": 4,
                "studies_per_step": 4,
                "evaluate_every": 2,
                "evaluate_studies": 3,
                "keep": "best",
                "checkpoint_every": 1,
                "optimiser": optimiser,
            },
            {
                "name": "grpo",
                "kind": "grpo",
                "steps": 2,
                "studies_per_step": 2,
                "group_size": 4,
                "sampling": {"max_new_tokens": 10},
                "rewards": REWARDS,
                "optimiser": optimiser,
            },
        ],
        "evaluation": {"splits": ["dev"], "metrics": REWARDS, "baseline": "sft", "draws": 50},
    }


def write(folder: Path, rows: Rows, settings: dict[str, Any]) -> Path:
    """Data, films and recipe in `folder`; returns the recipe's path."""
    rng = np.random.default_rng(0)
    for split, studies in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in studies))
        for row in studies:
            Image.fromarray(rng.integers(0, 255, (64, 64), dtype=np.uint8)).save(folder / f"{row['id']}.png")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(folder: Path) -> dict[Path, int]:
    """When each file was written; who holds the folder is written at every start."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of recipe and run after one start."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", str(write(folder, invented_rows(), recipe(folder)))]) == 0
    return folder


def test_the_run_folder_holds_what_is_promised(trained: Path) -> None:
    run = trained / "run"
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["seed"] == 0 and manifest["versions"]["torch"] and len(manifest["data"]["sft"]) == 64
    assert manifest["rewards"]["grpo"]["bleu"]["variant"] == "sentence4"
    assert manifest["stages"]["grpo"]["step"] == 2 and manifest["stages"]["sft"]["seconds"] > 0
    for stage in ("sft", "grpo"):
        left = {path.name for path in (run / "stages" / stage).iterdir() if path.name != ".lock"}
        assert left - {"workers"} == {"final", "metrics.jsonl"}, "checkpoints of a finished stage are removed"
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
            path.name for path in (run / "stages" / stage / "final").iterdir()
        }
    first, then = (load_file(run / "stages" / stage / "final" / "model.safetensors") for stage in ("sft", "grpo"))
    assert any(not first[name].equal(then[name]) for name in first)


def test_metrics_of_every_step(trained: Path) -> None:
    records = lines(trained / "run" / "metrics.jsonl")
    assert [(r["stage"], r["step"]) for r in records] == [("sft", i) for i in range(1, 5)] + [("grpo", 1), ("grpo", 2)]
    assert [r["step"] for r in records if "eval/positive_f1" in r] == [2, 4]
    for record in records[4:]:
        assert {"reward", "reward_std", "rewards/bleu/mean", "rewards/entity_f1/mean", "entropy", "loss"} <= set(record)
        assert {"monitor/unique_outputs", "monitor/all_normal", "monitor/entities"} <= set(record)
        parts = 0.3 * record["rewards/bleu/mean"] + 0.7 * record["rewards/entity_f1/mean"]
        assert record["rewards/entity_f1/masked"] > 0 or record["reward"] == pytest.approx(parts, abs=1e-6)


def test_rollouts_are_kept_with_scores(trained: Path) -> None:
    folder = trained / "run" / "rollouts" / "grpo"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000001.parquet", "step-000002.parquet"]
    rows = pyarrow.parquet.read_table(folder / "step-000001.parquet").to_pylist()
    assert len(rows) == 8 and len({row["study_id"] for row in rows}) == 2
    assert {"candidate", "reward", "advantage", "truncated", "scores.bleu", "scores.entity_f1"} <= set(rows[0])
    assert all(0 < row["length"] <= 10 for row in rows)


def test_predictions_evaluation_and_report(trained: Path) -> None:
    run = trained / "run"
    for name in ("sft", "grpo", "sft.sampled", "grpo.sampled"):
        rows = lines(run / "predictions" / "dev" / f"{name}.jsonl")
        assert [row["id"] for row in rows] == [f"dev-{i}" for i in range(4)]
        assert rows[0]["reference"] == f"Findings: {REPORTS[0]}"
    evaluation = json.loads((run / "evaluation" / "dev.json").read_text())
    assert list(evaluation["arms"]) == ["sft", "grpo"] and evaluation["baseline"] == "sft"
    figure = evaluation["arms"]["grpo"]["metrics"]["bleu"]
    assert figure["low"] <= figure["mean"] <= figure["high"]
    page = (run / "report.html").read_text()
    assert "entity_f1" in page and "dev-0" in page and "<script" not in page


def test_a_second_start_changes_nothing(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(trained / "run")
    assert main(["train", str(trained / "recipe.yaml")]) == 0
    said = capsys.readouterr().out
    assert "nothing to train" in said and "report.html" in said
    assert files(trained / "run") == before


def test_judged_anew_without_training_anew(trained: Path) -> None:
    weights = {path: when for path, when in files(trained / "run").items() if path.suffix == ".safetensors"}
    assert main(["train", str(trained / "recipe.yaml"), "evaluation.headline=bleu"]) == 0
    assert json.loads((trained / "run" / "evaluation" / "dev.json").read_text())["headline"] == "bleu"
    assert {path: path.stat().st_mtime_ns for path in weights} == weights


Break = Callable[[Path, Rows, dict[str, Any]], None]


def misspelt_key(folder: Path, rows: Rows, settings: dict[str, Any]) -> None:
    settings["stages"][1]["groupsize"] = settings["stages"][1].pop("group_size")


def missing_image(folder: Path, rows: Rows, settings: dict[str, Any]) -> None:
    rows["train"][3]["images"] = ["gone.png"]


def missing_dev_image(folder: Path, rows: Rows, settings: dict[str, Any]) -> None:
    rows["dev"][1]["images"] = ["gone.png"]


def corrupt_image(folder: Path, rows: Rows, settings: dict[str, Any]) -> None:
    rows["train"][5]["images"] = ["bad.png"]
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a film")


def empty_report(folder: Path, rows: Rows, settings: dict[str, Any]) -> None:
    rows["train"][2]["findings"] = "  "


def long_prompt(folder: Path, rows: Rows, settings: dict[str, Any]) -> None:
    rows["train"][6]["indication"] = "cough and fever " * 60


def large_film(folder: Path, rows: Rows, settings: dict[str, Any]) -> None:
    settings["policy"]["image_size"] = 512


def placeholder_in_the_text(folder: Path, rows: Rows, settings: dict[str, Any]) -> None:
    rows["train"][7]["indication"] = "cough <|image_pad|>"


def no_dev_split(folder: Path, rows: Rows, settings: dict[str, Any]) -> None:
    del settings["data"]["files"]["dev"]


def no_such_figure(folder: Path, rows: Rows, settings: dict[str, Any]) -> None:
    settings["evaluation"]["headline"] = "positive_f2"


def unknown_reward(folder: Path, rows: Rows, settings: dict[str, Any]) -> None:
    settings["stages"][1]["rewards"] = [{"name": "blue"}]


def column_that_is_not_there(folder: Path, rows: Rows, settings: dict[str, Any]) -> None:
    settings["stages"][1]["rewards"] = [{"name": "bleu", "reference": "complete"}]


def odd_shares(folder: Path, rows: Rows, settings: dict[str, Any]) -> None:
    settings["stages"][1] |= {"studies_per_step": 5, "studies_per_forward": 2}


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (misspelt_key, "groupsize"),
        (missing_image, "study train-3: missing image .*gone.png"),
        (missing_dev_image, "study dev-1: missing image .*gone.png"),
        (corrupt_image, "study train-5: corrupt image: .*bad.png"),
        (empty_report, "study train-2: empty report"),
        (long_prompt, "study train-6: its prompt has [0-9]+ tokens, policy.max_prompt_tokens allows 120"),
        (large_film, "study train-[0-9]: its prompt has [0-9]+ tokens"),
        (placeholder_in_the_text, "study train-7: its context holds '<.image_pad.>', a special token"),
        (no_dev_split, "no split 'dev'"),
        (no_such_figure, "evaluation.headline 'positive_f2' is no figure"),
        (unknown_reward, "blue"),
        (column_that_is_not_there, "reward 'bleu' takes column 'complete' as reference"),
        (odd_shares, "stage grpo: studies_per_step 5 must divide evenly"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_broken_input_is_one_line_before_any_training(
    spoil: Break, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, settings = invented_rows(), recipe(tmp_path)
    spoil(tmp_path, rows, settings)
    assert main(["train", str(write(tmp_path, rows, settings))]) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1, err
    assert re.search(named, err), err
    assert not (tmp_path / "run").exists() and "step" not in out


def test_all_bad_studies_are_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, settings = invented_rows(), recipe(tmp_path)
    for spoil in (missing_image, corrupt_image, empty_report):
        spoil(tmp_path, rows, settings)
    assert main(["train", str(write(tmp_path, rows, settings))]) == 2
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == [
        "study train-2",
        "study train-3",
        "study train-5",
    ]


@pytest.mark.slow
def test_stages_side_by_side_one_of_which_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What does not depend on the failure is finished; once it is put right, the same command does the rest. There is
    no dev split: nothing asks for one."""
    reward = tmp_path / "own.py"
    reward.write_text(
        "def own(candidates, references):\n"
        "    assert candidates == references, 'not today'\n"  # the check before training is passed
        "    return [1.0] * len(candidates)\n"
    )
    rows, settings = invented_rows(), recipe(tmp_path)
    rows["test"] = rows.pop("dev")
    settings["data"]["files"] = {split: str(tmp_path / f"{split}.jsonl") for split in rows}
    short = {"steps": 1, "studies_per_step": 2, "start": "policy"}
    sft, grpo = ({k: v for k, v in s.items() if k not in ("evaluate_every", "keep")} for s in settings["stages"])
    settings["stages"] = [sft | short, grpo | short | {"rewards": [{"name": f"{reward}:own", "on_error": "raise"}]}]
    settings |= {"jobs": 2, "evaluation": {"splits": ["test"], "sampled": False, "draws": 20}}
    path = str(write(tmp_path, rows, settings))

    assert main(["train", path]) == 2
    err = capfd.readouterr().err
    assert "grpo: reward 'own' failed on studies train-" in err and "not today" in err
    assert "stage grpo failed (its error stands above); the same command goes on from there" in err
    finals = {stage: tmp_path / "run" / "stages" / stage / "final" for stage in ("sft", "grpo")}
    assert finals["sft"].exists() and not finals["grpo"].exists()

    trained_at = (finals["sft"] / "model.safetensors").stat().st_mtime_ns
    reward.write_text("def own(candidates, references):\n    return [float(len(text)) for text in candidates]\n")
    assert main(["train", path]) == 0
    assert (finals["sft"] / "model.safetensors").stat().st_mtime_ns == trained_at and finals["grpo"].exists()
    assert set(json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]) == {"sft", "grpo"}
    evaluation = json.loads((tmp_path / "run" / "evaluation" / "test.json").read_text())
    assert list(evaluation["arms"]) == ["sft", "grpo"]
