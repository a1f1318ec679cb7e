"""Disks that are full, and files that change under a run."""

import hashlib
import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.faults.runs import Start, assert_same, digests, prepare, wait_for
from unirg import checkpoint
from unirg import run as run_folder
from unirg.errors import UserError
from unirg.process import hold


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """A file that leaves so many bytes free."""
    filler = disk / "filler"
    free = os.statvfs(disk)
    size = free.f_bavail * free.f_frsize - leave
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return filler


@pytest.mark.faults
def test_a_disk_that_is_full_for_a_while(start: Start, undisturbed: Path, small_disk: Path) -> None:
    """The metrics still fit, the checkpoints do not: training goes on, and the checkpoint is written as soon as it
    can be."""
    run = prepare(small_disk, "run", "stages.sft.checkpoint_every=2")
    assert start(run, "vision").wait() == 0
    filler = fill(small_disk, leave=150_000)
    trainer = start(run, "sft", signal=signal.SIGSTOP, after=4)
    wait_for(trainer.stands_still)
    assert "no checkpoint of step 3" in trainer.said
    assert "no checkpoint of step 2 (rank 0: No space left on device" in trainer.said
    assert not list((run / "stages" / "sft").glob("step-*")) and not list((run / "stages" / "sft").glob(".*.part"))
    filler.unlink()
    trainer.signal(signal.SIGCONT)
    assert trainer.wait() == 0, trainer.said
    assert "no checkpoint of step 4" not in trainer.said
    assert start(run).wait() == 0
    assert_same(run, undisturbed)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("after", "words", "goes_on"),
    [
        (
            3 + 2,
            "stage sft: step 2, the best so far, cannot be kept (rank 0: No space left on device)",
            "1 of stage sft",
        ),
        (3 + 6 + 3, "stage grpo: a file cannot be written or read ([Errno 28]", "2 of stage grpo"),
    ],
    ids=["the best policy", "rollouts"],
)
def test_a_disk_that_takes_nothing(
    after: int, words: str, goes_on: str, start: Start, undisturbed: Path, small_disk: Path
) -> None:
    """What must not be lost cannot be written: the run ends with words, and goes on from its last checkpoint when there
    is room."""
    run = prepare(small_disk, "run")
    trainer = start(run, signal=signal.SIGSTOP, after=after)
    wait_for(trainer.stands_still)
    filler = fill(small_disk, leave=0)
    trainer.signal(signal.SIGCONT)
    assert trainer.wait() == 2, trainer.said
    assert words in trainer.said
    assert f"the same command goes on from step {goes_on}" in trainer.said
    filler.unlink()
    assert start(run).wait() == 0
    assert_same(run, undisturbed)


@pytest.mark.faults
def test_files_that_may_not_grow(start: Start, tmp_path: Path) -> None:
    """A quota on the size of a file: every checkpoint fails, and so does the result, in words."""
    run = prepare(tmp_path, "run")
    trainer = start(run, "vision", file_bytes=20_000)
    assert trainer.wait() == 2, trainer.said
    assert trainer.said.count("no checkpoint of step") == 2 and "File too large" in trainer.said
    assert ".final.part: cannot be written" in trainer.said
    assert not run_folder.final_folder(run, "vision").exists()
    trainer = start(run, "vision")
    assert trainer.wait() == 0
    assert run_folder.final_folder(run, "vision").exists()


