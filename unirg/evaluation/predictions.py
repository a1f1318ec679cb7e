"""Predictions as JSONL: {"id", "report", "reference", "truncated"} per line, and "complete" where there is one.

A file grows by whole batches and is never rewritten, so that a generation that was cut short goes on where it was.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unirg.errors import UserError
from unirg.prompt import parse_report, report_text
from unirg.study import Study

if TYPE_CHECKING:
    from unirg.policy import Policy
    from unirg.rollout import Sampler


@dataclass
class Predictions:
    """Reports by study id, and, where the file has them, whether each was cut off, and its references."""

    reports: dict[str, str] = field(default_factory=dict)
    truncated: dict[str, bool] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    complete: dict[str, str] = field(default_factory=dict)

    def cut(self) -> dict[str, bool] | None:
        """`truncated` where it is known of every report, else None."""
        return self.truncated if len(self.truncated) == len(self.reports) else None

    def studies(self) -> list[Study]:
        """Studies made of the references, for a comparison without the data that they came from."""
        studies = []
        for study_id in self.reports:
            sections = parse_report(self.references.get(study_id, ""))
            extra = {"complete": self.complete[study_id]} if study_id in self.complete else {}
            findings = " ".join(text for text in (sections.rest, sections.findings) if text)
            studies.append(Study(study_id, findings=findings, impression=sections.impression, extra=extra))
        return studies


def read_predictions(path: Path) -> Predictions:
    """Reads a predictions file. Raises UserError naming file and line for a broken line, a row without `id` or
    `report`, an id that comes twice, and a file that is missing or empty. A last line that a kill cut
    short is left out.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    predictions = Predictions()
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no line end: the writer was killed within it
                break
            raise UserError(f"{path}:{number}: not JSON ({error}); expected one object per line") from error
        if not isinstance(row, dict) or not isinstance(row.get("id"), str) or not isinstance(row.get("report"), str):
            raise UserError(f'{path}:{number}: expected an object with the texts "id" and "report"')
        _take(predictions, row, f"{path}:{number}")
    if not predictions.reports:
        raise UserError(f"{path}: has no predictions")
    return predictions


def write_predictions(
    path: Path,
    policy: "Policy",
    studies: Sequence[Study],
    *,
    max_new_tokens: int,
    batch_size: int,
    sampler: "Sampler | None" = None,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Predictions:
    """Writes a report for every study that `path` does not have yet, batch by batch; returns the whole file.
    `sampler` is as in `generate_reports`.

    `progress` is called with the number of reports that the file has. Errors are those of `read_predictions` for a file
    that is already there, and the policy's own for a study that it cannot read.
    """
    from unirg.rollout import generate_reports

    path.parent.mkdir(parents=True, exist_ok=True)
    drop_cut_line(path)
    done = set(read_predictions(path).reports) if path.exists() and path.stat().st_size else set()
    waiting = [study for study in studies if study.id not in done]
    with path.open("a", encoding="utf-8") as file:
        for first in range(0, len(waiting), batch_size):
            batch = waiting[first : first + batch_size]
            reports = generate_reports(
                policy,
                batch,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                sampler=sampler,
                temperature=temperature,
                seed=seed,
            )
            for study, report in zip(batch, reports, strict=True):
                row = {
                    "id": study.id,
                    "report": report.text,
                    "reference": report_text(study),
                    "truncated": report.truncated,
                }
                if study.extra.get("complete"):
                    row["complete"] = study.extra["complete"]
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            if progress is not None:
                progress(len(done) + first + len(batch))
    return read_predictions(path)


def _take(predictions: Predictions, row: dict[str, Any], place: str) -> None:
    study_id = row["id"]
    if study_id in predictions.reports:
        raise UserError(f"{place}: id '{study_id}' comes a second time; expected one report per study")
    predictions.reports[study_id] = row["report"]
    if isinstance(row.get("truncated"), bool):
        predictions.truncated[study_id] = row["truncated"]
    for key, column in (("reference", predictions.references), ("complete", predictions.complete)):
        if isinstance(row.get(key), str):
            column[study_id] = row[key]


def drop_cut_line(path: Path) -> None:
    """Removes what follows the last line end, the rest of a write that was killed."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
