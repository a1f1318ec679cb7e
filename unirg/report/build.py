"""RUN/report.html: one page without scripts or outside addresses, from what the run folder holds.

Model output and reports are put in by a template that escapes them.
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from unirg.evaluation import table
from unirg.report import charts
from unirg.report.read import Curves, RunContents, read_run
from unirg.run import write_atomically

REWARD_CURVES = ("reward", "reward_std", "frac_reward_zero_std")
OTHER_CURVES = (
    "loss", "kl", "entropy", "completions/mean_length", "completions/clipped_ratio", "grad_norm", "learning_rate"
)  # fmt: skip
SHOWN_CANDIDATES = 8
"""At most so many reports of a rollout group are shown: the best and the worst of it."""


def build(run: Path) -> Path:
    """Writes RUN/report.html and returns its path. What the folder lacks is named on the page.

    Raises UserError where there is no such folder.
    """
    contents = read_run(run)
    environment = Environment(
        loader=PackageLoader("unirg.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"decimals": table.decimals, "percent": table.percent, "trained": table.trained}
    environment.filters["title"] = table.title
    stages = list(dict.fromkeys(stage for by_stage in contents.curves.values() for stage in by_stage))
    arms = dict.fromkeys(arm for evaluation in contents.evaluations.values() for arm in evaluation["arms"])
    colours = charts.colours_of(list(dict.fromkeys([*arms, *stages])))
    page = environment.get_template("page.html").render(
        name=contents.recipe.get("name") or run.resolve().name,
        drawn=_films_are_drawn(contents),
        drawn_line=table.DRAWN_FILMS,
        evaluations=[_evaluation(evaluation, colours) for evaluation in contents.evaluations.values()],
        curves=_curve_charts(contents.curves, colours),
        curve_stages=[(stage, colours[stage]) for stage in stages],
        samples=[_sample(run, sample, contents.notes) for sample in contents.samples],
        rollouts=[_rollout(stage, *found) for stage, found in contents.rollouts.items()],
        manifest=_manifest(contents.manifest),
        recipe_text=contents.recipe_text,
        notes=contents.notes,
    )
    path = run / "report.html"
    write_atomically(path, page)
    return path


def _films_are_drawn(contents: RunContents) -> bool:
    evaluated = any(evaluation.get("film") == "drawn" for evaluation in contents.evaluations.values())
    return evaluated or any(sample.get("film") == "drawn" for sample in contents.samples)


def _evaluation(evaluation: Mapping[str, Any], colours: Mapping[str, str]) -> dict[str, Any]:
    """One split's tables and charts."""
    arms, controls = evaluation["arms"], evaluation["controls"]
    groups = table.figure_groups(evaluation)
    forests = [
        (group, [_forest(key, arms, controls, colours) for key in keys])
        for group, keys in groups.items()
        if group != "outputs"
    ]
    findings = dict.fromkeys(finding for arm in arms.values() for finding in arm["per_finding"])
    columns = arms | {name: control for name, control in controls.items() if name == "perfect reporter"}
    return {
        "split": evaluation["split"],
        "studies": evaluation["studies"],
        "headline": evaluation["headline"],
        "baseline": evaluation["baseline"],
        "arms": arms,
        "controls": controls,
        "columns": arms | controls,
        "groups": groups,
        "beside": {key: _beside(key) for keys in groups.values() for key in keys},
        "versus": evaluation["versus"],
        "looking": _looking(evaluation),
        "forests": forests,
        "finding_columns": list(columns),
        "findings": [
            (finding.replace("_", " "), [column["per_finding"].get(finding) for column in columns.values()])
            for finding in findings
        ],
    }


