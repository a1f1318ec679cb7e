"""recipes/unirg_cxr.yaml, the very file: its published settings, and its three stages on a tiny policy, with look-alike
models in the official formats and a judge that fails now and then."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from tests.encoders import chexbert_folder, roberta_folder
from tests.judge_server import JudgeServer, answer, serve
from tests.radgraph_archives import write_archive
from unirg.cli import main
from unirg.recipe.load import load_recipe
from unirg.recipe.schema import GrpoStage
from unirg.run import final_folder
from unirg.stages import run_stage

# Old names that peft uses, too; unirg/stages.py ignores the warning, and pytest resets what it ignores.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

RECIPE = Path(__file__).parents[2] / "recipes" / "unirg_cxr.yaml"
ERRORS = 2  # one significant, one insignificant, in every answer of the judge

# The figure that chooses the best policy falls from one evaluation to the next, so that the best is never the last.
FALLING = """
class Falling:
    calls = 0

    def score(self, candidates, references, **columns):
        self.calls += 1
        return [1 / self.calls] * len(candidates)
"""


def test_what_is_published_is_what_the_recipe_says() -> None:
    recipe = load_recipe(RECIPE)
    assert recipe.policy.model == "Qwen/Qwen3-VL-8B-Instruct" and recipe.policy.image_size == 512
    sft, first, second = recipe.stages
    assert (sft.kind, sft.studies_per_step, sft.optimiser.learning_rate) == ("sft", 256, 5e-5)
    for stage in (first, second):
        assert isinstance(stage, GrpoStage)
        assert (stage.group_size, stage.studies_per_step, stage.optimiser.learning_rate) == (16, 256, 5e-6)
        assert stage.loss.clip_high is not None and stage.loss.clip_high > stage.loss.clip_low
        assert stage.aggregation == "sum_then_normalise" and stage.keep == "best"
    assert isinstance(first, GrpoStage) and isinstance(second, GrpoStage)
    assert (first.loss.kl, second.loss.kl) == (0, 0.03)
    assert [(reward.name, reward.weight) for reward in first.rewards] == [("r1", 1.0)]
    assert [(reward.name, reward.weight) for reward in second.rewards] == [("r1", 1.0), ("judge_errors", 0.5)]
    # the second starts from the first's best, and is held to it
    assert recipe.start_of(second) == first.name and second.kl.reference == "start"
    corpus = 563_494
    assert [round(stage.steps * 256 / corpus) for stage in recipe.stages] == [3, 1, 1]


def test_weights_named_once_serve_every_stage_and_the_evaluation() -> None:
    overrides = [f"stages.grpo_r1.rewards.r1.options.{part}.model_folder={part}" for part in ("radgraph", "chexbert")]
    recipe = load_recipe(RECIPE, overrides)
    rewards = [reward for stage in recipe.stages if isinstance(stage, GrpoStage) for reward in stage.rewards]
    for reward in [*rewards, *recipe.evaluation.metrics]:
        if reward.name in ("r1", "radcliq"):
            assert reward.options["radgraph"] == {"model_folder": "radgraph"} and reward.options["bertscore"] == {}
        if reward.name == "chexbert":
            assert reward.options == {"model_folder": "chexbert"}


def test_the_recipe_can_be_audited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random weights do not say which trick pays on a draft. That an exact match is never beaten holds for any."""
    one = "stages.grpo_r1.rewards.r1.options"
    judge_options = "stages.grpo_errors.rewards.judge_errors.options"
    with serve(answer(location=1)) as judge:
        overrides = {
            "data": "{adapter: phantom, train: 5}",
            f"{one}.radgraph.model_folder": write_archive(tmp_path / "radgraph", "radgraph"),
            f"{one}.bertscore.model_folder": roberta_folder(tmp_path / "distilroberta-base", layers=5),
            f"{one}.chexbert.model_folder": chexbert_folder(tmp_path / "chexbert"),
            "stages.grpo_r1.rewards.r1.device": "cpu",
            "stages.grpo_errors.rewards.r1.device": "cpu",
            f"{judge_options}.base_url": judge.base_url,
            f"{judge_options}.cache": tmp_path / "judge.sqlite",
        }
        capsys.readouterr()
        status = main(["audit", str(RECIPE), "--json", *(f"{key}={value}" for key, value in overrides.items())])
    stages = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [stage["name"] for stage in stages] == ["grpo_r1", "grpo_errors"]
    assert status == (0 if all(stage["passes"] for stage in stages) else 1)
    assert stages[1]["how"] == "1 r1 + 0.5 judge_errors"
    sums = [next(subject for subject in stage["subjects"] if subject["decides"]) for stage in stages]
    for found in sums:
        assert "wins" not in {outcome["verdict"] for outcome in found["outcomes"]["own"].values()}
        assert all(found["outcomes"][base]["empty"]["verdict"] == "loses" for base in ("own", "draft"))
    assert sums[1]["unchanged"]["own"] == pytest.approx(sums[0]["unchanged"]["own"] + 0.5 * 1 / 2)


@dataclass
class Trained:
    """A finished run, and the judge that it asked."""

    run: Path
    judge: JudgeServer

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return [record for record in records if record["stage"] == stage]

    def rollouts(self, stage: str) -> list[dict[str, Any]]:
        files = sorted((self.run / "rollouts" / stage).iterdir())
        return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]


