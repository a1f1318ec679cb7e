"""`unirg score`: two files of reports, and one clear line for each way they can be wrong."""

import json

import pytest

from unirg.scoring.command import list_rewards, parse_rewards, score
from unirg.scoring.contract import RewardError
from unirg.scoring.files import ReportFileError, read_reports

REFERENCES = """{"id": "a", "report": "Heart is normal. No pleural effusion."}
{"id": 7, "findings": "Small left pleural effusion.", "impression": "Effusion."}

{"id": "c", "report": ""}
"""
CANDIDATES = 'id,report\na,"Heart is normal. No pleural effusion."\n7,\nc,Clear lungs.\n'


@pytest.fixture
def files(tmp_path):
    (tmp_path / "R.jsonl").write_text(REFERENCES)
    (tmp_path / "C.csv").write_text(CANDIDATES)
    return tmp_path / "R.jsonl", tmp_path / "C.csv"


def test_reports_of_both_formats(files):
    references, candidates = files
    assert read_reports(references) == {
        "a": "Heart is normal. No pleural effusion.",
        "7": "Findings: Small left pleural effusion. Impression: Effusion.",
        "c": "",
    }
    assert read_reports(candidates) == {"a": "Heart is normal. No pleural effusion.", "7": "", "c": "Clear lungs."}


def test_a_byte_order_mark_and_quoted_line_breaks_are_read(tmp_path):
    path = tmp_path / "r.csv"
    path.write_bytes('\ufeffid,report\n1,"two\nlines"\n'.encode())
    assert read_reports(path) == {"1": "two\nlines"}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("r.jsonl", '{"id": "a", "report": "x"}\n{"id": "b", ', "r.jsonl:2: broken JSON"),
        ("r.jsonl", '["a", "x"]', "r.jsonl:1: a JSON list"),
        ("r.jsonl", "[" * 100_000, "r.jsonl:1: broken JSON"),
        ("r.jsonl", '{"report": "x"}', "r.jsonl:1: has no id .has: report"),
        ("r.jsonl", '{"id": null, "report": "x"}', "r.jsonl:1: has id None"),
        ("r.jsonl", '{"id": true, "report": "x"}', "r.jsonl:1: has id True"),
        ("r.jsonl", '{"id": " ", "report": "x"}', "r.jsonl:1: has id ' '"),
        ("r.jsonl", '{"id": 1, "report": ""}\n\n{"id": "1", "report": ""}', "r.jsonl:3: id '1' again, first on line 1"),
        ("r.jsonl", '{"id": "a", "text": "x"}', "r.jsonl:1: 'a' has no report, findings or impression"),
        ("r.jsonl", '{"id": "a", "report": null}', "r.jsonl:1: 'a' has no report"),
        ("r.jsonl", '{"id": "a", "report": 3}', "r.jsonl:1: report of 'a' is int; expected text"),
        ("r.jsonl", "\n \n", "r.jsonl: holds no reports"),
        ("r.csv", "", "r.csv: holds no reports"),
        ("r.csv", "id,report\n", "r.csv: holds no reports"),
        ("r.csv", "id,report\na,one,two\n", "r.csv:2: more cells than the header has columns"),
        ("r.csv", 'id,report\na,"open\n', "r.csv:2: broken CSV"),
        ("r.csv", "name,report\na,x\n", "r.csv:2: has no id"),
        ("r.csv", "id,report\na\n", "r.csv:2: 'a' has no report"),
    ],
)
def test_a_broken_file_is_told_by_line(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ReportFileError, match=said) as caught:
        read_reports(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(b'{"id": "a", "report": "\xff"}')
    with pytest.raises(ReportFileError, match="is not UTF-8"):
        read_reports(tmp_path / "r.jsonl")


def test_score_prints_an_object_per_study_then_the_summary(files, capsys):
    assert score(*files, "bleu,bleu(variant=coco2),rouge_l", as_json=True, summary=True) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    labels = ["bleu", "bleu(variant=coco2)", "rouge_l"]
    assert [row["id"] for row in rows[:3]] == ["a", "7", "c"]
    assert [rows[0][label] for label in labels] == pytest.approx([1, 1, 1])
    assert [rows[1][label] for label in labels] == [0, 0, 0]
    assert [rows[2][label] for label in labels] == [None, None, None]
    figures = rows[3]["summary"]["bleu"]
    assert figures["mean"] == pytest.approx(0.5)
    assert (figures["low"], figures["high"]) == (0, pytest.approx(1))
    assert (figures["judged"], figures["studies"]) == (2, 3)


def test_a_reward_that_judges_nothing_has_no_mean(files, capsys):
    assert score(*files, "label_f1", as_json=True, summary=True) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])["summary"]["label_f1"]
    assert summary == {"mean": None, "low": None, "high": None, "judged": 0, "studies": 3}


