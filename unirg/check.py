"""What is verified before any training time is spent: every split that the run will read, prompts, rewards, figures.

Each check raises UserError with lines that name the study, key or stage and say what to do.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import get_available_trackers
from PIL import Image

from unirg import ranks, watchdog
from unirg.data import load_studies
from unirg.data.command import broken_films, check_studies, images_of
from unirg.errors import UserError
from unirg.evaluation.evaluate import COMPLETE, measure
from unirg.grpo.choose import check_kernel
from unirg.policy import Policy
from unirg.prompt import PromptConfig, build_messages, prompt_images, report_text
from unirg.recipe.schema import GrpoStage, Recipe, StageConfig, VisionStage
from unirg.scoring.contract import RewardConfig, ScoreBatch, study_columns
from unirg.scoring.engine import ScoringEngine
from unirg.scoring.registry import check_trainable
from unirg.study import Study, StudyImage
from unirg.training import console, together
from unirg.vision import trainable_tower

SHOWN = 20
JUDGED = 64
"""So many studies' own reports are scored by the rewards."""
MANY = 1000
"""Films whose reading is told before it begins."""
PROMPTS = 50
"""So many of the longest prompts, and of the largest films, are processed as training will process them."""


def check_settings(recipe: Recipe) -> None:
    """Raises UserError for what the recipe and the installation alone show: trackers and engines that are not
    installed, steps that do not divide by the ranks, a forward that this machine does not have."""
    check_trackers(recipe)
    check_engine(recipe)
    for stage in recipe.stages:
        check_shares(stage, ranks.world())
        if isinstance(stage, GrpoStage) and stage.shared_prefix:
            check_kernel(stage, recipe.policy, torch.cuda.is_available())


def read_films(recipe: Recipe, whole: str | None = None) -> tuple[dict[Path, str], str]:
    """Reads every film file that the run will read, each rank its share; all ranks call it.

    Returns what is wrong with which file, and a mark of all their names, sizes and times. Where that is still `whole`
    (the first rank's), the mark of an earlier start at which nothing was wrong, they are not read again.
    """
    with together("the list of films", recipe.name):
        splits = [(config, "train") for config in unique([stage.data or recipe.data for stage in recipe.stages])]
        splits += [(recipe.data, split) for split in evaluated_splits(recipe)]
        studies = (study for config, split in splits for study in load_studies(config, split))
        images = (image.source for study in studies for image in images_of(study))
        files = list(dict.fromkeys(source for source in images if isinstance(source, Path)))
        own = files[ranks.rank() :: ranks.world()]
        share = sum(map(_mark, own))
    # A sum: of all files in any order, whatever the number of ranks.
    shares, known = zip(*ranks.everyones((share, whole)), strict=True)
    mark = f"{sum(shares) % 2**256:064x}"
    if mark == known[0]:
        return {}, mark
    if len(files) > MANY and ranks.rank() == 0:
        console.print(f"reading {len(files)} films, once for all starts of this run", highlight=False)
    with together("reading films", recipe.name):
        broken = broken_films(map(StudyImage, own))
    return {path: what for share in ranks.everyones(broken) for path, what in share.items()}, mark


def _mark(path: Path) -> int:
    watchdog.goes_on()
    try:
        known = path.stat()
    except OSError:
        return 0  # to be named where it is read
    return int.from_bytes(hashlib.sha256(f"{path} {known.st_size} {known.st_mtime_ns}".encode()).digest())


def evaluated_splits(recipe: Recipe) -> list[str]:
    """The splits that are not trained on."""
    dev = ["dev"] if any(stage.evaluate_every for stage in recipe.stages) else []
    return unique([*dev, *recipe.evaluation.splits])


