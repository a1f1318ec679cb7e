"""Studies: how image files of every depth become the films that a policy sees."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unirg.data import fingerprint
from unirg.study import Study, StudyImage


def levels(path: Path) -> np.ndarray:
    film = StudyImage(path).load()
    assert film.mode == "RGB"
    return np.asarray(film)[..., 0].astype(int)


@pytest.mark.parametrize(("dtype", "brightest"), [(np.uint16, 4095), (np.uint16, 65535), (np.int32, 3000)])
def test_more_than_eight_bits_keep_their_contrast(tmp_path: Path, dtype: type, brightest: int) -> None:
    ramp = np.linspace(0, brightest, 64 * 64).reshape(64, 64)
    Image.fromarray(ramp.astype(dtype)).save(tmp_path / "film.png" if dtype == np.uint16 else tmp_path / "film.tiff")
    seen = levels(next(tmp_path.iterdir()))
    assert np.abs(seen - ramp / brightest * 255).max() <= 1


def test_eight_bits_are_taken_as_they_are(tmp_path: Path) -> None:
    grey = np.arange(50, 178, dtype=np.uint8).reshape(8, 16)
    Image.fromarray(grey).save(tmp_path / "film.png")
    assert np.array_equal(levels(tmp_path / "film.png"), grey)


def test_an_even_film_of_sixteen_bits_is_no_error(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 900, np.uint16)).save(tmp_path / "film.png")
    assert not levels(tmp_path / "film.png").any()


@pytest.mark.parametrize("kept", [20, 60, 200])
def test_a_file_cut_short_is_named(tmp_path: Path, kept: int) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(tmp_path / "film.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "film.png").read_bytes()[:kept])
    with pytest.raises(OSError, match=r"cut\.png: cannot be read as an image"):
        StudyImage(tmp_path / "cut.png").load()


def test_the_fingerprint_sees_all_that_a_prompt_says() -> None:
    study = Study("a", indication="Cough.", findings="Clear.")
    changed = [
        replace(study, technique="Portable."),
        replace(study, demographics={"age": "40"}),
        replace(study, indication="Fever."),
        replace(study, findings="Effusion."),
        replace(study, labels={"effusion": 1}),
        replace(study, prior=Study("b", findings="Clear.")),
    ]
    assert len({fingerprint([one]) for one in (study, *changed)}) == 7
    assert fingerprint([study]) == fingerprint([replace(study)])
