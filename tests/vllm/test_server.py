"""vLLM servers on a CPU: what they write, whose weights they have, and what happens when they are killed or hang."""

import base64
import io
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="`make test-vllm` runs these where vLLM is installed")

from tests.vllm.engines import (
    SEEDS,
    TOKENS,
    VllmServer,
    largest_gap,
    lively_policy,
    same_greedy_reports,
    shake,
    vllm_server,
)
from unirg.errors import UserError
from unirg.policy import EncodedPrompt, LoraConfig, Policy
from unirg.rollout import Sample, SamplingConfig
from unirg.rollout.sampler import VllmConfig
from unirg.rollout.vllm_inputs import check_prompt
from unirg.rollout.vllm_server import ServerSampler
from unirg.study import Study


@pytest.fixture(scope="module")
def server(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    with vllm_server(policy, tmp_path_factory.mktemp("server")) as server:
        yield server


def sampler_of(policy: Policy, server: VllmServer, **settings: float) -> ServerSampler:
    config = VllmConfig(mode="server", servers=[server.url], **{"timeout": 120.0, "wait": 300.0} | settings)
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
