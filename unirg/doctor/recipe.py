"""What a recipe needs of the node: its model, data, rewards, trackers, and room in its run folder."""

import contextlib
import fcntl
import io
import math
import os
import shutil
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from unirg import zero3
from unirg.check import check_engine, check_rewards, check_shares, check_split, check_trackers, unique
from unirg.data import load_studies
from unirg.doctor.finding import Finding
from unirg.doctor.node import GIB
from unirg.errors import UserError
from unirg.grpo.choose import check_kernel
from unirg.plan.disk import run_bytes
from unirg.plan.policy import Given, plan_policy
from unirg.recipe.load import load_recipe
from unirg.recipe.schema import GrpoStage, Recipe, VisionStage

WEIGHTS = ("*.safetensors", "*.json")
PROBE = 5.0
"""Seconds that a server may take to say that it is there."""


def check_recipe(path: Path, overrides: Sequence[str]) -> Iterator[Finding]:
    """Everything that the recipe names and that this node must have. Raises UserError where the recipe is not valid."""
    recipe = load_recipe(path, list(overrides))
    config = None
    try:
        for finding, folder in _model(recipe):
            config = folder
            yield finding
    except OSError as error:
        yield Finding("model", "fail", f"policy.model: {error.filename} cannot be looked into ({error.strerror})")
    yield from _data(recipe)
    silent = []
    for url, start in _servers(recipe):
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=PROBE):
                yield Finding("servers", "ok", f"{url} answers")
        except (OSError, HTTPException) as error:  # nobody, or something else that listens there
            silent.append(url)
            why = str(getattr(error, "reason", None) or error).strip()
            yield Finding(
                "servers",
                "fail",
                f"{url} does not answer ({why}): has `{start}` been started, and can this node reach it?",
            )
    yield from _rewards(recipe, silent)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    for stage in recipe.stages:
        yield from _tried(
            "stages", f"{stage.name}: studies divide by {world} ranks", partial(check_shares, stage, world)
        )
        if isinstance(stage, GrpoStage) and stage.shared_prefix and stage.shared_prefix_kernel != "auto":
            kernel = partial(check_kernel, stage, recipe.policy, torch.cuda.is_available())
            yield from _tried("stages", f"{stage.name}: {stage.shared_prefix_kernel} can run", kernel)
    if recipe.rollout.engine != "hf":
        yield from _tried("rollout", f"engine {recipe.rollout.engine} is installed", partial(check_engine, recipe))
    if recipe.policy.lora is not None and find_spec("peft") is None:
        yield Finding("model", "fail", "policy.lora needs peft: pip install 'unirg[lora]'")
    if recipe.trackers:
        yield from _tried("trackers", ", ".join(recipe.trackers), partial(check_trackers, recipe))
    if recipe.distributed.strategy == "zero3":
        yield from _tried("distributed", "strategy zero3: DeepSpeed can be imported", zero3.require)
    yield from _disk(recipe, config)


def _tried(area: str, what: str, check: Callable[[], object]) -> Iterator[Finding]:
    """`what` is in order, or fails for the reasons that the check raises, a line each."""
    try:
        check()
    except UserError as error:
        yield from (Finding(area, "fail", line) for line in str(error).splitlines())
    else:
        yield Finding(area, "ok", what)


