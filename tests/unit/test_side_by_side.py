"""Stages as processes of their own: they end with the run that started them."""

import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from unirg import signals, stages
from unirg.recipe.load import load_recipe


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_run_goes_to_its_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int):
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "demo.yaml")
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def sleeper(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        started.append(popen(["sleep", "60"]))
        threading.Timer(0.3, os.kill, (os.getpid(), stop)).start()
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", sleeper)
    with signals.handled(), pytest.raises(signals.Stopped) as stopped:
        stages.run_side_by_side(recipe, tmp_path, recipe.stages[:1])
    assert stopped.value.number == stop
    assert len(started) == 1 and started[0].wait(timeout=10) == -stop
