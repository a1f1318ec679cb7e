"""Two ranks, under DDP and under FSDP2, give the gradients of one process, also where a forward of one of them has no
film; and sample what it samples. (`tests/zero3` has the same of ZeRO-3.)"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed
from accelerate import Accelerator

from tests import families
from tests.conftest import invented_studies
from tests.parity import LENGTHS, assert_same_gradients, encode, gradients, random_answers, wide_policy
from unirg import process, zero3
from unirg.distributed import distribute, sum_gradients, whole_tensor
from unirg.grpo.forward import AnswerScores, answer_logps
from unirg.grpo.shared_prefix import packed_logps, prepare
from unirg.policy import Policy, PolicyConfig, blank_prompt, load_policy
from unirg.prompt import PromptConfig
from unirg.rollout.hf import HFSampler
from unirg.study import Study

WAYS = ("", " recomputed", " dense")
FAMILIES = (
    families.qwen2_5_vl,
    families.qwen3_vl_moe,
    families.llava,
    families.gemma3,
    families.idefics3,
    families.qwen3_5,  # dense
    families.llama,
)
FORWARDS = (([0], [1]), ([2], [3]))  # studies by rank and forward: the second rank's first forward has no film


def summed(first: int) -> Callable[[AnswerScores], torch.Tensor]:
    """A loss that adds up over ranks and forwards: each token's weight follows from its place in the whole batch, whose
    rows here count from `first`."""

    def loss(scores: AnswerScores) -> torch.Tensor:
        rows, tokens = scores.logps_BT.shape
        weights_BT = torch.sin(2.3 * torch.arange(first, first + rows)[:, None] + 1.1 * torch.arange(tokens))
        return (scores.logps_BT * weights_BT).sum()

    return loss


def one_rank(folder: Path, sharded: str) -> None:
    """This rank's share of the batch in every way; the first rank writes the whole gradients."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    for way in ("ddp", "ddp half", f"{sharded} half", *(f"{sharded}{way}" for way in WAYS)):
        half = "half" in way
        policy = wide_policy(gradient_checkpointing="recomputed" in way)
        prompts, answers = encode(policy), random_answers(policy, LENGTHS)
        lay_out(policy, way.split()[0], accelerator, half)
        forward = answer_logps if "dense" in way else packed_logps
        for chosen in FORWARDS[accelerator.process_index]:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                scores = forward(policy, [prompts[i] for i in chosen], [answers[i] for i in chosen])
            assert len(scores.logps_BT) == sum(len(answers[i]) for i in chosen)
            backward(policy, summed(sum(map(len, LENGTHS[: chosen[0]])))(scores))
        if policy.engine is None:
            sum_gradients(policy.model.parameters())
        whole = whole_gradients(policy)
        if accelerator.is_main_process:
            torch.save(whole, folder / f"{way}.pt")
    for build in FAMILIES:
        one_family(build, folder / build.__name__, accelerator, sharded)
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()
    process.end(0)


def lay_out(policy: Policy, strategy: str, accelerator: Accelerator, half: bool = False) -> None:
    """As a stage does it, its optimiser included where that is DeepSpeed's."""
    distribute(policy.model, strategy, accelerator, half=half)
    if strategy != "ddp" and policy.reads_images:
        policy.blank = blank_prompt(policy)
    if strategy == "zero3":
        optimiser = torch.optim.AdamW(policy.model.parameters())
        policy.engine = zero3.engine(policy.model, optimiser, 1.0, half=half)


def backward(policy: Policy, loss: torch.Tensor) -> None:
    if policy.engine is None:
        loss.backward()
    else:
        policy.engine.backward(loss * torch.distributed.get_world_size())


def whole_gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """A collective: on every rank."""
    found = {}
    for name, parameter in policy.model.named_parameters():
        if policy.engine is not None:
            found[name] = safe_get_full_grad(parameter)
        elif parameter.grad is not None:
            found[name] = whole_tensor(parameter.grad)
    return found


