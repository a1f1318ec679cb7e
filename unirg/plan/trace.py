"""What a piece of the program costs, without doing it: the real code runs on tensors that have shapes and no numbers.

Weights and activations are on torch's `meta` device; integers and masks (token ids, positions, the grids of films) stay
real, because shapes hang on them. Every operation is noted with its floating point operations, as torch counts them,
the bytes that it reads and writes, and the most bytes that were alive at once.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# These read as many elements of their first argument as they give, not all of it.
PICKS = {aten.embedding.default, aten.index_select.default, aten.index.Tensor, aten.gather.default}


@dataclass(frozen=True)
class Operation:
    """Floating point operations, bytes read and written, whether matrix products are of half precision, and what kind
    of operation it is where products of as many FLOPs take less: `attention` (fused), `convolution`."""

    flops: int
    bytes: int
    half: bool
    kind: str = ""


@dataclass
class Cost:
    """The operations of a piece of the program; `peak` and `kept` are bytes beyond weights and gradients: the most
    alive at once, and what was still alive at the end. `copies` of the peak are weights in bfloat16, made by
    autocast."""

    operations: list[Operation] = field(default_factory=list)
    peak: int = 0
    kept: int = 0
    copies: int = 0

    @property
    def flops(self) -> int:
        return sum(operation.flops for operation in self.operations)

    @property
    def bytes(self) -> int:
        return sum(operation.bytes for operation in self.operations)


class _Ledger(TorchDispatchMode):
    """Runs operations on shapes and notes them in the current `Cost`."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost()
        self.live = 0
        self.copies = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        counted = func in flop_registry or func._overloadpacket in flop_registry
        if not counted and not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU"):
            with self:
                decomposed = func.decompose(*args, **kwargs)  # under no_grad composite operations arrive whole
            if decomposed is not NotImplemented:
                return decomposed
        out = _run(func, args, kwargs)
        self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        given, made = _tensors(args, kwargs), _tensors(out if isinstance(out, (tuple, list)) else (out,))
        storages = {_id(x) for x in given}
        fresh = [x for x in made if _id(x) not in storages]
        for x in fresh:
            self._hold(x)
        if not fresh and not func._schema.is_mutable:  # a view
            return
        moved = sum(map(_bytes, made)) + sum(map(_bytes, given))
        if func in PICKS:
            moved = 2 * sum(map(_bytes, made))
        flops = 0
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            flops = int(count(*args, **kwargs, out_val=out))
        half = any(x.dtype in (torch.bfloat16, torch.float16) for x in given)
        name = func._overloadpacket.__name__
        kind = next((kind for kind in ("attention", "convolution") if kind in name), "")
        self.cost.operations.append(Operation(flops, moved, half, kind))

    def _hold(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        if self.live > self.cost.peak:
            self.cost.peak, self.cost.copies = self.live, self.copies
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)

    def disown(self, x: torch.Tensor) -> None:
        """Counts the tensor no longer: it is a gradient."""
        self._drop(x.untyped_storage()._cdata)


