"""Rewards in worker processes: whatever a plug-in does, the run gets a score or a mask, and no process is left over."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unirg.scoring.contract import RewardConfig, RewardError, ScoreBatch
from unirg.scoring.engine import ScoringEngine, place
from unirg.scoring.worker import KEPT

FAULTY = '''
import ctypes, os, subprocess, sys, time

FOLDER = os.path.dirname(__file__)

def first_time(name):
    """Whether this is the first call under that name in any process."""
    try:
        os.close(os.open(os.path.join(FOLDER, name), os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False

def length(candidates, references, **columns):
    return [float(len(text)) for text in candidates]

def raises(candidates, references, **columns):
    raise KeyError("thing")

def dies_once(candidates, references, **columns):
    if first_time("died"):
        os._exit(9)
    return length(candidates, references)
'''
"""Rewards that fail, and what they need."""

FILE = (
    FAULTY
    + """
def process(candidates, references, **columns):
    return [float(os.getpid())] * len(candidates)

def leaves(candidates, references, **columns):
    sys.exit("no more of this")

def exits(candidates, references, **columns):
    os._exit(3)

def segfaults(candidates, references, **columns):
    ctypes.string_at(0)

def hangs(candidates, references, **columns):
    subprocess.Popen(["sleep", "1000"])
    time.sleep(1000)

def hangs_in_c(candidates, references, **columns):
    ctypes.PyDLL(None).sleep(1000)  # holds the interpreter's lock

def nan(candidates, references, **columns):
    return [float("nan")] * len(candidates)

def strings(candidates, references, **columns):
    return ["0.5"] * len(candidates)

def too_few(candidates, references, **columns):
    return [1.0]

def dies_of_b(candidates, references, **columns):
    if "b" in candidates:
        os._exit(4)
    return length(candidates, references)

def prints(candidates, references, **columns):
    for _ in range(300):
        print("x" * 10_000)
    os.write(2, b"the end")
    return length(candidates, references)

def meets(candidates, references, **columns):
    while not os.path.exists(os.path.join(FOLDER, "caller")):
        time.sleep(0.01)
    time.sleep(0.3)
    first_time("reward")
    return length(candidates, references)

def environment(candidates, references, **columns):
    return [float(os.environ["OMP_NUM_THREADS"]), float("RANK" in os.environ), float("torch" in sys.modules)]

class Model:
    shares = "model"

    def __init__(self, label="a"):
        self.label = label

    def setup(self, device="cpu"):
        if self.label == "broken":
            raise OSError("no weights in this folder")
        self.identity = {"device": device, "process": os.getpid()}

    def score(self, candidates, references, **columns):
        if "die" in candidates and self.label == "a" and first_time("model"):
            os._exit(5)
        return [self.identity["process"] * 1.0] * len(candidates)
