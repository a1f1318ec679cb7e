"""One and the same trajectory: prompts shared or not, micro-batches or one, two ranks or one, scores from workers or
inline, straight through or killed and resumed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import STAGES, environment, prepare, trajectory
from tests.served import Served, free_port
from unirg import run as run_folder

RECIPE = """
name: small
output: {output}
threads: 1
data: {{adapter: phantom, train: 24, dev: 4, test: 4, unseen: 4, size: 64}}
prompt: {{style: short, institution: true}}
policy:
  tiny:
    {{vocabulary: 400, hidden: 64, heads: 2, layers: 2, mlp: 96, vision_hidden: 32, vision_layers: 2, image_size: 64}}
stages:
  - name: vision
    kind: vision
    steps: 2
    studies_per_step: 4
    optimiser: {{learning_rate: 1.0e-3}}
  - name: sft
    kind: sft
    steps: 6
    studies_per_step: 4
    checkpoint_every: 2
    optimiser: {{learning_rate: 3.0e-3}}
  - name: grpo
    kind: grpo
    steps: 4
    studies_per_step: 4
    group_size: 4
    checkpoint_every: 1
    sampling: {{max_new_tokens: 12}}
    loss: {{kind: grpo, kl: 0.05}}
    optimiser: {{learning_rate: 1.0e-3}}
    rewards:
      - {{name: "tests_reward.py:closeness"}}
evaluation: {{splits: []}}
"""

REWARD = '''
def closeness(candidates, references, **columns):
    """Shared characters: varied enough that no group of a random policy is without variance."""
    return [len(set(c) & set(r)) / len(set(c) | set(r) | {" "}) - 0.01 * len(c) for c, r in zip(candidates, references)]
'''


def start(folder: Path, name: str, *overrides: str) -> Path:
    """A run folder with a resolved recipe, ready for its stages."""
    return prepare(folder, name, RECIPE, REWARD, *overrides)


def command(run: Path, ranks: int = 1) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launch, "-m", "unirg.stages", str(run), *STAGES]


def run_stages(run: Path, *, ranks: int = 1) -> str:
    done = subprocess.run(
        command(run, ranks), cwd=run.parent, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "stages" / "grpo" / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = start(tmp_path_factory.mktemp("straight"), "run")
    run_stages(run)
    return run


def assert_same(run: Path, other: Path, tolerance: float, steps: int = 12) -> None:
    ours, theirs = trajectory(run), trajectory(other)
    assert len(ours) == len(theirs) == steps
    for record, expected in zip(ours, theirs, strict=True):
        assert record.keys() == expected.keys()
        for name, value in record.items():
            if isinstance(value, float):
                assert value == pytest.approx(expected[name], rel=tolerance, abs=tolerance), (record["step"], name)
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, weights(other)[name], rtol=tolerance, atol=tolerance, msg=name)


def test_the_policy_moves(straight: Path) -> None:
    losses = [record["loss"] for record in trajectory(straight) if record["stage"] == "sft"]
    assert losses[-1] < losses[0]
    grpo = [record for record in trajectory(straight) if record["stage"] == "grpo"]
    assert all(record["grad_norm"] > 0 for record in grpo)
    assert grpo[0]["kl"] == pytest.approx(0, abs=1e-7) and grpo[-1]["kl"] > 0
    assert max(record["sampling/sampling_logp_difference/max"] for record in grpo) < 1e-4


def test_scores_from_a_server(straight: Path, tmp_path: Path) -> None:
    """To the last bit, though the server is killed in its first call and started again. The manifest says where."""
    port = free_port()
    own = f"stages.grpo.rewards=[{{name: 'tests_reward.py:closeness', server: 'http://127.0.0.1:{port}'}}]"
    run = start(tmp_path, "run", own)
    reward = tmp_path / "tests_reward.py"
    die = "\n".join(
        [
            "    import os, pathlib, signal",
            "    if not pathlib.Path('died').exists():",
            "        pathlib.Path('died').touch()",
            "        os.kill(int(pathlib.Path('server').read_text()), signal.SIGKILL)",
            "    return",
        ]
    )
    reward.write_text(reward.read_text().replace("    return", die))
    with Served(str(run / "recipe.yaml"), port=port, cwd=tmp_path) as first:
        (tmp_path / "server").write_text(str(first.process.pid))
        with subprocess.Popen(
            command(run), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
        ) as trainer:
            first.process.wait(timeout=200)
            with Served(str(run / "recipe.yaml"), port=port, cwd=tmp_path):
                told = trainer.communicate(timeout=300)[1]
    assert trainer.returncode == 0 and "waiting for the scoring server" in told, told
    assert trajectory(run) == trajectory(straight)
    ours, expected = weights(run), weights(straight)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())
    said = json.loads((run / "manifest.json").read_text())["rewards"]["grpo"]["closeness"]
    assert said == {"name": "tests_reward.py:closeness", "options": {}, "server": first.url}


def test_micro_batches(straight: Path, tmp_path: Path) -> None:
    run = start(tmp_path, "run", "stages.sft.studies_per_forward=1", "stages.grpo.studies_per_forward=2")
    run_stages(run)
    # Sums in another order: float32 rounding, amplified by AdamW, whose first steps divide by tiny moments.
    assert_same(run, straight, 2e-3)


def test_prompts_read_once_per_study_or_once_per_report(straight: Path, tmp_path: Path) -> None:
    run = start(tmp_path, "run", "stages.grpo.shared_prefix=false")
    run_stages(run)
    assert_same(run, straight, 2e-3)  # the same rounding as of micro-batches
    forwards = [json.loads((r / "manifest.json").read_text())["forwards"]["grpo"]["found"] for r in (run, straight)]
    assert "once per report" in forwards[0] and forwards[1].startswith("shared prefix (sdpa): ")


@pytest.mark.parametrize("scored", ["inline", "by workers that die"])
def test_scores_from_workers_or_inline(straight: Path, tmp_path: Path, scored: str) -> None:
    """To the last bit: scoring draws on nothing of the policy's, and takes no part in the order of its sums."""
    inline = scored == "inline"
    own = "stages.grpo.rewards=[{name: 'tests_reward.py:closeness', worker: false}]"
    run = start(tmp_path, "run", *([own] if inline else []))
    if not inline:  # every second call ends the process that has it
        reward = tmp_path / "tests_reward.py"
        reward.write_text(
            "import os\nCALLS = []\n"
            + reward.read_text().replace(
                "    return", "    if CALLS or CALLS.append(1):\n        os._exit(1)\n    return"
            )
        )
    run_stages(run)
    assert (run / "stages/grpo/workers/rewards/worker-1.log").exists() != inline
    assert trajectory(run) == trajectory(straight)
    ours, expected = weights(run), weights(straight)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("options", [["stages.grpo.shared_prefix=false"], []], ids=["dense", "packed"])
