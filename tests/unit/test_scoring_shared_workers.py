"""Rewards that share a model share a worker, whoever asks for them; references are read ahead; CPU time is counted."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.encoders import REPORTS, chexbert_folder, roberta_folder
from tests.radgraph_archives import write_archive
from unirg.scoring.contract import RewardConfig, RewardError, ScoreBatch
from unirg.scoring.engine import ScoringEngine, linked

FILE = '''
import os, subprocess, sys, time

class Reads:
    """Scores how many references it had read before, and its process."""
    shares = ("a", "b")

    def __init__(self, broken=False):
        self.broken, self.read = broken, []

    def setup(self):
        if self.broken == "setup":
            raise OSError("no weights")
        self.identity = {"process": os.getpid()}

    def prepare(self, references):
        if self.broken:
            raise OSError("no such model")
        self.read += references

    def score(self, candidates, references):
        return [float(len(self.read)) if text == "count" else float(os.getpid()) for text in candidates]

class OnlyB(Reads):
    shares = "b"

class OnlyA(Reads):
    shares = "a"

def burns(candidates, references):
    started = time.process_time()
    while time.process_time() - started < 0.1:
        pass
    subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.3: pass"], check=True)
    return [0.0] * len(candidates)
'''


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(FILE)
    return tmp_path / "own.py"


def engine(path: Path, *names: str, beside: ScoringEngine | None = None, **more: Any) -> ScoringEngine:
    configs = [RewardConfig(name=f"{path}:{name}", **more) for name in names]
    return ScoringEngine(configs, supervised=True, beside=beside)


def scored(engine: ScoringEngine, *candidates: str) -> dict[str, list[float | None]]:
    ids = {"study_id": [str(number) for number in range(len(candidates))]}
    return engine.collect(engine.submit(ScoreBatch(list(candidates), ["r"] * len(candidates), ids)))


def test_what_is_linked_at_any_remove_is_one_group() -> None:
    assert linked({"x": {1}, "y": {2}, "z": {3}, "both": {2, 1}, "w": {4, 3}}) == [["x", "y", "both"], ["z", "w"]]
    assert linked({}) == []


def test_a_reward_of_two_models_brings_their_rewards_into_one_worker(path: Path) -> None:
    with engine(path, "OnlyA", "OnlyB") as apart, engine(path, "OnlyA", "OnlyB", "Reads") as together:
        assert len({values[0] for values in scored(apart, "x").values()}) == 2
        assert len({values[0] for values in scored(together, "x").values()}) == 1


def test_composites_and_their_components_stand_in_one_worker(tmp_path: Path) -> None:
    """On the built-in rewards: one process, and in it each model once."""
    radgraph = {"model_folder": str(write_archive(tmp_path / "radgraph", "radgraph"))}
    chexbert = {"model_folder": str(chexbert_folder(tmp_path / "chexbert"))}
    bertscore = {"model_folder": str(roberta_folder(tmp_path / "roberta", layers=6))}
    configs = [
        RewardConfig(name="chexbert", options=chexbert),
        RewardConfig(name="bertscore", options=bertscore),
        RewardConfig(name="radgraph_f1", options=radgraph | {"model": "radgraph"}),
        RewardConfig(name="r1", options={"radgraph": radgraph, "chexbert": chexbert, "bertscore": bertscore}),
        RewardConfig(name="bleu"),
    ]
    batch = ScoreBatch(list(REPORTS), list(reversed(REPORTS)), {"study_id": list(REPORTS)})
    with ScoringEngine(configs, supervised=True) as ours:
        workers = [ours._workers[config.log_label] for config in configs]
        assert len(set(workers)) == 2 and set(workers[:4]) == {workers[0]}
        ours.prepare(batch.references, batch.columns)
        scores = ours.collect(ours.submit(batch))
    here = ScoringEngine(configs)
    models = {name: reward.written for name, reward in here.rewards.items()}
    assert models["r1"].components.radgraph._radgraph is models["radgraph_f1"]._radgraph
    assert models["r1"].components.semb_score._model is models["chexbert"]._model
    assert models["r1"].components.bertscore._encoder is models["bertscore"]._encoder
    for name, values in here.collect(here.submit(batch)).items():  # not prepared: forwards hold other texts together
        assert scores[name] == pytest.approx(values, abs=1e-6)


def test_another_engine_uses_the_workers_that_hold_its_models(path: Path) -> None:
    with engine(path, "Reads", "OnlyB") as training:
        (process,) = {value for values in scored(training, "x").values() for value in values}
        with engine(path, "Reads", label="again", beside=training) as metrics:
            training.prepare(["r"], {})
            assert scored(metrics, "x", "count") == {"again": [process, 1.0]}  # the same object
        with engine(path, "OnlyB", options={"broken": True}, beside=training) as metrics:  # a label that is taken
            assert scored(metrics, "x", "count") == {"OnlyB": [process, 0.0]}
            assert metrics.identities()["OnlyB"]["process"] == process
        with pytest.raises(RewardError, match="'other' cannot be set up: OSError: no weights"):
            engine(path, "Reads", label="other", options={"broken": "setup"}, beside=training)
        assert scored(training, "x")["Reads"] == [process]  # closed with none of them
        os.kill(int(process), signal.SIGKILL)
        with engine(path, "Reads", beside=training) as metrics:
            (fresh,) = scored(metrics, "x")["Reads"]
            assert fresh != process and scored(training, "x") == {"Reads": [fresh], "OnlyB": [fresh]}


@pytest.mark.parametrize("worker", [True, False])
def test_references_are_read_once_and_before_the_scores(path: Path, worker: bool) -> None:
    with engine(path, "Reads", reference="impression", worker=worker) as ours:
        ours.prepare(["", "", ""], {"impression": ["one", "two", "one"]})
        batch = ScoreBatch(["count"], [""], {"impression": ["one"]})
        assert ours.collect(ours.submit(batch)) == {"Reads": [2.0]}
        assert ours.collect(ours.submit(batch)) == {"Reads": [2.0]}


@pytest.mark.parametrize("worker", [True, False])
def test_what_cannot_be_read_ahead_is_said_and_left_to_the_scoring(
    path: Path, capsys: pytest.CaptureFixture[str], worker: bool
) -> None:
    with engine(path, "Reads", options={"broken": True}, worker=worker) as ours:
        ours.prepare(["one"], {})
        assert scored(ours, "count") == {"Reads": [0.0]}
        assert ours.step_figures()["rewards/Reads/failed"] == 0
    assert "reward 'Reads' could not prepare references: OSError: no such model" in capsys.readouterr().err


def test_the_cpu_time_of_workers_and_of_what_they_start_is_counted(path: Path) -> None:
    with engine(path, "burns") as ours:
        scored(ours, "x")
        figures = ours.step_figures()
        assert figures["time/workers_cpu"] >= 0.4 and figures["time/rewards"] > 0.3
        assert ours.step_figures()["time/workers_cpu"] == 0
    with engine(path, "burns", worker=False) as ours:  # this process counts it already
        scored(ours, "x")
        assert ours.step_figures()["time/workers_cpu"] == 0
