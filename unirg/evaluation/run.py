"""Evaluation of a finished run: reports of every stage for a split, figures, controls, sample films, RUN/evaluation.

Reports are read from RUN/predictions/<split>/<stage>.jsonl (and <stage>.sampled.jsonl) where these are newer than the
stage's final policy, and written there otherwise.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unirg.data import JsonlData, load_studies
from unirg.errors import UserError
from unirg.evaluation.arms import best_constants, evaluate_arms
from unirg.evaluation.evaluate import Arm, EvaluationConfig
from unirg.evaluation.predictions import Predictions, drop_cut_line, read_predictions, write_predictions
from unirg.prompt import prompt_images, report_text
from unirg.recipe.load import load_recipe
from unirg.report import write_samples
from unirg.run import final_folder, read_manifest, write_atomically
from unirg.study import Study

if TYPE_CHECKING:
    from unirg.policy import Policy
    from unirg.recipe.schema import Recipe
    from unirg.rollout import Sampler

Writer = tuple["Policy", "Sampler"]
"""A stage's policy, and the engine that writes its reports."""
Progress = Callable[[str, int, int], None]
"""Called with what is being written ("greedy reports of sft"), how many are done, and how many there will be."""
CONSTANTS = 20
"""How many of the most frequent training reports the best constant report is chosen from,"""
CONSTANT_STUDIES = 300
"""and on how many dev studies."""


def load_run_recipe(run: Path, overrides: Sequence[str] = ()) -> "Recipe":
    """The resolved recipe of a run folder. Raises UserError where the folder has none."""
    path = run / "recipe.yaml"
    if not path.exists():
        raise UserError(f"{run}: not a run folder (it has no recipe.yaml); expected the `output` of a training recipe")
    return load_recipe(path, overrides)