def unsteady(body: dict[str, Any], number: int) -> str | int:
    """Every third request is refused for good."""
    return 400 if number % 3 == 2 else answer(location=1, insignificant_severity=ERRORS - 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("unirg_cxr")
    (folder / "falling.py").write_text(FALLING)
    weights = {
        "radgraph": write_archive(folder / "radgraph", "radgraph"),
        "bertscore": roberta_folder(folder / "distilroberta-base", layers=5),
        "chexbert": chexbert_folder(folder / "chexbert"),
    }
    tiny = "vocabulary: 400, hidden: 64, heads: 2, layers: 2, mlp: 96, vision_hidden: 32, vision_layers: 2"
    small = {
        "output": folder / "run",
        "threads": 1,
        "data": "{adapter: phantom, train: 12, dev: 3, test: 2}",
        "policy.model": "null",
        "policy.tiny": f"{{{tiny}, image_size: 64}}",
        "policy.image_size": 64,
        "policy.dtype": "float32",
        "evaluation.splits": "[dev]",
        "evaluation.draws": 20,
        "evaluation.headline": "falling",
        "evaluation.metrics.bleu": f"{{name: '{folder / 'falling.py'}:Falling', label: falling, worker: false}}",
    }
    for metric in ("radcliq", "r1", "chexbert"):  # in this process, where each model is loaded once
        small |= {f"evaluation.metrics.{metric}.device": "cpu", f"evaluation.metrics.{metric}.worker": "false"}
    for stage in ("sft", "grpo_r1", "grpo_errors"):
        small |= {f"stages.{stage}.steps": 2, f"stages.{stage}.studies_per_step": 2}
        small[f"stages.{stage}.evaluate_every"] = 1
    for stage in ("grpo_r1", "grpo_errors"):
        small |= {f"stages.{stage}.group_size": 4, f"stages.{stage}.sampling.max_new_tokens": 12}
        small[f"stages.{stage}.rewards.r1.device"] = "cpu"
        small[f"stages.{stage}.optimiser.learning_rate"] = (
            5e-3  # by the published one, two steps change next to nothing
        )
    for part, path in weights.items():
        small[f"stages.grpo_r1.rewards.r1.options.{part}.model_folder"] = path
    with serve(unsteady) as judge:
        options = "stages.grpo_errors.rewards.judge_errors.options"
        small |= {f"{options}.base_url": judge.base_url, f"{options}.cache": folder / "judge.sqlite"}
        assert main(["train", str(RECIPE), *(f"{key}={value}" for key, value in small.items())]) == 0
    return Trained(folder / "run", judge)


def test_r1_alone_is_the_first_stages_reward(trained: Trained) -> None:
    assert len(trained.metrics("sft")) == len(trained.metrics("grpo_r1")) == 2
    rows = trained.rollouts("grpo_r1")
    assert len(rows) == 2 * 2 * 4
    assert all(row["reward"] == pytest.approx(row["scores.r1"], abs=1e-6) for row in rows)
    assert len({row["scores.r1"] for row in rows}) > 1
    assert all("kl" not in record for record in trained.metrics("grpo_r1"))


def test_the_judges_errors_weigh_half_beside_r1(trained: Trained) -> None:
    judged = [row for row in trained.rollouts("grpo_errors") if row["scores.judge_errors"] is not None]
    assert any(row["candidate"] for row in judged)
    for row in judged:
        value = 1 / (1 + ERRORS) if row["candidate"] else 0
        assert row["scores.judge_errors"] == pytest.approx(value)
        assert row["reward"] == pytest.approx(row["scores.r1"] + 0.5 * value, abs=1e-6)


def test_a_judge_that_fails_now_and_then_masks_reports_and_the_run_goes_on(trained: Trained) -> None:
    rows, records = trained.rollouts("grpo_errors"), trained.metrics("grpo_errors")
    lost = [row for row in rows if row["scores.judge_errors"] is None]
    assert 0 < len(lost) < len(rows) and len(records) == 2
    assert all(row["reward"] is None and row["scores.r1"] is not None and not row["trained"] for row in lost)
    assert sum(record["masked_samples"] for record in records) == len(lost)
    assert sum(record["rewards/judge_errors/masked"] for record in records) == pytest.approx(2 * len(lost) / len(rows))
    assert all(record["rewards/judge_errors/failed"] == 0 for record in records)  # no call of the reward was lost
    assert {body["model"] for body in trained.judge.bodies} == {"Qwen/Qwen3-30B-A3B-Instruct-2507"}


def test_the_second_stage_is_held_to_the_firsts_best(trained: Trained, tmp_path: Path) -> None:
    assert [record["eval/falling"] for record in trained.metrics("grpo_r1")] == pytest.approx([1, 1 / 3])
    # what the first stage left is its policy of step 1, the best, and not that of step 2, the last
    shutil.copytree(trained.run / "stages" / "sft", tmp_path / "stages" / "sft")
    ends_there = load_recipe(trained.run / "recipe.yaml", ["stages.grpo_r1.steps=1", "stages.grpo_r1.keep=last"])
    run_stage(ends_there, tmp_path, ends_there.stages[1])
    left, best = (load_file(final_folder(run, "grpo_r1") / "model.safetensors") for run in (trained.run, tmp_path))
    assert left.keys() == best.keys() and all(torch.equal(left[name], best[name]) for name in left)
    # where the second starts it is its own reference, and then it moves away
    start, then = (record["kl"] for record in trained.metrics("grpo_errors"))
    assert abs(start) < 1e-8 and then > 1e-4


def test_the_evaluation_has_the_figures_that_papers_print(trained: Trained) -> None:
    evaluation = json.loads((trained.run / "evaluation" / "dev.json").read_text())
    for arm in evaluation["arms"].values():
        metrics = arm["metrics"]
        assert metrics["radcliq.reciprocal"]["mean"] == pytest.approx(-1 / metrics["radcliq"]["mean"], rel=1e-4)
        for figure in ("micro_14", "macro_14", "micro_5", "macro_5"):
            assert f"chexbert.{figure}" in metrics
    assert "radcliq.reciprocal" in evaluation["versus"]["grpo_r1"]
