"""What the ranks of a run tell each other beside the training itself: small things, on the CPU.

They go over a gloo group of their own, so that they wait for no kernel of a GPU. On one rank all of it costs nothing.
"""

import functools
import os
from typing import Any

import torch
import torch.distributed as dist

from unirg.errors import UserError


def rank() -> int:
    """This process's rank; 0 where there is one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


@functools.cache
def _group(of: dist.ProcessGroup) -> dist.ProcessGroup:
    """The gloo group beside the process group `of`. All ranks come here for the first time together."""
    return dist.new_group(backend="gloo")


def largest(value: int) -> int:
    """The largest of all ranks' values. All ranks call it, equally often."""
    if world() == 1:
        return value
    largest = torch.tensor([value])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=_group(dist.group.WORLD))
    return int(largest)


def everyones(item: Any) -> list[Any]:
    """All ranks' items, in the ranks' order. All ranks call it, equally often."""
    if world() == 1:
        return [item]
    items: list[Any] = [None] * world()
    dist.all_gather_object(items, item, group=_group(dist.group.WORLD))
    return items


def numbers(ranks: list[int]) -> str:
    """Ranks in words: `rank 3`, `ranks 0-2, 5`."""
    spans: list[list[int]] = []
    for number in sorted(ranks):
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    shown = ", ".join("-".join(map(str, span)) for span in spans)
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def check_restarts() -> None:
    """Raises UserError where torchrun would start ranks again and they could not meet: it keeps one store over all
    starts, in which the second finds the addresses of the first (pytorch issue 135712)."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) > 0:
        raise UserError(
            "torchrun --max-restarts: ranks that are started again would look for the dead ones in the store that "
            "torchrun shares between starts; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
        )
