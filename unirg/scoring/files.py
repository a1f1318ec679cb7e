"""Read a file of reports, one per study: JSONL or CSV with `id` and `report` (or `findings` and `impression`)."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unirg.errors import UserError
from unirg.prompt import report_text
from unirg.study import Study

_TEXT_KEYS = ("report", "findings", "impression")


class ReportFileError(UserError):
    """A file of reports that cannot be used. The message names the file, the line, and what is wrong."""


def read_reports(path: Path) -> dict[str, str]:
    """Report text by study id, in the file's order. Other columns are ignored; a report may be empty text.

    `report` is taken as it stands; without it, findings and impression are joined in the layout of references.
    A name that ends in .csv is read as CSV with a header, any other as JSONL. Raises ReportFileError.
    """
    reports: dict[str, str] = {}
    lines: dict[str, int] = {}
    try:
        for line, row in _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path):
            name = _study_id(path, line, row)
            if name in reports:
                raise ReportFileError(f"{path}:{line}: id '{name}' again, first on line {lines[name]}; ids must differ")
            reports[name] = _text(path, line, name, row)
            lines[name] = line
    except OSError as error:
        raise ReportFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise ReportFileError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    if not reports:
        raise ReportFileError(f"{path}: holds no reports; expected one row per study with id and report")
    return reports


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
