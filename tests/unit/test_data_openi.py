"""Open-i: look-alike XML with invented text; and, where the wheel is at hand, the collection itself."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unirg.data import OpeniData, drawn_films, load_studies
from unirg.data.mesh import FINDINGS, LATERAL, mesh_labels, parse_heading
from unirg.data.openi import OpeniReport, film_findings, find_reports, r2gen_split, read_reports
from unirg.data.phantom_films import DRAWABLE
from unirg.errors import UserError
from unirg.extraction import FINDINGS as VOCABULARY
from unirg.extraction import extract
from unirg.prompt import report_text

XML = """<?xml version="1.0" encoding="utf-8"?>
<eCitation><uId id="CXR{number}"/><MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">None.</AbstractText><AbstractText Label="INDICATION">Cough for XXXX days</AbstractText>
<AbstractText Label="FINDINGS">{findings}</AbstractText><AbstractText Label="IMPRESSION">{impression}</AbstractText>
</Abstract></Article></MedlineCitation><MeSH>{majors}<automatic>Opacity</automatic></MeSH>{images}</eCitation>"""


def xml(number: int, findings: str = "Invented opacity.", impression: str = "Invented.", *majors: str) -> str:
    names = (f"CXR{number}_IM-0001-1001", f"CXR{number}_IM-0001-2001")
    return XML.format(
        number=number,
        findings=findings,
        impression=impression,
        majors="".join(f"<major>{major}</major>" for major in majors or ("normal",)),
        images="".join(f'<parentImage id="{name}"/>' for name in names),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Reports 1 (train), 4 (val of R2Gen) and 2 (test); 3 has no findings, so that R2Gen leaves it out."""
    texts = {
        1: xml(1, "Opacity, left XXXX base.", "Opacity XXXX.", "Opacity/lung/base/left/mild", "Cardiomegaly/moderate"),
        2: xml(2, "Clear."),
        3: xml(3, "", "Normal."),
        4: xml(4, "Clear.", "", "No Indexing"),
    }
    for number, text in texts.items():
        (tmp_path / f"{number}.xml").write_text(text)
    return tmp_path


