"""The steps of a stage of any kind: optimiser, schedule, log, evaluation, checkpoints, where it goes on or stops."""

import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator

from unirg import checkpoint, signals, watchdog, zero3
from unirg import run as run_folder
from unirg.distributed import sum_gradients, whole_tensor
from unirg.errors import UserError
from unirg.recipe.schema import OptimiserConfig, StageConfig
from unirg.training import RanksStop, StageRun, say


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
        {"params": [p for p in trainable if zero3.dimensions(p) >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if zero3.dimensions(p) < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        foreach=True,
    )


class Carried(Protocol):
    """What a stage has under way between two steps, beside weights and optimiser."""

    def state(self, step: int) -> Any:
        """What a checkpoint after `step` steps keeps of it, as JSON. All ranks call it."""
        ...

    def restore(self, state: Any) -> None:
        """Goes on with what `state` gave."""
        ...


@dataclass
class Steps:
    """A stage's steps: what is trained, how far it is, and what of it is on disk."""

    work: StageRun
    weights: dict[str, torch.nn.Parameter]
    optimiser: torch.optim.AdamW
    boundary: int
    state: dict[str, Any]
    """What a checkpoint holds beside tensors. `unlogged`: the metrics of a step whose evaluation and log line are still
    to come; a stop between them and the step repeats them."""
    carried: Carried | None = None
    """What goes into checkpoints beside these."""
    on_disk: int = 0
    """The step of the newest checkpoint."""
    owed: bool = False
    """Whether a checkpoint could not be written, and is to be tried again."""

    def resume(self) -> None:
        """Goes to where the folder is: weights, optimiser and state of its newest whole checkpoint."""
        work, folder = self.work, self.work.folder
        folder.mkdir(parents=True, exist_ok=True)
        kept = checkpoint.load(folder, self.weights, self.optimiser, warn=work.warn)
        if kept is not None:
            self.state |= kept | {"world_size": work.accelerator.num_processes}
            self.on_disk = self.state["step"]
            if self.carried is not None:
                self.carried.restore(self.state["carried"])
            say(work.accelerator, work.stage.name, f"goes on from step {self.on_disk}")
        if work.accelerator.is_main_process:
            logged = self.on_disk - (self.state["unlogged"] is not None)
            if lost := logged - run_folder.forget_metrics_after(folder, logged):
                work.warn(f"{folder / 'metrics.jsonl'}: damaged; the figures of {lost} steps are lost")

    def run(
        self, step_metrics: Callable[[int], dict[str, float]], evaluate: Callable[[], dict[str, float]] | None
    ) -> None:
        """All steps from here; signals wait from the last one's end."""
        work, stage, state = self.work, self.work.stage, self.state
        every = math.ceil(stage.checkpoint_every / self.boundary) * self.boundary
        try:
            signals.at_once(work.accelerator.num_processes == 1)  # ranks stop together, where all of them meet
            if state["unlogged"] is not None:
                self.close(evaluate)
            for step in range(state["step"], stage.steps):
                self.train(step, step_metrics)
                self.close(evaluate)
                due = state["step"] % every == 0 or (self.owed and work.stoppable)
                if due and state["step"] < stage.steps:
                    self.save()
                work.meet("step")
            signals.at_once(False)
        except (signals.Stopped, UserError) as error:
            self.stop(error)
            raise

    def save(self) -> None:
        """A checkpoint; where the disk does not take it, that is told, and it is owed."""
        try:
            with self.work.uninterrupted("checkpoint"):
                keep = self.work.stage.keep_checkpoints
                if self.carried is not None:
                    self.state["carried"] = self.carried.state(self.state["step"])
                checkpoint.save(
                    self.work.folder, self.state["step"], self.weights, self.optimiser, self.state, keep=keep
                )
                self.on_disk, self.owed = self.state["step"], False
        except checkpoint.NotSaved as error:
            self.owed = True
            self.work.warn(f"no checkpoint of step {self.state['step']} ({error}); a later step tries again")

    def train(self, step: int, step_metrics: Callable[[int], dict[str, float]]) -> None:
        """One step. A stop changes nothing of it: weights, optimiser and state change in the last lines, at once."""
        work, config, engine = self.work, self.work.stage.optimiser, self.work.policy.engine
        watchdog.comes_to("start", step=f"step {step + 1} of stage {work.stage.name}")
        started, cpu_started = time.perf_counter(), time.process_time()
        rate = learning_rate(config, step, work.stage.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        seed_everything(work.seed("step", step, work.accelerator.process_index))
        if engine is not None:
            zero3.clear(engine)
        metrics = step_metrics(step)
        if engine is None:
            sum_gradients(self.weights.values())
            norm = whole_tensor(torch.nn.utils.clip_grad_norm_(list(self.weights.values()), config.max_grad_norm))
        else:  # it has summed them, and clips in its step
            norm = zero3.norm(self.weights.values())
        loss = metrics.get("loss", 0.0)
        if not torch.isfinite(norm) or math.isnan(loss):
            raise UserError(
                f"stage {work.stage.name}, step {step + 1}: the loss is {loss:g}, the gradient {norm.item():g}; it "
                "changed no weight, and checkpoints are intact. Lower optimiser.learning_rate, or look at the step's "
                "rollouts"
            )
        with work.uninterrupted("optimiser"):
            (engine or self.optimiser).step()
            self.optimiser.zero_grad()  # evaluations and the next reports need their room
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
            cpu_seconds += metrics.get("time/workers_cpu", 0.0)
            metrics |= {"learning_rate": rate, "grad_norm": norm.item()}
            metrics |= {"time/step": seconds, "time/step_cpu": cpu_seconds}
            self.state["step"] = step + 1
            self.state["seconds"] += seconds
            self.state["cpu_seconds"] += cpu_seconds
            self.state["unlogged"] = metrics
            work.stoppable = self.state["step"] % self.boundary == 0
        signals.at_once(work.accelerator.num_processes == 1 and work.stoppable)

    def close(self, evaluate: Callable[[], dict[str, float]] | None) -> None:
        """The made step's evaluation and its line in the log."""
        work, step, metrics = self.work, self.state["step"], dict(self.state["unlogged"])
        if evaluate is not None and work.stage.evaluate_every and step % work.stage.evaluate_every == 0:
            work.meet("evaluation")
            measured = evaluate()
            metrics |= {f"eval/{name}": value for name, value in measured.items()}
            if work.stage.keep == "best":
                # A metric that failed may leave no figure of the corpus.
                self.keep_best(measured.get(work.recipe.evaluation.headline, math.nan))
        with work.together("log"):
            if work.accelerator.is_main_process:
                run_folder.append_metrics(
                    work.folder, {"stage": work.stage.name, "step": step, "time": time.time(), **metrics}
                )
                work.accelerator.log(metrics, step=step)
        self.state["unlogged"] = None
        _report_step(work.accelerator, work.stage, step, metrics, self.state)

    def keep_best(self, figure: float) -> None:
        """Keeps the weights where `figure`, the same on all ranks, is the best so far."""
        if math.isnan(figure) or (self.state["best"] is not None and figure <= self.state["best"]):
            return
        step = self.state["step"]
        try:
            with self.work.uninterrupted("checkpoint"):
                folder = self.work.folder
                # A run that goes on from a checkpoint ends with the best that this names, if it finds none better.
                needed = checkpoint.best_steps(folder)
                checkpoint.save(folder / "best", step, self.weights, None, {"best": figure}, needed=needed)
                self.state |= {"best": figure, "best_step": step}
        except checkpoint.NotSaved as error:  # to go on would lose it
            stage = self.work.stage.name
            raise RanksStop(
                f"stage {stage}: step {step}, the best so far, cannot be kept ({error}); make room"
            ) from error

    def stop(self, error: BaseException) -> None:
        """Before the process ends: a checkpoint of the last whole step, where ranks are at one place to write it."""
        signals.at_once(False)
        step, work = self.state["step"], self.work
        together = work.accelerator.num_processes == 1 or isinstance(error, (signals.Stopped, RanksStop))
        if together and work.stoppable and step > self.on_disk:
            self.save()
        where = f"from {f'step {self.on_disk}' if self.on_disk else 'the start'} of stage {work.stage.name}"
        if isinstance(error, signals.Stopped):
            error.goes_on = where
        elif work.accelerator.is_main_process or not isinstance(error, RanksStop):
            error.add_note(f"the same command goes on {where}")


def optimise(
    work: StageRun,
    trainable: torch.nn.Module,
    step_metrics: Callable[[int], dict[str, float]],
    *,
    evaluate: Callable[[], dict[str, float]] | None = None,
    boundary: int = 1,
    carried: Carried | None = None,
) -> None:
    """Runs the stage's steps from where its folder left off: backward by `step_metrics`, clip, step, log, checkpoint.

    `boundary`: checkpoints fall on multiples of it (steps that share one batch of samples must not be parted).
    `carried` goes into them. With `keep: best` the weights of the best dev evaluation are the stage's result.

    Raises UserError for what the user can put right (a film that has become unreadable, a full disk, a loss that is no
    number) and signals.Stopped where a signal asks for it; the last whole step is then in a checkpoint. Signals wait
    from its end until the caller has put the result in place and allows them again (`signals.at_once`).
    """
    stage: StageConfig = work.stage
    optimiser = build_optimiser(stage.optimiser, trainable.named_parameters())
    weights = {name: p for name, p in trainable.named_parameters() if p.requires_grad}
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "cpu_seconds": 0.0}
    state |= dict.fromkeys(("best", "best_step", "unlogged", "carried"))
    state |= {"stage": stage.name, "world_size": work.accelerator.num_processes}
    if any(map(zero3.is_apart, weights.values())):
        half = work.policy.config.dtype == "bfloat16"
        work.policy.engine = zero3.engine(trainable, optimiser, stage.optimiser.max_grad_norm, half=half)
    steps = Steps(work, weights, optimiser, boundary, state, carried)
    steps.resume()
    steps.run(step_metrics, evaluate)
    if state["best_step"] is not None:
        kept = checkpoint.load(work.folder / "best", weights, None, step=state["best_step"], warn=work.warn)
        assert kept is not None
        state["best"] = kept["best"]  # where the best is damaged, that of the one before
    if work.policy.engine is not None:
        zero3.end(work.policy.engine)
        work.policy.engine = None
    if work.accelerator.is_main_process:
        run_folder.update_manifest(
            work.run, stages={stage.name: {k: state[k] for k in ("step", "best", "seconds", "cpu_seconds")}}
        )


def seed_everything(seed: int) -> None:
    """Sets every random generator that a step might draw from: dropout draws from torch's, a reward that runs in this
    process from any. So none of their states need be in a checkpoint."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


SHOWN = ("loss", "reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "kl", "entropy")


def _report_step(
    accelerator: Accelerator, stage: StageConfig, step: int, metrics: dict[str, float], state: dict[str, Any]
) -> None:
    """One line per step; where steps are many, per twentieth of a stage, but one a minute."""
    every = max(1, stage.steps // 20)
    evaluated = any(name.startswith("eval/") for name in metrics)
    minute = int(state["seconds"] / 60) > int((state["seconds"] - metrics["time/step"]) / 60)
    if not accelerator.is_main_process or (step % every and step != stage.steps and not evaluated and not minute):
        return
    parts = [f"{name.split('/')[-1]} {metrics[name]:.3f}" for name in SHOWN if name in metrics]
    parts += [f"{name} {value:.3f}" for name, value in metrics.items() if name.startswith("eval/")]
    left = state["seconds"] / step * (stage.steps - step)
    say(accelerator, stage.name, f"step {step}/{stage.steps}  {'  '.join(parts)}  [dim]{left:.0f} s left[/dim]")
