"""Weights on their way to vLLM servers, against servers that fail as a script says: cut, slow, standing still, fed by
several ranks, stopped by a signal."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rollout_server import RPC, first_token, sample, sampler_of, serve, text_policy
from tests.runs import on_two_ranks
from unirg import signals
from unirg.policy import Policy
from unirg.rollout import vllm_server, weights
from unirg.rollout.weights import WeightStream, receive_weights
from unirg.study import Study


@pytest.fixture
def policy() -> Policy:
    return text_policy()


@pytest.mark.parametrize(
    "dropped, pushes", [((RPC, 1), 1), (("/reset_prefix_cache", 0), 2), (("/reset_encoder_cache", 0), 2), ((RPC, 2), 2)]
)
def test_a_push_that_breaks_off_is_made_again(
    policy: Policy,
    studies: list[Study],
    dropped: tuple[str, int],
    pushes: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wherever the server drops it, also after the last tensor: until it has forgotten what it computed with other
    weights, its own are not those that were sent. That is told, and the samples wait for the second."""
    with serve(policy, script=lambda path, number: "drop" if (path, number) == dropped else None) as server:
        sampler = sampler_of(policy, server)
        sampler.sync_weights()
        assert sampler.away[server.url].startswith("weights: ") and server.version is None
        assert f"goes on without {server.url} (weights: " in " ".join(capsys.readouterr().out.split())
        groups = sample(sampler, studies)
        assert [group[0].ids[0] for group in groups] == [first_token(policy, study) for study in studies]
        assert server.pushes == pushes


