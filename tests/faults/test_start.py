"""Two ranks before and after their steps: the check of the data, a folder that one of them does not see, the
evaluation."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.faults.runs import environment, job, wait_for

pytestmark = pytest.mark.faults
FILMS = 8
TINY = {"vocabulary": 400, "hidden": 32, "heads": 2, "layers": 1, "mlp": 48, "vision_hidden": 32, "vision_layers": 2}
STAGE = {"name": "sft", "kind": "sft", "steps": 2, "studies_per_step": 2, "optimiser": {"learning_rate": 1.0e-3}}


def write(folder: Path, tests: int = 0, **changes: object) -> tuple[Path, list[str]]:
    """A run folder that is still to be made, of studies with a film each, and the command that makes it. `tests` of
    them are read in an evaluation."""
    noise = random.Random(0)
    for i in range(FILMS):
        Image.frombytes("L", (64, 64), noise.randbytes(64 * 64)).save(folder / f"{i}.png")
    rows = [{"id": f"s{i}", "images": [f"{i % FILMS}.png"], "findings": f"A nodule, {i} cm."} for i in range(tests + 8)]
    for split, chosen in (("train", rows[:8]), ("test", rows[8:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    recipe = {
        "name": "start",
        "output": str(folder / "run"),
        "threads": 1,
        "data": {"adapter": "jsonl", "files": {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}},
        "policy": {"tiny": TINY | {"image_size": 64}},
        "stages": [STAGE],
        "evaluation": {"splits": ["test"] * (tests > 0), "max_new_tokens": 8, "headline": "length", "batch_size": 1},
    }
    (folder / "run.yaml").write_text(json.dumps(recipe | changes))
    return folder / "run", ["-m", "unirg", "train", str(folder / "run.yaml")]


def test_a_rank_that_looks_for_the_others_can_be_stopped(tmp_path: Path) -> None:
    """It does so within torch, where Python hears no signal. The test is the first rank, and answers nothing."""
    _, command = write(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(silent.getsockname()[1]), "LOCAL_RANK": "1"}
        environment = os.environ | place | {"RANK": "1", "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
        rank = subprocess.Popen([sys.executable, *command], env=environment)
        try:
            silent.settimeout(120)
            silent.accept()
            rank.send_signal(signal.SIGTERM)
            assert rank.wait(20) == -signal.SIGTERM
        finally:
            rank.kill()


def test_broken_films_of_both_ranks_shares(tmp_path: Path) -> None:
    """All are named, once, in the studies' order; no folder is made. With the films put back the run is made."""
    run, command = write(tmp_path)
    whole = {i: (tmp_path / f"{i}.png").read_bytes() for i in (2, 5)}
    for i, content in whole.items():
        (tmp_path / f"{i}.png").write_bytes(content[: len(content) // 2])
    with job(run, command=command) as refused:
        assert refused.process.wait(120) != 0
    assert re.findall(r"^study (s\d): corrupt image", refused.said, re.M) == ["s2", "s5"]
    assert "Traceback" not in refused.said.partition("torch/distributed")[0] and not run.exists()
    for i, content in whole.items():
        (tmp_path / f"{i}.png").write_bytes(content)
    with job(run, command=command) as trained:
        assert trained.process.wait(120) == 0, trained.said
    assert trained.steps() == 2


def test_a_rank_that_stalls_in_the_check(tmp_path: Path) -> None:
    """A film that never ends, as on a file system that hangs: the rank that reads it is named."""
    run, command = write(tmp_path, distributed={"timeout": 20})
    (tmp_path / "3.png").unlink()
    os.mkfifo(tmp_path / "3.png")
    with job(run, command=command) as stalled:
        assert stalled.process.wait(180) != 0
    assert re.search(r"rank 1 \(host .*\) has been in 'reading films' of its start for \d+ s", stalled.said), (
        stalled.said
    )
    assert not run.exists()


def test_a_run_folder_that_one_rank_does_not_see(tmp_path: Path) -> None:
    """As on a disk of the first host alone: refused before a step is made."""
    run, command = write(tmp_path)
    run.mkdir()
    (tmp_path / "rank.py").write_text(
        "import ctypes, os, sys\n"
        f"hidden = {str(run)!r}\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "if os.environ['RANK'] == '1':\n"
        "    flags = 1 << 18 | 1 << 14  # MS_PRIVATE, MS_REC\n"
        "    if libc.unshare(0x20000) or libc.mount(b'none', b'/', None, flags, None):\n"
        "        sys.exit(77)\n"
        "    if libc.mount(b'none', hidden.encode(), b'tmpfs', 0, None):\n"
        "        sys.exit(77)\n"
        "import unirg.process\n"
        "from unirg.cli import main\n"
        "unirg.process.SEEN_SECONDS = 2\n"
        "unirg.process.end(main(sys.argv[1:]))\n"
    )
    with job(run, command=[str(tmp_path / "rank.py"), *command[2:]]) as apart:
        assert apart.process.wait(120) != 0
    if "exitcode  : 77" in apart.said:
        pytest.skip("no file system can be mounted here")
    said = f"rank 1 (host {os.uname().nodename}) does not see {run / 'recipe.yaml'}, which rank 0 has written"
    assert apart.said.count(said) == 1, apart.said
    assert apart.steps() == 0


def test_a_signal_in_the_evaluation_of_a_run_of_two_ranks(tmp_path: Path) -> None:
    """It is the first rank's alone: the other has ended. Started again, it goes on from the reports that there are."""
    run, command = write(tmp_path, tests=60)
    reports = run / "predictions" / "test" / "sft.jsonl"
    with job(run, command=command) as stopped:
        wait_for(lambda: reports.exists() and reports.read_bytes().count(b"\n") >= 3)
        stopped.process.send_signal(signal.SIGTERM)
        assert stopped.process.wait(120) != 0
    assert stopped.said.count("stopped by SIGTERM: the same command goes on with the evaluation") == 1, stopped.said
    before = reports.read_bytes()
    assert 3 <= before.count(b"\n") < 60
    with job(run, command=command) as resumed:
        assert resumed.process.wait(300) == 0, resumed.said
    assert reports.read_bytes().startswith(before[: before.rindex(b"\n") + 1]) and (run / "report.html").exists()


def test_a_signal_before_the_first_step_of_two_ranks(tmp_path: Path) -> None:
    run, command = write(tmp_path)
    film = tmp_path / "3.png"
    film.unlink()
    os.mkfifo(film)
    with job(run, command=command) as stopped:
        end = wait_for(lambda: write_end(film))  # rank 1 reads, rank 0 waits for it
        stopped.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "closing signal SIGTERM" in stopped.said)  # what torchrun says when it passes it on
        time.sleep(1)  # the signal comes before the end of the film
        os.close(end)
        assert stopped.process.wait(120) != 0
    assert stopped.said.count("stopped by SIGTERM: the same command goes on from its start") == 2, stopped.said
    assert not run.exists()


def write_end(pipe: Path) -> int | None:
    """The pipe's end for writing, where a process waits at the other."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


SLOW = """
import time
from unirg import doctor, process
from unirg.doctor import network
network.SECONDS = 10
def slow():
    time.sleep(12)
    yield doctor.Finding("memory", "ok", "looked at")
doctor.check_memory = slow
process.end(doctor.doctor(None))
"""


def test_doctor_waits_for_a_node_that_takes_long_to_look_at(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW, encoding="utf-8")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "slow.py")]
    here = environment(PYTHONPATH=str(Path(__file__).parents[2]))
    ended = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=here, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "looked at" in ended.stdout and "2 ranks add up" in ended.stdout
