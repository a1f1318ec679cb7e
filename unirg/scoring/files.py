"""Read a file of reports, one per study: JSONL or CSV with `id` and `report` (or `findings` and `impression`), and in
files of references whatever else rewards may judge by."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unirg.errors import UserError
from unirg.prompt import report_text
from unirg.scoring.contract import STUDY_COLUMNS
from unirg.study import Study

_TEXT_KEYS = ("report", "findings", "impression")
_MAPPINGS = ("labels", "demographics")
_NOT_EXTRA = {"id", "report", "study_id", "candidates", "references", "truncated", *STUDY_COLUMNS}


class ReportFileError(UserError):
    """A file of reports that cannot be used. The message names the file, the line, and what is wrong."""


def read_reports(path: Path) -> dict[str, str]:
    """Report text by study id, in the file's order. Other columns are ignored; a report may be empty text.

    `report` is taken as it stands; without it, findings and impression are joined in the layout of references.
    A name that ends in .csv is read as CSV with a header, any other as JSONL. Raises ReportFileError.
    """
    return {name: text for name, (_, text, _) in _rows_by_id(path).items()}


def read_references(path: Path) -> tuple[dict[str, str], dict[str, Study]]:
    """As `read_reports`, and by the same ids the studies with what else the file says of them: texts, `labels` (an
    object of finding -> 1, 0, -1; in CSV as JSON), and every further column under its own name. Raises ReportFileError.
    """
    rows = _rows_by_id(path)
    studies = {name: _study(path, line, name, row) for name, (line, _, row) in rows.items()}
    return {name: text for name, (_, text, _) in rows.items()}, studies


def _rows_by_id(path: Path) -> dict[str, tuple[int, str, Mapping[str, Any]]]:
    """(line, report text, row) by id."""
    rows: dict[str, tuple[int, str, Mapping[str, Any]]] = {}
    try:
        for line, row in _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path):
            name = _study_id(path, line, row)
            if name in rows:
                raise ReportFileError(
                    f"{path}:{line}: id '{name}' again, first on line {rows[name][0]}; ids must differ"
                )
            rows[name] = line, _text(path, line, name, row), row
    except OSError as error:
        raise ReportFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise ReportFileError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    if not rows:
        raise ReportFileError(f"{path}: holds no reports; expected one row per study with id and report")
    return rows


def _json_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                said = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
                raise ReportFileError(f"{path}:{line}: broken JSON ({said}); expected one object per line") from error
            if not isinstance(row, dict):
                raise ReportFileError(f"{path}:{line}: a JSON {type(row).__name__}; expected one object per line")
            yield line, row


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row:
                    raise ReportFileError(f"{path}:{reader.line_num}: more cells than the header has columns")
                yield reader.line_num, row
        except csv.Error as error:
            line = reader.reader.line_num  # that of DictReader lags one row behind on an error
            raise ReportFileError(f"{path}:{line}: broken CSV ({error})") from error


def _study_id(path: Path, line: int, row: Mapping[str, Any]) -> str:
    name = row.get("id")
    if isinstance(name, bool) or not isinstance(name, (str, int)) or not str(name).strip():
        found = f"has id {name!r}" if "id" in row else f"has no id (has: {', '.join(row) or 'nothing'})"
        raise ReportFileError(f"{path}:{line}: {found}; expected the study's id, text or a whole number")
    return str(name)


def _text(path: Path, line: int, name: str, row: Mapping[str, Any]) -> str:
    texts = {key: row[key] for key in _TEXT_KEYS if row.get(key) is not None}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise ReportFileError(f"{path}:{line}: {key} of '{name}' is {type(text).__name__}; expected text")
    if not texts:
        raise ReportFileError(f"{path}:{line}: '{name}' has no report, findings or impression")
    if "report" in texts:
        return texts["report"]
    return report_text(Study(id=name, findings=texts.get("findings"), impression=texts.get("impression")))


def _study(path: Path, line: int, name: str, row: Mapping[str, Any]) -> Study:
    known: dict[str, Any] = {key: row[key] for key in STUDY_COLUMNS if row.get(key) not in (None, "")}
    for key in _MAPPINGS:
        if isinstance(known.get(key), str):  # a CSV cell
            try:
                known[key] = json.loads(known[key])
            except json.JSONDecodeError as error:
                raise ReportFileError(f"{path}:{line}: {key} of '{name}' is no JSON object ({error.msg})") from error
        if not isinstance(known.get(key, {}), dict):
            raise ReportFileError(f"{path}:{line}: {key} of '{name}' is {known[key]!r:.60}; expected an object")
    if "labels" in known:
        known["labels"] = {finding: value for finding, value in known["labels"].items() if value is not None}
    for finding, value in known.get("labels", {}).items():
        if isinstance(value, bool) or value not in (1, 0, -1):
            raise ReportFileError(f"{path}:{line}: label '{finding}' of '{name}' is {value!r:.60}; expected 1, 0 or -1")
    return Study(id=name, **known, extra={key: value for key, value in row.items() if key not in _NOT_EXTRA})
