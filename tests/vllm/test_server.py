"""vLLM servers on a CPU: what they write, whose weights they have, and what happens when they are killed or hang."""

import base64
import io
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="`make test-vllm` runs these where vLLM is installed")

from tests.conftest import REPORTS
from tests.conftest import TINY as SMALL
from tests.vllm.engines import (
    SEEDS,
    TOKENS,
    VllmServer,
    largest_gap,
    lively_policy,
    same_greedy_reports,
    shake,
    vllm_servers,
)
from unirg.errors import UserError
from unirg.policy import EncodedPrompt, LoraConfig, Policy, load_policy
from unirg.rollout import Sample, SamplingConfig, vllm_server
from unirg.rollout.sampler import VllmConfig
from unirg.rollout.vllm_inputs import check_prompt
from unirg.rollout.vllm_server import ServerSampler
from unirg.rollout.weights import WeightStream
from unirg.study import Study


@pytest.fixture(scope="module")
def servers(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[VllmServer]]:
    """One in one process, and one that is split over two."""
    with vllm_servers(policy, tmp_path_factory.mktemp("server"), (), ("--tensor-parallel-size", "2")) as servers:
        yield servers


@pytest.fixture(scope="module")
def server(servers: list[VllmServer]) -> VllmServer:
    return servers[0]


def sampler_of(policy: Policy, *servers: VllmServer, **settings: float) -> ServerSampler:
    settings = {"timeout": 120.0, "wait": 300.0} | settings
    config = VllmConfig(mode="server", servers=[server.url for server in servers], **settings)
    return ServerSampler(policy, config, SamplingConfig(max_new_tokens=TOKENS))


@pytest.fixture(scope="module")
def sampler(policy: Policy, server: VllmServer) -> ServerSampler:
    return sampler_of(policy, server)


