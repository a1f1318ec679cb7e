"""How wrong `unirg plan` is: its seconds beside those of real steps, phase by phase.

    python benchmarks/plan_error.py               # a few steps of two small policies here, about two minutes
    python benchmarks/plan_error.py runs/demo     # a run's own metrics.jsonl, of a run made on this machine

Without a run, plan and steps are both in CPU seconds of one thread: on a machine that others use too, wall time
measures them. With one, both are wall time, the plan's with torch's own number of threads or the recipe's. The plan is
given the report lengths that were sampled, so that the ratio is the error of the counting and of the rates alone.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import torch
from rich.console import Console
from rich.table import Table

from unirg import sft
from unirg.data import load_studies
from unirg.grpo import loop
from unirg.plan.command import with_servers
from unirg.plan.compute import stage_cost
from unirg.plan.machine import Cluster, Machine, machine, measured_cpu
from unirg.plan.memory import weights_of
from unirg.plan.policy import plan_policy
from unirg.plan.stage import Setting, plan_stage
from unirg.recipe.load import load_recipe
from unirg.recipe.schema import GrpoStage, OptimiserConfig, Recipe, SftStage, StageConfig
from unirg.rollout.hf import HFSampler
from unirg.run import read_metrics, stage_folder
from unirg.scoring.contract import RewardConfig
from unirg.scoring.engine import ScoringEngine

PHASES = {
    "sampling": (["prefill", "decode", "weights for sampling"], ["time/sampling"]),
    "log-probs": (["reference", "forward"], ["time/logps"]),
    "backward": (["backward"], ["time/backward"]),
}
Rows = Sequence[dict[str, Any]]
Clock = Callable[[], float]


def compare(
    recipe: Recipe, stage: StageConfig, rows: Rows, device: Machine, step: str, world: int = 1, clock: Clock = time.time
) -> list[dict[str, Any]]:
    """Predicted and measured seconds of each phase on one rank, medians over the steps but the first; `step` names the
    whole's."""
    rows = rows[1:]
    policy, lengths = plan_policy(recipe, None, None, clock)
    if isinstance(stage, GrpoStage):
        mean = statistics.median(row["completions/mean_length"] for row in rows)
        longest = statistics.median(row["completions/max_length"] for row in rows)
        lengths = replace(lengths, report=round(mean), longest_report=round(longest))
    cost = stage_cost([(policy, 1.0)], lengths, recipe, stage, world)
    weights = weights_of(policy, stage)
    planned = plan_stage(
        Setting(recipe, stage, weights, cost, lengths, with_servers(recipe, Cluster(device, gpus=world)), {})
    )
    predicted = {name: phase["seconds"] for name, phase in planned["phases"].items()}
    measured = {name: statistics.median(row.get(name, 0.0) for row in rows) for name in rows[0] if "time/" in name}
    pairs = {
        name: (sum(predicted.get(p, 0.0) for p in ours), sum(measured[m] for m in theirs))
        for name, (ours, theirs) in PHASES.items()
        if all(m in measured for m in theirs)
    }
    pairs["step"] = (planned["step_seconds"], measured[step])
    return [
        {"policy": recipe.name, "stage": stage.name, "phase": name, "predicted": ours, "measured": theirs}
        for name, (ours, theirs) in pairs.items()
    ]


def small_runs(steps: int) -> list[dict[str, Any]]:
    """SFT and GRPO steps of the demo's policy on small films, and of one with six layers of 384 on large ones."""
    measure.one_thread()
    loop.Stopwatch = measure.CpuStopwatch
    scaled = {"hidden": 384, "layers": 6, "heads": 6, "mlp": 1152, "vision_hidden": 128, "vision_layers": 5}
    results = []
    for name, image, studies, sizes in (("tiny", 96, 16, {}), ("scaled", 320, 4, scaled)):
        shared = {"steps": steps, "studies_per_step": studies, "checkpoint_every": 10_000}
        shared["optimiser"] = OptimiserConfig(learning_rate=1e-5, schedule="constant", warmup=0)
        rewards = [RewardConfig(name="rouge_l", worker=False)]
        sampling = {"max_new_tokens": 64}
        grpo: dict[str, Any] = shared | {"rewards": rewards, "sampling": sampling}
        for stage in (
            SftStage(kind="sft", name="sft", **shared),
            GrpoStage(kind="grpo", name="grpo", **grpo),
            GrpoStage(kind="grpo", name="grpo_kl", **grpo | {"loss": {"kl": 0.03}}),
        ):
            device = measured_cpu(time.process_time)  # beside the steps: neighbours slow both
            print(device, file=sys.stderr)
            work = measure.our_stage(stage, studies * steps, image, **sizes)
            work.studies = load_studies(work.recipe.data, "train")  # none of its films is drawn yet
            if isinstance(stage, GrpoStage):
                reference = loop.load_reference(work)
                loop.run_grpo(work, HFSampler(work.policy), ScoringEngine(stage.rewards), None, reference)
            else:
                sft.run_sft(work, None)
            recipe = work.recipe.model_copy(update={"name": name})
            rows = read_metrics(work.folder)
            results += compare(recipe, stage, rows, device, "time/step_cpu", clock=time.process_time)
    return results


def of_run(folder: Path, gpu: str) -> list[dict[str, Any]]:
    """The stages of a run that logged steps, made on devices of that name."""
    recipe = load_recipe(folder / "recipe.yaml")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    device = machine(gpu)
    world = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["world_size"]
    results = []
    for stage in recipe.stages:
        rows = read_metrics(stage_folder(folder, stage.name))
        if len(rows) > 1:
            results += compare(recipe, stage, rows, device, "time/step", world)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="a run folder with metrics")
    parser.add_argument("--gpu", default="cpu", help="what the run was made on; default cpu, this one, measured now")
    parser.add_argument("--steps", type=int, default=6, help="steps of each small run; default 6")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        found = of_run(arguments.run, arguments.gpu) if arguments.run else small_runs(arguments.steps)
    if arguments.json:
        print(json.dumps(found))
    else:
        table = Table("policy", "stage", "phase")
        for column in ("predicted, s", "measured, s", "predicted / measured"):
            table.add_column(column, justify="right")
        for row in found:
            ratio = f"{row['predicted'] / row['measured']:.2f}" if row["measured"] else ""
            seconds = (f"{row['predicted']:.3f}", f"{row['measured']:.3f}")
            table.add_row(row["policy"], row["stage"], row["phase"], *seconds, ratio)
        Console().print(table)
