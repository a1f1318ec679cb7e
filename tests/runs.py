"""Runs of stages for tests: their folder made, started, and what they logged."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from unirg import run as run_folder
from unirg.recipe.load import dump_recipe, load_recipe

STAGES = ("vision", "sft", "grpo")
ENDS = "import torch.distributed, unirg.process\ntorch.distributed.destroy_process_group()\nunirg.process.end(0)\n"
"""As a run's ranks end: the interpreter's own end may meet one of torch's threads, and abort."""


def prepare(folder: Path, name: str, recipe: str, reward: str, *overrides: str) -> Path:
    """A run folder with the resolved recipe, ready for its stages; the reward is in the file that it names."""
    (folder / "tests_reward.py").write_text(reward)
    (folder / f"{name}.yaml").write_text(recipe.format(output=folder / name))
    resolved = load_recipe(folder / f"{name}.yaml", list(overrides))
    run_folder.open_run(Path(resolved.output), dump_recipe(resolved))
    return Path(resolved.output)


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"} | more


def trajectory(run: Path) -> list[dict[str, Any]]:
    """What the stages logged, but for times."""
    records = [r for stage in STAGES for r in run_folder.read_metrics(run / "stages" / stage)]
    return [{k: v for k, v in record.items() if not k.startswith("time")} for record in records]


def on_two_ranks(folder: Path, script: str, *arguments: str) -> None:
    """Runs a script of Python on two ranks; each ends by saying that it found `the same`."""
    path = folder / "script.py"
    path.write_text(script + ENDS)
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path), *arguments]
    here = environment(PYTHONPATH=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, *run], capture_output=True, text=True, env=here)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the same") == 2