def test_score_prints_a_table(files, capsys):
    assert score(*files, "bleu,rouge_l", summary=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["id\tbleu\trouge_l", "a\t1.0000\t1.0000", "7\t0.0000\t0.0000", "c\t\t"]
    assert lines[-1].split() == ["rouge_l", "0.5000", "[0.0000,", "1.0000]", "2/3"]


@pytest.mark.parametrize(
    ("references", "candidates", "rewards", "said"),
    [
        (REFERENCES, CANDIDATES, "blue", "no reward 'blue' (nearest: bleu)"),
        (REFERENCES, CANDIDATES, "bleu(variant=coco9)", "variant 'coco9' is none of"),
        (REFERENCES, CANDIDATES, "bleu,", "cannot read reward ''"),
        (REFERENCES, CANDIDATES, "bleu,bleu", "two rewards are called 'bleu'"),
        (REFERENCES, "id,report\na,x\n", "bleu", "C.csv: lacks 2 of the studies of"),
        (REFERENCES, CANDIDATES + "d,x\n", "bleu", "R.jsonl: lacks 1 of the studies of"),
        (REFERENCES, "", "bleu", "C.csv: holds no reports"),
        (REFERENCES + '{"id"', CANDIDATES, "bleu", "R.jsonl:5: broken JSON"),
    ],
)
def test_what_cannot_be_scored_is_status_2_and_one_line(files, capsys, references, candidates, rewards, said):
    files[0].write_text(references)
    files[1].write_text(candidates)
    assert score(*files, rewards, as_json=True) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""


def test_a_file_that_is_not_there(files, capsys, tmp_path):
    assert score(files[0], tmp_path / "none.jsonl", "bleu") == 2
    assert "none.jsonl: cannot be read (No such file" in capsys.readouterr().err


def test_options_are_typed_and_their_commas_do_not_split():
    first, second, third = parse_rewards("a.py:f(sides=true, depth=2,kinds=[x,y]), bleu ,bleu(variant=coco1)")
    assert (first.name, first.options) == ("a.py:f", {"sides": True, "depth": 2, "kinds": ["x", "y"]})
    assert (second.name, second.log_label, second.options) == ("bleu", "bleu", {})
    assert third.log_label == "bleu(variant=coco1)"


@pytest.mark.parametrize("text", ["", "bleu(", "bleu(variant)", "bleu(=x)", "bleu(a=[)", "(a=1)", "bleu(a=1)x"])
def test_a_list_that_cannot_be_read(text):
    with pytest.raises(RewardError, match="cannot read"):
        parse_rewards(text)


def test_the_list_of_rewards(capsys):
    assert list_rewards(as_json=True) == 0
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows["bleu"]["package"] == "unirg"
    assert rows["ratescore"]["error"] is None
    assert list_rewards() == 0
    assert "entity_f1 (unirg): Findings with polarity" in capsys.readouterr().out


def test_rewards_get_the_columns_of_the_references(tmp_path, capsys):
    references, candidates = tmp_path / "R.jsonl", tmp_path / "C.jsonl"
    rows = [
        {"id": "a", "report": "No effusion.", "labels": {"effusion": 1, "edema": None}, "truncated": True, "rank": 3},
        {"id": "b", "report": "Clear."},
    ]
    references.write_text("".join(json.dumps(row) + "\n" for row in rows))
    candidates.write_text('{"id": "b", "report": "Clear."}\n{"id": "a", "report": "Left effusion."}\n')
    (tmp_path / "own.py").write_text("def rank(candidates, references, rank):\n    return rank\n")
    assert score(references, candidates, f"label_f1,{tmp_path}/own.py:rank", as_json=True) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"id": "a", "label_f1": 1.0, "rank": 3.0}, {"id": "b", "label_f1": None, "rank": None}]


def test_a_reward_that_judges_nothing_says_so(files, capsys):
    assert score(*files, "label_f1") == 0
    assert "reward 'label_f1' could judge none of the 3 studies" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "said"),
    [({"effusion": "yes"}, "label 'effusion' of 'a' is 'yes'; expected 1, 0 or -1"), (["effusion"], "expected an obj")],
)
def test_labels_that_are_no_labels(tmp_path, capsys, labels, said):
    path = tmp_path / "R.jsonl"
    path.write_text(json.dumps({"id": "a", "report": "x", "labels": labels}))
    assert score(path, path, "bleu") == 2
    assert said in capsys.readouterr().err
