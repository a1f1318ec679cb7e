"""Open-i: the Indiana University chest X-ray collection, 3,955 real radiologists' reports with human MeSH annotations.

Demner-Fushman et al., JAMIA 2016, doi:10.1093/jamia/ocv080; CC BY-NC-ND 4.0. The reports ship inside the wheel of
torchxrayvision (Apache-2.0), which is read as a file and never installed. The images do not ship: without the real PNG
folder each study gets a drawn film of its MeSH findings. One report a patient, so there are no priors.
"""

import io
import os
import random
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import Field

from unirg.data.mesh import LATERAL, mesh_labels, parse_headings
from unirg.data.phantom_films import Finding, draw_film
from unirg.errors import UserError
from unirg.section import Section
from unirg.study import Study, StudyImage

WHEEL = "torchxrayvision==1.5.7"
_MEMBER = "torchxrayvision/data/NLMCXR_reports.tgz"
_CACHE = Path.home() / ".cache" / "unirg"


class OpeniData(Section):
    """Open-i's real reports, with the real films where they are at hand and drawn ones where not."""

    adapter: Literal["openi"] = "openi"
    """Always "openi"."""
    reports: Path | None = None
    """The torchxrayvision wheel, its member NLMCXR_reports.tgz, or a folder that holds one of them or the XML files.
    Left out: the environment's UNIRG_OPENI, then ~/.cache/unirg (where `unirg data fetch openi` puts the wheel)."""
    images: Path | None = None
    """Folder of the real PNG files, named as by Open-i (CXR1_1_IM-0001-3001.png) or as on Kaggle
    (1_IM-0001-3001.dcm.png). Left out: films are drawn from the MeSH findings."""
    sections: Literal["both", "findings", "impression"] = "both"
    """What the reference holds: "both" (ReXrank), "findings" alone (R2Gen), or the "impression" alone."""
    placeholders: Literal["keep", "drop"] = "keep"
    """The de-identification mark XXXX: kept, as leaderboards' references keep it, or dropped from every text."""
    size: int = Field(96, ge=32)
    """Width and height of a drawn film in pixels."""
    films: int = Field(1, gt=0)
    """Drawn films of each training study, each a study of its own: other patients, the same findings and report. More
    than one keeps a small corpus from being learned film by film."""


@dataclass(frozen=True)
class OpeniReport:
    """One XML file of the collection; missing sections are ""."""

    number: int  # of "CXR1"
    findings: str
    impression: str
    indication: str
    comparison: str
    mesh: tuple[str, ...]  # the human ("major") headings
    images: tuple[str, ...]  # Open-i's image names, without a suffix


