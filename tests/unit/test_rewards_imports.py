"""The built-in rewards stand where a third party's stand."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _imported(folder: str) -> Iterator[tuple[str, str]]:
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path.name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield path.name, node.module or ""


def test_rewards_use_the_contract_and_the_extractor_alone():
    used = {module for _, module in _imported("rewards") if module.partition(".")[0] in ("unirg", "unirg_rewards")}
    assert used <= {"unirg.scoring.contract", "unirg.extraction"}
    assert "unirg.extraction" in used


def test_the_framework_finds_rewards_by_entry_point_only():
    assert not [where for where, module in _imported("unirg") if module.startswith(("unirg_rewards", "rewards"))]