def one_family(build: families.Builder, folder: Path, accelerator: Accelerator, strategy: str) -> None:
    """A film on the first rank, a text on the second; and the same with whole weights, on each rank by itself."""
    if accelerator.is_main_process:
        folder.mkdir()
        build(folder)
    accelerator.wait_for_everyone()
    alone, sharded = (load_policy(PolicyConfig(model=str(folder)), PromptConfig(style="short")) for _ in range(2))
    film = invented_studies()[0]
    text = Study("text", indication="cough", findings="The lungs are clear.")
    studies = [film if alone.reads_images else dataclasses.replace(film, images=()), text]
    refusals = [prepare(policy) for policy in (alone, sharded)]
    forward = answer_logps if refusals[0] else packed_logps
    prompts, answers = [alone.encode(study) for study in studies], random_answers(alone, ([5, 3], [4, 2]))
    lay_out(sharded, strategy, accelerator)
    own = accelerator.process_index
    sampled = [
        HFSampler(policy).sample([prompts[own]], [[1, 2]], temperature=1.0, max_new_tokens=5)
        for policy in (alone, sharded)
    ]
    assert [sample.ids for sample in sampled[0][0]] == [sample.ids for sample in sampled[1][0]]
    for i, prompt in enumerate(prompts):
        forward(alone, [prompt], [answers[i]]).logps_BT.sum().backward()
    backward(sharded, forward(sharded, [prompts[own]], [answers[own]]).logps_BT.sum())
    expected = {name: p.grad for name, p in alone.model.named_parameters() if p.grad is not None}
    found = whole_gradients(sharded)
    if sharded.engine is not None:  # DeepSpeed has zeros for what no forward used
        found = {name: gradient for name, gradient in found.items() if name in expected or bool(gradient.any())}
    if accelerator.is_main_process:
        torch.save((found, expected), folder / "gradients.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_ranks(tmp_path_factory.mktemp("ranks"), "fsdp2")


def two_ranks(folder: Path, sharded: str) -> Path:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "tests.invariant.test_shared_prefix_ranks", str(folder), sharded],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("way", ["ddp", *(f"fsdp2{way}" for way in WAYS)])
def test_two_ranks_give_the_dense_gradients_of_one(folder: Path, way: str) -> None:
    assert_gradients_of_one(folder, way)


def assert_gradients_of_one(folder: Path, way: str) -> None:
    policy = wide_policy()
    prompts, answers = encode(policy), random_answers(policy, LENGTHS)
    _, _, expected = gradients(policy, lambda: answer_logps(policy, prompts, answers), summed(0))
    assert_same_gradients(torch.load(folder / f"{way}.pt"), expected)


def test_half_precision_is_as_near_to_float32_with_sharded_weights(folder: Path) -> None:
    """Layers that are gathered in bfloat16 lose no more than autocast does with float32 ones."""
    assert_as_near(folder, "fsdp2 half")


def assert_as_near(folder: Path, half: str) -> None:
    expected = torch.load(folder / "ddp.pt")

    def off(way: str) -> float:
        ours = torch.load(folder / f"{way}.pt")
        assert all(gradient.dtype == torch.float32 for gradient in ours.values())
        return float(torch.stack([(ours[name] - g).norm() for name, g in expected.items()]).norm())

    total = float(torch.stack([g.norm() for g in expected.values()]).norm())
    assert 0 < off(half) < 1.2 * off("ddp half") < 0.2 * total


@pytest.mark.parametrize("build", FAMILIES, ids=lambda build: build.__name__)
def test_families_with_sharded_weights(folder: Path, build: families.Builder) -> None:
    assert_same_gradients(*torch.load(folder / build.__name__ / "gradients.pt"))


if __name__ == "__main__":
    if sys.argv[2] == "zero3":
        zero3.require()
        from deepspeed.utils import safe_get_full_grad
    one_rank(Path(sys.argv[1]), sys.argv[2])
