"""Two ranks, under DDP and under FSDP2, give the gradients of one process on the dense path."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.parity import LENGTHS, assert_same_gradients, encode, gradients, random_answers, wide_policy
from unirg.grpo.forward import AnswerScores, answer_logps
from unirg.grpo.shared_prefix import packed_logps
from unirg.policy import Policy

WAYS = ("ddp", "fsdp2", "fsdp2 recomputed", "fsdp2 dense")
SPLIT = 2  # the first rank has the first two studies


def summed(first: int) -> Callable[[AnswerScores], torch.Tensor]:
    """A loss that adds up over ranks: each token's weight follows from its place in the whole batch, whose rows here
    count from `first`."""

    def loss(scores: AnswerScores) -> torch.Tensor:
        rows, tokens = scores.logps_BT.shape
        weights_BT = torch.sin(2.3 * torch.arange(first, first + rows)[:, None] + 1.1 * torch.arange(tokens))
        return (scores.logps_BT * weights_BT).sum()

    return loss


def shard(policy: Policy) -> None:
    """FSDP2 as usual: each layer by itself, then what is left."""
    for layer in (*policy.model.model.language_model.layers, *policy.model.model.visual.blocks):
        fully_shard(layer)
    fully_shard(policy.model)


def one_rank(folder: Path) -> None:
    """This rank's share of the batch in every way; the first rank writes the whole gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = slice(SPLIT) if rank == 0 else slice(SPLIT, None)
    loss = summed(0 if rank == 0 else sum(map(len, LENGTHS[:SPLIT])))
    for way in WAYS:
        policy = wide_policy(gradient_checkpointing="recomputed" in way)
        prompts, answers = encode(policy)[own], random_answers(policy, LENGTHS)[own]
        model = policy.model
        if way == "ddp":
            model = DistributedDataParallel(policy.model)
        else:
            shard(policy)
        # Both engines average over ranks.
        forward = answer_logps if "dense" in way else packed_logps
        scores = forward(policy, prompts, answers, model=model)
        (loss(scores) * ranks).backward()
        whole = {}
        for name, p in policy.model.named_parameters():
            whole[name] = p.grad.full_tensor() if way != "ddp" else p.grad  # a collective: on every rank
        if rank == 0:
            torch.save(whole, folder / f"{way}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "tests.invariant.test_shared_prefix_ranks", str(folder)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_give_the_dense_gradients_of_one(folder: Path, way: str) -> None:
    policy = wide_policy()
    prompts, answers = encode(policy), random_answers(policy, LENGTHS)
    _, _, expected = gradients(policy, lambda: answer_logps(policy, prompts, answers), summed(0))
    assert_same_gradients(torch.load(folder / f"{way}.pt"), expected)


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]))
