"""The run folder: resolved recipe, manifest, metrics, checkpoints that are whole or not there at all.

RUN/recipe.yaml  manifest.json  metrics.jsonl  report.html
RUN/stages/<stage>/metrics.jsonl  step-000050/ ...  latest  final/
RUN/rollouts/<stage>/step-000050.parquet   RUN/predictions/<split>/<stage>.jsonl   RUN/evaluation/<split>.json
"""

import contextlib
import fcntl
import json
import os
import platform
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from unirg.errors import UserError

PACKAGES = (
    "unirg",
    "torch",
    "transformers",
    "accelerate",
    "trl",
    "peft",
    "datasets",
    "numpy",
    "pillow",
    "vllm",
    "deepspeed",
)


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that a reader, or a kill, finds the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:  # a full disk
        part.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Returns when a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def stage_folder(run: Path, stage: str) -> Path:
    """Where a stage keeps its checkpoints."""
    return run / "stages" / stage


def final_folder(run: Path, stage: str) -> Path:
    """The Hugging Face model folder that a finished stage leaves; it exists only when it is whole."""
    return stage_folder(run, stage) / "final"


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on, where installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


FREE = ("jobs", "threads", "distributed", "rollout.vllm", "output", "trackers", "evaluation")
"""What a recipe may say anew of a run that exists: how it is run and judged, not what it learns."""
FREE_IN_STAGES = (
    "shared_prefix",
    "shared_prefix_kernel",
    "shared_prefix_mismatch",
    "tokens_per_forward",
    "server",
    "timeout",
    "checkpoint_every",
    "keep_checkpoints",
)
"""The same of a stage: how its forwards are made, where its rewards are scored and how long that may take, when it is
saved. The numbers stay the same to rounding."""


def open_run(run: Path, recipe: str) -> None:
    """Makes the folder and writes the resolved recipe (YAML), or checks that the folder is of the same recipe.

    Raises UserError naming the keys that differ from the run that the folder already holds (keys in FREE and
    FREE_IN_STAGES may, and all may where that run has left no step to go on from), or that the recipe there cannot be
    read, or the folder not written.
    """
    import yaml

    path = run / "recipe.yaml"
    if path.exists():
        try:
            old = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(
                f"{path}: cannot be read, so that nobody can tell whether the run in its folder is this recipe's "
                f"({error}); put it back, or choose another `output`"
            ) from error
        new = yaml.safe_load(recipe)
        differing = [
            key
            for key in _differences(old, new)
            if not f"{key}.".startswith(tuple(f"{free}." for free in FREE))
            and key.rpartition(".")[2] not in FREE_IN_STAGES
        ]
        if differing and any(next(run.glob(f"stages/*/{kept}"), None) for kept in ("step-*", "final")):
            raise UserError(
                f"{run}: holds a run of another recipe (differs in {', '.join(differing[:6])}); "
                "choose another `output`, or remove the folder"
            )
        limits = [(tree.get("evaluation") or {}).get("max_new_tokens") for tree in (old, new)]
        if limits[0] != limits[1]:  # the reports there are were written under the other limit
            shutil.rmtree(run / "predictions", ignore_errors=True)
        if old == new:  # left as it is: its time says since when the run is judged like this
            return
    try:
        write_atomically(path, recipe)
    except OSError as error:
        raise UserError(f"{run}: cannot be written ({error.strerror}); choose another `output`") from error


def _differences(old: Any, new: Any, at: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{at}.{key}" if at else str(key))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            d
            for i, (a, b) in enumerate(zip(old, new, strict=True))
            for d in _differences(a, b, f"{at}.{(isinstance(a, dict) and (a.get('label') or a.get('name'))) or i}")
        ]
    return [] if old == new else [at]


def read_manifest(run: Path) -> dict[str, Any]:
    """The run's manifest.json; empty where it has none."""
    path = run / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def update_manifest(run: Path, **entries: Any) -> None:
    """Adds entries to manifest.json (versions and the time of the first start are always there)."""
    with (run / ".manifest.lock").open("w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)  # stages that run side by side write it too
        manifest = read_manifest(run) or {"started": _now()}
        manifest |= {"versions": package_versions(), "platform": platform.platform(), "cpus": os.cpu_count()}
        for key, value in entries.items():
            known = manifest.get(key)
            manifest[key] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
        write_atomically(run / "manifest.json", json.dumps(manifest, indent=1, default=str) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def append_metrics(folder: Path, record: Mapping[str, Any]) -> None:
    """Adds one step's metrics to the stage's metrics.jsonl."""
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """A metrics.jsonl's records; a last line that a kill cut short is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def forget_metrics_after(folder: Path, step: int) -> int:
    """Drops what was logged after the checkpoint that a resumed stage goes on from; returns how many steps are left."""
    kept = [record for record in read_metrics(folder) if record["step"] <= step]
    write_atomically(folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
    return len(kept)


def gather_metrics(run: Path, stages: list[str]) -> None:
    """Writes RUN/metrics.jsonl, all stages' metrics one after another."""
    records = [record for stage in stages for record in read_metrics(stage_folder(run, stage))]
    write_atomically(run / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
