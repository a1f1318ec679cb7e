"""What safety costs: a checkpoint's time by the size of what it holds, and the ranks' agreement and watchdog per step.

    python benchmarks/reliability.py [--folder DIR] [--millions 10 50 200]
    torchrun --nproc-per-node 2 benchmarks/reliability.py

The first writes checkpoints (weights and AdamW's two moments, float32) to DIR, verifies and reads them; the second
times the places where ranks come together. Medians of five, or of 2000.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from unirg import checkpoint, process, ranks, watchdog


def median(action: Callable[[], object], times: int) -> float:
    """Seconds that `action` takes."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def checkpoints(folder: Path, millions: int) -> None:
    """One line of the table: a policy of so many million parameters, in layers of one million."""
    weights = {f"layer.{i}.weight": torch.nn.Parameter(torch.randn(1000, 1000)) for i in range(millions)}
    optimiser = torch.optim.AdamW(weights.values(), lr=1e-3)
    for parameter in weights.values():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    written = median(lambda: checkpoint.save(folder, 1, weights, optimiser, {}), 5)
    size = sum(path.stat().st_size for path in (folder / checkpoint.name_of(1)).iterdir()) / 1e9
    verified = median(lambda: checkpoint._problem(folder / checkpoint.name_of(1)), 5)
    loaded = median(lambda: checkpoint.load(folder, weights, optimiser, warn=print), 5)
    print(
        f"{millions:5d} million parameters, {size:5.2f} GB: written {written:6.2f} s, verified {verified:6.2f} s, "
        f"verified and read {loaded:6.2f} s",
        flush=True,
    )
    shutil.rmtree(folder)


def meetings() -> None:
    """Microseconds of one agreement of the ranks, and of one note for the watchdog, with its thread at work."""
    dist.init_process_group("gloo")
    with watchdog.watching(60.0):
        ranks.largest(0)
        met = median(lambda: ranks.largest(0), 2000) * 1e6
        noted = median(lambda: watchdog.comes_to("step"), 2000) * 1e6
    if ranks.rank() == 0:
        print(f"{ranks.world()} ranks: they agree in {met:.0f} us; a note for the watchdog takes {noted:.1f} us")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--millions", type=int, nargs="+", default=[10, 50, 200])
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        meetings()
        process.end(0)
    else:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            for millions in arguments.millions:
                checkpoints(Path(folder) / str(millions), millions)
