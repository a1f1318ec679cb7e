"""One GRPO step on 1, 2 and 4 ranks, whole weights (ddp) beside sharded ones (fsdp2); and when each of its parts runs.

    python benchmarks/scaling.py                                     # --quick, --json as everywhere
    .venv-zero3/bin/python benchmarks/scaling.py                     # ZeRO-3 too, where DeepSpeed is installed
    python benchmarks/scaling.py --wide                              # a policy of 27 million parameters, 1 and 2 ranks
    python benchmarks/scaling.py --picture docs/timeline.svg         # draws two ranks' steps

The step is the same whatever the number of ranks: 16 studies x 8 reports of up to 64 tokens, a tiny policy and a KL
reference of its size, four rewards in workers, one CPU thread a rank. Ranks share the cores of one machine, so
that more ranks than cores cannot be faster. What the second figure says holds there too: CPU seconds of all ranks
together, without the workers; where ranks only divide the work, they stay what they are on one. Medians over steps, the
first left out.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

RANKS = (1, 2, 4)
WAYS = ("ddp", "fsdp2", *(["zero3"] if importlib.util.find_spec("deepspeed") else []))
REWARDS = ("entity_f1", "label_f1", "bleu", "rouge_l")
COLOURS = {
    "sampling": "#4477aa",
    "self-check": "#bbbbbb",
    "logps": "#66ccee",
    "loss": "#228833",
    "backward": "#ccbb44",
    "sum and optimiser": "#ee6677",
    "waiting for scores": "#aa3377",
    "rewards (workers)": "#ddaacc",
}
PHASES = {"scoring": "waiting for scores"}  # the loop's names that a reader of the picture would take for another thing

Event = tuple[str, float, float]  # what, from, to (seconds of the machine's clock)


def recipe(run: Path, steps: int, way: str, wide: bool) -> dict[str, Any]:
    """The benchmark's recipe: the demo's sizes, or wider and deeper ones; no warm start."""
    sizes = {"hidden": 512, "layers": 8, "heads": 8, "mlp": 1536} if wide else {}
    return {
        "name": "scaling",
        "output": str(run),
        "threads": 1,
        "data": {"adapter": "phantom", "train": 16 * steps, "dev": 4, "test": 4, "unseen": 4},
        "prompt": {"style": "short"},
        "policy": {"tiny": {"image_size": 96, **sizes}},
        "distributed": {"strategy": way},
        "evaluation": {"splits": []},
        "stages": [
            {
                "name": "grpo",
                "kind": "grpo",
                "steps": steps,
                "studies_per_step": 16,
                "checkpoint_every": steps,
                "tokens_per_forward": 2048,
                "sampling": {"max_new_tokens": 64},
                "loss": {"kl": 0.01},
                "optimiser": {"learning_rate": 1e-5},
                "rewards": [{"name": name} for name in REWARDS],
            }
        ],
    }


def one_rank(run: Path) -> None:
    """The stage on this rank; writes each step's seconds and CPU seconds, and the events of its parts."""
    from unirg import process, steps, training
    from unirg.recipe.load import load_recipe
    from unirg.scoring.worker_process import Worker
    from unirg.stages import run_stage

    events: list[Event] = []
    measured: list[dict[str, float]] = []
    lock = threading.Lock()

    @contextmanager
    def noted(name: str) -> Iterator[None]:
        started = time.time()
        yield
        with lock:  # workers are waited for in threads
            events.append((name, started, time.time()))

    phase, attempts, train = training.Stopwatch.__call__, Worker._attempts, steps.Steps.train

    @contextmanager
    def watched(self: training.Stopwatch, name: str) -> Iterator[None]:
        with noted(PHASES.get(name, name)), phase(self, name):
            yield

    def scored(self: Worker, *arguments: Any, **options: Any) -> Any:
        with noted("rewards (workers)"):
            return attempts(self, *arguments, **options)

    def step(self: steps.Steps, number: int, step_metrics: Any) -> None:
        started, cpu = time.time(), time.process_time()
        last: list[float] = []

        def metrics(number: int) -> dict[str, float]:
            found = step_metrics(number)
            last.append(time.time())
            return found

        train(self, number, metrics)
        ended = time.time()
        events.append(("sum and optimiser", last[0], ended))
        measured.append({"from": started, "seconds": ended - started, "cpu": time.process_time() - cpu})

    training.Stopwatch.__call__, Worker._attempts, steps.Steps.train = watched, scored, step
    resolved = load_recipe(run / "recipe.yaml")
    run_stage(resolved, run, resolved.stages[0])
    rank = os.environ.get("RANK", "0")
    (run / f"rank{rank}.json").write_text(json.dumps({"steps": measured, "events": events}))
    process.end(0)


