"""What both benchmarks share: a corpus and policy, a stage of our loop, a clock for TRL's trainers, the table."""

import argparse
import atexit
import contextlib
import copy
import functools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback

from unirg.data import load_studies
from unirg.data.phantom import PhantomData
from unirg.grpo.loop import Stopwatch
from unirg.policy import Policy, PolicyConfig, load_policy
from unirg.prompt import PromptConfig, build_messages, report_text
from unirg.recipe.schema import Recipe
from unirg.study import Study
from unirg.tiny import TinyConfig
from unirg.training import StageRun

Steps = dict[str, list[float]]  # phase, or "total" -> seconds of each step

# All figures are CPU time of this process on one thread: on a machine that others use too, wall time measures them.
clock = time.process_time


Settings = tuple[list[tuple[int, ...]], int]


def one_thread() -> None:
    """Keeps both sides to one CPU thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


class CpuStopwatch(Stopwatch):
    """The loop's stopwatch on CPU time."""

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = clock()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + clock() - started


def our_stage(stage: Any, studies: int, image_size: int, **sizes: int) -> StageRun:
    """A stage of our loop at its start, on drawn films and a tiny policy (of these sizes), in a run folder of its
    own."""
    recipe = Recipe(
        name="benchmark",
        data=PhantomData(train=studies, size=image_size),
        prompt=PromptConfig(style="unirg"),
        policy=PolicyConfig(tiny=TinyConfig(image_size=image_size, **sizes)),
        stages=[stage],
    )
    train = load_studies(recipe.data, "train")
    for study in train:  # draw the films now: neither side is to pay for it
        for image in study.images:
            image.load()
    texts = [text for study in train for text in (prompt_text(study, recipe.prompt), report_text(study))]
    policy = load_policy(recipe.policy, recipe.prompt, texts=texts)
    run = Path(tempfile.mkdtemp(prefix="unirg-benchmark-"))
    atexit.register(shutil.rmtree, run, ignore_errors=True)
    work = StageRun(recipe, stage, run, Accelerator(cpu=True), policy, train)
    return work


def our_steps(work: StageRun) -> Steps:
    """What the loop logged of its steps; the first, which warms things up, is left out."""
    lines = [json.loads(line) for line in (work.folder / "metrics.jsonl").read_text().splitlines()][1:]
    names = [name for name in lines[0] if name.startswith("time/") and name not in ("time/step", "time/step_cpu")]
    steps = {name.removeprefix("time/"): [line[name] for line in lines] for name in names}
    return steps | {"total": [line["time/step_cpu"] for line in lines]}


def prompt_text(study: Study, config: PromptConfig) -> str:
    """The text part of the study's prompt, which follows its images."""
    return build_messages(study, config)[0]["content"][-1]["text"]


def twin(policy: Policy) -> Any:
    """The policy's model once more, with the same weights: TRL replaces the forward of the one it is given."""
    return copy.deepcopy(policy.model)


def rows(policy: Policy, studies: Sequence[Study]) -> list[dict[str, Any]]:
    """The studies as TRL's conversational rows: the same prompt text, images and report."""
    return [
        {
            "prompt": [{"role": "user", "content": prompt_text(study, policy.prompt)}],
            "images": [image.load() for image in study.images],
            "reference": report_text(study),
        }
        for study in studies
    ]


def dataset(items: list[dict[str, Any]]) -> Dataset:
    return Dataset.from_list(items)


class TrainerWatch(TrainerCallback):
    """Seconds per phase and step of a transformers trainer, from outside: the phases are its own methods."""

    def __init__(self) -> None:
        self.steps: Steps = {}
        self._phases: dict[str, float] = {}
        self._last: float | None = None

    def add(self, owner: Any, method: str, phase: str) -> None:
        """Adds what `owner.method` takes to `phase`."""
        inner: Callable[..., Any] = getattr(owner, method)

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = clock()
            try:
                return inner(*args, **kwargs)
            finally:
                self._phases[phase] = self._phases.get(phase, 0.0) + clock() - started

        setattr(owner, method, timed)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step lasts from the end of the step before it, so the first is left out."""
        now = clock()
        if self._last is not None:
            for name, value in (self._phases | {"total": now - self._last}).items():
                self.steps.setdefault(name, []).append(value)
        self._phases, self._last = {}, clock()


def train(trainer: Any, watch: TrainerWatch) -> Steps:
    """Runs the trainer to its end and gives what `watch` saw."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    trainer.train()
    return watch.steps


def compare(title: str, phases: dict[str, tuple[list[str], list[str]]], ours: Steps, trl: Steps) -> dict[str, Any]:
    """Medians over the steps, phase by phase. `phases` maps a row to the phases that make it up, ours and TRL's."""

    def medians(steps: Steps, parts: dict[str, list[str]]) -> dict[str, float]:
        rows = {row: [sum(values) for values in zip(*(steps[n] for n in names))] for row, names in parts.items()}
        if rows:
            rows["rest"] = [whole - sum(own) for whole, *own in zip(steps["total"], *rows.values())]
        return {row: statistics.median(values) for row, values in (rows | {"whole step": steps["total"]}).items()}

    mine = medians(ours, {row: names for row, (names, _) in phases.items()})
    theirs = medians(trl, {row: names for row, (_, names) in phases.items()})
    seconds = {row: {"unirg": mine[row], "trl": theirs[row]} for row in mine}
    return {"setting": title, "steps": len(ours["total"]), "seconds": seconds}


def main(doc: str | None, compare: Callable[..., dict[str, Any]], *, quick: Settings, full: Settings) -> None:
    """The command line that the step benchmarks share; `quick` and `full` are arguments of `compare`, and steps."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small setting")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    arguments = parser.parse_args()
    one_thread()
    settings, steps = quick if arguments.quick else full
    show(lambda: [compare(*setting, steps) for setting in settings], arguments.json)


def show(run: Callable[[], list[dict[str, Any]]], as_json: bool) -> None:
    """Runs the comparisons and prints them, as tables or as one JSON object; what the trainers print goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        results = run()
    if as_json:
        print(json.dumps({"unit": "CPU seconds per step, median", "threads": 1, "results": results}))
        return
    for result in results:
        table = Table("", title=f"{result['setting']}; CPU time of a step")
        for column in ("unirg, s", "TRL, s", "TRL / unirg"):
            table.add_column(column, justify="right")
        for name, side in result["seconds"].items():
            ratio = f"{side['trl'] / side['unirg']:.2f}" if min(side.values()) > 2e-3 else ""
            table.add_row(name, f"{side['unirg']:.3f}", f"{side['trl']:.3f}", ratio)
        Console().print(table)
