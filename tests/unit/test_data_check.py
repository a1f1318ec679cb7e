"""`unirg data check`: every bad study by name, before training."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unirg.data import PhantomData, load_studies
from unirg.data.command import Problem, broken_films, check, check_studies
from unirg.errors import UserError
from unirg.study import Study, StudyImage


@pytest.fixture(autouse=True)
def in_a_fresh_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save("good.png")


def write(*rows: dict | str) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path("own.jsonl").write_text("\n".join(lines))
    return Path("own.jsonl")


def test_good_studies_pass_and_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"id": "s1", "findings": "Clear <b>lungs</b>.", "images": "good.png", "labels": {"mass": 1, "nodule": 0}}
    assert check(write(row, row | {"id": "s2"})) == 0
    printed = capsys.readouterr().out
    assert "no problems" in printed
    assert "2 of 2 (100.0%)" in printed and "0 of 2 (0.0%)" in printed and "Clear <b>lungs</b>." in printed
    page = Path("runs/data-check/own.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "Clear &lt;b&gt;lungs&lt;/b&gt;." in page


def test_every_bad_study_is_named_and_the_status_is_1(capsys: pytest.CaptureFixture[str]) -> None:
    whole = Path("good.png").read_bytes()
    Path("cut.png").write_bytes(whole[: len(whole) // 2])
    Path("text.png").write_text("not a picture")
    source = write(
        {"id": "fine", "findings": "Clear.", "images": "good.png"},
        {"id": "gone", "findings": "Clear.", "images": "gone.png"},
        {"id": "cut", "findings": "Clear.", "images": "cut.png"},
        {"id": "text", "findings": "Clear.", "images": "text.png"},
        {"id": "prior", "findings": "Clear.", "prior": {"images": "gone too.png"}},
        {"id": "mute", "findings": " ", "images": "good.png"},
        {"id": "fine", "findings": "Twice."},
        '{"id": "broken"',
    )
    assert check(source) == 1
    printed = capsys.readouterr().out
    for problem in (
        "study gone: missing image gone.png",
        "study cut: corrupt image: cut.png",
        "study text: corrupt image: text.png",
        "study prior: missing image gone too.png",
        "study mute: empty report",
        "own.jsonl:7: id 'fine' again (first on line 1)",
        "own.jsonl:8: broken JSON",
        "7 problems",
    ):
        assert problem in printed, problem


def test_a_file_that_cannot_be_read_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
        check(Path("gone.jsonl"))
    with pytest.raises(UserError, match="expected a recipe"):
        check(Path("good.png"))
    with pytest.raises(UserError, match="columnz"):
        check(write({"id": "s1"}), ["data.columnz.id=uid"])


def test_what_training_would_pass_over_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    labels = {"Pleural Effusion": 1, "edema": 0, "left/x": 1}
    assert check(write({"id": "s1", "findings": "Clear.", "image": "good.png", "note": "x", "labels": labels})) == 0
    printed = capsys.readouterr().out
    assert "all: columns not used: image (did you mean images?), note\n" in printed
    assert "a reward of your own could use: Pleural Effusion (did you mean effusion?), left\n" in printed


def test_a_file_without_the_id_column_is_one_error_however_many_rows() -> None:
    with pytest.raises(UserError, match=r"^own.jsonl: no row has the column 'id'.*There are: uid, findings$"):
        check(write({"uid": "s1", "findings": "Clear."}, {"uid": "s2", "findings": "Clear."}))


@pytest.mark.parametrize("override", ["columns.id=uid", "data=3", "data.columns.id=5", "data.columns=uid"])
def test_overrides_that_mean_nothing_are_one_line(override: str) -> None:
    with pytest.raises(UserError, match=r"^override[^\n]*$"):
        check(write({"id": "s1"}), [override])


def test_overrides_reach_the_adapter() -> None:
    assert check(write({"uid": "s1", "findings": "Clear."}), ["data.columns.id=uid"]) == 0


def test_check_studies_finds_repeated_ids_and_leaves_drawn_films_undrawn() -> None:
    def explode() -> np.ndarray:
        raise AssertionError("was drawn")

    drawn = Study("s", (StudyImage(explode),), findings="Clear.")
    assert check_studies([drawn]) == []
    assert check_studies([drawn, drawn, drawn]) == [Problem("s", "the id occurs more than once; ids must be unique")]
    with pytest.raises(AssertionError, match="was drawn"):
        broken_films(drawn.images)


def test_the_phantom_corpus_has_no_bad_study() -> None:
    config = PhantomData(train=50, unseen=20, reports="omitting")
    studies = load_studies(config, "train") + load_studies(config, "unseen")
    assert check_studies(studies, broken_films(image for study in studies for image in study.images)) == []
