"""Rollouts: the Hugging Face engine beside a colocated vLLM, and the ways of weights to another process.

    make .venv-vllm/.installed
    .venv-vllm/bin/python benchmarks/rollouts.py [sampling|weights]

`sampling`: 16 studies x 8 reports, G = 8, on drawn films, as a GRPO step asks for them. The policy is random and is
kept from ending a report, so that both engines write the same number of tokens; both sample the plain softmax. The
engines take turns; figures are medians of wall time on one thread of the machine, and ratios medians of each turn's,
which neighbours on the machine move less.

`weights`: tensors like a model's from one process to another on this machine: the stream of unirg.rollout.weights, a
safetensors file in /dev/shm, and gloo's broadcast, from tensor to tensor, without vLLM's own loading.
"""

import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
torch.set_num_threads(1)

STUDIES, GROUP, TOKENS, ROUNDS = 16, 8, 64, 3
POLICIES = {
    "the demo's (1.4 M parameters)": {},
    "wider and deeper (27 M)": {"hidden": 512, "layers": 8, "heads": 8, "mlp": 1536},
}
SIZES_MB = (10, 100, 1000)


def sampling() -> Iterator[dict[str, Any]]:
    """Tokens per second of both engines, and the seconds of a colocated engine's weights."""
    from unirg.data import load_studies
    from unirg.data.phantom import PhantomData
    from unirg.policy import PolicyConfig, load_policy
    from unirg.prompt import PromptConfig, report_text
    from unirg.rollout import SamplingConfig
    from unirg.rollout.hf import HFSampler
    from unirg.rollout.sampler import VllmConfig
    from unirg.rollout.vllm_colocate import ColocatedSampler
    from unirg.tiny import TinyConfig

    studies = load_studies(PhantomData(adapter="phantom", train=STUDIES, dev=0, test=0, unseen=0), "train")
    seeds = [[100 * i + g for g in range(GROUP)] for i in range(STUDIES)]
    for name, sizes in POLICIES.items():
        config = PolicyConfig(tiny=TinyConfig(**sizes), max_prompt_tokens=256)
        policy = load_policy(config, PromptConfig(style="short"), texts=map(report_text, studies))
        policy.stop_ids, policy.banned_ids = (), (*policy.banned_ids, *policy.stop_ids)
        prompts = [policy.encode(study) for study in studies]
        vllm = ColocatedSampler(policy, VllmConfig(sleep=False), SamplingConfig(max_new_tokens=TOKENS), images=1)
        seconds: dict[str, list[float]] = {"hf": [], "vllm": [], "weights": []}
        for _ in range(ROUNDS + 1):
            seconds["weights"].append(timed(vllm.sync_weights))
            for engine, sampler in (("hf", HFSampler(policy)), ("vllm", vllm)):
                began = time.perf_counter()
                groups = sampler.sample(prompts, seeds, temperature=1.0, max_new_tokens=TOKENS)
                seconds[engine].append(time.perf_counter() - began)
                assert all(len(sample.ids) == TOKENS for group in groups for sample in group)
        vllm.close()
        middle = {what: statistics.median(values[1:]) for what, values in seconds.items()}
        tokens = STUDIES * GROUP * TOKENS
        parameters = sum(parameter.numel() for parameter in policy.model.parameters())
        row = {"policy": name, "parameters": parameters, "prompt": len(prompts[0]), **middle}
        row |= {f"{engine}_tokens_per_second": tokens / middle[engine] for engine in ("hf", "vllm")}
        yield row | {"hf/vllm": ratio(seconds["hf"], seconds["vllm"])}


def ratio(some: list[float], others: list[float]) -> float:
    """The median over turns, the first left out."""
    return statistics.median(a / b for a, b in zip(some[1:], others[1:], strict=True))


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def layers(megabytes: int) -> dict[str, torch.Tensor]:
    """Tensors of that size in all, in bfloat16, 24 of them."""
    return {f"layer.{i}.weight": torch.zeros(megabytes * 500_000 // 24 // 64, 64).bfloat16() for i in range(24)}


def receiver(orders: Any, answers: Any) -> None:
    """The other process: takes weights in the way that it is told, and says when it has them all."""
    from unirg.rollout.weights import receive_weights

    torch.set_num_threads(1)
    for way, what in iter(orders.get, None):
        if way == "stream":
            names = [name for name, _ in receive_weights(*what)]
        elif way == "file":
            names = [name for name, tensor in load_file(what).items() if tensor.clone() is not None]
        else:
            port, shapes = what
            dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=1, world_size=2)
            answers.put("ready")
            names = []
            for name, shape in shapes:
                dist.broadcast(torch.empty(shape, dtype=torch.bfloat16), 0)
                names.append(name)
            dist.destroy_process_group()
        answers.put(len(names))


def weights() -> Iterator[dict[str, Any]]:
    """Seconds from the first tensor to the other process's word that it has the last."""
    from unirg.rollout.weights import WeightStream

    context = multiprocessing.get_context("spawn")
    orders, answers = context.Queue(), context.Queue()
    other = context.Process(target=receiver, args=(orders, answers))
    other.start()

    def stream(tensors: dict[str, torch.Tensor]) -> None:
        sender = WeightStream("127.0.0.1", 9, 1, 60)
        orders.put(("stream", (*sender.address, sender.token, 60)))
        sender.accept(lambda: False)
        for name, tensor in tensors.items():
            sender.write(name, tensor)
        sender.end()
        answers.get()
        sender.close()

    def file(tensors: dict[str, torch.Tensor]) -> None:
        path = Path("/dev/shm") / f"unirg-{os.getpid()}.safetensors"
        save_file(tensors, path)
        orders.put(("file", str(path)))
        answers.get()
        path.unlink()

    def gloo(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            dist.broadcast(tensor, 0)
        answers.get()

    for megabytes in SIZES_MB:
        tensors = layers(megabytes)
        seconds: dict[str, list[float]] = {"stream": [], "file": [], "gloo": []}
        for _ in range(ROUNDS + 1):
            seconds["stream"].append(timed(lambda: stream(tensors)))  # noqa: B023
            seconds["file"].append(timed(lambda: file(tensors)))  # noqa: B023
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            orders.put(("gloo", (port, [(name, tuple(tensor.shape)) for name, tensor in tensors.items()])))
            dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=2)
            answers.get()  # the group stands: what follows is the transfer alone
            seconds["gloo"].append(timed(lambda: gloo(tensors)))  # noqa: B023
            dist.destroy_process_group()
        row = {"megabytes": megabytes} | {way: statistics.median(times[1:]) for way, times in seconds.items()}
        yield row | {f"{way}/stream": ratio(seconds[way], seconds["stream"]) for way in ("file", "gloo")}
    orders.put(None)
    other.join()


if __name__ == "__main__":
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {"sampling": sampling, "weights": weights}
    asked = sys.argv[1:] or list(parts)
    if not set(asked) <= set(parts):
        sys.exit(__doc__)
    for part in asked:
        for row in parts[part]():
            rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
            print(json.dumps(rounded), flush=True)
