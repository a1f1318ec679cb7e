"""DeepSpeed's ZeRO-3 on gloo: two and four ranks make the steps of one process, checkpoints pass between strategies, a
rollout engine gets whole weights, and no step is made of a gradient that is no number.

`make test-zero3` has the environment.
"""

import subprocess
from pathlib import Path

import pytest

from tests import families
from tests.invariant import test_ranks, test_shared_prefix_ranks
from tests.invariant import test_trajectories as trajectories
from tests.runs import on_two_ranks
from tests.unit import test_rollout_weights

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (make test-zero3)")

RUNS = {
    1: (("whole policy", "ddp"), ("adapters and everything", "ddp")),
    2: (("whole policy", "zero3"), ("adapters and everything", "zero3")),
    4: (("whole policy", "zero3"),),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    test_ranks.make_runs(folder, RUNS, {2: "zero3", 4: "ddp"})
    (folder / "back").mkdir()
    test_ranks.make_runs(folder / "back", {2: (), 4: ()}, {2: "fsdp2", 4: "zero3"})
    return folder


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return test_shared_prefix_ranks.two_ranks(tmp_path_factory.mktemp("gradients"), "zero3")


@pytest.mark.parametrize(("ranks", "options", "way"), [(n, *run) for n in (2, 4) for run in RUNS[n]])
def test_the_same_trajectory(runs: Path, ranks: int, options: str, way: str) -> None:
    ours, expected = (runs / test_ranks.name_of(options, n, w) for n, w in ((ranks, way), (1, "ddp")))
    # Sums in another order: float32 rounding, amplified by AdamW, whose first steps divide by tiny moments.
    trajectories.assert_same(ours, expected, 2e-3, steps=len(trajectories.trajectory(expected)))


@pytest.mark.parametrize("folder", [".", "back"])
def test_checkpoints_pass_between_strategies_and_numbers_of_ranks(runs: Path, folder: str) -> None:
    assert "goes on from step 2" in (runs / folder / "said-4.txt").read_text()
    trajectories.assert_same(runs / folder / "handed-over", runs / "whole-1-ddp", 2e-3, steps=8)


@pytest.mark.parametrize("way", test_shared_prefix_ranks.WAYS)
def test_two_ranks_give_the_gradients_of_one(gradients: Path, way: str) -> None:
    test_shared_prefix_ranks.assert_gradients_of_one(gradients, f"zero3{way}")


def test_half_precision_is_as_near_to_float32(gradients: Path) -> None:
    test_shared_prefix_ranks.assert_as_near(gradients, "zero3 half")


@pytest.mark.parametrize("build", test_shared_prefix_ranks.FAMILIES, ids=lambda build: build.__name__)
def test_families(gradients: Path, build: families.Builder) -> None:
    test_shared_prefix_ranks.test_families_with_sharded_weights(gradients, build)


def test_a_gradient_that_is_no_number_makes_no_step(tmp_path: Path) -> None:
    """A rate that throws the weights out of what float32 holds."""
    optimiser = ("stages.sft.optimiser.learning_rate=1e30", "stages.sft.checkpoint_every=1", "stages.vision.steps=1")
    run = trajectories.start(tmp_path, "run", *optimiser, "distributed.strategy=zero3")
    done = subprocess.run(
        trajectories.command(run, 2), cwd=tmp_path, env=trajectories.environment(), capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "stage sft, step 2: the loss is nan, the gradient nan; it changed no weight" in done.stderr
    assert "the same command goes on from step 1 of stage sft" in done.stderr


def test_a_rollout_engine_gets_whole_weights_with_adapters(tmp_path: Path) -> None:
    test_rollout_weights.assert_shards_are_put_together(tmp_path, "zero3")


def test_a_run_goes_on_to_the_last_bit_where_a_checkpoint_left_it(tmp_path: Path) -> None:
    """With weight decay, on matrices alone; the weights that the stage began with differ."""
    on_two_ranks(tmp_path, RESUME, str(tmp_path))


RESUME = """
import sys
import weakref
from pathlib import Path
import torch
from accelerate import Accelerator
from unirg import checkpoint, zero3
from unirg.distributed import distribute, whole_tensor
from unirg.recipe.schema import OptimiserConfig
from unirg.steps import build_optimiser

accelerator = Accelerator(cpu=True)

def build(seed, strategy):
    torch.manual_seed(seed)
    layers = torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.LayerNorm(9), torch.nn.Linear(9, 7))
    distribute(layers, strategy, accelerator)
    config = OptimiserConfig(learning_rate=0.01, weight_decay=10.0)
    optimiser = build_optimiser(config, layers.named_parameters())
    engine = zero3.engine(layers, optimiser, 1.0) if strategy == "zero3" else None
    return layers, optimiser, engine

def step(layers, optimiser, engine, number):
    optimiser.zero_grad()
    loss = (engine or layers)(torch.sin(torch.arange(56.0) + number).view(8, 7)).square().sum()
    if engine is None:  # each rank has it all
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
        optimiser.step()
    else:
        engine.backward(loss)
        engine.step()

def weights(layers):
    return [whole_tensor(parameter).clone() for parameter in layers.parameters()]

runs = straight, plain = build(0, "zero3"), build(0, "ddp")
for number in (1, 2):
    for run in runs:
        step(*run, number)
folder = Path(sys.argv[1]) / "checkpoints"
checkpoint.save(folder, 2, dict(straight[0].named_parameters()), straight[1], {})
for run in runs:
    step(*run, 3)
for ours, theirs in zip(weights(straight[0]), weights(plain[0]), strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
resumed = build(1, "zero3")
checkpoint.load(folder, dict(resumed[0].named_parameters()), resumed[1], warn=print)
step(*resumed, 3)
assert all(map(torch.equal, weights(resumed[0]), weights(straight[0])))
held = [weakref.ref(tensor) for state in resumed[1].state.values() for tensor in state.values()]
zero3.end(resumed[2])
assert held and not any(tensor() is not None for tensor in held)  # the next stage needs their room
assert all(map(torch.equal, weights(resumed[0]), weights(straight[0])))
print("the same", flush=True)
"""
