"""A user's own studies in JSONL and CSV: what is read, and what each mistake is called."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unirg.data import JsonlData, load_studies
from unirg.data.jsonl import BadRows
from unirg.errors import UserError

ROW = {"id": "s1", "findings": "Clear."}


def config(path: Path, *lines: str, name: str = "train.jsonl", **settings: object) -> JsonlData:
    (path / name).write_text("\n".join(lines), encoding="utf-8")
    return JsonlData(files={"train": path / name}, **settings)


def test_every_field_of_a_row_reaches_the_study(tmp_path: Path) -> None:
    row = {
        "id": 7,
        "images": ["a/1.png", "a/2.png"],
        "views": ["frontal", "lateral"],
        **dict(indication="Cough.", comparison="Old film.", technique="AP.", findings="Clear.", impression="Normal."),
        **dict(patient="p", institution="H", modality="CXR", language="en"),
        "demographics": {"age": 61, "sex": "F"},
        "labels": {"effusion": 0, "nodule": 1, "mass": None},
        "prior": {"images": "a/0.png", "impression": "Nodule."},
        "complete": "All of it.",
    }
    (study,) = load_studies(config(tmp_path, json.dumps(row), extra=["complete"]), "train")
    assert [(image.source, image.view) for image in study.images] == [
        (tmp_path / "a/1.png", "frontal"),
        (tmp_path / "a/2.png", "lateral"),
    ]
    assert (study.id, study.patient, study.institution, study.demographics) == (
        "7",
        "p",
        "H",
        {"age": "61", "sex": "F"},
    )
    assert (study.indication, study.comparison, study.technique) == ("Cough.", "Old film.", "AP.")
    assert (study.findings, study.impression, study.modality, study.language) == ("Clear.", "Normal.", "CXR", "en")
    assert study.labels == {"effusion": 0, "nodule": 1} and study.extra == {"complete": "All of it."}
    assert study.prior is not None and study.prior.impression == "Nodule."
    assert study.prior.images[0].source == tmp_path / "a/0.png"


def test_csv_with_a_column_map_and_label_columns(tmp_path: Path) -> None:
    settings = config(
        tmp_path,
        "uid,files,text,Pleural Effusion,Mass",
        '1,"x/1.png|x/2.png","Clear, dry.",0.0,',
        "2,,Wet.,-1,1",
        name="train.csv",
        columns={"id": "uid", "images": "files", "findings": "text"},
        labels={"effusion": "Pleural Effusion", "mass": "Mass"},
    )
    first, second = load_studies(settings, "train")
    assert (first.id, first.findings, first.labels) == ("1", "Clear, dry.", {"effusion": 0})
    assert [image.source for image in first.images] == [tmp_path / "x/1.png", tmp_path / "x/2.png"]
    assert (second.images, second.labels) == ((), {"effusion": -1, "mass": 1})


def test_a_column_serves_one_field(tmp_path: Path) -> None:
    """Findings that are shown are not asked for. The id's column may name the patient too."""
    settings = config(
        tmp_path,
        ",id,findings,impression",  # as pandas writes it, its index first
        "0,a,Clear.,Normal.",
        name="train.csv",
        columns={"indication": "findings", "patient": "id"},
    )
    (study,) = load_studies(settings, "train")
    assert (study.id, study.patient, study.indication) == ("a", "a", "Clear.")
    assert study.findings is None and study.impression == "Normal."
    assert load_studies(settings.model_copy(update={"columns": {}}), "train")[0].findings == "Clear."


def test_a_byte_order_mark_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    settings = config(tmp_path, "\ufeff" + json.dumps(ROW), "", json.dumps(ROW | {"id": "s2"}), "")
    assert [study.id for study in load_studies(settings, "train")] == ["s1", "s2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "x", ', r"train\.jsonl:2: broken JSON"),
        ("[1]", r"train\.jsonl:2: expected a JSON object, not list"),
        ('{"findings": "Clear."}', r"train\.jsonl:2: no 'id'"),
        (json.dumps(ROW), r"train\.jsonl:2: id 's1' again \(first on line 1\)"),
        ('{"id": "x", "findings": 3}', r"train\.jsonl:2: 'findings' must be text, not int"),
        ('{"id": "x", "images": [1]}', r"train\.jsonl:2: 'images' must be a path or a list of paths"),
        ('{"id": "x", "images": "a.png", "views": ["a", "b"]}', r"train\.jsonl:2: 'views' has 2 entries for 1 images"),
        ('{"id": "x", "labels": {"mass": 2}}', r"train\.jsonl:2: label 'mass' is 2; expected 1, 0, -1"),
        ('{"id": "x", "labels": {"mass": "yes"}}', r"train\.jsonl:2: label 'mass' is 'yes'"),
        ('{"id": "x", "prior": "old"}', r"train\.jsonl:2: 'prior' must hold a JSON object"),
        ('{"id": "x", "prior": {"findings": []}}', r"train\.jsonl:2: 'findings' must be text, not list"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_key(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(BadRows, match=message):
        load_studies(config(tmp_path, json.dumps(ROW), line), "train")


def test_all_bad_rows_are_counted_and_the_first_twenty_shown(tmp_path: Path) -> None:
    with pytest.raises(BadRows) as raised:
        load_studies(config(tmp_path, json.dumps(ROW), *["{"] * 30), "train")
    assert len(raised.value.rows) == 30
    assert str(raised.value).startswith("30 bad rows:") and str(raised.value).endswith("... and 10 more")
    assert len(str(raised.value).splitlines()) == 22


@pytest.mark.parametrize("cells", ["1", "1,Clear.,more"])
def test_a_csv_row_with_other_cells_than_the_header_is_bad(tmp_path: Path, cells: str) -> None:
    with pytest.raises(BadRows, match=r"train\.csv:2: (more|fewer) cells than the header's 2"):
        load_studies(config(tmp_path, "id,findings", cells, name="train.csv"), "train")


def test_columns_that_no_row_has_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadRows, match=r"no row has the column 'text'.*there are: id, findings"):
        load_studies(config(tmp_path, json.dumps(ROW), columns={"impression": "text"}), "train")
    with pytest.raises(UserError, match=r"data\.columns: finding is no field"):
        load_studies(config(tmp_path, json.dumps(ROW), columns={"finding": "id"}), "train")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no split 'dev'; there are: train"):
        load_studies(config(tmp_path, json.dumps(ROW)), "dev")
    with pytest.raises(UserError, match=r"gone\.jsonl: cannot be read"):
        load_studies(JsonlData(files={"train": tmp_path / "gone.jsonl"}), "train")
    with pytest.raises(UserError, match=r"train\.jsonl: holds no study"):
        load_studies(config(tmp_path, ""), "train")
    (tmp_path / "latin.jsonl").write_bytes('{"id": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jsonl: cannot be read"):
        load_studies(JsonlData(files={"train": tmp_path / "latin.jsonl"}), "train")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(["id", "images", "views", "findings", "labels", "prior", "demographics"]), JSON))
def test_any_row_is_a_study_or_a_named_mistake(tmp_path_factory: pytest.TempPathFactory, row: dict) -> None:
    path = tmp_path_factory.mktemp("rows")
    try:
        (study,) = load_studies(config(path, json.dumps(row)), "train")
    except BadRows as error:
        assert "train.jsonl:1: " in str(error)
    else:
        assert study.id
