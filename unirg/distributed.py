"""How the weights of a run lie on its ranks, and what that asks of gradients, of sampling and of what is written.

`ddp`: every rank holds the model. Gradients are summed once a step, in buckets, before the clip: a step has many
backwards, and a sum after each, as torch's DDP wrapper makes, would move the gradients of all weights as many times.

`fsdp2`: torch's `fully_shard`, by decoder layer, vision block and what is left. Every rank holds its part of weights,
gradients and optimiser state (DTensors); a layer is put together for as long as it computes. Ranks must then call the
same layers in the same order: see `Policy.blank` for forwards without films, and `whole` for sampling.

`zero3`: the same by DeepSpeed (`unirg.zero3`), whose engine makes forwards, backwards and steps.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from pydantic import Field
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from unirg import zero3
from unirg.section import Section

BUCKET = 1 << 26
"""Elements in one sum of gradients over ranks: 256 MiB in float32."""


class DistributedConfig(Section):
    """How several ranks (torchrun's processes) share the work; one process does not read it."""

    strategy: Literal["ddp", "fsdp2", "zero3"] = "ddp"
    """ddp: each rank holds all weights. fsdp2: weights, gradients and optimiser state are sharded over the ranks; while
    the Hugging Face engine samples, each rank holds all weights. zero3: the same by DeepSpeed, which is installed with
    the extra `zero3`; vision stages, and a KL reference, are sharded as by fsdp2."""
    timeout: float = Field(1800.0, gt=0)
    """Seconds that a rank may be in one part of the run (loading, reading films, sampling, an evaluation) before it
    ends with a line that names the ranks that are behind and those that wait for them."""


def distribute(
    module: nn.Module, strategy: str, accelerator: Accelerator, *, half: bool = False, trained: bool = True
) -> None:
    """Lays a module that every rank holds in full out over the ranks, in place; the first rank's weights count.

    `half`: the forward runs under bfloat16 autocast. What is not `trained` gives all of its weights back after each
    forward. To be called before the optimiser is made, by all ranks alike. What `zero3` lays out must be trained, and
    makes no forward before `zero3.engine`.
    """
    if accelerator.num_processes == 1 or strategy == "ddp":
        module.to(accelerator.device)
    if accelerator.num_processes == 1:
        return
    if strategy == "zero3":
        zero3.partition(module, accelerator.device)
        return
    for parameter in module.parameters():  # a head that a checkpoint lacks is drawn by each rank for itself
        first = parameter.data.to(accelerator.device)
        dist.broadcast(first, 0)
        parameter.data.copy_(first)
    if strategy == "ddp":
        return
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # What autocast would cast at every matrix product is sent in half precision. Inputs stay as they are, and so do
    # embeddings and whatever stands outside the layers: the residual stream is float32, as it is under ddp.
    layers = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    rest = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in stacked_layers(module):
        fully_shard(layer, mesh=mesh, mp_policy=layers)
    fully_shard(module, mesh=mesh, mp_policy=rest, reshard_after_forward=None if trained else True)
    for part in sharded_modules(module):
        part.set_gradient_divide_factor(1.0)  # shares of a loss add up
        part.set_force_sum_reduction_for_comms(True)


def beside_engine(strategy: str) -> str:
    """The strategy for what DeepSpeed's engine does not run under `zero3`: vision stages and KL references."""
    return "fsdp2" if strategy == "zero3" else strategy


def stacked_layers(module: nn.Module) -> list[nn.Module]:
    """The layers of every outermost stack (a ModuleList of two or more modules of one class): decoder layers, vision
    blocks, mergers."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(layer) for layer in child}) == 1:
            found += list(child)
        else:
            found += stacked_layers(child)
    return found


def sharded_modules(module: nn.Module) -> list[Any]:
    """The parts of `module` that FSDP2 gathers and gives back by themselves; none where it is not sharded."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def is_sharded(module: nn.Module) -> bool:
    """Whether ranks hold parts of the module's parameters."""
    return any(isinstance(parameter, DTensor) or zero3.is_apart(parameter) for parameter in module.parameters())


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter, or a tensor that lies as one does, in full. Collective where it is sharded."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    with zero3.gathered([tensor]):
        return tensor.detach().clone() if zero3.is_apart(tensor) else tensor


@contextmanager
def whole(module: nn.Module, engine: Any = None) -> Iterator[None]:
    """Every rank holds all weights meanwhile, so that each can make as many forwards (without gradients) as it needs.

    A collective: all ranks enter and leave it together. Does nothing where weights are not sharded, or are whole
    already. Of the choices for sampling it is the simple one: gathering layer by layer at every decoded token would
    move all weights once a token, and ranks would have to decode equally many. Where the weights do not fit one device,
    sampling needs an engine of its own. `engine` is DeepSpeed's, where that shards the module.
    """
    if engine is not None:
        with zero3.whole(engine):
            yield
        return
    parts = sharded_modules(module)
    if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        yield
        return
    with torch.inference_mode(False), torch.no_grad():  # or what is gathered here could never be trained
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not parts[0], recurse=False)  # the root's backward comes at once
            part.reshard()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sums gradients over ranks, in place; FSDP2 has summed those of its own. A parameter without a gradient on some
    ranks counts as zero there (no film in any of their forwards); without one anywhere it keeps none."""
    held = [p for p in parameters if not isinstance(p, DTensor)]
    if not held or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    used = torch.tensor([p.grad is not None for p in held], device=held[0].device, dtype=torch.int32)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    buckets: list[list[nn.Parameter]] = []
    for parameter in (p for p, somewhere in zip(held, used.tolist(), strict=True) if somewhere):
        last = buckets[-1] if buckets else []
        if last and last[0].dtype == parameter.dtype and sum(p.numel() for p in [*last, parameter]) <= BUCKET:
            last.append(parameter)
        else:
            buckets.append([parameter])
    for bucket in buckets:
        flat = torch.cat([(p.new_zeros(p.shape) if p.grad is None else p.grad).flatten() for p in bucket])
        dist.all_reduce(flat)
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view_as(parameter)


def outline(module: nn.Module) -> nn.Module:
    """A copy of `module` without its weights, for `filled`; FSDP2's own modules cannot be copied."""
    empty = {id(p): nn.Parameter(p.to("meta"), requires_grad=p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, empty)


def filled(outlined: nn.Module, module: nn.Module, main: bool) -> nn.Module | None:
    """`outlined` with the weights of the sharded `module`, on the CPU of the main process; None on the others.

    A collective: all ranks call it.
    """
    weights = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        full = whole_tensor(tensor).detach()
        if main:
            weights[name] = full.cpu()
    if not main:
        return None
    outlined.load_state_dict(weights, assign=True)
    model: Any = outlined
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return outlined