def measure(folder: Path, ranks: int, way: str, steps: int, wide: bool) -> list[dict[str, Any]]:
    """What each rank measured."""
    run = folder / f"{way}-{ranks}"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe(run, steps, way, wide)))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    subprocess.run(
        [sys.executable, *launch, __file__, "--rank", str(run)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return [json.loads((run / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def figures(measured: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over steps: seconds of a step, and CPU seconds of all ranks together."""
    steps = list(zip(*(rank["steps"] for rank in measured), strict=True))[1:]
    return {
        "seconds": median(max(rank["seconds"] for rank in step) for step in steps),
        "cpu_seconds": median(sum(rank["cpu"] for rank in step) for step in steps),
    }


def draw(measured: list[dict[str, Any]], path: Path) -> None:
    """The last two steps of each rank as bars: what its process does, and below what its reward workers do."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    starts = [step["from"] for step in measured[0]["steps"]]
    begin = starts[-2]
    figure, axes = pyplot.subplots(figsize=(11, 0.6 + 0.9 * len(measured)))
    shown = set()
    for rank, own in enumerate(measured):
        for name, started, ended in own["events"]:
            if ended < begin or ended - started < 0.002:  # too short to be seen
                continue
            lane = 2 * rank + (name == "rewards (workers)")
            label = None if name in shown else name
            shown.add(name)
            left = max(0.0, started - begin)
            axes.barh(lane, ended - begin - left, left=left, height=0.8, color=COLOURS.get(name, "black"), label=label)
    for start in starts[-2:]:
        axes.axvline(start - begin, color="black", linewidth=0.8)
    lanes = [text for rank in range(len(measured)) for text in (f"rank {rank}", "its rewards")]
    axes.set_yticks(range(len(lanes)), lanes)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds; a line where a step begins")
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three steps, 1 and 2 ranks")
    parser.add_argument("--wide", action="store_true", help="a larger policy; four steps, 1 and 2 ranks")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--picture", type=Path, help="where to draw two ranks' last steps (.svg, .png)")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        return one_rank(arguments.rank)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in RANKS[:2] if arguments.quick or arguments.wide else RANKS:
            for way in WAYS if ranks > 1 else WAYS[:1]:
                steps = 3 if arguments.quick else 4 if arguments.wide else 8
                measured = measure(Path(folder), ranks, way, steps, arguments.wide)
                found[f"{way} {ranks}"] = figures(measured)
                if arguments.picture and (way, ranks) == ("ddp", 2):
                    draw(measured, arguments.picture)
    alone = found["ddp 1"]
    for own in found.values():
        own["efficiency"] = alone["cpu_seconds"] / own["cpu_seconds"]
    if arguments.json:
        print(json.dumps({"cores": os.cpu_count(), "load": os.getloadavg()[0], "runs": found}))
        return
    table = Table(title=f"{os.cpu_count()} cores")
    for column in ("strategy, ranks", "step, s", "CPU of all ranks, s", "CPU of one rank alone / of all"):
        table.add_column(column, justify="left" if column.startswith("strategy") else "right")
    for name, own in found.items():
        table.add_row(name, f"{own['seconds']:.2f}", f"{own['cpu_seconds']:.2f}", f"{own['efficiency']:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
