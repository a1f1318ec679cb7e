"""`unirg rewards new NAME`: a plug-in package of one reward, whole from the start.

What is written works: it installs, passes its own test, and scores reports. Its author replaces the body of one
function.
"""

import importlib.util
import keyword
import re
from importlib.metadata import entry_points
from pathlib import Path
from string import Template

from unirg.errors import UserError
from unirg.scoring.registry import GROUP

LONGEST = 40
"""Characters of a name: the lines below stay within their width."""

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$package"
version = "0.1"
description = "The UniRG reward $name"
requires-python = ">=3.11"

[project.entry-points."unirg.rewards"]
$name = "$name:$name"

[tool.setuptools]
py-modules = ["$name"]
package-dir = { "" = "." } # so that `pip install -e` is not hidden by a folder of this name beside you

[tool.ruff]
line-length = 120
"""

REWARD = '''\
"""The reward `$name`: recipes name it so once this package is installed."""

import re
from typing import Any


def $name(
    candidates: list[str],
    references: list[str],
    *,
    shortest: int = 4,
    **columns: Any,
) -> list[float | None]:
    """F1 of the report's distinct words against the reference's, words under `shortest` letters left out."""
    # One score per candidate. None says "cannot judge": the sample is left out, not scored zero.
    return [_overlap(_words(c, shortest), _words(r, shortest)) for c, r in zip(candidates, references, strict=True)]


def _overlap(written: set[str], wanted: set[str]) -> float | None:
    if not wanted:
        return None
    return 2 * len(written & wanted) / (len(written) + len(wanted))


def _words(text: str, shortest: int) -> set[str]:
    return {word for word in re.findall(r"\\w+", text.lower()) if len(word) >= shortest}
'''

TEST = '''\
"""What `$name` pays for, and that it keeps the contract: run `pytest` here."""

from unirg.scoring.contract_check import check_contract
from unirg.scoring.registry import load_reward

from $name import $name

REPORT = "Small left pleural effusion. No pneumothorax."


def test_it_ranks_reports():
    reports = [REPORT, "Left effusion.", "Clear lungs.", ""]
    same, half, other, silence = $name(reports, [REPORT] * 4)
    assert same == 1.0
    assert same > half > other == silence == 0.0


def test_it_masks_what_it_cannot_judge():
    assert $name([REPORT], [""]) == [None]


def test_it_keeps_the_contract():
    reward = load_reward("$name:$name")
    reward.setup()
    findings = check_contract(reward)
    assert [finding.text for finding in findings if finding.kind == "wrong"] == []
'''


def new_reward(name: str, folder: Path = Path()) -> Path:
    """Write the package `name` into a new folder of that name under `folder`; returns that folder.

    Raises UserError where the name cannot serve as module and reward, something of that name is there already (it
    is left alone), or the folder cannot be written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or len(name) > LONGEST:
        raise UserError(
            f"'{name}' cannot name a reward; expected lower-case letters and digits, words parted by one _, at most "
            f"{LONGEST} characters, such as my_reward"
        )
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise UserError(f"'{name}' is a word of Python's own; choose another name")
    if name.startswith("test_"):
        raise UserError(f"'{name}' would be collected as a test; choose a name that does not begin with test_")
    if name in entry_points(group=GROUP).names:
        raise UserError(f"a reward '{name}' is installed already (`unirg rewards` lists them); choose another name")
    target = folder / name
    if target.exists():
        raise UserError(f"{target} exists already; nothing was written. Choose another name, or move it away")
    if importlib.util.find_spec(name) is not None:
        raise UserError(f"a module '{name}' can be imported already, and one would hide the other; choose another name")
    values = {"name": name, "package": name.replace("_", "-")}
    files = {"pyproject.toml": PYPROJECT, f"{name}.py": REWARD, f"test_{name}.py": TEST}
    try:
        target.mkdir()
        for file, text in files.items():
            (target / file).write_text(Template(text).substitute(values), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error
    return target