def fetch_reports(folder: Path = _CACHE) -> Path:
    """Download the wheel with pip (29 MB, without dependencies, not installed) and return its path.

    Raises subprocess.CalledProcessError when pip fails; its message stands on the terminal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", WHEEL, "-d", str(folder)], check=True)
    return find_reports(folder)


def find_reports(path: Path | None = None) -> Path:
    """Where the reports are: `path`, else $UNIRG_OPENI, else ~/.cache/unirg.

    Returns a wheel, a .tgz or a folder of XML files. Raises UserError that says how to get them.
    """
    place = path or (Path(os.environ["UNIRG_OPENI"]) if os.environ.get("UNIRG_OPENI") else _CACHE)
    if place.is_file():
        return place
    for pattern in ("torchxrayvision-*.whl", "NLMCXR_reports.tgz", "ecgen-radiology/*.xml", "*.xml"):
        if found := sorted(place.glob(pattern)):
            return found[-1].parent if pattern.endswith(".xml") else found[-1]
    raise UserError(
        f"the Open-i reports are not at {place}; get them with `unirg data fetch openi` (or `pip download --no-deps "
        f"{WHEEL} -d {_CACHE}`), or name the wheel in data.reports or in the environment's UNIRG_OPENI"
    )


@lru_cache(maxsize=2)
def read_reports(path: Path) -> tuple[OpeniReport, ...]:
    """All reports of a wheel, .tgz or XML folder, by number.

    Raises UserError naming the file where there is none or one is not a report of the collection.
    """
    reports = [_parse(name, text) for name, text in _xml_files(path)]
    if not reports:
        raise UserError(f"{path} holds no Open-i report (expected *.xml, or {_MEMBER} in a wheel)")
    return tuple(sorted(reports, key=lambda report: report.number))


def _xml_files(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for file in sorted(path.glob("*.xml")):
            yield str(file), file.read_bytes()
        return
    archive = path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            if _MEMBER not in wheel.namelist():
                raise UserError(f"{path} has no member {_MEMBER}; expected the wheel of {WHEEL}")
            archive = wheel.read(_MEMBER)
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:*") as tar:
        for member in tar:
            content = tar.extractfile(member) if member.name.endswith(".xml") else None
            if content is not None:
                yield f"{path}:{member.name}", content.read()


def _parse(name: str, text: bytes) -> OpeniReport:
    try:
        root = ElementTree.fromstring(text)
        identity = root.find("uId")
        number = int(identity.attrib["id"].removeprefix("CXR")) if identity is not None else int(Path(name).stem)
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        raise UserError(f"{name} is not an Open-i report: {error}") from error
    sections = {part.get("Label", ""): " ".join((part.text or "").split()) for part in root.iter("AbstractText")}
    return OpeniReport(
        number=number,
        findings=sections.get("FINDINGS", ""),
        impression=sections.get("IMPRESSION", ""),
        indication=sections.get("INDICATION", ""),
        comparison=sections.get("COMPARISON", ""),
        mesh=tuple((major.text or "").strip() for major in root.iter("major")),
        images=tuple(image.attrib["id"] for image in root.iter("parentImage")),
    )


def r2gen_split(reports: tuple[OpeniReport, ...]) -> Mapping[int, str]:
    """Report number -> "train", "dev" (R2Gen's val) or "test", for the 2,955 reports that R2Gen uses.

    Those have findings and two or more images; 296 are val and 590 test by the list shipped here, 2,069 train.
    """
    lists: dict[str, set[int]] = {}
    for line in (files("unirg.data") / "openi_split.txt").read_text().splitlines():
        if line.isalpha():
            lists[line] = set()
        elif not line.startswith("#"):
            lists[next(reversed(lists))].update(int(number) for number in line.split())
    used = [report.number for report in reports if report.findings and len(report.images) >= 2]
    return {n: "test" if n in lists["test"] else "dev" if n in lists["val"] else "train" for n in used}


def load_openi(config: OpeniData, split: str) -> list[Study]:
    """The studies of R2Gen's split ("dev" is its val) that have the configured sections, by report number.

    Raises UserError for another split and where the reports or the image folder are missing.
    """
    if split not in ("train", "dev", "test"):
        raise UserError(f"Open-i has no split {split!r}; there are train, dev and test")
    if config.images is not None and not config.images.is_dir():
        raise UserError(f"data.images: {config.images} is not a folder")
    reports = read_reports(find_reports(config.reports))
    splits = r2gen_split(reports)
    copies = config.films if split == "train" and config.images is None else 1
    chosen = [report for report in reports if splits.get(report.number) == split]
    studies = [_study(report, config, copy) for copy in range(copies) for report in chosen]
    return [study for study in studies if study.findings or study.impression]


def _study(report: OpeniReport, config: OpeniData, copy: int = 0) -> Study:
    """The study of a report; `copy` counts its drawn films."""

    def text(section: str) -> str | None:
        if config.placeholders == "drop":
            section = " ".join(word for word in section.split() if "XXXX" not in word)
        return section or None

    if config.images is None:
        images: tuple[StudyImage, ...] = (
            StudyImage(
                partial(draw_film, film_findings(report, copy), _seed(report, copy), config.size), view="frontal"
            ),
        )
    else:
        images = tuple(StudyImage(_image_file(config.images, name)) for name in report.images)
    return Study(
        id=f"CXR{report.number}" + (f"-film{copy + 1}" if copy else ""),
        images=images,
        indication=text(report.indication),
        comparison=text(report.comparison),
        findings=text(report.findings) if config.sections != "impression" else None,
        impression=text(report.impression) if config.sections != "findings" else None,
        patient=str(report.number),
        labels=mesh_labels(report.mesh),
        modality="CXR",
        language="en",
        extra={"mesh": "; ".join(report.mesh), **({"film": "drawn"} if config.images is None else {})},
    )


def _seed(report: OpeniReport, copy: int) -> int:
    """A seed of its own for each film of the collection: its reports are numbered up to 3,999."""
    return report.number + 10_000 * copy


def film_findings(report: OpeniReport, copy: int = 0) -> tuple[Finding, ...]:
    """The findings of a report's MeSH headings as they are drawn: a side that is not stated is drawn by lot."""
    rng = random.Random(_seed(report, copy))
    drawn: list[Finding] = []
    for name, side, place, severity in parse_headings(report.mesh):
        lot = rng.choice(("left", "right"))
        if name == "device":
            place = rng.choice(("catheter", "pacemaker"))
        drawn.append((name, lot if side is None and name in LATERAL else side, place, severity))
    return tuple(drawn)


def _image_file(folder: Path, name: str) -> Path:
    """The file of an Open-i image name in either naming; Open-i's own where neither exists, to be named as missing."""
    number, _, rest = name.removeprefix("CXR").partition("_")
    short = rest if rest.startswith(f"{number}_") else f"{number}_{rest}"  # CXR1_1_IM-... and CXR4_IM-... both occur
    kaggle = folder / f"{short}.dcm.png"
    return kaggle if kaggle.exists() else folder / f"{name}.png"
