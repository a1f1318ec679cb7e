"""DeepSpeed's ZeRO-3: weights, gradients and AdamW's moments sharded over the ranks by its engine.

A forward whose loss is to be trained goes through the engine, its backward and the optimiser's step are calls of the
engine, and a parameter (empty while it is apart) is put together by DeepSpeed's own functions. Everything else of a
step is as under the other strategies. DeepSpeed is imported here alone, and only where a recipe asks for it.
"""

import inspect
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from unirg.errors import UserError


def require() -> None:
    """Imports DeepSpeed. Raises UserError where it is not installed or cannot start."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would find that out, and warn
    # New names for what the DeepSpeed that we take knows by the old ones.
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+_tensor. is deprecated", FutureWarning)
    try:
        import deepspeed.ops
    except ImportError as error:
        raise UserError(
            f"distributed.strategy: zero3 needs DeepSpeed ({error}); pip install 'unirg[zero3]', "
            "or take fsdp2, which shards the same"
        ) from error
    if not torch.cuda.is_available():
        # Sums over ranks that inference alone makes: compiled for minutes, under a lock that a kill leaves behind.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def partition(module: nn.Module, device: torch.device) -> None:
    """Takes the parameters of `module` apart, in place, one after another; the first rank's weights count.
    Collective."""
    require()
    import deepspeed

    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    deepspeed.zero.Init(module=module, config_dict_or_path=_config(module))
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


def engine(module: nn.Module, optimiser: torch.optim.Optimizer, max_grad_norm: float, *, half: bool = False) -> Any:
    """DeepSpeed's engine around a module that was taken apart; it takes over the optimiser. `half`: its forwards run
    under bfloat16 autocast, whatever surrounds them. Collective."""
    import deepspeed

    made, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimiser,
        config=_config(module)
        | {
            "gradient_clipping": max_grad_norm,
            # No module's weights and gradients cross ranks in half precision: sums of gradients are float32.
            "torch_autocast": {"enabled": half, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        },
    )
    return made


def clear(engine: Any) -> None:
    """Zeros the gradients before a step: DeepSpeed would have those of the last one for what this one does not use."""
    engine.optimizer.grad_partitions_flat_buffer.zero_()


def end(engine: Any) -> None:
    """Takes DeepSpeed's hooks off the module, whose parameters stay apart, frees the optimiser's tensors, and has
    DeepSpeed forget the module, which it would hold to the end of the process."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    engine.destroy()
    FWD_MODULE_STACK.remove(engine.module)
    # A cache without a bound, of modules.
    released: Any = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    inspect.getclosurevars(released).nonlocals["func"].cache_clear()
    zero = engine.optimizer
    zero.optimizer.state.clear()
    zero.fp32_partitioned_groups_flat.clear()


def _config(module: nn.Module) -> dict[str, Any]:
    vectors = [_numel(parameter) for parameter in module.parameters() if dimensions(parameter) < 2]
    return {
        "train_micro_batch_size_per_gpu": 1,  # it asks, and counts samples by it; nothing here reads the count
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # a step follows as many backwards as it had
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": max(vectors, default=0),  # norms and biases stay whole
        },
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
    }


def _numel(parameter: Any) -> int:
    return int(parameter.ds_numel) if is_apart(parameter) else parameter.numel()


def dimensions(parameter: Any) -> int:
    """How many dimensions a parameter has, apart (when it is an empty vector) or not."""
    return len(parameter.ds_shape) if is_apart(parameter) else parameter.dim()


def is_apart(tensor: torch.Tensor) -> bool:
    """Whether a parameter is one of DeepSpeed's."""
    return hasattr(tensor, "ds_id")


@contextmanager
def gathered(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Parameters of DeepSpeed's are whole on every rank meanwhile. Collective; nothing where there are none."""
    apart = [parameter for parameter in parameters if is_apart(parameter)]
    if not apart:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(apart):
        yield


@contextmanager
def whole(engine: Any) -> Iterator[None]:
    """Every rank holds all weights meanwhile, and forwards of the module (without gradients) move none. Collective;
    nothing where they are whole already."""
    from trl.models.utils import add_hooks, remove_hooks

    if not engine.optimizer.parameter_offload.forward_hooks:
        yield
        return
    with gathered(engine.module.parameters()):
        remove_hooks(engine)
        try:
            yield
        finally:
            add_hooks(engine)


def norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The norm of the step's gradient over all ranks, before the clip that the engine's step makes. Collective."""
    from deepspeed.utils import safe_get_local_grad

    squares = torch.stack([safe_get_local_grad(parameter).square().sum() for parameter in parameters]).sum()
    dist.all_reduce(squares)
    return squares.sqrt()


def put_weight(parameter: Any, value: torch.Tensor) -> None:
    """Sets a parameter that is apart to `value`, whole, on all ranks; and the optimiser's copy of it, which the next
    step would put back. Collective."""
    import deepspeed
    from deepspeed.utils import safe_set_local_fp32_param

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if dist.get_rank() == 0:
            parameter.data.copy_(value)
    safe_set_local_fp32_param(parameter, _part(parameter, value))


def moments(parameter: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """AdamW's tensors for a parameter, each whole; none before the first step. Collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    _, state = _flat(parameter)
    for key in state:
        yield key, state[key].clone() if key == "step" else safe_get_full_optimizer_state(parameter, key)


def put_moment(parameter: Any, key: str, value: torch.Tensor) -> None:
    """Sets one of AdamW's tensors for a parameter from the whole `value`; each rank takes its part. The count of steps
    is that of all parameters in a flat shard: where they differ, the largest."""
    from deepspeed.utils import safe_set_local_optimizer_state

    flat, state = _flat(parameter)
    if not state:
        state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
    if key == "step":
        state["step"].copy_(torch.maximum(state["step"], value))
        return
    safe_set_local_optimizer_state(parameter, _part(parameter, value), key)


def _part(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole tensor that lies as the parameter does."""
    size = parameter.ds_tensor.numel()
    part = value.flatten()[size * dist.get_rank() :][:size].to(parameter.ds_tensor.device)
    return torch.nn.functional.pad(part, (0, size - len(part)))  # the last ranks' shards have padding


def _flat(parameter: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The flat shard that holds this rank's part of a parameter, and the optimiser's state for it."""
    zero = parameter._z3_optimizer
    group, _, _ = zero.grad_position[zero.get_param_id(parameter)]
    flat = zero.fp32_partitioned_groups_flat[group]
    return flat, zero.optimizer.state[flat]
