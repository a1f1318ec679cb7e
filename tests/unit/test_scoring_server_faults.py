"""Whatever becomes of a scoring server or of what runs in it, a trainer gets its scores or a mask, and goes on."""

import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.served import free_port, serve
from tests.unit.test_scoring_workers import FAULTY, alive, children
from unirg.scoring import client, server
from unirg.scoring.contract import RewardConfig, RewardError, ScoreBatch
from unirg.scoring.engine import ScoringEngine
from unirg.scoring.serve import served
from unirg.scoring.server import ScoringServer
from unirg.scoring.wire import TOKEN

FILE = (
    FAULTY
    + """
def dies(candidates, references, **columns):
    os._exit(3)

def hangs(candidates, references, **columns):
    time.sleep(1000)

def hangs_once(candidates, references, **columns):
    if first_time("hung"):
        time.sleep(1000)
    return length(candidates, references)

def slow(candidates, references, **columns):
    time.sleep(0.8)
    return length(candidates, references)

def waits(candidates, references, **columns):
    first_time("at-" + candidates[0])
    while not os.path.exists(os.path.join(FOLDER, "go")):
        time.sleep(0.01)
    return length(candidates, references)

class Versioned:
    identity = {"version": open(os.path.join(FOLDER, "version")).read()}

    def score(self, candidates, references, **columns):
        return length(candidates, references)
"""
)
BATCH = ScoreBatch(["aa", "b"], ["r"] * 2, {"study_id": ["1", "2"]})


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(FILE)
    (tmp_path / "version").write_text("1")
    return tmp_path / "own.py"


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)


def config(rewards: Path, name: str, url: str, **more: object) -> RewardConfig:
    return RewardConfig.model_validate({"name": f"{rewards}:{name}", "server": url} | more)


def trainer(rewards: Path, name: str, url: str, **more: object) -> ScoringEngine:
    return ScoringEngine([config(rewards, name, url, **more)], supervised=True)


def score(engine: ScoringEngine, batch: ScoreBatch = BATCH) -> list[float | None]:
    (scores,) = engine.collect(engine.submit(batch)).values()
    return scores


def failed(engine: ScoringEngine) -> float:
    (count,) = (value for name, value in engine.step_figures().items() if name.endswith("/failed"))
    return count


