"""`unirg extract` on files of reports."""

import json
from pathlib import Path

from unirg.extraction import label_vector
from unirg.extraction.command import run

REPORT = "Small left effusion. No pneumothorax."


def write(folder: Path, *rows: dict[str, str]) -> Path:
    path = folder / "reports.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_json_gives_every_mention_with_its_span(tmp_path, capsys):
    path = write(tmp_path, {"id": "a", "report": REPORT}, {"id": "b", "report": ""})
    assert run(path, True, "cxr14") == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["id"] == "a"
    assert first["labels"] == label_vector(REPORT, "cxr14")
    effusion, pneumothorax = first["mentions"]
    assert (effusion["finding"], effusion["polarity"], effusion["side"]) == ("effusion", "positive", "left")
    assert REPORT[pneumothorax["start"] : pneumothorax["end"]] == pneumothorax["text"] == "pneumothorax"
    assert second == {"id": "b", "mentions": [], "labels": dict.fromkeys(first["labels"])}


def test_table_shows_markup_as_it_stands(tmp_path, capsys):
    path = write(tmp_path, {"id": "[red]a[/red]", "report": REPORT}, {"id": "empty", "report": ""})
    assert run(path, False) == 0
    shown = capsys.readouterr().out
    assert "[red]a[/red]" in shown and "effusion" in shown and "empty" in shown and "left" in shown


def test_faults_are_one_line_and_status_2(tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": "a", "report": "Edema."}\n{"id": \n')
    for path, labels, said in (
        (broken, None, "broken.jsonl:2"),
        (tmp_path / "absent.jsonl", None, "absent.jsonl"),
        (broken, "padchest", "chexpert14 or cxr14"),
    ):
        assert run(path, True, labels) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert said in output.err and output.err.count("\n") == 1