def check(
    recipe: Recipe, build_policy: Callable[[Sequence[Study]], Policy], broken: Mapping[Path, str] | None = None
) -> None:
    """Raises UserError for what would stop the run later: unreadable or empty studies (all of them, by id), prompts
    over the limit, rewards and metrics that cannot be loaded, fail, or judge no study, figures that do not exist.
    `build_policy` gives the policy for training studies; `broken` has what `read_films` found.
    """
    policy: Policy | None = None
    for config in unique([stage.data or recipe.data for stage in recipe.stages]):
        studies = load_studies(config, "train")
        users = [stage for stage in recipe.stages if (stage.data or recipe.data) == config]
        vision = [stage for stage in users if isinstance(stage, VisionStage)]
        if vision:  # the policy first: a text-only one may well have studies without films
            policy = policy or build_policy(studies)
            check_vision(policy, vision[0])
        check_split(studies, "train", vision, broken)
        for stage in users:
            if isinstance(stage, GrpoStage):
                check_trainable(stage.rewards)
                check_rewards(stage.rewards, studies)
        policy = policy or build_policy(studies)
        check_prompts(policy, studies)
    assert policy is not None
    for i, split in enumerate(evaluated_splits(recipe)):
        studies = load_studies(recipe.data, split)
        check_split(studies, split, broken=broken)
        check_prompts(policy, studies)
        if i == 0:
            check_figures(recipe, studies)


def check_split(
    studies: Sequence[Study],
    split: str,
    vision: Sequence[StageConfig] = (),
    broken: Mapping[Path, str] | None = None,
) -> None:
    """Every study can be read and has a report; those that a vision stage learns from have a film, and some a label.
    `broken` as for `check_studies`."""
    if not studies:
        raise UserError(f"the split '{split}' has no studies")
    lines = [f"study {problem.study}: {problem.what}" for problem in check_studies(studies, broken)]
    for stage in vision:
        needs = f"no image, and stage {stage.name} trains the vision tower"
        lines += [f"study {study.id}: {needs}" for study in studies if not prompt_images(study, PromptConfig())]
        if not any(study.labels for study in studies):
            lines.append(f"stage {stage.name}: a vision stage learns from labels, and no training study has any")
    if lines:
        more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise UserError("\n".join(lines[:SHOWN] + more))


def check_vision(policy: Policy, stage: StageConfig) -> None:
    """The policy has a tower that a vision stage can train, and its prompts have images to train it on."""
    try:
        trainable_tower(policy)
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error}") from error
    if not policy.prompt.images:
        raise UserError(f"stage {stage.name}: a vision stage learns from images, and prompt.images is false")


def check_prompts(policy: Policy, studies: Sequence[Study]) -> None:
    """No prompt's text holds one of the model's special tokens (the processor would take it for an image, or for the
    end of a turn), and the prompts with the most text and those with the most pixels fit `policy.max_prompt_tokens`."""
    texts = {id(study): build_messages(study, policy.prompt)[0]["content"][-1]["text"] for study in studies}
    for study in studies:
        for token in policy.tokenizer.all_special_tokens:
            if token in texts[id(study)]:
                raise UserError(f"study {study.id}: its context holds '{token}', a special token of the model")
    # In bytes of UTF-8: scripts that take more tokens a letter take more bytes too.
    by_text = sorted(studies, key=lambda study: len(texts[id(study)].encode()), reverse=True)[:PROMPTS]
    by_film = sorted(studies, key=lambda study: pixels(study, policy.prompt), reverse=True)[:PROMPTS]
    for study in {id(study): study for study in (*by_text, *by_film)}.values():
        policy.encode(study)


def pixels(study: Study, prompt: PromptConfig) -> int:
    """Pixels of the prompt's image files, from their headers; drawn films are all of one size and count 1. Raises
    UserError where a file has none."""
    total = 0
    watchdog.goes_on()  # where files are many and far away this takes its time
    for image in prompt_images(study, prompt):
        if isinstance(image.source, Path):
            try:
                with Image.open(image.source) as opened:
                    total += opened.width * opened.height
            except OSError as error:
                raise UserError(f"study {study.id}: corrupt image: {error}") from error
        else:
            total += 1
    return total


