"""A third party's package, installed by pip, in use: listed, checked, scored with, trained on by name.

Everything runs in processes of its own, whose only knowledge of the packages is the folder they were installed into.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from unirg.scoring.new_reward import new_reward

PLUGIN = Path(__file__).parents[1] / "plugin_package"
BROKEN = '[project.entry-points."unirg.rewards"]\nbroken = "example_report_rewards.missing:nothing"\n'
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies to build from: the package of these tests with one entry point more, which is broken, and the package
    that `unirg rewards new` writes."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(PLUGIN, folder / "plugin_package")
    project = folder / "plugin_package" / "pyproject.toml"
    project.write_text(project.read_text().replace(BROKEN.partition("\n")[0] + "\n", BROKEN))
    new_reward("fresh_reward", folder)
    return folder


@pytest.fixture(scope="module")
def unirg(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A Python with both packages installed, run in a folder: `-m unirg` or whatever else."""
    site = tmp_path_factory.mktemp("site")
    install = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        str(site),
    ]
    packages = [str(source / name) for name in ("plugin_package", "fresh_reward")]
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *install, *packages], check=True)

    def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)

    return run


def test_entry_points_are_listed_and_a_broken_one_hides_nothing(unirg: Run, tmp_path: Path) -> None:
    done = unirg("-m", "unirg", "rewards", "--json", cwd=tmp_path)
    listed = {reward["name"]: reward for reward in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0
    assert listed["words_near"]["package"] == listed["says_side"]["package"] == "example-report-rewards"
    assert listed["words_near"]["measures"] == "Whether the report has about as many words as the reference."
    assert listed["says_side"]["needs"] == "studies with labels that have sides, such as effusion/left"
    assert listed["fresh_reward"]["package"] == "fresh-reward" and listed["fresh_reward"]["error"] is None
    assert "ModuleNotFoundError" in listed["broken"]["error"]
    assert listed["bleu"]["error"] is None
    done = unirg("-m", "unirg", "rewards", "check", "broken", cwd=tmp_path)
    assert done.returncode == 2
    assert "'broken' (example_report_rewards.missing:nothing) cannot be loaded: ModuleNotFoundError" in done.stderr


def test_a_name_that_is_installed_is_not_given_out_again(unirg: Run, tmp_path: Path) -> None:
    done = unirg("-m", "unirg", "rewards", "new", "words_near", cwd=tmp_path)
    assert done.returncode == 2 and "a reward 'words_near' is installed already" in done.stderr


@pytest.mark.parametrize("name", ["words_near(tolerance=3)", "says_side", "fresh_reward"])
def test_an_installed_name_is_checked(unirg: Run, tmp_path: Path, name: str) -> None:
    done = unirg("-m", "unirg", "rewards", "check", name, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{name} keeps the contract." in done.stdout and "What a policy would learn" in done.stdout


@pytest.mark.parametrize("package", ["plugin_package", "fresh_reward"])
def test_its_own_tests_pass_where_it_is_installed(unirg: Run, source: Path, package: str) -> None:
    done = unirg("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", cwd=source / package)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr


def test_files_are_scored_by_name(unirg: Run, tmp_path: Path) -> None:
    labels = {"effusion": 1, "effusion/left": 1}
    references = [{"id": "a", "report": "Left effusion.", "labels": labels}, {"id": "b", "report": "Clear."}]
    candidates = [{"id": "a", "report": "Erguss links."}, {"id": "b", "report": "Clear lungs."}]
    for name, rows in (("r", references), ("c", candidates)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards = "words_near(tolerance=0),says_side(language=de)"
    files = ["--references", "r.jsonl", "--candidates", "c.jsonl", "--json"]
    done = unirg("-m", "unirg", "score", "--rewards", rewards, *files, cwd=tmp_path)
    assert [list(json.loads(line).values()) for line in done.stdout.splitlines()] == [["a", 1.0, 1.0], ["b", 0.0, None]]


def test_a_recipe_trains_on_it_by_name(unirg: Run, tmp_path: Path) -> None:
    """Scored in a worker process, as any reward in training; the manifest has its identity, the rollouts its scores."""
    sizes = {"hidden": 64, "heads": 2, "layers": 2, "mlp": 96, "vision_hidden": 32, "vision_layers": 2}
    stage = {
        "name": "grpo",
        "kind": "grpo",
        "steps": 1,
        "studies_per_step": 2,
        "group_size": 2,
        "sampling": {"max_new_tokens": 6},
        "optimiser": {"learning_rate": 1e-3},
        "rewards": [
            {"name": "words_near", "options": {"tolerance": 100}},
            {"name": "says_side", "label": "sides", "weight": 0.5, "options": {"language": "de"}},
            {"name": "fresh_reward"},
        ],
    }
    recipe = {
        "name": "plugin",
        "output": "run",
        "threads": 1,
        "data": {"adapter": "phantom", "train": 8, "dev": 2, "test": 0, "unseen": 0, "size": 64},
        "prompt": {"style": "short"},
        "policy": {"tiny": {"vocabulary": 400, "image_size": 64, **sizes}, "max_prompt_tokens": 200},
        "stages": [stage],
        "evaluation": {"splits": ["dev"], "metrics": [{"name": "words_near"}], "draws": 20},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = unirg("-m", "unirg", "train", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert set(manifest["rewards"]["grpo"]) == {"words_near", "sides", "fresh_reward"}
    assert manifest["rewards"]["grpo"]["sides"]["language"] == "de"
    (record,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert record["rewards/words_near/mean"] == 1.0  # tolerance 100
    assert 0 <= record["rewards/fresh_reward/mean"] < 1 and record["rewards/fresh_reward/masked"] == 0
    assert "rewards/sides/masked" in record
