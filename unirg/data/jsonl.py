"""JSONL or CSV: a user's own studies, one a row.

```json
{"id": "s1", "images": ["s1/frontal.png"], "indication": "Cough.", "findings": "...", "impression": "..."}
```
"""

import csv
import io
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from unirg.errors import UserError
from unirg.section import Section
from unirg.study import Study, StudyImage

TEXTS = ("indication", "comparison", "technique", "findings", "impression", "institution", "modality", "language")
FIELDS = ("id", "patient", "images", "views", "prior", "labels", "demographics", *TEXTS)
NOWHERE = "\0"
"""A column that no file has."""
_SHOWN = 20


class JsonlData(Section):
    """Studies in JSONL or CSV files, one file a split, image paths relative to the file."""

    adapter: Literal["jsonl"] = "jsonl"
    """Always "jsonl"."""
    files: dict[str, Path]
    """A file for each split, e.g. {train: train.jsonl, dev: dev.jsonl, test: test.csv}. By suffix .csv, else JSONL."""
    columns: dict[str, str] = {}
    """Study field -> column of the file, where they differ, e.g. {id: study_id, images: image_path}. Fields: id (the
    only required one), images (a path or a list; in CSV several separated by "|"), views, indication, comparison,
    technique, findings, impression, patient, institution, modality, language, demographics (object), labels (object),
    prior (object with the same columns). A column that is named here serves no other field: {indication: findings}
    shows the findings and asks for the impression."""
    labels: dict[str, str] = {}
    """Finding -> column that holds 1 present, 0 absent, -1 uncertain or nothing (unknown), e.g. {effusion: Pleural
    Effusion}; beside a `labels` object."""
    extra: list[str] = Field(default_factory=list)
    """Further columns to hand to rewards under their own names, e.g. [complete]."""


class BadRows(UserError):
    """Rows that cannot be studies; `rows` names each as "file:line: what is wrong"."""

    def __init__(self, rows: list[str]) -> None:
        self.rows = rows
        more = f"\n... and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        super().__init__(f"{len(rows)} bad row{'s' * (len(rows) > 1)}:\n" + "\n".join(rows[:_SHOWN]) + more)


def load_jsonl(config: JsonlData, split: str) -> list[Study]:
    """The studies of a split's file, in its order.

    Raises UserError for a split without a file and for a file that cannot be read or is empty; BadRows (all of them at
    once) for broken lines, wrong types, missing or duplicate ids.
    """
    studies, problems, _ = read_studies(config, split)
    if problems:
        raise BadRows(problems)
    return studies


def read_studies(config: JsonlData, split: str) -> tuple[list[Study], list[str], list[str]]:
    """The studies of a split's file, its bad rows ("file:line: what is wrong"), and the columns that the recipe makes
    no use of; raises as `load_jsonl` else."""
    if split not in config.files:
        there = ", ".join(config.files) or "none"
        raise UserError(f"data.files has no split {split!r}; there are: {there}")
    if unknown := sorted(set(config.columns) - set(FIELDS)):
        raise UserError(
            f"data.columns: {', '.join(unknown)} is no field of a study; the fields are {', '.join(FIELDS)}"
        )
    path = config.files[split]
    studies: list[Study] = []
    problems: list[str] = []
    lines: dict[str, int] = {}
    keys: dict[str, None] = {}
    column_of = _columns(config)
    named = False
    for number, row in _rows(path):
        keys |= dict.fromkeys(row) if isinstance(row, dict) else {}
        named |= isinstance(row, dict) and column_of["id"] in row
        try:
            study = _study(row if isinstance(row, dict) else _fail(row), config, path)
            if study.id in lines:
                raise ValueError(f"id {study.id!r} again (first on line {lines[study.id]}); ids must be unique")
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
        else:
            lines[study.id] = number
            studies.append(study)
    if not studies and not problems:
        raise UserError(f"{path}: holds no study")
    if len(problems) > 1 and keys and not named:  # every row would say the same
        raise UserError(
            f"{path}: no row has the column {column_of['id']!r}; data.columns maps other names, such as "
            f"{{id: COLUMN}}. There are: {', '.join(keys)}"
        )
    for name in (*config.columns.values(), *config.labels.values(), *config.extra):
        if name not in keys:
            problems.append(
                f"{path}: no row has the column {name!r} that the recipe names; there are: {', '.join(keys)}"
            )
    used = {*column_of.values(), *config.labels.values(), *config.extra}
    return studies, problems, [key for key in keys if key not in used]


