"""What a run folder holds, read for the report page. Missing and broken pieces become notes, never failures."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml

from unirg.errors import UserError

Curves = dict[str, dict[str, list[tuple[float, float]]]]
"""metric -> stage -> (step, value) points."""


@dataclass
class RunContents:
    """The pieces of a run folder; an empty piece has a line in `notes` that says why."""

    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    rollouts: dict[str, tuple[str, list[dict[str, Any]]]] = field(default_factory=dict)
    """stage -> (file name of its last step, its rows)."""
    notes: list[str] = field(default_factory=list)


def read_run(run: Path) -> RunContents:
    """Everything the report shows of `run`. Raises UserError where there is no such folder."""
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder; expected the `output` of a recipe")
    contents = RunContents()
    note = contents.notes.append
    contents.recipe_text = _read(run, "recipe.yaml", str, note) or ""
    contents.recipe = _read(run, "recipe.yaml", yaml.safe_load, note, quiet=True) or {}
    contents.manifest = _read(run, "manifest.json", json.loads, note) or {}
    for path in sorted((run / "evaluation").glob("*.json")):
        evaluation = _read(run, f"evaluation/{path.name}", json.loads, note)
        if evaluation:
            contents.evaluations[path.stem] = evaluation
    if not contents.evaluations:
        note(f"No evaluation yet: `unirg evaluate {run}` writes it.")
    contents.curves = _curves(run, note)
    contents.samples = _read(run, "samples/samples.json", json.loads, note) or []
    for folder in sorted(path for path in (run / "rollouts").glob("*") if path.is_dir()):
        files = sorted(folder.glob("step-*.parquet"))
        if files:
            rows = _rows(files[-1], note)
            if rows:
                contents.rollouts[folder.name] = (files[-1].stem, rows)
    if not contents.rollouts:
        note("No rollouts: the run has no GRPO stage, or it has not logged a step yet.")
    return contents


def _read(run: Path, where: str, parse: Callable[[str], Any], note: Callable[[str], None], quiet: bool = False) -> Any:
    try:
        return parse((run / where).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not quiet:
            note(f"{where} is not there.")
    except (OSError, ValueError, yaml.YAMLError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        if not quiet:
            note(f"{where} cannot be read: {error}")
    return None


def _curves(run: Path, note: Callable[[str], None]) -> Curves:
    """Numbers logged per step, from RUN/metrics.jsonl, or from the stages' own files while the run goes on."""
    whole = run / "metrics.jsonl"
    paths = [whole] if whole.exists() else sorted((run / "stages").glob("*/metrics.jsonl"))
    if not paths:
        note("metrics.jsonl is not there.")
    curves: Curves = {}
    for record in (record for path in paths for record in _records(path, note)):
        stage, step = str(record.get("stage", "run")), record.get("step")
        if not isinstance(step, int):
            continue
        for key, value in record.items():
            if key not in ("stage", "step", "time") and _is_number(value):
                curves.setdefault(key, {}).setdefault(stage, []).append((float(step), float(value)))
    return curves


def _records(path: Path, note: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    broken = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            broken += 1
            continue
        if isinstance(record, dict):
            yield record
    if broken:
        note(f"{path.name}: {broken} broken lines were left out.")


def _rows(path: Path, note: Callable[[str], None]) -> list[dict[str, Any]]:
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        note(f"rollouts/{path.parent.name}/{path.name} cannot be read: {error}")
        return []
    # NaN says that no reward could judge the sample.
    return [{key: None if value != value else value for key, value in row.items()} for row in rows]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