def test_a_push_may_take_longer_than_an_answer(
    policy: Policy, studies: list[Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time follows from the model's size; what counts is that it goes on."""

    def gathered_slowly(*args: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for weight in weights.named_weights(*args):
            time.sleep(0.12)
            yield weight

    monkeypatch.setattr(vllm_server, "named_weights", gathered_slowly)
    with serve(policy) as server:
        sampler = sampler_of(policy, server, timeout=2.0)
        sampler.sync_weights()
        assert len(server.loaded) * 0.12 > 2.0 and sampler.away == {} and server.pushes == 1
        groups = sample(sampler, studies)
        assert [group[0].ids[0] for group in groups] == [first_token(policy, study) for study in studies]


def test_a_push_that_a_server_does_not_take_ends(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other servers have all of theirs, though they were kept waiting for so long."""
    monkeypatch.setattr(vllm_server, "PROBE", 0.5)
    with (
        serve(policy, script=lambda path, number: "hang" if (path, number) == (RPC, 1) else None) as hung,
        serve(policy) as well,
    ):
        sampler = sampler_of(policy, hung, well, timeout=0.5)
        sampler.sync_weights()
        assert sampler.away == {hung.url: "weights: 0 of 1 workers connected to 127.0.0.1 for weights"}
        assert well.version == sampler.version
        assert sampler.servers[0].open == sampler.servers[1].open == set()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_share_the_servers_of_a_push(policy: Policy, tmp_path: Path, strategy: str) -> None:
    """The first of two ranks feeds two of three servers, the second one, which breaks off the first time."""
    breaks: dict[str, Any] = {"script": lambda path, number: "drop" if (path, number) == (RPC, 1) else None}
    with serve(policy) as one, serve(policy) as two, serve(policy, **breaks) as three:
        on_two_ranks(tmp_path, PUSHES, strategy, one.url, two.url, three.url)
        assert [server.pushes for server in (one, two, three)] == [2, 2, 1]
        assert one.version == two.version == three.version is not None
        for server in (one, two, three):
            assert all(torch.equal(server.loaded[name], value) for name, value in policy.model.named_parameters())


PUSHES = """
import sys
import torch
from accelerate import Accelerator
from tests.rollout_server import text_policy
from unirg import ranks
from unirg.distributed import distribute
from unirg.rollout import SamplingConfig, vllm_server
from unirg.rollout.sampler import VllmConfig
from unirg.rollout.weights import WeightStream

accelerator = Accelerator(cpu=True)
policy = text_policy()
distribute(policy.model, sys.argv[1], accelerator)
fed = []

class Told(WeightStream):
    def __init__(self, host, port, *more):
        fed.append(f"http://{host}:{port}")
        super().__init__(host, port, *more)

vllm_server.WeightStream = Told
servers = sys.argv[2:]
sampler = vllm_server.ServerSampler(policy, VllmConfig(mode="server", servers=servers), SamplingConfig())
mine = (servers[:2], servers[2:])[ranks.rank()]
for away in ([servers[2]], []):
    fed.clear()
    sampler.sync_weights()
    assert sorted(fed) == sorted(mine), fed
    assert list(sampler.away) == away, sampler.away
print("the same", flush=True)
"""


@pytest.mark.parametrize("reads", [False, True])
def test_a_stop_does_not_wait_for_a_server_that_stands_still_in_a_push(policy: Policy, reads: bool) -> None:
    """Before it connects for weights, and where it has connected and reads none."""
    asked, over, waited = threading.Event(), threading.Event(), threading.Event()

    def script(path: str, number: int) -> str | None:
        if (path, number) != (RPC, 1):
            return None
        with socket.create_connection(server.bodies[-1]["args"][:2]) if reads else nullcontext() as connection:
            if connection is not None:
                connection.sendall(server.bodies[-1]["args"][2].encode())
            asked.set()
            over.wait(20)
            waited.set()
        return "drop"

    with torch.no_grad():  # more than sockets hold
        policy.base.get_output_embeddings().weight = torch.nn.Parameter(torch.zeros(310, 32 * 1024))
    with serve(policy, script=script) as server, signals.handled():
        sampler = sampler_of(policy, server, timeout=300.0)
        stop = threading.Thread(target=lambda: (asked.wait(30), time.sleep(0.5), os.kill(os.getpid(), signal.SIGTERM)))
        stop.start()
        with pytest.raises(signals.Stopped):
            sampler.sync_weights()
        assert not waited.is_set()
        over.set()
        stop.join()


def test_a_stream_of_weights_wants_its_token_and_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever else connects, scanning ports for example, and says nothing or something else, is not waited for."""
    monkeypatch.setattr(weights, "HANDSHAKE", 0.3)
    tensors = {"a.b": torch.randn(3, 5), "c": torch.randn(7).bfloat16(), "d": torch.zeros(()), "e": torch.ones(0, 2)}
    stream = WeightStream("127.0.0.1", 9, workers=1, timeout=20)
    got: list[tuple[str, torch.Tensor]] = []

    def worker(token: str) -> None:
        try:
            got.extend(receive_weights(*stream.address, token, 20))
        except OSError as error:
            got.append((type(error).__name__, torch.empty(0)))

    silent = socket.create_connection(stream.address)
    socket.create_connection(stream.address).close()
    impostor = threading.Thread(target=worker, args=("0" * len(stream.token),))
    impostor.start()
    time.sleep(0.1)
    honest = threading.Thread(target=worker, args=(stream.token,))
    honest.start()
    stream.accept(lambda: False)
    silent.close()
    impostor.join()
    assert [name for name, _ in got] in (["ConnectionError"], ["ConnectionResetError"])
    got.clear()
    for name, tensor in tensors.items():
        stream.write(name, tensor)
    stream.end()
    honest.join()
    stream.close()
    assert [name for name, _ in got] == list(tensors)
    assert all(torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype for name, tensor in got)


def test_a_torn_stream_of_weights_is_an_error() -> None:
    stream = WeightStream("127.0.0.1", 9, workers=1, timeout=20)
    failed: list[BaseException] = []

    def worker() -> None:
        try:
            list(receive_weights(*stream.address, stream.token, 20))
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=worker)
    thread.start()
    stream.accept(lambda: False)
    stream.write("a", torch.randn(10))
    stream.close()
    thread.join()
    assert "before its end" in str(failed[0])
