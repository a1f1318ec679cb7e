"""What machines can do: published figures of GPUs, taken at an assumed share; and this CPU, measured.

Sources: NVIDIA's data sheets of H100 SXM, H200 SXM, A100 SXM (80 and 40 GB), L40S, and the Ada architecture white paper
(RTX 4090). Dense tensor-core rates, without sparsity; float32 is without TF32, which torch leaves off.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from unirg.errors import UserError

RESERVE = 2.5e9
"""Bytes of a GPU that the CUDA context, libraries and communication buffers take: assumed."""


@dataclass(frozen=True)
class Machine:
    """One device: products per second (FLOP/s) in bfloat16 and float32, bytes per second of its memory, bytes of it,
    seconds to start one operation, bytes per second to the other devices of a node and, per device, to other nodes."""

    name: str
    half: float
    single: float
    bandwidth: float
    memory: float
    launch: float = 5e-6
    node: float = 25e9
    network: float = 50e9
    compute_share: float = 0.5
    """What matrix products reach of the peak."""
    bandwidth_share: float = 0.8
    attention: float = 1.0
    """How many times as long as products of as many FLOPs fused attention takes,"""
    convolution: float = 1.0
    """and a tower's convolution over patches."""
    stream: float = 1e9
    """Bytes per second of weights from the trainer to a vLLM server, over TCP: assumed."""
    disk: float = 1e9
    """Bytes per second of checkpoints to the run folder's disk, all ranks together: assumed."""
    measured: bool = False

    @property
    def cpu(self) -> bool:
        return self.name == "cpu"

    @property
    def vllm_rows(self) -> int:
        """Reports that a vLLM server decodes at once: its default for the GPU."""
        return 1024 if self.name in ("h100", "h200") else 256


@dataclass(frozen=True)
class Cluster:
    """So many nodes with so many training GPUs each, and GPUs of vLLM servers beside them."""

    machine: Machine
    nodes: int = 1
    gpus: int = 1
    sampling_gpus: int = 0

    @property
    def world(self) -> int:
        """Ranks: one for each training GPU."""
        return self.nodes * self.gpus

    @property
    def link(self) -> float:
        """Bytes per second from one rank to the next: the slowest on the way round."""
        return self.machine.network if self.nodes > 1 else self.machine.node

    @property
    def around(self) -> float:
        """What a rank sends where all come to hold the whole of what is sharded over them, as a share of it."""
        return (self.world - 1) / self.world

    @property
    def memory(self) -> float:
        """Bytes for a rank: those of its GPU, or its share of this machine's."""
        return self.machine.memory / (self.gpus if self.machine.cpu else 1)


GPUS = {
    "h100": Machine("h100", 989e12, 67e12, 3.35e12, 80e9, node=450e9),
    "h200": Machine("h200", 989e12, 67e12, 4.8e12, 141e9, node=450e9),
    "a100-80": Machine("a100-80", 312e12, 19.5e12, 2.039e12, 80e9, node=300e9),
    "a100-40": Machine("a100-40", 312e12, 19.5e12, 1.555e12, 40e9, node=300e9),
    "l40s": Machine("l40s", 362e12, 91.6e12, 0.864e12, 48e9),
    "rtx4090": Machine("rtx4090", 165e12, 82.6e12, 1.008e12, 24e9),
}
NAMES = (*GPUS, "cpu")


def machine(name: str, compute_share: float | None = None) -> Machine:
    """The device of that name; `cpu` is measured here, in about two seconds. Raises UserError for an unknown one."""
    name = name.lower()
    if name not in NAMES:
        raise UserError(f"--gpu: '{name}' is not known; there are {', '.join(NAMES)}")
    found = measured_cpu() if name == "cpu" else GPUS[name]
    return found if compute_share is None else replace(found, compute_share=compute_share)


def measured_cpu(clock: Callable[[], float] = time.perf_counter) -> Machine:
    """This machine with torch's present number of threads, by `clock`.

    Products are of 512 x 512 matrices; attention is of 8 heads over 128 tokens, the convolution over 256 patches of a
    film. Memory is what a mix of a model's other operations moves (sums, SiLU, softmax, transposed copies) among 128
    MiB, more than caches hold, as a forward's activations are. Starting an operation is what a linear layer on a few
    numbers takes, Python included.
    """
    a, x = torch.randn(512, 512), torch.randn(1, 8, 128, 64)
    half, single = (2 * 512**3 / _seconds(lambda m=m: m @ m, clock) for m in (a.bfloat16(), a))  # type: ignore[misc]
    attended = _seconds(lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x), clock)
    patches, embed = torch.randn(256, 3, 2, 16, 16), torch.nn.Conv3d(3, 64, (2, 16, 16), (2, 16, 16))
    with torch.no_grad():
        embedded = _seconds(lambda: embed(patches), clock)
    few, layer = torch.zeros(8, 8), torch.nn.Linear(8, 8)
    launch = _seconds(lambda: [layer(few) for _ in range(100)], clock) / 100
    return Machine(
        name="cpu",
        half=half,
        single=single,
        bandwidth=_bandwidth(clock),
        memory=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        launch=launch,
        node=1e9,
        network=1e9,
        compute_share=1.0,
        bandwidth_share=1.0,
        attention=attended * single / (4 * 8 * 128**2 * 64),
        convolution=embedded * single / (2 * 256 * 64 * 3 * 2 * 16**2),
        measured=True,
    )


def _bandwidth(clock: Callable[[], float]) -> float:
    """Bytes per second of operations on 16 tensors of 4 MiB each, into 16 others."""
    pairs = [(torch.randn(2048, 512), torch.empty(2048, 512)) for _ in range(16)]
    before = [x for x, _ in pairs[-1:] + pairs[:-1]]
    turned = [(x.view(-1, 64, 64).transpose(1, 2), out.view(-1, 64, 64)) for x, out in pairs]
    works: list[Callable[[], object]] = [
        lambda: [torch.add(x, y, out=out) for (x, out), y in zip(pairs, before, strict=True)],
        lambda: [torch.ops.aten.silu.out(x, out=out) for x, out in pairs],
        lambda: [torch.softmax(x, -1, out=out) for x, out in pairs],
        lambda: [out.copy_(x) for x, out in turned],
    ]
    moved = (3 + 2 + 2 + 2) * sum(x.nbytes for x, _ in pairs)
    return moved / sum(_seconds(work, clock) for work in works)


def _seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """The median of several tries: a run has the same neighbours."""
    work()
    tries = []
    for _ in range(15):
        started = clock()
        work()
        tries.append(clock() - started)
    return statistics.median(tries)