def _id(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


def _bytes(x: torch.Tensor) -> int:
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def _tensors(args: Any, kwargs: Any = None) -> list[torch.Tensor]:
    """The tensors among arguments, those in lists included."""
    found: list[torch.Tensor] = []
    for x in (*args, *(kwargs or {}).values()):
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += [y for y in x if isinstance(y, torch.Tensor)]
    return found


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation; tensors of integers stay real where everything that they are made of is real."""
    given = _tensors(args, kwargs)
    real = [x for x in given if x.device.type != "meta"]
    if len(real) == len(given):
        if str(kwargs.get("device", "")) != "meta":
            return func(*args, **kwargs)
        dtype = kwargs.get("dtype")
        floating = dtype.is_floating_point if dtype else any(x.is_floating_point() for x in given)
        if not floating and (dtype or given):
            return func(*args, **{**kwargs, "device": torch.device("cpu")})
        return func(*tree_map(_to_meta, args), **kwargs)
    if not real:
        return func(*args, **kwargs)
    if func is aten.index.Tensor or func is aten.index_put_.default:  # a mask as the places that it names
        places: list[Any] = []
        for x in args[1]:
            places += x.nonzero(as_tuple=True) if x is not None and x.dtype == torch.bool else [x]
        args = (args[0], places, *args[2:])
    return func(*tree_map(_to_meta, args), **tree_map(_to_meta, kwargs))


def _to_meta(x: Any) -> Any:
    if not isinstance(x, torch.Tensor) or x.device.type == "meta":
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


# What autocast does on CUDA, as far as the project's models use it.
HALF = {torch.nn.functional.linear, torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.addmm}
HALF |= {torch.conv2d, torch.conv3d, torch.nn.functional.conv2d, torch.nn.functional.conv3d, torch.baddbmm}
SINGLE = {torch.nn.functional.layer_norm}


class _Rules(TorchFunctionMode):
    """Autocast, which torch has not for the meta device; and attention as a fused kernel does it, without a matrix of
    all pairs in memory."""

    def __init__(self, ledger: _Ledger, autocast: bool) -> None:
        super().__init__()
        self.ledger, self.autocast = ledger, autocast
        self._cast: dict[int, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if self.autocast and func in HALF:
            args, kwargs = tree_map(self._half, args), tree_map(self._half, kwargs)
        elif self.autocast and func in SINGLE:
            args = tree_map(lambda x: x.float() if isinstance(x, torch.Tensor) else x, args)
        return func(*args, **kwargs)

    def _half(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(torch.bfloat16)
        if id(x) not in self._cast:  # autocast keeps the copy of a weight until it ends
            with torch.enable_grad():
                self._cast[id(x)] = copy = x.to(torch.bfloat16)
            size = copy.untyped_storage().nbytes()
            self.ledger.copies += size
            weakref.finalize(copy.untyped_storage(), self._forget, size)
        return self._cast[id(x)]

    def _forget(self, size: int) -> None:
        self.ledger.copies -= size

    def end(self) -> None:
        """Leaves autocast: copies of weights stay where a backward will want them."""
        self._cast.clear()

    @contextmanager
    def again(self) -> Iterator[None]:
        """A recomputed piece, which has an autocast of its own; torch runs it without the modes of the function."""
        with self:
            yield
        self.end()

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if self.autocast:
            query, key, value = map(self._half, (query, key, value))
        shared = query.shape[1] // key.shape[1]
        if shared > 1:
            key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
        bias = None
        if attn_mask is not None:
            size = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
            bias = torch.empty(attn_mask.shape, dtype=query.dtype, device=query.device).expand(size)
        out, *_ = aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
        )
        return out


class Tracer:
    """Notes what code under `with tracer.part() as cost:` does; gradients are left out of what is alive."""

    def __init__(self, model: Any, autocast: bool, checkpointing: bool) -> None:
        self._ledger = _Ledger()
        self._rules = _Rules(self._ledger, autocast)
        ledger = self._ledger
        self._hooks = [
            p.register_post_accumulate_grad_hook(lambda p: ledger.disown(p.grad))
            for p in model.parameters()
            if p.requires_grad
        ]
        self._model, self._checkpointing = model, checkpointing

    def __enter__(self) -> "Tracer":
        if self._checkpointing:
            again = {"context_fn": lambda: (nullcontext(), self._rules.again())}
            self._model.gradient_checkpointing_enable({"use_reentrant": False} | again)
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._checkpointing:
            self._model.gradient_checkpointing_disable()
        for p in self._model.parameters():
            p.grad = None

    @contextmanager
    def part(self) -> Iterator[Cost]:
        """A phase under autocast, where the run has it; its end is autocast's."""
        self._ledger.cost = cost = Cost(peak=self._ledger.live, copies=self._ledger.copies)
        with self._ledger, self._rules:
            yield cost
        self._rules.end()
        cost.kept = self._ledger.live