def evaluate_run(
    run: Path,
    split: str,
    *,
    stages: Sequence[str] | None = None,
    baseline: str | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluates a run's stages on a split, writes RUN/evaluation/<split>.json and RUN/samples, returns the evaluation.

    `stages` and `baseline` default to the recipe's, which `overrides` may say anew. Raises UserError for a stage that
    the run does not have or that is not finished, and for an unknown split.
    """
    recipe = load_run_recipe(run, overrides)
    config = recipe.evaluation
    names = _stages(run, recipe, split, stages)
    if baseline is not None:
        if baseline not in names:
            raise UserError(f"--baseline {baseline}: not among the stages evaluated ({', '.join(names)})")
        config = config.model_copy(update={"baseline": baseline})
    studies = load_studies(recipe.data, split)
    if not studies:
        raise UserError(f"{run}: the data have no studies in split '{split}'")
    measured = read_manifest(run).get("stages", {})
    arms: dict[str, Arm] = {}
    for name in names:
        greedy, sampled = stage_predictions(run, recipe, name, split, studies, progress=progress)
        arms[name] = Arm(
            reports=greedy.reports,
            truncated=greedy.cut(),
            sampled=sampled.reports if sampled else None,
            sees=next(stage.sees for stage in recipe.stages if stage.name == name),
            seconds=measured.get(name, {}).get("seconds"),
            cpu_seconds=measured.get(name, {}).get("cpu_seconds"),
        )
    constants = _floor(recipe, config)
    evaluation = evaluate_arms(studies, arms, config, split=split, constants=constants, seed=recipe.seed)
    text = json.dumps(evaluation, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(run / "evaluation" / f"{split}.json", text + "\n")
    write_samples(run, studies, {name: arm.reports for name, arm in arms.items()}, split=split)
    return evaluation


def stage_predictions(
    run: Path,
    recipe: "Recipe",
    stage: str,
    split: str,
    studies: Sequence[Study],
    *,
    writer: Writer | None = None,
    progress: Progress | None = None,
) -> tuple[Predictions, Predictions | None]:
    """A stage's greedy reports for a split, and its sampled ones where the recipe wants them: those on disk where they
    are newer than its policy, else written now, by `writer` or by the stage's own from its folder."""
    folder = final_folder(run, stage)
    weights = sorted(folder.glob("*.safetensors"))
    wanted = [study.id for study in studies]
    predictions: list[Predictions] = []
    with ExitStack() as opened:
        for kind in ("greedy", "sampled") if recipe.evaluation.sampled else ("greedy",):
            path = run / "predictions" / split / f"{stage}{'.sampled' if kind == 'sampled' else ''}.jsonl"
            if path.exists() and weights and path.stat().st_mtime < max(file.stat().st_mtime for file in weights):
                path.unlink()  # reports of an earlier policy
            if path.exists():
                drop_cut_line(path)
                found = _whole(path, set(wanted))
                if found is not None:
                    predictions.append(found)
                    continue
            if writer is None:  # one for both: it keeps the prompts that it has processed
                if not folder.exists():
                    raise UserError(
                        f"{run}: stage '{stage}' has no {folder.relative_to(run)} to write the missing reports with"
                    )
                writer = opened.enter_context(report_writer(recipe, folder, studies))
            policy, sampler = writer
            report = (
                (lambda done, kind=kind: progress(f"{kind} reports of {stage}", done, len(wanted)))
                if progress
                else None
            )
            predictions.append(
                write_predictions(
                    path,
                    policy,
                    studies,
                    max_new_tokens=max_new_tokens(recipe),
                    batch_size=recipe.evaluation.batch_size,
                    sampler=sampler,
                    temperature=1.0 if kind == "sampled" else 0.0,
                    seed=recipe.seed,
                    progress=report,
                )
            )
    greedy, *sampled = predictions
    return greedy, sampled[0] if sampled else None


@contextmanager
def report_writer(recipe: "Recipe", folder: Path, studies: Sequence[Study]) -> Iterator[Writer]:
    """The policy of a Hugging Face model folder, in the recipe's prompt, adapters merged, and the recipe's engine with
    its weights, for reports on `studies`. The Hugging Face engine writes in float32, on the accelerator where there is
    one; vLLM in `policy.dtype`, and there the policy stays on the CPU."""
    import torch

    from unirg.policy import load_policy
    from unirg.rollout import SamplingConfig, open_sampler

    policy = load_policy(
        recipe.policy.model_copy(update={"lora": None}), recipe.prompt, folder=folder, seed=recipe.seed
    )
    rollout = recipe.rollout
    if rollout.engine == "hf" and torch.cuda.is_available():
        policy.model.to("cuda")
    if rollout.engine == "vllm":  # nothing is trained between its batches
        rollout = rollout.model_copy(update={"vllm": rollout.vllm.model_copy(update={"sleep": False})})
    images = max((len(prompt_images(study, recipe.prompt)) for study in studies), default=0)
    sampler = open_sampler(rollout, policy, SamplingConfig(max_new_tokens=max_new_tokens(recipe)), images=images)
    try:
        yield policy, sampler
    finally:
        sampler.close()


def max_new_tokens(recipe: "Recipe") -> int:
    """`evaluation.max_new_tokens`, else the limit that the last GRPO stage samples with, else 256."""
    if recipe.evaluation.max_new_tokens is not None:
        return recipe.evaluation.max_new_tokens
    limits = [stage.sampling.max_new_tokens for stage in recipe.stages if stage.kind == "grpo"]
    return limits[-1] if limits else 256


def _stages(run: Path, recipe: "Recipe", split: str, asked: Sequence[str] | None) -> list[str]:
    """The stages to evaluate. Those asked for by name must be finished, or have left reports; of the others only the
    finished are taken."""
    writing = [stage.name for stage in recipe.stages if stage.kind != "vision"]
    names = list(asked or recipe.evaluation.stages or ())
    if unknown := [name for name in names if name not in writing]:
        raise UserError(f"{run}: no stage '{unknown[0]}' that writes reports; there are: {', '.join(writing)}")
    finished = [name for name in writing if final_folder(run, name).exists()]
    left = [name for name in names if (run / "predictions" / split / f"{name}.jsonl").exists()]
    if waiting := [name for name in names if name not in (*finished, *left)]:
        raise UserError(f"{run}: stage '{waiting[0]}' is not finished; train it first, or name other stages")
    if names:
        return names
    if not finished:
        raise UserError(f"{run}: no stage is finished yet; train it first")
    return finished


def _floor(recipe: "Recipe", config: EvaluationConfig) -> dict[str, str] | None:
    """For every figure the best constant report, chosen among the most frequent training reports on dev; None where
    the data have no dev split."""
    if isinstance(recipe.data, JsonlData) and "dev" not in recipe.data.files:
        return None
    frequent = Counter(text for study in load_studies(recipe.data, "train") if (text := report_text(study)))
    dev = load_studies(recipe.data, "dev")[:CONSTANT_STUDIES]
    if not frequent or not dev:
        return None
    candidates = [text for text, _ in frequent.most_common(CONSTANTS)]
    return best_constants(dev, candidates, config.headline, config.metrics)


def _whole(path: Path, wanted: set[str]) -> Predictions | None:
    """The file's predictions where it has all that are wanted, and nothing else; None where some are missing."""
    if not path.stat().st_size:
        return None
    found = read_predictions(path)
    if strangers := sorted(set(found.reports) - wanted):
        raise UserError(f"{path}: report '{strangers[0]}' is of no study of the split; remove the file")
    return found if wanted == set(found.reports) else None
