"""What machines can do: published figures of GPUs, taken at an assumed share; and this CPU, measured.

Sources: NVIDIA's data sheets of H100 SXM, H200 SXM, A100 SXM (80 and 40 GB), L40S, and the Ada architecture white paper
(RTX 4090). Dense tensor-core rates, without sparsity; float32 is without TF32, which torch leaves off.
"""

import os
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
    measured: bool = False

    @property
    def cpu(self) -> bool:
        return self.name == "cpu"


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
    if name not in NAMES:
        raise UserError(f"--gpu: '{name}' is not known; there are {', '.join(NAMES)}")
    found = measured_cpu() if name == "cpu" else GPUS[name]
    return found if compute_share is None else replace(found, compute_share=compute_share)


def measured_cpu(clock: Callable[[], float] = time.perf_counter) -> Machine:
    """This machine with torch's present number of threads, by `clock`.

    Products are of 512 x 512 matrices. Memory is what a mix of a model's other operations moves (sums, SiLU, softmax,
    transposed copies, each into new memory): on a CPU they are far from the bandwidth of a plain copy. Starting an
    operation is what a linear layer on a few numbers takes, Python included.
    """
    a = torch.randn(512, 512)
    h = a.bfloat16()
    x = torch.randn(2048, 512)
    blocks = x.view(-1, 64, 64)
    mix = (
        _seconds(lambda: x + x, clock)
        + _seconds(lambda: torch.nn.functional.silu(x), clock)
        + _seconds(lambda: x.softmax(-1), clock)
        + _seconds(lambda: blocks.transpose(1, 2).contiguous(), clock)
    )
    few, layer = torch.zeros(8, 8), torch.nn.Linear(8, 8)
    launch = _seconds(lambda: [layer(few) for _ in range(100)], clock) / 100
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    half, single = (2 * 512**3 / _seconds(lambda m=m: m @ m, clock) for m in (h, a))  # type: ignore[misc]
    return Machine("cpu", half, single, 9 * x.nbytes / mix, memory, launch, 1e9, 1e9, 1.0, 1.0, measured=True)


def _seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """The best of several tries: neighbours only ever add to it."""
    work()
    tries = []
    for _ in range(25):
        started = clock()
        work()
        tries.append(clock() - started)
    return min(tries)