def _forest(key: str, arms: Mapping[str, Any], controls: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    ends = [
        controls[name]["metrics"].get(key, {}).get("mean") if name in controls else None
        for name in ("best constant report", "perfect reporter")
    ]
    figures = {name: arm["metrics"].get(key, {}) for name, arm in arms.items()}
    return charts.forest(table.title(key), figures, colours, marks={"constant": ends[0], "perfect": ends[1]})


def _beside(key: str) -> list[str]:
    """The keys of the precision and the recall that belong to a counted F1; other keys have none in the evaluation."""
    stem, slash, ending = key.partition("/")
    return [f"{stem.removesuffix('_f1')}_{what}{slash}{ending}" for what in ("precision", "recall")]


def _looking(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Greedy, sampled and shuffled figures of the arms."""
    rows = []
    for key in table.looked_at(evaluation):
        variants = {"greedy": "metrics", "sampled": "sampled", "films shuffled": "shuffled"}
        cells = {
            label: [arm.get(source, {}).get(key) for arm in evaluation["arms"].values()]
            for label, source in variants.items()
        }
        rows.append({"key": key, "against": table.against(key), "cells": {k: v for k, v in cells.items() if any(v)}})
    return rows


def _curve_charts(curves: Curves, colours: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Charts by heading; metrics of no heading (times, counts) are left to trackers."""
    rewards = [*REWARD_CURVES, *(key for key in curves if key.startswith("rewards/") and key.endswith("/mean"))]
    dev = [key for key in curves if key.startswith("eval/")]
    wanted = {"Rewards": rewards, "Dev reports during training": dev, "Training": list(OTHER_CURVES)}
    charted = {
        heading: [charts.learning_curve(key, curves[key], colours) for key in keys if key in curves]
        for heading, keys in wanted.items()
    }
    return [(heading, made) for heading, made in charted.items() if made]


def _sample(run: Path, sample: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    image = None
    if sample.get("image"):
        path = run / "samples" / Path(sample["image"]).name
        if path.exists():
            image = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        else:
            notes.append(f"samples/{path.name} is not there.")
    return {
        "id": sample["id"],
        "split": sample.get("split", ""),
        "image": image,
        "reference": sample["reference"],
        "complete": sample.get("complete"),
        "reports": sample["reports"],
        "labels": _present(sample.get("labels") or {}),
        "has_labels": bool(sample.get("labels")),
    }


def _present(labels: Mapping[str, int]) -> str:
    """The findings that are there, with their sides: "cardiomegaly, left and right effusion"."""
    words = []
    for finding in (key for key, value in labels.items() if value == 1 and "/" not in key):
        sides = [key.partition("/")[2] for key, value in labels.items() if value == 1 and key.startswith(f"{finding}/")]
        words.append(" ".join([*([" and ".join(sides)] if sides else []), finding.replace("_", " ")]))
    return ", ".join(words) or "no finding"


def _rollout(stage: str, step: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The groups with the highest and the lowest mean reward of a step, best report first."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row["study_id"]), []).append(row)
    judged = {s: [row["reward"] for row in group if row.get("reward") is not None] for s, group in groups.items()}
    means = {study: sum(rewards) / len(rewards) for study, rewards in judged.items() if rewards}
    chosen = [("highest mean reward", max(means, key=lambda s: means[s]))] if means else []
    if len(means) > 1:
        chosen.append(("lowest mean reward", min(means, key=lambda s: means[s])))
    return {
        "stage": stage,
        "step": step.removeprefix("step-").lstrip("0") or "0",
        "groups": [(heading, study, means[study], *_candidates(groups[study])) for heading, study in chosen],
        "scores": [key for key in rows[0] if key.startswith("scores.")],
    }


def _candidates(group: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], int]:
    """The group's rows, best reward first, and how many of the middle are left out."""
    known = [row for row in group if row.get("reward") is not None]
    ordered = sorted(known, key=lambda row: -row["reward"]) + [row for row in group if row.get("reward") is None]
    half = SHOWN_CANDIDATES // 2
    left_out = max(0, len(ordered) - SHOWN_CANDIDATES)
    return (ordered[:half] + ordered[-half:] if left_out else ordered), left_out


def _manifest(manifest: Mapping[str, Any], at: str = "") -> list[tuple[str, str]]:
    """The manifest as lines of dotted key and value."""
    lines: list[tuple[str, str]] = []
    for key, value in manifest.items():
        name = f"{at}.{key}" if at else str(key)
        lines += _manifest(value, name) if isinstance(value, Mapping) and value else [(name, str(value))]
    return lines