def _columns(config: JsonlData) -> dict[str, str]:
    """The column of each field: the one that the recipe names, else the one of its own name, unless the recipe gives
    that to another field: findings that are shown to the policy are not what it is to write."""
    taken = set(config.columns.values()) - {"id"}
    return {field: config.columns.get(field, NOWHERE if field in taken else field) for field in FIELDS}


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, row) of a file; a broken JSONL line comes as the ValueError that says what is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    with io.StringIO(text, newline="") as file:
        if path.suffix.lower() == ".csv":
            reader = csv.DictReader(file)
            for row in reader:
                if None in row or None in row.values():
                    wrong = "more" if None in row else "fewer"
                    yield reader.line_num, ValueError(f"{wrong} cells than the header's {len(reader.fieldnames or ())}")
                else:
                    yield reader.line_num, row
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    yield number, ValueError(f"broken JSON: {error.msg} at column {error.colno}")


def _fail(row: Any) -> dict[str, Any]:
    raise row if isinstance(row, ValueError) else ValueError(f"expected a JSON object, not {type(row).__name__}")


def _study(row: dict[str, Any], config: JsonlData, path: Path) -> Study:
    """One row. Raises ValueError that names the key, what was expected and what is there."""
    column = _columns(config)
    name = _name(row, column["id"])
    if name is None:
        raise ValueError(f"no {column['id']!r}; each row needs a unique id (data.columns maps other names)")
    views = _list(row, column["views"])
    sources = _list(row, column["images"])
    if views and len(views) != len(sources):
        raise ValueError(f"{column['views']!r} has {len(views)} entries for {len(sources)} images")
    prior = _object(row, column["prior"])
    return Study(
        id=name,
        images=tuple(StudyImage(path.parent / source, view) for source, view in itertools.zip_longest(sources, views)),
        prior=_study({column["id"]: f"{name}/prior", **prior}, config, path) if prior else None,
        demographics={key: str(value) for key, value in _object(row, column["demographics"]).items()},
        labels=_labels(row, column["labels"], config.labels),
        extra={key: row[key] for key in config.extra if key in row},
        patient=_name(row, column["patient"]),
        **{field: _text(row, column[field]) for field in TEXTS},
    )


def _name(row: Mapping[str, Any], key: str) -> str | None:
    """An identifier, which may be a number."""
    value = row.get(key)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(row, key)


def _text(row: Mapping[str, Any], key: str) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key!r} must be text, not {type(value).__name__}")
    return value if value and value.strip() else None


def _list(row: Mapping[str, Any], key: str) -> list[str]:
    value = row.get(key)
    if isinstance(value, str):
        value = [part.strip() for part in value.split("|") if part.strip()]
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(part, str) and part for part in value):
        raise ValueError(f"{key!r} must be a path or a list of paths, not {value!r:.60}")
    return value


def _object(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = row.get(key)
    if isinstance(value, str):  # a CSV cell
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"{key!r} must hold a JSON object ({error.msg})") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key!r} must be an object, not {type(value).__name__}")
    return value or {}


def _labels(row: Mapping[str, Any], key: str, columns: Mapping[str, str]) -> dict[str, int]:
    given = _object(row, key) | {finding: row.get(column) for finding, column in columns.items()}
    labels = {}
    for finding, value in given.items():
        if value is None or value == "":
            continue
        try:
            labels[finding] = int(float(value))
            valid = labels[finding] == float(value) and labels[finding] in (-1, 0, 1)
        except (TypeError, ValueError, OverflowError):
            valid = False
        if not valid:
            raise ValueError(f"label {finding!r} is {value!r}; expected 1, 0, -1 or nothing")
    return labels
