"""The package's metadata fits what is there."""

import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import unirg

ROOT = Path(unirg.__file__).parents[1]
METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_listed() -> None:
    """The list is kept by hand; a package that is not in it works here and is missing from the wheel."""
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "unirg").rglob("*.py")}
    found = {".".join(folder.parts) for folder in folders}
    found |= {
        ".".join(("unirg_rewards", *file.parent.relative_to(ROOT / "rewards").parts))
        for file in (ROOT / "rewards").rglob("*.py")
    }
    assert sorted(METADATA["tool"]["setuptools"]["packages"]) == sorted(found)


def test_every_package_has_an_init() -> None:
    folders = {file.parent for room in ("unirg", "rewards") for file in (ROOT / room).rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_data_files_are_packaged() -> None:
    patterns = METADATA["tool"]["setuptools"]["package-data"]["*"]
    files = [file for room in ("unirg", "rewards") for file in (ROOT / room).rglob("*") if file.is_file()]
    files = [file for file in files if file.suffix not in (".py", ".pyc")]
    assert [file for file in files if not any(file.match(pattern) for pattern in patterns)] == []


def test_rewards_are_installed_under_their_names() -> None:
    """After a change of the table in pyproject.toml: `make install`."""
    declared = METADATA["project"]["entry-points"]["unirg.rewards"]
    installed = {point.name: point.value for point in entry_points(group="unirg.rewards")}
    assert declared.items() <= installed.items()
    for point in entry_points(group="unirg.rewards"):
        if point.name in declared:
            point.load()


def test_metadata_pins_no_build_of_torch() -> None:
    """A GPU user's `pip install unirg[vllm]` must be free to take CUDA builds."""
    (torch,) = [text for text in METADATA["project"]["dependencies"] if text.startswith("torch")]
    assert "==" not in torch and "+" not in torch and "<" not in torch