def test_small_forwards_on_two_ranks(straight: Path, tmp_path: Path, options: list[str]) -> None:
    """Groups are split, and ranks need different numbers of forwards: reports differ in length."""
    run = start(tmp_path, "run", "stages.grpo.tokens_per_forward=60", *options)
    run_stages(run, ranks=2)
    assert_same(run, straight, 2e-3)


@pytest.mark.parametrize(("stage", "after"), [("sft", 3), ("grpo", 2)])
def test_killed_and_resumed_to_the_last_bit(straight: Path, tmp_path: Path, stage: str, after: int) -> None:
    run = start(tmp_path, "run")
    process = subprocess.Popen(command(run), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while len(run_folder.read_metrics(run / "stages" / stage)) < after:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not run_folder.final_folder(run, stage).exists()
    assert "goes on from step" in run_stages(run)
    assert trajectory(run) == trajectory(straight)
    ours, expected = weights(run), weights(straight)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())


def test_another_recipe_on_the_same_folder_is_refused(straight: Path) -> None:
    text = (straight / "recipe.yaml").read_text().replace("learning_rate: 0.003", "learning_rate: 0.03")
    with pytest.raises(ValueError, match=r"another recipe \(differs in stages\.sft\.optimiser\.learning_rate\)"):
        run_folder.open_run(straight, text)
    run_folder.open_run(straight, (straight / "recipe.yaml").read_text().replace("threads: 1", "threads: 2"))
    manifest = json.loads((straight / "manifest.json").read_text())
    assert manifest["stages"]["grpo"]["step"] == 4
