"""What `unirg evaluate`, `unirg generate` and `unirg compare` do. Each returns the exit status."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unirg import report
from unirg.data import load_studies
from unirg.errors import UserError
from unirg.evaluation import run as runs
from unirg.evaluation.evaluate import compare as paired_comparison
from unirg.evaluation.evaluate import measure
from unirg.evaluation.predictions import Predictions, read_predictions, write_predictions
from unirg.evaluation.table import print_evaluation, render_comparison
from unirg.recipe.load import load_recipe
from unirg.scoring.engine import ScoringEngine
from unirg.study import Study


def evaluate(
    run: Path,
    split: str | None = None,
    *,
    stages: Sequence[str] | None = None,
    baseline: str | None = None,
    overrides: Sequence[str] = (),
    as_json: bool = False,
) -> int:
    """Evaluate a run's stages on `split` (default: the recipe's `evaluation.splits`), print the tables or JSON.
    `overrides` are of the recipe, such as servers that are elsewhere now.

    Also writes RUN/evaluation/<split>.json and RUN/report.html. With `as_json` one JSON object per split and line.
    """
    for name in [split] if split else runs.load_run_recipe(run, overrides).evaluation.splits:
        with _progress() as progress:
            evaluation = runs.evaluate_run(
                run, name, stages=stages, baseline=baseline, overrides=overrides, progress=progress
            )
        if as_json:
            print(json.dumps(evaluation, ensure_ascii=False))
        else:
            print_evaluation(evaluation)
    page = report.build(run)
    Console(stderr=as_json).print(f"\nreport: {page}", soft_wrap=True)
    return 0


def generate(
    target: Path,
    out: Path,
    *,
    split: str = "test",
    data: Path | None = None,
    stage: str | None = None,
    temperature: float = 0.0,
    overrides: Sequence[str] = (),
) -> int:
    """Write reports of a run's stage (default its last), or of a Hugging Face model folder, as JSONL to `out`.

    `data` is the recipe whose data, prompt and policy settings are used; a run folder has its own. Ids that `out`
    already has are skipped, so that a run cut short goes on. Raises UserError where a model folder comes
    without `data`.
    """
    is_run = (target / "recipe.yaml").exists()
    if data is None and not is_run:
        raise UserError(f"{target}: a model folder says nothing of data; give a recipe with --data")
    own = load_recipe(target / "recipe.yaml") if is_run else None
    recipe = load_recipe(data, overrides) if data is not None else load_recipe(target / "recipe.yaml", overrides)
    folder = target
    if own is not None:
        names = [s.name for s in own.stages if s.kind != "vision"]
        if stage is not None and stage not in names:
            raise UserError(f"{target}: no stage '{stage}' that writes reports; there are: {', '.join(names)}")
        folder = runs.final_folder(target, stage or names[-1])
    if not folder.exists():
        raise UserError(f"{folder}: no model folder there; is the stage finished?")
    studies = load_studies(recipe.data, split)
    with _progress() as progress, runs.report_writer(recipe, folder, studies) as (policy, sampler):
        predictions = write_predictions(
            out,
            policy,
            studies,
            max_new_tokens=runs.max_new_tokens(recipe),
            batch_size=recipe.evaluation.batch_size,
            sampler=sampler,
            temperature=temperature,
            seed=recipe.seed,
            progress=lambda done: progress("reports", done, len(studies)),
        )
    Console(stderr=True).print(f"{out}: {len(predictions.reports)} reports", soft_wrap=True)
    return 0


def compare(
    a: Path,
    b: Path,
    *,
    data: Path | None = None,
    split: str = "test",
    draws: int = 1000,
    as_json: bool = False,
) -> int:
    """Compare two prediction files study by study: b less a, for every figure, with 95% intervals.

    With `data` (a recipe) the studies come from there, with their labels and the recipe's metrics; without, from the
    references in the files. Raises UserError where the two files' ids differ.
    """
    first, second = read_predictions(a), read_predictions(b)
    if differing := sorted(set(first.reports) ^ set(second.reports)):
        only = a if differing[0] in first.reports else b
        raise UserError(f"{a} and {b} differ in {len(differing)} ids (first: '{differing[0]}', only in {only})")
    engine = None
    if data is None:
        studies = _studies_of_files(first, second, a, b)
    else:
        recipe = load_recipe(data)
        studies = [study for study in load_studies(recipe.data, split) if study.id in first.reports]
        engine = ScoringEngine(recipe.evaluation.metrics) if recipe.evaluation.metrics else None
    measured = [measure(studies, file.reports, engine, truncated=file.cut()) for file in (first, second)]
    differences = paired_comparison(*measured, draws=draws)
    if as_json:
        print(json.dumps({"a": str(a), "b": str(b), "studies": len(studies), "differences": differences}))
    else:
        Console().print(render_comparison(differences, a.name, b.name, len(studies)))
    return 0


def _studies_of_files(first: Predictions, second: Predictions, a: Path, b: Path) -> list[Study]:
    for file, path in ((first, a), (second, b)):
        if missing := [study_id for study_id in file.reports if not file.references.get(study_id)]:
            raise UserError(f"{path}: '{missing[0]}' has no \"reference\"; give the studies with --data")
    if differing := [i for i in first.reports if first.references[i] != second.references[i]]:
        raise UserError(f"{a} and {b}: the references of '{differing[0]}' differ; give the studies with --data")
    return first.studies()


@contextmanager
def _progress() -> Iterator[runs.Progress]:
    """A progress bar on standard error, one line per file of reports."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, int] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)  # type: ignore[arg-type]

        yield update
