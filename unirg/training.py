"""What stages of every kind share: optimiser, schedule, data order, the step loop with logging, checkpoints and resume.

A kind of stage is one function: given the step's number it runs forward and backward and returns the step's metrics.
Every random choice follows from (seed, stage, step, study), so a run that was killed repeats what it would have done.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from torch.distributed.tensor import DTensor

from unirg import run as run_folder
from unirg.distributed import sum_gradients
from unirg.policy import Policy
from unirg.recipe.schema import OptimiserConfig, Recipe, StageConfig
from unirg.rollout import request_seed
from unirg.study import Study

console = Console()


@dataclass
class StageRun:
    """A stage at work: what its step function needs."""

    recipe: Recipe
    stage: Any
    run: Path
    accelerator: Accelerator
    policy: Policy
    studies: Sequence[Study]

    @property
    def folder(self) -> Path:
        return run_folder.stage_folder(self.run, self.stage.name)

    def seed(self, *parts: object) -> int:
        """A seed that follows from the recipe's seed, the stage and `parts`."""
        return request_seed(self.recipe.seed, self.stage.name, *parts)

    def step_studies(self, batch: int) -> list[Study]:
        """The studies of the batch number `batch`, over all ranks: a fresh permutation in every epoch."""
        size, count = self.stage.studies_per_step, len(self.studies)
        chosen = []
        for position in range(batch * size, (batch + 1) * size):
            epoch, place = divmod(position, count)
            chosen.append(self.studies[int(self._order(epoch)[place])])
        return chosen

    def _order(self, epoch: int) -> np.ndarray:
        if getattr(self, "_epoch", None) != epoch:
            order = np.random.default_rng(self.seed("order", epoch)).permutation(len(self.studies))
            self._epoch, self._permutation = epoch, order
        return self._permutation

    def mine(self, items: Sequence[Any]) -> list[Any]:
        """This rank's share of a step's items; `everyones` puts shares together again, in order."""
        return list(items[self.accelerator.process_index :: self.accelerator.num_processes])

    def everyones(self, share: Sequence[Any]) -> list[Any]:
        """All ranks' items in the step's order, from each rank's share (equal in length)."""
        if self.accelerator.num_processes == 1:
            return list(share)
        world = self.accelerator.num_processes
        ranks = gather_object([list(share)])
        return [ranks[i % world][i // world] for i in range(len(share) * world)]

    def micro_batches(self, items: Sequence[Any]) -> Iterable[Sequence[Any]]:
        """The rank's share in whole groups, `studies_per_forward` at a time."""
        size = self.stage.studies_per_forward or len(items)
        for first in range(0, len(items), size):
            yield items[first : first + size]

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of a share of the step's loss: shares of all micro-batches and ranks add up to it."""
        loss.backward()


class Stopwatch:
    """Seconds per phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def metrics(self) -> dict[str, float]:
        return {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}


def learning_rate(config: OptimiserConfig, step: int, steps: int) -> float:
    """The rate of step `step` (from 0): linear warm-up, then flat, or down to 0 after the last step."""
    warmup = math.ceil(config.warmup * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if config.schedule == "linear":
        return config.learning_rate * (1 - progress)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate


def build_optimiser(config: OptimiserConfig, named: Iterable[tuple[str, torch.nn.Parameter]]) -> torch.optim.AdamW:
    """AdamW over trainable parameters; weight decay on matrices only."""
    trainable = [p for _, p in named if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        foreach=True,
    )


def optimise(
    work: StageRun,
    trainable: torch.nn.Module,
    step_metrics: Callable[[int], dict[str, float]],
    *,
    evaluate: Callable[[], dict[str, float]] | None = None,
    boundary: int = 1,
) -> None:
    """Runs the stage's steps from where its folder left off: backward by `step_metrics`, clip, step, log, checkpoint.

    `boundary`: checkpoints fall on multiples of it (steps that share one batch of samples must not be parted).
    With `keep: best` the weights of the best dev evaluation are the stage's result.
    """
    stage: StageConfig = work.stage
    accelerator, folder = work.accelerator, work.folder
    optimiser = build_optimiser(stage.optimiser, trainable.named_parameters())
    weights = {name: p for name, p in trainable.named_parameters() if p.requires_grad}
    state: dict[str, Any] = {"step": 0, "best": None, "seconds": 0.0, "cpu_seconds": 0.0}
    folder.mkdir(parents=True, exist_ok=True)
    kept = run_folder.load_checkpoint(folder)
    if kept is not None:
        _restore(weights, kept[0])
        optimiser.load_state_dict(kept[1])
        state = kept[2]
        say(accelerator, stage.name, f"goes on from step {state['step']}")
    if accelerator.is_main_process:
        run_folder.forget_metrics_after(folder, state["step"])
    headline = work.recipe.evaluation.headline
    for step in range(state["step"], stage.steps):
        started, cpu_started = time.perf_counter(), time.process_time()
        rate = learning_rate(stage.optimiser, step, stage.steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        torch.manual_seed(work.seed("step", step, accelerator.process_index))  # dropout alone draws from it
        optimiser.zero_grad(set_to_none=True)
        metrics = step_metrics(step)
        sum_gradients(weights.values())
        norm = torch.nn.utils.clip_grad_norm_(list(weights.values()), stage.optimiser.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"stage {stage.name}, step {step + 1}: the gradient is {norm.item()}; checkpoints are intact. "
                "Lower optimiser.learning_rate, or look at the step's rollouts"
            )
        optimiser.step()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        state["step"] = step + 1
        state["seconds"] += seconds
        state["cpu_seconds"] += cpu_seconds
        metrics |= {"learning_rate": rate, "grad_norm": norm.item(), "time/step": seconds, "time/step_cpu": cpu_seconds}
        if evaluate is not None and stage.evaluate_every and (step + 1) % stage.evaluate_every == 0:
            measured = evaluate()
            metrics |= {f"eval/{name}": value for name, value in measured.items()}
            figure = measured.get(headline, math.nan)  # a metric that failed may leave no figure of the corpus
            if stage.keep == "best" and not math.isnan(figure) and (state["best"] is None or figure > state["best"]):
                state["best"] = figure
                if accelerator.is_main_process:
                    run_folder.save_checkpoint(folder / "best", step + 1, weights, {}, {})
        if accelerator.is_main_process:
            record = {"stage": stage.name, "step": step + 1, "time": time.time(), **metrics}
            run_folder.append_metrics(folder, record)
            accelerator.log(metrics, step=step + 1)
        _report_step(accelerator, stage, step + 1, metrics, state)
        due = (step + 1) % (math.ceil(stage.checkpoint_every / boundary) * boundary) == 0
        if due and step + 1 < stage.steps and accelerator.is_main_process:
            run_folder.save_checkpoint(folder, step + 1, weights, optimiser.state_dict(), state)
        accelerator.wait_for_everyone()
    best = run_folder.load_checkpoint(folder / "best") if stage.keep == "best" else None
    if best is not None:
        _restore(weights, best[0])
    if accelerator.is_main_process:
        run_folder.update_manifest(
            work.run, stages={stage.name: {k: state[k] for k in ("step", "best", "seconds", "cpu_seconds")}}
        )


def _restore(weights: dict[str, torch.nn.Parameter], saved: dict[str, torch.Tensor]) -> None:
    if set(weights) != set(saved):
        odd = sorted(set(weights) ^ set(saved))
        raise ValueError(f"the checkpoint does not fit the policy: {len(odd)} tensors differ, e.g. {odd[0]}")
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(saved[name])


def say(accelerator: Accelerator, stage: str, text: str) -> None:
    if accelerator.is_main_process:
        console.print(f"[bold]{stage}[/bold]  {text}", highlight=False, soft_wrap=True)


SHOWN = ("loss", "reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "kl", "entropy")


def _report_step(
    accelerator: Accelerator, stage: StageConfig, step: int, metrics: dict[str, float], state: dict[str, Any]
) -> None:
    """One line per step, or per twentieth of a stage where steps are many."""
    every = max(1, stage.steps // 20)
    evaluated = any(name.startswith("eval/") for name in metrics)
    if not accelerator.is_main_process or (step % every and step != stage.steps and not evaluated):
        return
    parts = [f"{name.split('/')[-1]} {metrics[name]:.3f}" for name in SHOWN if name in metrics]
    parts += [f"{name} {value:.3f}" for name, value in metrics.items() if name.startswith("eval/")]
    left = state["seconds"] / step * (stage.steps - step)
    say(accelerator, stage.name, f"step {step}/{stage.steps}  {'  '.join(parts)}  [dim]{left:.0f} s left[/dim]")
