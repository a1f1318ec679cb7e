"""What the tests of real vLLM share: a tiny policy whose reports end at different lengths, and a server."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.conftest import REPORTS
from unirg.grpo.forward import answer_logps
from unirg.policy import EncodedPrompt, LoraConfig, Policy, PolicyConfig, load_policy
from unirg.prompt import PromptConfig
from unirg.rollout import Sample, Sampler
from unirg.rollout.hf import HFSampler
from unirg.tiny import TinyConfig

# Heads of the language model, and of the vision tower, that two processes can share.
TINY = TinyConfig(
    vocabulary=400, hidden=128, heads=4, layers=2, mlp=96, vision_hidden=64, vision_layers=2, image_size=64
)
TOKENS = 24
SEEDS = [[100 * i + g for g in range(8)] for i in range(4)]
"""Of eight samples for each of the four studies."""


def lively_policy(lora: LoraConfig | None = None) -> Policy:
    """A tiny policy with larger weights than a fresh one: reports of its own, some of which end, and which would hold
    image tokens if they might."""
    config = PolicyConfig(tiny=TINY, max_prompt_tokens=100, lora=lora)
    policy = load_policy(config, PromptConfig(style="short"), texts=REPORTS * 20, seed=0)
    with torch.no_grad():
        embedding = policy.base.get_input_embeddings().weight
        for name, parameter in policy.base.named_parameters():
            if parameter.dim() >= 2 and parameter is not embedding and "lora" not in name:
                parameter.mul_(8.0)
        embedding.mul_(3.0)
        embedding[policy.eos_id] *= 1.5
        embedding[list(policy.banned_ids)] *= 4.0
    return policy


def shake(policy: Policy, seed: int) -> None:
    """Other weights, those of the vision tower too, as after a large optimiser step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                size = 0.3 * parameter.std() if parameter.numel() > 1 and parameter.std() > 0 else 0.05
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def greedy(sampler: Sampler, prompts: list[EncodedPrompt]) -> list[Sample]:
    seeds = [[0]] * len(prompts)
    return [group[0] for group in sampler.sample(prompts, seeds, temperature=0.0, max_new_tokens=TOKENS)]


def same_greedy_reports(sampler: Sampler, policy: Policy, prompts: list[EncodedPrompt]) -> list[Sample]:
    """Asserts that the engine writes what the Hugging Face engine writes, with the same log-probs; returns it."""
    ours, theirs = greedy(sampler, prompts), greedy(HFSampler(policy), prompts)
    assert [sample.text for sample in ours] == [sample.text for sample in theirs]
    assert [sample.ids for sample in ours] == [sample.ids for sample in theirs]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.tensor(a.logps), torch.tensor(b.logps), rtol=0, atol=1e-5)
    return ours


@torch.no_grad()
def largest_gap(policy: Policy, prompts: list[EncodedPrompt], groups: list[list[Sample]], temperature: float) -> float:
    """The largest difference between the log-probs of samples and the trainer's on the same tokens, in nats."""
    answers = [[sample.ids for sample in group] for group in groups]
    scores = answer_logps(policy, prompts, answers, temperature=temperature)
    rows = [sample.logps for group in groups for sample in group]
    return max(
        float((logps_T[: len(row)] - torch.tensor(row)).abs().max())
        for logps_T, row in zip(scores.logps_BT, rows, strict=True)
    )


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class VllmServer:
    """`unirg rollout-server` with its children, on one port through all its lives."""

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        self.model, self.log, self.port, self.options = model, log, free_port(), options
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and returns at once."""
        options = ["--port", str(self.port), "--max-model-len", str(100 + TOKENS), "--max-num-seqs", "64"]
        command = [sys.executable, "-m", "unirg", "rollout-server", str(self.model), *options, *self.options]
        with self.log.open("ab") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)

    def wait(self) -> None:
        """Until it is up."""
        assert self.process is not None
        for _ in range(600):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"the server is not up: {self.log.read_text()[-3000:]}")

    def signal(self, number: int) -> None:
        """To the server and its children."""
        if self.process is not None:
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """As the kernel does where memory runs out."""
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextmanager
def vllm_servers(policy: Policy, folder: Path, *options: Sequence[str]) -> Iterator[list[VllmServer]]:
    """As many servers for the policy's architecture as there are lists of options, up until the block ends. Their own
    weights are others."""
    other = load_policy(policy.config, policy.prompt, texts=REPORTS * 20, seed=99)
    other.save(folder / "model")
    servers = [VllmServer(folder / "model", folder / f"server-{i}.log", *own) for i, own in enumerate(options)]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.kill()