def test_what_fails_in_the_server_is_masked_or_raised_here(
    rewards: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    faults = {
        "raises": r"KeyError: 'thing' \(\S*own.py:\d+, in raises\)",
        "dies": r"its process ended \(exit status 3\)",
        "hangs": "no answer in 0.3 seconds; its process was killed",
    }
    with serve([f"{rewards}:{name}" for name in (*faults, "dies_once", "length")], tmp_path) as running:
        for name, reason in faults.items():
            with trainer(rewards, name, running.url, timeout=0.3) as ours:
                assert score(ours) == [None, None] and failed(ours) == 2
            told = rf"reward '{name}' failed on studies 1, 2: .*{reason}.*\(at {running.url}\); 2 candidates are masked"
            assert re.search(told, capsys.readouterr().err)
            with (
                trainer(rewards, name, running.url, timeout=0.3, on_error="raise") as ours,
                pytest.raises(RewardError, match=reason),
            ):
                score(ours)
            with (
                ScoringEngine([config(rewards, name, running.url, timeout=0.3)]) as ours,
                pytest.raises(RewardError, match=reason),
            ):
                score(ours)
        for name in ("dies_once", "length"):  # started again, and asked again, inside the server
            with trainer(rewards, name, running.url) as ours:
                assert score(ours) == [2.0, 1.0] and failed(ours) == 0
        assert running.health() == {"ready": True, "requests": 11, "reports": 22, "failed": 9, "refused": 0}


def test_a_server_that_is_killed_and_started_again_costs_nothing(
    rewards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port, name = free_port(), f"{rewards}:hangs_once"
    with serve([name], tmp_path, port) as first, trainer(rewards, "hangs_once", first.url) as ours:
        handle = ours.submit(BATCH)
        while not (tmp_path / "hung").exists():
            time.sleep(0.01)
        first.process.kill()  # while its reward is at work
        first.process.wait()
        with serve([name], tmp_path, port) as second:
            assert ours.collect(handle) == {"hangs_once": [2.0, 1.0]}
            assert failed(ours) == 0
            second.process.terminate()
            assert second.process.wait(timeout=30) == 0
            assert "ended after 1 requests" in second.said()
        told = capsys.readouterr().err
        assert f"'hangs_once': waiting for the scoring server {first.url} (" in told and told.count("waiting") == 1
        with serve([name], tmp_path, port):
            assert score(ours) == [2.0, 1.0]


def test_a_server_that_is_told_to_end_leaves_no_process_and_no_call_half_answered(
    rewards: Path, tmp_path: Path
) -> None:
    port, name = free_port(), f"{rewards}:hangs_once"
    for end in (signal.SIGTERM, signal.SIGINT):
        (tmp_path / "hung").unlink(missing_ok=True)
        with serve([name], tmp_path, port) as first, trainer(rewards, "hangs_once", first.url) as ours:
            handle = ours.submit(BATCH)
            while not (tmp_path / "hung").exists():
                time.sleep(0.01)
            started = children(first.process.pid)
            first.process.send_signal(end)
            assert first.process.wait(timeout=30) == 0 and len(started) >= 2
            assert "Traceback" not in first.said()
            deadline = time.monotonic() + 10
            while left := [pid for pid in started if alive(pid)]:
                assert time.monotonic() < deadline, left
                time.sleep(0.02)
            with serve([name], tmp_path, port):
                assert ours.collect(handle) == {"hangs_once": [2.0, 1.0]}


def test_another_reward_under_the_same_name_is_refused_in_mid_run(
    rewards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port, name = free_port(), f"{rewards}:Versioned"
    with serve([name], tmp_path, port) as first, trainer(rewards, "Versioned", first.url) as ours:
        assert score(ours) == [2.0, 1.0]
        first.process.kill()
        first.process.wait()
        (tmp_path / "version").write_text("2")
        with serve([name], tmp_path, port):
            assert score(ours) == [None, None]
        words = r"refused \(HTTP 409\): '.*' is not what it was when this run began: version is \"2\" here, \"1\" there"
        assert re.search(words, capsys.readouterr().err)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(client, "LONGEST_PAUSE", 0.1)


@pytest.fixture
def here(rewards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScoringServer]:
    """A server in this process, whose answers have a blank in them every 50 ms."""
    monkeypatch.setattr(server, "BEAT_SECONDS", 0.05)
    configs = served([RewardConfig(name=f"{rewards}:{name}") for name in ("slow", "waits", "length")])
    running = ScoringServer("127.0.0.1", 0, None, lambda line: None)
    with ScoringEngine(list(configs.values()), supervised=True) as engine:
        running.open(engine, configs)
        yield running
        running.end()


def test_a_busy_server_is_not_a_silent_one(rewards: Path, here: ScoringServer, impatient: None) -> None:
    with trainer(rewards, "slow", here.url, timeout=5) as ours:
        assert score(ours) == [2.0, 1.0] and failed(ours) == 0


def test_nothing_is_scored_for_a_trainer_that_has_gone(rewards: Path, here: ScoringServer) -> None:
    def under_way(count: int) -> None:
        while sum("process_request" in thread.name for thread in threading.enumerate()) != count:
            time.sleep(0.01)

    with trainer(rewards, "waits", here.url) as first:
        handle = first.submit(ScoreBatch(["first"], [""]))
        while not (rewards.parent / "at-first").exists():
            time.sleep(0.01)
        with trainer(rewards, "waits", here.url) as second:
            second.submit(ScoreBatch(["second"], [""]))
            under_way(2)  # it waits for its turn
        under_way(1)
        (rewards.parent / "go").touch()
        assert first.collect(handle) == {"waits": [5.0]}
    with trainer(rewards, "length", here.url) as third:  # the same worker, so that the turn of the second is over
        assert score(third) == [2.0, 1.0]
    assert not (rewards.parent / "at-second").exists()


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.0 200 OK\r\n\r\n   ", b'HTTP/1.0 200 OK\r\n\r\n{"scores": [1.0', b"x"]
)
def test_a_server_that_never_answers_costs_one_wait_and_no_run(
    rewards: Path, here: ScoringServer, impatient: None, capsys: pytest.CaptureFixture[str], answer: bytes
) -> None:
    """It takes the request, says `answer`, and hangs or goes away."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        held: list[socket.socket] = []
        asked: list[int] = []

        def listen() -> None:
            while True:
                try:
                    taken, _ = mute.accept()
                except OSError:
                    return
                asked.append(1)
                taken.recv(1 << 16)
                taken.sendall(answer)
                held.append(taken) if not answer else taken.close()

        threading.Thread(target=listen, daemon=True).start()
        with trainer(rewards, "length", here.url, timeout=1.0) as ours:
            (worker,) = ours._workers.values()
            assert isinstance(worker, client.ServedReward)
            good, worker._address = (
                worker._address,
                worker._address._replace(netloc=f"127.0.0.1:{mute.getsockname()[1]}"),
            )
            assert score(ours) == [None, None] and failed(ours) == 2
            assert len(asked) >= 2
            before = len(asked)
            assert score(ours) == [None, None] and len(asked) == before + 1  # it was waited for long enough
            worker._address = good
            assert score(ours) == [2.0, 1.0] and failed(ours) == 2
        assert capsys.readouterr().err.count("is away") == 2
        mute.shutdown(socket.SHUT_RDWR)
    for taken in held:
        taken.close()


@pytest.mark.parametrize("name", ["length", "waits"])
def test_a_run_that_ends_does_not_wait_for_a_server(
    rewards: Path, here: ScoringServer, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Neither for one that is away nor for one that is at work."""
    with trainer(rewards, name, here.url) as ours:
        if name == "length":
            here.end()
        handle = ours.submit(BATCH)
        while name == "waits" and not (rewards.parent / "at-aa").exists():
            time.sleep(0.01)
    assert ours.collect(handle) == {name: [None, None]}
    assert "the scoring engine was closed" in capsys.readouterr().err


def test_no_server_at_all_is_an_error_in_words(rewards: Path, impatient: None) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RewardError, match=rf"'length' cannot be set up: the scoring server {url} is away \(.*refused"):
        trainer(rewards, "length", url, timeout=0.2)


def test_two_servers_of_one_port_do_not_both_start(rewards: Path, here: ScoringServer) -> None:
    with pytest.raises(RewardError, match=r"127.0.0.1:\d+ cannot be listened on \(Address already in use\)"):
        ScoringServer("127.0.0.1", here.server_address[1], None, print)
    with pytest.raises(RewardError, match=r"--host no.such.host.invalid: no address of this machine"):
        ScoringServer("no.such.host.invalid", 0, None, print)


def test_what_is_served_twice_is_one_reward_on_one_device() -> None:
    bleu = [RewardConfig(name="bleu", label=label, weight=2.0) for label in "ab"]
    assert list(served([*bleu, RewardConfig(name="bleu", options={"variant": "coco4"})])) == [
        "bleu",
        'bleu("variant": "coco4")',
    ]
    with pytest.raises(RewardError, match="'bleu' is to run on cpu and on cuda:0: choose one"):
        served([*bleu, RewardConfig(name="bleu", device="cuda:0")])
