"""One, two and four ranks, whole weights and sharded ones: one and the same trajectory; and a group of reports
never leaves its rank."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.parquet
import pytest

from tests.invariant import test_trajectories as trajectories
from unirg import signals
from unirg.process import end, joined
from unirg.recipe.load import load_recipe
from unirg.run import final_folder
from unirg.stages import run_stage
from unirg.steps import Steps

pytestmark = pytest.mark.slow

BASE = (
    "stages.sft.steps=3",
    "stages.grpo.steps=3",
    "stages.sft.studies_per_step=12",  # three studies on each of four ranks
    "stages.grpo.studies_per_step=12",
    "stages.grpo.sampling.max_new_tokens=8",
)
OPTIONS = {
    "whole policy": (
        "data.dev=5",  # uneven: ranks write different numbers of reports
        "stages.grpo.evaluate_every=2",
        "stages.grpo.keep=best",
        "stages.grpo.checkpoint_every=2",
    ),
    "adapters and everything": (
        "policy.lora={rank: 4}",
        "policy.gradient_checkpointing=true",
        "policy.freeze_vision=true",
        "stages.grpo.aggregation=normalise_then_sum",
        "stages.grpo.group_size=6",
        "stages.grpo.iterations=2",
        "stages.grpo.steps=4",
        "stages.grpo.train_on=3",
        "stages.grpo.mask_truncated=true",  # most groups of a random policy lose all of their reports
        "stages.grpo.resample=1",
        "stages.grpo.tokens_per_forward=60",  # groups are split, and ranks need different numbers of forwards
        "stages.grpo.sampling.max_new_tokens=40",
    ),
}
RUNS = {  # by the number of ranks
    1: (("whole policy", "ddp"), ("adapters and everything", "ddp")),
    2: (("whole policy", "ddp"), ("whole policy", "fsdp2"), ("adapters and everything", "fsdp2")),
    4: (("whole policy", "ddp"), ("whole policy", "fsdp2"), ("adapters and everything", "ddp")),
}
HANDED_OVER = {2: "fsdp2", 4: "ddp"}
"""One run that two ranks begin and four finish."""
TELLS = "    print(*(f'judged {i}' for i in columns['study_id']), sep='\\n', flush=True)\n    return"


def name_of(options: str, ranks: int, way: str) -> str:
    return f"{options.split()[0]}-{ranks}-{way}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(tmp_path_factory.mktemp("ranks"), RUNS, HANDED_OVER)


def make_runs(folder: Path, table: Mapping[int, Sequence[tuple[str, str]]], handed_over: Mapping[int, str]) -> Path:
    """All runs, those of as many ranks one after another in the same processes."""
    environment = trajectories.environment() | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for ranks, settings in table.items():
        runs = []
        for options, way in settings:
            overrides = (*BASE, *OPTIONS[options], f"distributed.strategy={way}")
            runs.append(str(trajectories.start(folder, name_of(options, ranks, way), *overrides)))
        if ranks in handed_over:
            overrides = (*BASE, *OPTIONS["whole policy"], f"distributed.strategy={handed_over[ranks]}")
            runs.append(str(trajectories.start(folder, "handed-over", *overrides)))
        (folder / "tests_reward.py").write_text(trajectories.REWARD.replace("    return", TELLS))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        done = subprocess.run(
            [sys.executable, *launch, "-m", "tests.invariant.test_ranks", *runs],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / f"said-{ranks}.txt").write_text(done.stdout)
    return folder


@pytest.mark.parametrize(("ranks", "options", "way"), [(n, *run) for n, runs in RUNS.items() if n > 1 for run in runs])
def test_the_same_trajectory(folder: Path, ranks: int, options: str, way: str) -> None:
    ours, expected = folder / name_of(options, ranks, way), folder / name_of(options, 1, "ddp")
    # Sums in another order: float32 rounding, amplified by AdamW, whose first steps divide by tiny moments.
    trajectories.assert_same(ours, expected, 2e-3, steps=len(trajectories.trajectory(expected)))


def test_another_number_of_ranks_and_another_layout_go_on(folder: Path) -> None:
    assert "goes on from step 2" in (folder / "said-4.txt").read_text()
    trajectories.assert_same(folder / "handed-over", folder / "whole-1-ddp", 2e-3, steps=8)


def test_everything_learns(folder: Path) -> None:
    for options in OPTIONS:
        records = trajectories.trajectory(folder / name_of(options, 1, "ddp"))
        assert all(record["grad_norm"] > 0 for record in records if record["stage"] == "sft")
        assert any(record["grad_norm"] > 0 for record in records if record["stage"] == "grpo")
    evaluated = [r for r in trajectories.trajectory(folder / "whole-4-fsdp2") if "eval/length" in r]
    assert [record["step"] for record in evaluated] == [2]


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_a_group_stays_on_its_rank(folder: Path, way: str) -> None:
    run = folder / name_of("whole policy", 4, way)
    for step in (1, 2, 3):
        owners: dict[str, set[int]] = {}
        for rank in range(4):
            rows = pyarrow.parquet.read_table(run / f"rollouts/grpo/step-{step:06d}-rank{rank}.parquet").to_pylist()
            ids = [row["study_id"] for row in rows]
            assert len(ids) == 3 * 4 and len(set(ids)) == 3
            for study in ids:
                owners.setdefault(study, set()).add(rank)
            log = (run / f"stages/grpo/workers/rewards-rank{rank}/worker-1.log").read_text()
            judged = [line.removeprefix("judged ") for line in log.splitlines() if line.startswith("judged ")]
            assert sorted(judged[12 * (step - 1) : 12 * step]) == sorted(ids)  # its own, and no other's
        assert len(owners) == 12 and all(len(ranks) == 1 for ranks in owners.values())


def stop_after_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has this process be asked to stop when a GRPO stage has written its first checkpoint."""
    save = Steps.save

    def save_and_ask(self: Steps) -> None:
        save(self)
        if self.work.stage.name == "grpo":
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(Steps, "save", save_and_ask)


def run_all(run: Path) -> None:
    recipe = load_recipe(run / "recipe.yaml")
    for stage in recipe.stages:
        if not final_folder(run, stage.name).exists():
            run_stage(recipe, run, stage)


if __name__ == "__main__":
    with joined(600):
        for argument in sys.argv[1:]:
            with pytest.MonkeyPatch.context() as monkeypatch, signals.handled(), contextlib.suppress(signals.Stopped):
                if argument.endswith("handed-over") and os.environ["WORLD_SIZE"] == "2":
                    stop_after_a_checkpoint(monkeypatch)
                run_all(Path(argument))
    end(0)  # as `unirg train` does: the interpreter's own end may meet one of torch's threads, and abort