def test_greedy_reports_are_the_hugging_face_engines(
    sampler: ServerSampler, policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    """With the policy's weights, which the server was not started with, and again with others, the tower's too."""
    before = same_greedy_reports(sampler, policy, prompts)
    shake(policy, 1)
    sampler.sync_weights()
    after = same_greedy_reports(sampler, policy, prompts)
    assert len({sample.ids for sample in before}) > 1
    assert [sample.ids for sample in before] != [sample.ids for sample in after]


def test_log_probs_of_samples_are_the_trainers(
    sampler: ServerSampler, policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    told: list[tuple[int, int]] = []
    groups = sampler.sample(
        prompts, SEEDS, temperature=0.7, max_new_tokens=TOKENS, finished=lambda i, g, sample: told.append((i, g))
    )
    assert sorted(told) == [(i, g) for i in range(4) for g in range(8)]
    assert largest_gap(policy, prompts, groups, 0.7) < 1e-5
    samples = [sample for group in groups for sample in group]
    assert not any(token in policy.banned_ids for sample in samples for token in sample.ids)
    assert any(sample.truncated for sample in samples) and not all(sample.truncated for sample in samples)
    again = sampler.sample(prompts, SEEDS, temperature=0.7, max_new_tokens=TOKENS)
    assert [[s.ids for s in group] for group in again] == [[s.ids for s in group] for group in groups]


def test_two_servers_one_of_them_split_over_two_processes(
    policy: Policy, prompts: list[EncodedPrompt], servers: list[VllmServer]
) -> None:
    """Each process takes its part of every weight from one push; both servers write what the trainer would."""
    both = sampler_of(policy, *servers)
    for seed in (7, 8):
        shake(policy, seed)
        both.sync_weights()
        assert both.away == {}
        versions = [
            [worker["version"] for worker in server.workers("unirg_describe", timeout=60)] for server in both.servers
        ]
        assert versions == [[both.version], [both.version, both.version]]
        for left_out in servers:
            both.away = {left_out.url: "left out"}
            same_greedy_reports(both, policy, prompts)
            groups = both.sample(prompts, SEEDS, temperature=0.7, max_new_tokens=TOKENS)
            assert largest_gap(policy, prompts, groups, 0.7) < 1e-5


@pytest.mark.parametrize("cut", [[0], [1], [0, 1]])
def test_a_push_that_is_cut_on_its_way_to_some_processes_is_made_again(
    policy: Policy,
    prompts: list[EncodedPrompt],
    servers: list[VllmServer],
    cut: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And none of them answers a later question with what it has to say of this one."""
    sampler, write, written = sampler_of(policy, servers[1]), WeightStream.write, []

    def write_then_cut(stream: WeightStream, name: str, tensor: torch.Tensor) -> None:
        written.append(name)
        if len(written) == 10:
            for i in cut:
                stream.connections[i].close()
        write(stream, name, tensor)

    monkeypatch.setattr(WeightStream, "write", write_then_cut)
    sampler.sync_weights()
    assert sampler.away == {servers[1].url: "weights: the other end closed the stream of weights before its end"}
    same_greedy_reports(sampler, policy, prompts)
    assert [worker["version"] for worker in sampler.servers[0].workers("unirg_describe", timeout=60)] == [
        sampler.version
    ] * 2


def test_weights_of_another_size_are_refused(policy: Policy, prompts: list[EncodedPrompt], server: VllmServer) -> None:
    """At once, with what does not fit; the server takes its own again."""
    small = load_policy(policy.config.model_copy(update={"tiny": SMALL}), policy.prompt, texts=REPORTS * 20, seed=0)
    with pytest.raises(UserError, match=f"{server.url} does not take the policy's weights .*start it with the model"):
        sampler_of(small, server).sync_weights()
    same_greedy_reports(sampler_of(policy, server), policy, prompts)


def test_expanded_image_tokens_are_expanded_twice_where_films_are_sent_as_files_and_that_is_caught(
    sampler: ServerSampler, policy: Policy, prompts: list[EncodedPrompt], studies: list[Study]
) -> None:
    """Why pixels are sent with their places: the server's own processor expands what it is given."""
    sampler.sync_weights()
    png = io.BytesIO()
    studies[0].images[0].load().save(png, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    body = sampler.inputs.request(prompts[0]) | {"sampling_params": {"max_tokens": 1}}
    body |= {"features": None, "content_parts": [{"type": "image_url", "url": url}]}
    answer = sampler.servers[0].post("/inference/v1/generate", body, 60)
    with pytest.raises(UserError, match=r"study s0: here read \d+ token ids .* twice"):
        check_prompt(prompts[0], answer["prompt_token_ids"], "here")


def test_another_runs_weights_are_noticed_and_replaced(
    sampler: ServerSampler, policy: Policy, prompts: list[EncodedPrompt], server: VllmServer
) -> None:
    """The other run's has adapters."""
    sampler.sync_weights()
    other = lively_policy(LoraConfig(rank=4))
    shake(other, 3)
    same_greedy_reports(sampler_of(other, server), other, prompts)
    same_greedy_reports(sampler, policy, prompts)


def test_a_server_of_another_vllm_is_refused(
    policy: Policy, server: VllmServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As seen from a trainer whose vLLM is newer: films go over as that writes them."""
    monkeypatch.setattr(vllm_server, "vllm_version", lambda: "99.0")
    with pytest.raises(UserError, match=rf"{server.url}: its vllm is \d\S+, and the run needs 99.0"):
        sampler_of(policy, server).sync_weights()


def test_a_server_that_is_too_small_is_refused(policy: Policy, server: VllmServer) -> None:
    config = VllmConfig(mode="server", servers=[server.url])
    with pytest.raises(UserError, match="start it with --max-model-len 500"):
        ServerSampler(policy, config, SamplingConfig(max_new_tokens=400)).sync_weights()


def test_a_server_that_hangs_is_named(
    sampler: ServerSampler, policy: Policy, prompts: list[EncodedPrompt], server: VllmServer
) -> None:
    """And when it goes on, so does sampling."""
    impatient = sampler_of(policy, server, timeout=3.0, wait=1.0)
    impatient.sync_weights()
    server.signal(signal.SIGSTOP)
    try:
        with pytest.raises(UserError, match=rf"rank 0 waited \d+ s for {server.url} \(no answer in 3 s\): study s0"):
            impatient.sample(prompts, SEEDS, temperature=1.0, max_new_tokens=TOKENS)
    finally:
        server.signal(signal.SIGCONT)
    same_greedy_reports(sampler, policy, prompts)


def test_a_killed_server_that_comes_back_gets_the_weights_before_it_samples(
    sampler: ServerSampler, policy: Policy, prompts: list[EncodedPrompt], server: VllmServer, tmp_path: Path
) -> None:
    """kill -9 in the middle of a batch, and another start on the same port, with the weights of its folder."""
    shake(policy, 4)
    sampler.sync_weights()
    killed: list[int] = []

    def finished(i: int, g: int, sample: Sample) -> None:
        if not killed:
            killed.append(i)
            server.kill()
            threading.Thread(target=server.start).start()

    groups = sampler.sample(
        prompts * 40, [[k] for k in range(160)], temperature=1.0, max_new_tokens=TOKENS, finished=finished
    )
    assert killed and len(groups) == 160
    assert largest_gap(policy, prompts * 40, groups, 1.0) < 1e-5
    same_greedy_reports(sampler, policy, prompts)