def packed(folder: Path, suffix: str) -> Path:
    """The folder as the collection ships: a .tgz, or a wheel that holds it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for file in sorted(folder.glob("*.xml")):
            tar.add(file, f"ecgen-radiology/{file.name}")
    path = folder / ("NLMCXR_reports.tgz" if suffix == "tgz" else "torchxrayvision-1.5.7-py3-none-any.whl")
    if suffix == "tgz":
        path.write_bytes(buffer.getvalue())
    else:
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr("torchxrayvision/data/NLMCXR_reports.tgz", buffer.getvalue())
    return path


def test_wheel_tgz_and_folder_give_the_same_reports(folder: Path) -> None:
    reports = read_reports(folder)
    assert [report.number for report in reports] == [1, 2, 3, 4]
    assert read_reports(packed(folder, "tgz")) == reports
    assert read_reports(packed(folder, "whl")) == reports


def test_studies_follow_the_r2gen_split(folder: Path) -> None:
    config = OpeniData(reports=folder)
    ids = {split: [study.id for study in load_studies(config, split)] for split in ("train", "dev", "test")}
    assert ids == {"train": ["CXR1"], "dev": ["CXR4"], "test": ["CXR2"]}
    with pytest.raises(UserError, match="no split 'val'"):
        load_studies(config, "val")


def test_study_of_a_report(folder: Path) -> None:
    (study,) = load_studies(OpeniData(reports=folder), "train")
    assert report_text(study) == "Findings: Opacity, left XXXX base. Impression: Opacity XXXX."
    assert (study.indication, study.comparison) == ("Cough for XXXX days", "None.")
    assert {name for name, value in study.labels.items() if value == 1} == {"opacity", "opacity/left", "cardiomegaly"}
    assert study.labels["opacity/right"] == study.labels["effusion"] == 0
    assert study.extra["film"] == "drawn" and drawn_films(OpeniData(reports=folder))
    assert study.images[0].load().size == (96, 96)


def test_sections_and_placeholders(folder: Path) -> None:
    (study,) = load_studies(OpeniData(reports=folder, sections="findings", placeholders="drop"), "train")
    assert report_text(study) == "Findings: Opacity, left base."
    assert load_studies(OpeniData(reports=folder, sections="impression"), "dev") == []


@pytest.mark.parametrize("naming", ["CXR1_IM-0001-{}001.png", "1_IM-0001-{}001.dcm.png"])
def test_real_images_are_found_in_either_naming(folder: Path, naming: str) -> None:
    pictures = folder / "png"
    pictures.mkdir()
    for view in (1, 2):
        Image.fromarray(np.full((5, 4), 50 * view, np.uint8)).save(pictures / naming.format(view))
    config = OpeniData(reports=folder, images=pictures)
    (study,) = load_studies(config, "train")
    assert [np.asarray(image.load())[0, 0, 0] for image in study.images] == [50, 100]
    assert not drawn_films(config) and "film" not in study.extra
    (absent,) = load_studies(config, "test")
    with pytest.raises(FileNotFoundError, match="CXR2_IM-0001-1001"):
        absent.images[0].load()


def test_errors_say_what_to_do(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="pip download --no-deps torchxrayvision"):
        find_reports(tmp_path / "nowhere")
    monkeypatch.setenv("UNIRG_OPENI", str(folder))
    assert find_reports() == folder
    with pytest.raises(UserError, match=r"data\.images: .*png is not a folder"):
        load_studies(OpeniData(reports=folder, images=folder / "png"), "train")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "7.xml").write_text("<eCitation><uId id='CXR7'>")
    with pytest.raises(UserError, match=r"7\.xml is not an Open-i report"):
        read_reports(broken)
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as wheel:
        wheel.writestr("readme", "")
    with pytest.raises(UserError, match=r"no member .*NLMCXR_reports\.tgz"):
        read_reports(other)


@pytest.mark.parametrize(
    ("heading", "finding"),
    [
        ("normal", None),
        ("Opacity/lung/base/left/mild", ("opacity", "left", "lower", "mild")),
        ("Pulmonary Atelectasis/base/bilateral", ("atelectasis", "bilateral", "lower", None)),
        ("Pleural Effusion/left/right/small", ("effusion", "bilateral", None, "small")),
        ("Cicatrix/lingula", ("scarring", "left", "mid", None)),
        ("Lung/hyperdistention", ("hyperinflation", None, None, None)),
        ("Lung/azygos lobe", None),
        ("Opacity/lung/upper lobe/right/round/small", ("nodular_opacity", "right", "upper", "small")),
        ("Calcinosis/aorta", ("aortic_calcification", None, None, None)),
        ("Calcinosis/coronary vessels", None),
    ],
)
def test_mesh_headings(heading: str, finding: tuple | None) -> None:
    assert parse_heading(heading) == finding


def test_mesh_labels_know_what_they_do_not_know() -> None:
    assert mesh_labels(["No Indexing"]) == {} == mesh_labels([])
    assert set(mesh_labels(["normal"]).values()) == {0}
    sideless = mesh_labels(["Nodule/lung"])
    assert sideless["nodule"] == 1 and "nodule/left" not in sideless and "nodule/right" not in sideless
    partly = mesh_labels(["Nodule/lung", "Nodule/lung/left"])
    assert partly["nodule/left"] == 1 and "nodule/right" not in partly
    assert mesh_labels(["Hydropneumothorax/right"])["effusion/right"] == 1


def test_labels_speak_the_extractors_vocabulary() -> None:
    assert set(FINDINGS) <= set(VOCABULARY) and set(FINDINGS) >= LATERAL


def test_sides_that_are_not_stated_are_drawn_by_lot_and_the_same_each_time() -> None:
    def film(number: int) -> tuple:
        return film_findings(OpeniReport(number, "", "", "", "", ("Nodule/lung", "Cardiomegaly"), ()))

    assert {film(number)[0][1] for number in range(20)} == {"left", "right"}
    assert film(5) == film(5)
    assert {film(number)[1] for number in range(20)} == {("cardiomegaly", None, None, None)}


def test_more_films_of_a_training_study_differ_from_each_other_and_from_nothing_else(folder: Path) -> None:
    config = OpeniData(reports=folder, films=3)
    studies = load_studies(config, "train")
    assert [study.id for study in studies] == ["CXR1", "CXR1-film2", "CXR1-film3"]
    assert len({study.images[0].load().tobytes() for study in studies}) == 3
    assert len({(report_text(study), study.patient, tuple(study.labels.items())) for study in studies}) == 1
    (plain,) = load_studies(OpeniData(reports=folder), "train")
    assert plain.images[0].load() == studies[0].images[0].load()
    assert [study.id for study in load_studies(config, "test")] == ["CXR2"]


@pytest.fixture(scope="module")
def collection() -> tuple[OpeniReport, ...]:
    try:
        return read_reports(find_reports())
    except UserError as error:
        pytest.skip(f"needs the Open-i reports: {error}")


def test_collection_counts(collection: tuple[OpeniReport, ...]) -> None:
    counts = [0, 0, 0, 0]
    for report in collection:
        counts[bool(report.findings) + 2 * bool(report.impression)] += 1
    assert (len(collection), counts) == (3955, [28, 6, 502, 3419])
    assert sum(report.mesh == ("normal",) for report in collection) == 1391


def test_collection_split_has_the_published_sizes(collection: tuple[OpeniReport, ...]) -> None:
    splits = list(r2gen_split(collection).values())
    assert {split: splits.count(split) for split in ("train", "dev", "test")} == {
        "train": 2069,
        "dev": 296,
        "test": 590,
    }


def test_collection_labels_agree_with_what_the_extractor_reads_in_the_texts(
    collection: tuple[OpeniReport, ...],
) -> None:
    """Two independent readings of each report: a mapping that slipped would fall far below."""
    for name, least in {
        "effusion": 0.8,
        "cardiomegaly": 0.7,
        "atelectasis": 0.8,
        "opacity": 0.8,
        "scoliosis": 0.8,
    }.items():
        both = stated = read = 0
        for report in collection:
            labels = mesh_labels(report.mesh)
            text = {m.finding for m in extract(f"{report.findings} {report.impression}") if m.polarity == "positive"}
            both += labels.get(name) == 1 and name in text
            stated += labels.get(name) == 1
            read += bool(labels) and name in text
        assert 2 * both / (stated + read) > least, (name, 2 * both / (stated + read))


def test_collection_films_show_most_of_what_is_annotated(collection: tuple[OpeniReport, ...]) -> None:
    names = [finding[0] for report in collection for finding in film_findings(report)]
    assert sum(name in DRAWABLE for name in names) / len(names) > 0.95
