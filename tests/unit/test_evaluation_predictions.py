"""Prediction files: what is read, what is refused, and that a generation cut short goes on."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import unirg.rollout
from unirg.errors import UserError
from unirg.evaluation.predictions import read_predictions, write_predictions
from unirg.prompt import report_text
from unirg.study import Study

STUDIES = [Study(f"s{i}", findings="No effusion.", extra={"complete": "Findings: All."} if i else {}) for i in range(7)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces generation; the ids that it was asked for, in order."""
    ids: list[str] = []

    def generate(policy: object, studies: Sequence[Study], **_: Any) -> list[SimpleNamespace]:
        if policy == "breaks" and len(ids) >= 4:
            raise KeyboardInterrupt
        ids.extend(study.id for study in studies)
        return [SimpleNamespace(id=s.id, text=f"report of {s.id} – ok", truncated=s.id == "s1") for s in studies]

    monkeypatch.setattr(unirg.rollout, "generate_reports", generate)
    return ids


def write(path: Path, policy: str = "policy", **options: Any) -> Any:
    return write_predictions(path, policy, STUDIES, max_new_tokens=5, batch_size=2, **options)  # type: ignore[arg-type]


def test_a_generation_cut_short_goes_on_and_equals_an_uninterrupted_one(tmp_path: Path, asked: list[str]) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    write(whole)
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        write(resumed, "breaks")
    with resumed.open("a", encoding="utf-8") as file:
        file.write('{"id": "s4", "rep')  # killed within a line
    progress: list[int] = []
    write(resumed, progress=progress.append)
    assert asked == [f"s{i}" for i in range(7)]
    assert progress == [6, 7]
    assert resumed.read_bytes() == whole.read_bytes()


def test_what_is_written_reads_back(tmp_path: Path, asked: list[str]) -> None:
    found = write(tmp_path / "p.jsonl")
    assert found == read_predictions(tmp_path / "p.jsonl")
    assert found.reports["s3"] == "report of s3 – ok"
    assert found.references["s3"] == "Findings: No effusion." and found.complete["s3"] == "Findings: All."
    assert "s0" not in found.complete
    assert found.cut() is not None and found.truncated["s1"] is True
    assert write(tmp_path / "p.jsonl") == found and len(asked) == 7  # nothing is written twice


def test_references_of_a_file_make_studies_with_the_same_texts(tmp_path: Path) -> None:
    texts = ["Findings: Clear lungs. Impression: Normal.", "Findings: Clear lungs.", "Impression: Normal."]
    path = tmp_path / "p.jsonl"
    rows = [{"id": str(i), "report": "x", "reference": text} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [report_text(study) for study in read_predictions(path).studies()] == texts
    assert read_predictions(path).cut() is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "a", "report": "x"}\nnot json\n', r"p.jsonl:2: not JSON"),
        ('{"id": "a", "report": "x"}\n{"id": "a", "report": "y"}\n', r"p.jsonl:2: id 'a' comes a second time"),
        ('{"id": "a"}\n', r'p.jsonl:1: expected an object with the texts "id" and "report"'),
        ('{"id": 3, "report": "x"}\n', r"p.jsonl:1: expected"),
        ("[1]\n", r"p.jsonl:1: expected"),
        ("\n", r"p.jsonl: has no predictions"),
        ("", r"p.jsonl: has no predictions"),
    ],
)
def test_broken_files_are_refused_by_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_predictions(path)


def test_a_missing_file_and_one_that_is_not_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.jsonl: cannot be read"):
        read_predictions(tmp_path / "absent.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary.jsonl: cannot be read"):
        read_predictions(tmp_path / "binary.jsonl")