def check_rewards(configs: Sequence[RewardConfig], studies: Sequence[Study]) -> list[str]:
    """The rewards load, score the reports of a few studies as if a policy had written them, and can judge some. One
    that judges none is told; where all judge none there is nothing to learn from, and that is an error. They run as in
    training, in workers that end here, so that no model stays in this process; but no failure is masked.

    Returns the figures that they give in an evaluation: labels, and label and name of each figure of a corpus."""
    few = list(studies[:: max(1, len(studies) // JUDGED)])[:JUDGED]
    texts = [report_text(study) for study in few]
    columns = study_columns(few) | {"truncated": [False] * len(few)}
    strict = [config.model_copy(update={"on_error": "raise"}) for config in configs]
    with ScoringEngine(strict, supervised=True) as engine:
        batch = ScoreBatch(texts, texts, columns)
        scores, terms = engine.collect(engine.submit(batch)), engine.corpus_terms(batch)
    mute = [label for label, values in scores.items() if all(value is None for value in values)]
    said = f"reward {', '.join(mute)}: could judge none of {len(few)} studies by their own reports"
    if len(mute) == len(scores):
        raise UserError(f"{said}; `unirg rewards` says what each reward needs")
    if mute:
        console.print(f"[yellow]{said}[/yellow]", highlight=False, soft_wrap=True)
    return [*scores, *(f"{label}.{figure}" for label, figures in terms.items() for figure in figures)]


def check_figures(recipe: Recipe, studies: Sequence[Study]) -> None:
    """The evaluation's metrics load and work, and its headline is a figure that these studies give."""
    config = recipe.evaluation
    few = list(studies[:200])
    figures = set(measure(few, {study.id: report_text(study) for study in few}).statistics)
    for metric in config.metrics:
        if metric.log_label in figures:
            raise UserError(f"metric '{metric.log_label}' has the name of a figure that is always counted; label it")
    if config.metrics:
        given = check_rewards(config.metrics, studies)
        endings = ["", f"/{COMPLETE}"] if all(study.extra.get(COMPLETE) for study in few) else [""]
        figures |= {f"{figure}{ending}" for figure in given for ending in endings}
    if config.headline not in figures:
        raise UserError(
            f"evaluation.headline '{config.headline}' is no figure; there are: {', '.join(sorted(figures))}"
        )


def check_shares(stage: StageConfig, world: int) -> None:
    """A step's studies divide evenly by ranks and forwards: the shares of the loss are then those of one process."""
    forward = stage.studies_per_forward

    def divides(studies: int) -> bool:
        share = studies // world
        return studies % world == 0 and not (forward and share % min(share, forward))

    if not divides(stage.studies_per_step):
        more = next(studies for studies in count(stage.studies_per_step) if divides(studies))
        raise UserError(
            f"stage {stage.name}: studies_per_step {stage.studies_per_step} must divide evenly by {world} ranks"
            + (f" and studies_per_forward {forward}" if forward else "")
            + f"; stages.{stage.name}.studies_per_step={more} does"
        )


def check_trackers(recipe: Recipe) -> None:
    """The trackers are installed: accelerate passes over one that is not."""
    available = {str(tracker.value) for tracker in get_available_trackers()}
    for tracker in recipe.trackers:
        if tracker not in available:
            raise UserError(f"trackers: {tracker} is not installed; `pip install {tracker}`, or leave it out")


def check_engine(recipe: Recipe) -> None:
    """vLLM is installed where the trainer needs it: for an engine of its own, or to prepare images for a server's."""
    rollout = recipe.rollout
    needed = rollout.engine == "vllm" and (rollout.vllm.mode == "colocate" or recipe.prompt.images)
    if needed and any(not isinstance(stage, VisionStage) for stage in recipe.stages) and find_spec("vllm") is None:
        raise UserError("rollout.engine: vllm is not installed; pip install 'unirg[vllm]', or set rollout.engine=hf")


def unique(items: Sequence[Any]) -> list[Any]:
    """The items without repetition, in order (configs are not all hashable)."""
    return [item for i, item in enumerate(items) if item not in items[:i]]