"""
)

BATCH = ScoreBatch(["aa", "b", "aa"], ["r"] * 3, {"study_id": ["1", "1", "1"]})


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(FILE)
    return path


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = children()
    yield
    deadline = time.monotonic() + 10
    while left := children() - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def children(parent: int | None = None) -> set[int]:
    """The processes that descend from this one, or from `parent`, at any remove."""
    found: set[int] = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == (parent or os.getpid()) and fields[0] != "Z":
            found |= {int(stat.parent.name)} | children(int(stat.parent.name))
    return found


def engine(path: Path, *names: str, logs: Path | None = None, **options: Any) -> ScoringEngine:
    configs = [RewardConfig(name=f"{path}:{name}", **options) for name in names]
    return ScoringEngine(configs, supervised=True, logs=logs)


def score(engine: ScoringEngine, batch: ScoreBatch = BATCH) -> dict[str, list[float | None]]:
    return engine.collect(engine.submit(batch))


FAULTS = {
    "raises": r"KeyError: 'thing' \(\S*own.py:\d+, in raises\)",
    "leaves": "SystemExit: no more of this",
    "exits": r"its process ended \(exit status 3\)",
    "segfaults": r"killed by SIGSEGV\); its last words: .*in segfaults",
    "nan": r"reward \S*nan' returned nan at index 0 \(study 1\)",
    "strings": r"reward \S*strings' returned '0.5' at index 0 \(study 1\)",
    "too_few": r"reward \S*too_few' returned 1 scores for 2 candidates",
}


def test_a_fault_masks_its_own_reward_alone(rewards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with engine(rewards, "length", *FAULTS) as ours:
        scores = score(ours)
        assert scores.pop("length") == [2.0, 1.0, 2.0]
        assert scores == {name: [None] * 3 for name in FAULTS}
        figures = ours.step_figures()
        assert {name for name, value in figures.items() if value == 3} == {f"rewards/{name}/failed" for name in FAULTS}
        assert figures["rewards/length/failed"] == 0
        assert ours.step_figures()["rewards/raises/failed"] == 0  # told once
    told = capsys.readouterr().err
    for name, reason in FAULTS.items():
        assert re.search(rf"reward '{name}' failed on studies 1: .*{reason}.*; 2 candidates are masked", told), told


@pytest.mark.parametrize("name", ["raises", "exits", "nan"])
def test_a_fault_stops_a_run_that_says_so(rewards: Path, name: str) -> None:
    with (
        engine(rewards, name, on_error="raise") as ours,
        pytest.raises(RewardError, match=f"reward '{name}' failed on studies 1: .*{FAULTS[name]}"),
    ):
        score(ours)


@pytest.mark.parametrize("name", ["raises", "nan"])
def test_a_fault_in_the_training_process_has_the_same_end(rewards: Path, name: str) -> None:
    with engine(rewards, name, "length", worker=False) as ours:
        assert score(ours) == {name: [None] * 3, "length": [2.0, 1.0, 2.0]}
        assert ours.step_figures()[f"rewards/{name}/failed"] == 3
    with engine(rewards, name, worker=False, on_error="raise") as ours, pytest.raises(RewardError, match=FAULTS[name]):
        score(ours)


@pytest.mark.parametrize("name", ["hangs", "hangs_in_c"])
def test_a_hung_worker_is_killed_with_all_it_started(rewards: Path, name: str) -> None:
    configs = [RewardConfig(name=f"{rewards}:{name}", timeout=0.2), RewardConfig(name=f"{rewards}:length")]
    with ScoringEngine(configs, supervised=True) as ours:
        handle = ours.submit(BATCH)
        assert ours.collect(handle) == {name: [None] * 3, "length": [2.0, 1.0, 2.0]}
        assert score(ours)["length"] == [2.0, 1.0, 2.0]
        assert len(children()) <= 2  # the guard and the worker that took over, and no child of those before it


def test_a_worker_that_died_is_started_again_and_asked_again(rewards: Path) -> None:
    with engine(rewards, "dies_once") as ours:
        assert score(ours) == {"dies_once": [2.0, 1.0, 2.0]}
        assert ours.step_figures()["rewards/dies_once/failed"] == 0


def test_a_failure_costs_the_candidates_of_its_call(rewards: Path) -> None:
    batch = ScoreBatch(["a", "bb", "b", "ccc"], ["r"] * 4, {"study_id": ["1", "2", "3", "4"]})
    with engine(rewards, "dies_of_b", batch_size=1) as ours:
        assert score(ours, batch) == {"dies_of_b": [1.0, 2.0, None, 3.0]}
        assert ours.step_figures()["rewards/dies_of_b/failed"] == 1


def test_a_reward_that_compares_candidates_has_no_batch_size(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text("def rank(candidates, references): ...\nrank.deduplicate = False\n")
    with pytest.raises(RewardError, match="'rank' compares a batch's candidates: it cannot have a batch_size"):
        engine(tmp_path / "rank.py", "rank", batch_size=2)


def test_rewards_that_share_a_model_share_a_process_and_get_it_back(rewards: Path) -> None:
    configs = [
        RewardConfig(name=f"{rewards}:Model", label=label, options={"label": label}, device=device)
        for label, device in (("a", "cpu"), ("b", "cpu"), ("c", "cuda:7"))
    ]
    with ScoringEngine([*configs, RewardConfig(name=f"{rewards}:process")], supervised=True) as ours:
        said = ours.identities()
        scores = score(ours)
        first = [scores[label][0] for label in ("a", "b", "c", "process")]
        assert first[0] == first[1] == said["a"]["process"] and len(set(first)) == 3
        assert said["c"]["device"] == "cuda:7" and said["b"]["options"] == {"label": "b"}
        # One dies, in a fresh process both are set up again, each at its first call.
        again = score(ours, ScoreBatch(["die"], ["r"], {"study_id": ["1"]}))
        assert again["a"] == again["b"] != [first[0]] and again["c"] == [first[2]]


def test_scores_and_columns_pass_as_they_are(rewards: Path) -> None:
    (rewards.parent / "odd.py").write_text(
        "def odd(candidates, references, labels, score):\n"
        "    return [s + l[('left', 1)] if c == '\\ud800\\U0001f600' and r is not None else 0.0\n"
        "            for c, r, l, s in zip(candidates, references, labels, score)]\n"
    )
    columns = {"study_id": ["1", "2"], "labels": [{("left", 1): 2**-40}] * 2, "score": [1 / 3, 1e-300]}
    batch = ScoreBatch(["\ud800\U0001f600"] * 2, ["", "r"], columns)
    with engine(rewards.parent / "odd.py", "odd") as ours:
        assert score(ours, batch) == {"odd": [1 / 3 + 2**-40, 1e-300 + 2**-40]}
    with engine(rewards, "length") as ours:
        unsendable = ScoreBatch(["a"], ["r"], {"study_id": ["1"], "labels": [lambda: 1]})
        assert score(ours, unsendable) == {"length": [None]}


def test_what_cannot_be_set_up_is_an_error_at_once(rewards: Path) -> None:
    config = RewardConfig(name=f"{rewards}:Model", options={"label": "broken"})
    with pytest.raises(RewardError, match=r"'Model' cannot be set up: OSError: no weights in this folder"):
        ScoringEngine([config], supervised=True)
    with pytest.raises(RewardError, match=r"own.py:length' takes no device; leave `device: cuda:0` out"):
        engine(rewards, "length", device="cuda:0")


def test_of_what_is_printed_the_end_is_kept(rewards: Path, tmp_path: Path) -> None:
    with engine(rewards, "prints", "exits", logs=tmp_path / "workers") as ours:
        for _ in range(2):
            scores = score(ours)
        assert scores == {"prints": [2.0, 1.0, 2.0], "exits": [None] * 3}
    log = (tmp_path / "workers" / "worker-1.log").read_bytes()
    assert log.endswith(b"the end") and KEPT <= len(log) <= 2 * KEPT  # of 6 megabytes


def test_a_worker_has_one_thread_no_rank_and_no_needless_import(rewards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    batch = ScoreBatch(["a", "b", "c"], ["r"] * 3)
    for told, threads in ((None, 1.0), ("2", 2.0)):
        monkeypatch.delenv("OMP_NUM_THREADS") if told is None else monkeypatch.setenv("OMP_NUM_THREADS", told)
        with engine(rewards, "environment") as ours:
            assert score(ours, batch) == {"environment": [threads, 0.0, 0.0]}


def test_ranks_are_dealt_out_to_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def placed(device: str) -> list[str]:
        found = []
        for rank in range(4):
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            found.append(place("x", device))
        return found

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert placed("cpu") == ["cpu"] * 4 and placed("cuda:1") == ["cuda:1"] * 4
    assert placed("cuda:6,cuda:7") == ["cuda:6", "cuda:7"] * 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 6)
    assert placed("cuda:auto") == ["cuda:4", "cuda:5"] * 2  # those that no rank trains on
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert placed("cuda:auto") == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(RewardError, match="reward 'x': device is cuda:auto, and there is no CUDA device"):
        place("x", "cuda:auto")


def test_scoring_goes_on_while_the_caller_works(rewards: Path) -> None:
    with engine(rewards, "meets") as ours:
        handle = ours.submit(BATCH)
        (rewards.parent / "caller").touch()  # the reward waits for it, and the caller then waits for the reward
        while not (rewards.parent / "reward").exists():
            time.sleep(0.01)
        assert ours.collect(handle) == {"meets": [2.0, 1.0, 2.0]}
        assert 0 < ours.step_figures()["time/scoring_hidden"] <= 1
    with engine(rewards, "length", worker=False) as ours:
        score(ours)
        assert ours.step_figures()["time/scoring_hidden"] == 0


TRAINER = """
import sys
from unirg.scoring.contract import RewardConfig, ScoreBatch
from unirg.scoring.engine import ScoringEngine
engine = ScoringEngine([RewardConfig(name=name) for name in sys.argv[2:]], supervised=True)
handle = engine.submit(ScoreBatch(["a"], ["b"], {"study_id": ["1"]}))
print("ready", flush=True)
if sys.argv[1] == "collect":
    with engine:
        engine.collect(handle)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, None])
@pytest.mark.parametrize("name", ["hangs", "hangs_in_c"])
def test_no_process_outlives_the_run(rewards: Path, end: signal.Signals | None, name: str) -> None:
    """Killed, told to stop, Ctrl-C, or ended without a word while a reward is at work."""
    command = [sys.executable, "-c", TRAINER, "collect" if end else "leave", f"{rewards}:{name}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as trainer:
        assert trainer.stdout is not None and trainer.stdout.readline() == b"ready\n"
        if end is not None:
            started = children(trainer.pid)
            while len(started) < 2 + (name == "hangs"):  # the guard, the worker, and what the reward started
                started = children(trainer.pid)
            trainer.send_signal(end)
        else:
            started = children(trainer.pid)
        trainer.wait(timeout=20)
    deadline = time.monotonic() + 10
    while left := {pid for pid in started if alive(pid)}:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
