"""One warm process and one undisturbed run for all tests of faults."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.runs import Start, prepare, warm


@pytest.fixture(scope="session")
def start() -> Iterator[Start]:
    with warm() as starter:
        yield starter


@pytest.fixture(scope="session")
def undisturbed(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    run = prepare(tmp_path_factory.mktemp("undisturbed"), "run")
    trainer = start(run)
    assert trainer.wait() == 0, trainer.said
    return run
