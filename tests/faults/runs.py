"""A short run of every kind of stage, started, stopped and compared: what the tests of faults share."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests import runs
from tests.runs import STAGES, environment, trajectory
from unirg import run as run_folder

RECIPE = """
name: faults
output: {output}
threads: 1
data: {{adapter: phantom, train: 24, dev: 4, test: 4, unseen: 4, size: 64}}
prompt: {{style: short, institution: true}}
policy:
  lora: {{rank: 4, dropout: 0.1}}
  tiny:
    {{vocabulary: 400, hidden: 32, heads: 2, layers: 1, mlp: 48, vision_hidden: 32, vision_layers: 2, image_size: 64}}
stages:
  - name: vision
    kind: vision
    steps: 3
    studies_per_step: 4
    checkpoint_every: 1
    optimiser: {{learning_rate: 1.0e-3}}
  - name: sft
    kind: sft
    steps: 6
    studies_per_step: 4
    studies_per_forward: 2
    checkpoint_every: 1
    evaluate_every: 2
    evaluate_studies: 4
    keep: best
    optimiser: {{learning_rate: 3.0e-3}}
  - name: grpo
    kind: grpo
    steps: 6
    studies_per_step: 4
    group_size: 4
    iterations: 2
    resample: 1
    checkpoint_every: 1
    evaluate_every: 3
    evaluate_studies: 4
    sampling: {{max_new_tokens: 6}}
    loss: {{kind: grpo, kl: 0.05}}
    optimiser: {{learning_rate: 1.0e-3}}
    rewards:
      - {{name: "tests_reward.py:closeness"}}
evaluation: {{splits: [], max_new_tokens: 8, headline: length}}
"""

REWARD = '''
def closeness(candidates, references, **columns):
    """Shared characters, in coarse steps: some groups are without variance."""
    return [round(4 * len(set(c) & set(r)) / len(set(c) | set(r) | {" "})) / 4 for c, r in zip(candidates, references)]
'''


def prepare(folder: Path, name: str, *overrides: str) -> Path:
    """A run folder with a resolved recipe, ready for its stages."""
    return runs.prepare(folder, name, RECIPE, REWARD, *overrides)


def digests(run: Path) -> dict[str, str]:
    """SHA-256 of the policy that each finished stage left."""
    finals = [run_folder.final_folder(run, stage) / "model.safetensors" for stage in STAGES]
    return {str(f.parent.parent.name): hashlib.sha256(f.read_bytes()).hexdigest() for f in finals if f.exists()}


def assert_same(run: Path, other: Path) -> None:
    """To the last bit: every figure of every step, and the weights of every stage."""
    for ours, theirs in zip(trajectory(run), trajectory(other), strict=True):
        assert ours == theirs
    assert len(digests(run)) == len(STAGES) and digests(run) == digests(other)


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """Returns when the condition holds, what it gives then."""
    deadline = time.monotonic() + seconds
    while not (given := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
    return given


class Trainer:
    """A process that trains a run's stages; its status as of a shell is in `status` when it has ended."""

    def __init__(self, server: "subprocess.Popen[str]", log: Path) -> None:
        assert server.stdout is not None
        self._server, self._log, self._from = server, log, log.stat().st_size if log.exists() else 0
        self.pid = int(server.stdout.readline())
        self.ended = False

    @property
    def said(self) -> str:
        return self._log.read_text()[self._from :] if self._log.exists() else ""

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def stands_still(self) -> bool:
        """Whether SIGSTOP has stopped it."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def wait(self) -> int:
        """128 + the signal's number where it was killed."""
        assert self._server.stdout is not None
        status = os.waitstatus_to_exitcode(int(self._server.stdout.readline()))
        self.ended = True
        return status if status >= 0 else 128 - status


Start = Callable[..., Trainer]


@contextmanager
def warm() -> Iterator[Start]:
    """A function that starts a trainer of a run, one at a time, in no time: see warm.py."""
    command = [sys.executable, str(Path(__file__).parent / "warm.py")]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )
    assert server.stdin is not None
    stdin = server.stdin
    started: list[Trainer] = []

    def start(run: Path, *stages: str, **asked: Any) -> Trainer:
        log = run.with_suffix(".log")
        request = {"arguments": [str(run), *(stages or STAGES)], "log": str(log), "folder": str(run.parent), **asked}
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        started.append(Trainer(server, log))
        return started[-1]

    try:
        yield start
    finally:
        if started and not started[-1].ended:  # a test that failed while it waited
            started[-1].signal(signal.SIGKILL)
        stdin.close()
        server.wait()


class Job:
    """torchrun with two ranks on a command; by default, the stage `sft` of a run."""

    def __init__(self, run: Path, *options: str, command: Sequence[str] = ()) -> None:
        self.folder, self._log = run / "stages" / "sft", run.with_suffix(".log")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        launch += ["--shutdown-timeout", "10", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", *options]
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                [*launch, *(command or ["-m", "unirg.stages", str(run), "sft"])],
                cwd=run.parent,
                # Without it torchrun's second start finds the addresses of the first, and hangs.
                env=environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
                stdout=log,
                stderr=log,
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    def steps(self) -> int:
        return len(run_folder.read_metrics(self.folder))

    def rank(self, number: int) -> int:
        """The process of a rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for child in map(int, children):
            if f"RANK={number}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return child
        raise AssertionError(f"no rank {number}: {self.said}")


@contextmanager
def job(run: Path, *options: str, command: Sequence[str] = ()) -> Iterator[Job]:
    started = Job(run, *options, command=command)
    try:
        yield started
    finally:
        if started.process.poll() is None:  # a test that failed
            started.process.kill()