@pytest.mark.faults
def test_damaged_checkpoints_of_a_run(start: Start, undisturbed: Path, tmp_path: Path) -> None:
    """A bit of the newest is flipped: the run says so, and goes on from the one before it, to the same end."""
    run = prepare(tmp_path, "run")
    assert start(run, "vision").wait() == 0
    trainer = start(run, "sft", signal=signal.SIGKILL, after=4)
    assert trainer.wait() == 128 + signal.SIGKILL
    newest = run / "stages" / "sft" / "step-000003" / "weights-0000-000.safetensors"
    content = bytearray(newest.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 16
    newest.write_bytes(content)
    trainer = start(run)
    assert trainer.wait() == 0
    assert "step-000003: weights-0000-000.safetensors is damaged (its SHA-256 is another); not used" in trainer.said
    assert "goes on from step 2" in trainer.said
    assert_same(run, undisturbed)


@pytest.mark.faults
def test_a_film_that_breaks_in_the_middle_of_an_epoch(start: Start, tmp_path: Path) -> None:
    """The check before training has seen it whole. Its study is named; nothing made so far is lost, and with the film
    put back the run is what it would have been."""
    films, rows = random.Random(0), []
    for i in range(8):
        Image.frombytes("L", (64, 64), films.randbytes(64 * 64)).save(tmp_path / f"{i}.png")
        rows.append({"id": f"s{i}", "images": [f"{i}.png"], "findings": f"There is a small effusion, {i} cm."})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"adapter": "jsonl", "files": {"train": str(tmp_path / "train.jsonl")}}
    more = [f"data={json.dumps(data)}", "stages.sft.start=policy", "stages.sft.studies_per_step=2"]
    more += ["stages.sft.keep=last", "stages.sft.evaluate_every=null", "stages.sft.checkpoint_every=100"]
    expected, run = (prepare(tmp_path, name, *more) for name in ("expected", "run"))
    assert start(expected, "sft").wait() == 0

    trainer = start(run, "sft", signal=signal.SIGSTOP, after=2)
    wait_for(trainer.stands_still)
    whole = {path: path.read_bytes() for path in tmp_path.glob("?.png")}
    for path, content in whole.items():  # of those that this epoch has not read yet, the next is met
        path.write_bytes(content[: len(content) // 2])
    trainer.signal(signal.SIGCONT)
    assert trainer.wait() == 2, trainer.said
    assert "sft: study s" in trainer.said and ".png" in trainer.said
    assert "the same command goes on from step 2 of stage sft" in trainer.said
    for path, content in whole.items():
        path.write_bytes(content)
    trainer = start(run, "sft")
    assert trainer.wait() == 0
    assert "goes on from step 2" in trainer.said
    assert digests(run) == digests(expected) and digests(run)


@pytest.mark.faults
def test_a_loss_that_is_no_number(start: Start, tmp_path: Path) -> None:
    """A rate that throws the weights out of what float32 holds: the step that shows it changes nothing more."""
    optimiser = ["stages.vision.optimiser.learning_rate=1e30", "stages.vision.optimiser.warmup=0"]
    run = prepare(tmp_path, "run", *optimiser)
    trainer = start(run, "vision")
    assert trainer.wait() == 2
    assert "vision: stage vision, step 2: the loss is nan, the gradient nan; it changed no weight" in trainer.said
    kept = run / "stages" / "vision" / "step-000001"
    listed = json.loads((kept / "checksums.json").read_text())
    assert all(hashlib.sha256((kept / name).read_bytes()).hexdigest() == listed[name]["sha256"] for name in listed)
    assert (run / "stages" / "vision" / "latest").read_text() == checkpoint.name_of(1) + "\n"


@pytest.mark.faults
def test_two_runs_on_one_folder(start: Start, tmp_path: Path) -> None:
    run = prepare(tmp_path, "run", "stages.vision.steps=2000")
    trainer = start(run, "vision")
    wait_for(lambda: run_folder.read_metrics(run / "stages" / "vision"))
    with pytest.raises(UserError, match=rf"vision: process {trainer.pid} on \S+ \(since .*\) is training there"):
        hold(run / "stages" / "vision")
    trainer.signal(signal.SIGKILL)
    trainer.wait()
    hold(run / "stages" / "vision").close()  # the dead hold nothing


def test_a_folder_is_held_once(tmp_path: Path) -> None:
    held = hold(tmp_path)
    with pytest.raises(UserError, match=f"process {os.getpid()} on .* is training there; wait for it, or stop it"):
        hold(tmp_path)
    held.close()
    hold(tmp_path).close()