def _model(recipe: Recipe) -> Iterator[tuple[Finding, Path | None]]:
    """The policy's files are here and whole; with their folder, None where they are not, or none are needed."""
    area, name = "model", recipe.policy.model
    if name is None:
        yield Finding(area, "ok", "built here (policy.tiny)"), None
        return
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
            yield Finding(area, "fail", f"policy.model {name}: there is no such folder"), None
            return
        try:
            folder = Path(snapshot_download(name, allow_patterns=list(WEIGHTS), local_files_only=True))
        except LocalEntryNotFoundError:
            offline = os.environ.get("HF_HUB_OFFLINE") == "1"
            said = f"policy.model {name} is not in this node's hub cache"
            more = "and HF_HUB_OFFLINE=1 forbids to download it" if offline else "it would be downloaded at the start"
            fetch = f"`hf download {name}` where there is a network, or HF_HOME on a disk that all nodes share"
            yield Finding(area, "fail" if offline else "warn", f"{said}: {more}; {fetch}"), None
            return
        except HFValidationError:
            yield Finding(area, "fail", f"policy.model {name} is no folder and no hub id"), None
            return
    for missing in [file for file in ("config.json", "tokenizer_config.json") if not (folder / file).exists()]:
        yield Finding(area, "fail", f"{folder}: {missing} is missing"), None
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        yield Finding(area, "fail", f"{folder}: no .safetensors files; weights in other formats are not loaded"), None
        return
    count = 0
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                count += sum(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            yield Finding(area, "fail", f"{file}: cannot be read ({error}); download it again"), None
            return
    yield Finding(area, "ok", f"{name}: {count / 1e6:,.0f} million weights in {len(files)} files"), folder


def _data(recipe: Recipe) -> Iterator[Finding]:
    """Every split that the run reads has studies whose reports and images can be read."""
    vision = [stage for stage in recipe.stages if isinstance(stage, VisionStage)]
    dev = ["dev"] if any(stage.evaluate_every for stage in recipe.stages) else []
    splits = [(config, "train") for config in unique([stage.data or recipe.data for stage in recipe.stages])]
    splits += [(recipe.data, split) for split in unique([*dev, *recipe.evaluation.splits])]
    for config, split in splits:
        of = ", ".join(stage.name for stage in recipe.stages if stage.data == config)
        try:
            studies = load_studies(config, split)
            own = [stage for stage in vision if split == "train" and (stage.data or recipe.data) == config]
            check_split(studies, split, own)
        except UserError as error:
            yield from (Finding("data", "fail", line) for line in str(error).splitlines())
        else:
            yield Finding(
                "data", "ok", f"{config.adapter} {split}{of and f' of {of}'}: {len(studies):,} studies, all can be read"
            )


def _servers(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The addresses that the recipe names, each with the command that listens there."""
    if recipe.rollout.engine == "vllm":
        yield from ((url, "unirg rollout-server") for url in recipe.rollout.vllm.servers)
    rewards = [reward for stage in recipe.stages if isinstance(stage, GrpoStage) for reward in stage.rewards]
    named = [reward.server for reward in (*rewards, *recipe.evaluation.metrics) if reward.server is not None]
    yield from ((url, "unirg rewards serve") for url in unique(named))


def _rewards(recipe: Recipe, silent: Sequence[str]) -> Iterator[Finding]:
    """Rewards and metrics load in workers, or are known to their server, and judge a few training studies' own reports.
    Those of `silent` servers are left out: their clients would wait."""
    groups = {f"stage {stage.name}": stage.rewards for stage in recipe.stages if isinstance(stage, GrpoStage)}
    if recipe.evaluation.metrics:
        groups["evaluation"] = recipe.evaluation.metrics
    try:
        studies = load_studies(recipe.data, "train")
    except UserError:  # said where the data are looked at
        yield Finding("rewards", "warn", "not tried: there are no studies to try them on")
        return
    for user, every in groups.items():
        configs = [config for config in every if config.server not in silent]
        if not configs:
            continue
        labels = ", ".join(config.log_label for config in configs)
        yield from _tried("rewards", f"{user}: {labels}", partial(check_rewards, configs, studies))


def _disk(recipe: Recipe, config: Path | None) -> Iterator[Finding]:
    """The run folder's disk takes files, locks and renames, and has room for the checkpoints."""
    area, run = "disk", Path(recipe.output).absolute()
    place = run
    try:
        place = next(folder for folder in (run, *run.parents) if folder.exists())
        with tempfile.TemporaryDirectory(dir=place, prefix=".unirg-doctor-") as name:
            (Path(name) / "a").write_text("a", encoding="ascii")
            (Path(name) / "a").rename(Path(name) / "b")
            with (Path(name) / "b").open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        yield Finding(
            area, "fail", f"{place}: cannot be written, renamed in or locked ({error}); choose another `output`"
        )
        return
    free = shutil.disk_usage(place).free
    text = f"{run}: {free / GIB:,.0f} GiB are free"
    if config is None and recipe.policy.tiny is None:
        yield Finding(area, "ok", text)
        return
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # transformers' advice on loading is not about a disk
            policy, _ = plan_policy(recipe, config, Given())
    except UserError as error:
        yield Finding(area, "warn", f"{text}; how many a run needs is not known ({error})")
        return
    need = run_bytes(recipe, policy)
    size = f"{need / GIB:,.0f} GiB" if need > GIB else f"{need / (1 << 20):,.0f} MiB"
    needed = f"{size} are needed for checkpoints and {len(recipe.stages)} stages' policies"
    if free < need:
        yield Finding(area, "fail", f"{text}, and {needed}; choose another `output`")
    else:
        yield Finding(area, "ok", f"{text}, {needed}")
