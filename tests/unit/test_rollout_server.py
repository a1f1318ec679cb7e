"""The sampler's end of vLLM servers, against a server that fails as a script says: what is asked, of whom, how often,
and what is said when nobody answers. tests/vllm asks vLLM itself."""

import os
import signal
import socket
import threading
import time
from typing import Any

import pytest
import torch

from tests.rollout_server import GENERATE, first_token, sample, sampler_of, serve, text_policy
from unirg import signals
from unirg.errors import UserError
from unirg.policy import Policy, load_policy
from unirg.rollout import SamplingConfig, vllm_client, vllm_server
from unirg.rollout.sampler import VllmConfig
from unirg.rollout.vllm_inputs import NEVER
from unirg.rollout.vllm_server import ServerSampler
from unirg.study import Study


@pytest.fixture
def policy() -> Policy:
    return text_policy()


def test_one_request_a_study_asks_for_the_plain_softmax(policy: Policy, studies: list[Study]) -> None:
    with serve(policy) as server:
        told: list[tuple[int, int]] = []
        sampler = sampler_of(policy, server)
        groups = sample(sampler, studies, finished=lambda i, g, sample: told.append((i, g)))
    assert server.paths.count(GENERATE) == len(studies) and [len(group) for group in groups] == [3] * len(studies)
    assert sorted(told) == [(i, g) for i in range(len(studies)) for g in range(3)]
    asked = [body["sampling_params"] for body in server.bodies if "sampling_params" in body]
    assert len({request["seed"] for request in asked}) == len(studies)
    for request in asked:
        assert (request["n"], request["temperature"], request["max_tokens"]) == (3, 0.7, 4)
        assert (request["top_p"], request["top_k"], request["min_p"], request["repetition_penalty"]) == (1, 0, 0, 1)
        assert request["stop_token_ids"] == list(policy.stop_ids) and request["ignore_eos"]
        assert request["logit_bias"] == {str(token): NEVER for token in policy.banned_ids} and policy.banned_ids
    assert groups[0][0].logps == (-1.0, -1.0) and groups[0][0].truncated


def test_greedy_asks_once_for_a_group_of_equals(policy: Policy, studies: list[Study]) -> None:
    with serve(policy) as server:
        groups = sample(sampler_of(policy, server), studies[:1], temperature=0.0)
    assert [body["sampling_params"]["n"] for body in server.bodies if "sampling_params" in body] == [1]
    assert len(groups[0]) == 3 and len(set(groups[0])) == 1


def test_samples_follow_the_weights_of_every_push(policy: Policy, studies: list[Study]) -> None:
    with serve(policy) as one, serve(policy) as two:
        sampler = sampler_of(policy, one, two)
        seen = []
        for _ in range(3):
            with torch.no_grad():
                for parameter in policy.model.parameters():
                    parameter.copy_(torch.randn_like(parameter))
            sampler.sync_weights()
            groups = sample(sampler, studies)
            seen.append([first_token(policy, study) for study in studies])
            assert [group[0].ids[0] for group in groups] == seen[-1]
        assert one.pushes == two.pushes == 3 and one.version == two.version
        assert one.paths.count(GENERATE) == two.paths.count(GENERATE) == 3 * len(studies) // 2  # both are used
        # What was computed with the weights before is forgotten after each.
        assert one.paths.count("/reset_prefix_cache") == one.paths.count("/reset_encoder_cache") == 3
        assert all(torch.equal(one.loaded[name], value) for name, value in policy.model.named_parameters())
    assert seen[0] != seen[1] != seen[2]


@pytest.mark.parametrize("wrong", [500, "drop", "abort", "restart"])
def test_a_server_that_fails_once_gets_the_rest_done(policy: Policy, studies: list[Study], wrong: str | int) -> None:
    """A restarted one has other weights, whatever it answers: it gets them again first. What it cut short is not taken
    for a report."""
    with serve(policy, script=lambda path, number: wrong if (path, number) == (GENERATE, 1) else None) as server:
        groups = sample(sampler_of(policy, server), studies)
        assert [group[0].ids[0] for group in groups] == [first_token(policy, study) for study in studies]
        assert {len(report.ids) for group in groups for report in group} == {2}
        assert server.pushes == (2 if wrong == "restart" else 1)


def test_weights_that_came_from_another_run_are_noticed(policy: Policy, studies: list[Study]) -> None:
    other = load_policy(policy.config, policy.prompt, texts=["a b"], seed=1)
    with serve(policy) as server:
        mine, theirs = sampler_of(policy, server), sampler_of(other, server)
        mine.sync_weights()
        theirs.sync_weights()
        groups = sample(mine, studies)
        assert [group[0].ids[0] for group in groups] == [first_token(policy, study) for study in studies]
        assert server.pushes == 3


def test_the_other_server_takes_over_from_one_that_hangs(policy: Policy, studies: list[Study]) -> None:
    def script(path: str, number: int) -> str | None:
        return "hang" if path == GENERATE else None

    with serve(policy, script=script) as hung, serve(policy) as well:
        sampler = sampler_of(policy, hung, well, timeout=2.0)
        groups = sample(sampler, studies)
        assert [group[0].ids[0] for group in groups] == [first_token(policy, study) for study in studies]
        assert sampler.away == {hung.url: "no answer in 2 s"}
        again = hung.paths.count(GENERATE)
        sample(sampler, studies)
        assert hung.paths.count(GENERATE) == again  # not asked a second time
        assert sampler.servers[0].open == sampler.servers[1].open == set()


@pytest.mark.parametrize(
    "wrong, why", [("hang", "no answer in 0.5 s"), ("drop", "Remote end closed"), (503, "answered 503")]
)
def test_servers_that_stay_away_are_named_with_who_waits(
    policy: Policy, studies: list[Study], wrong: str | int, why: str
) -> None:
    with serve(policy, script=lambda path, number: wrong if path == GENERATE else None) as server:
        sampler = sampler_of(policy, server, timeout=0.5, wait=1.0)
        with pytest.raises(UserError, match=rf"rank 0 waited \d+ s for {server.url} \({why}.*\): study s0, s1, s2 and"):
            sample(sampler, studies)
        assert 2 <= server.paths.count(GENERATE) <= 4 * len(studies)  # again, and not for ever


def test_a_server_that_is_not_there_is_waited_for(
    policy: Policy, studies: list[Study], capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(policy) as server:
        pass
    sampler = sampler_of(policy, server, wait=0.5)
    sampler.sync_weights()  # says nothing yet: it may come
    with pytest.raises(UserError, match=r"rank 0 waited \d+ s for .*refused.*: study s0"):
        sample(sampler, studies[:1])
    assert "asking again" in capsys.readouterr().out


@pytest.mark.parametrize(
    "what, error",
    [
        ({"dtype": "bfloat16"}, "its dtype is bfloat16, and the run needs float32"),
        ({"architecture": "LlamaForCausalLM"}, "its architecture is LlamaForCausalLM"),
        ({"logprobs_mode": "raw_logprobs"}, "its logprobs_mode is raw_logprobs"),
        ({"max_model_len": 100}, "start it with --max-model-len 4096"),  # its model's own, less than the recipe allows
    ],
)
def test_a_server_of_another_kind_is_refused(policy: Policy, what: dict[str, Any], error: str) -> None:
    with serve(policy, describes=what) as server, pytest.raises(UserError, match=error):
        sampler_of(policy, server).sync_weights()
    assert server.pushes == 0


@pytest.mark.parametrize("status, error", [(404, "start it by `unirg rollout-server`"), (400, "answered 400")])
def test_a_refused_request_names_the_study_and_is_not_repeated(
    policy: Policy, studies: list[Study], status: int, error: str
) -> None:
    with serve(policy, script=lambda path, number: status if path == GENERATE else None) as server:
        with pytest.raises(UserError, match=error) as raised:
            sample(sampler_of(policy, server), studies[:1])
        assert server.paths.count(GENERATE) == 1 and "study s0" in str(raised.value)


def test_a_prompt_that_leaves_no_room_for_a_report_is_named(policy: Policy, studies: list[Study]) -> None:
    """vLLM would cut the report short, and it would pass for one that is truncated."""
    with serve(policy) as server:
        sampler = sampler_of(policy, server)
        sampler.tokens = len(policy.encode(studies[0])) + 3
        with pytest.raises(UserError, match=r"study s0: its prompt has \d+ tokens, which leaves less than the 4 of a"):
            sample(sampler, studies[:1])
        assert server.paths.count(GENERATE) == 0


def test_an_error_does_not_wait_for_what_hangs(policy: Policy, studies: list[Study]) -> None:
    """Its threads end with it, and ask no other server: they would keep the process from ending, a signal's grace
    period long."""
    studies, told = studies * 4, threading.Event()

    def refuse(path: str, number: int) -> str | int | None:
        if path != GENERATE:
            return None
        if number:
            return "hang"
        told.wait(10)
        return 400

    def hang(path: str, number: int) -> str | None:
        return "hang" if path == GENERATE else None

    before = set(threading.enumerate())
    with serve(policy, script=refuse) as one, serve(policy, script=hang) as two, serve(policy, script=hang) as three:
        sampler = sampler_of(policy, one, two, three, timeout=300.0)
        threading.Timer(0.5, told.set).start()
        with pytest.raises(UserError, match="answered 400"):
            sample(sampler, studies)
        for thread in set(threading.enumerate()) - before:
            if thread.name.startswith("ThreadPool"):
                thread.join(10)
                assert not thread.is_alive()


def test_a_host_that_does_not_answer_is_given_up_soon(
    policy: Policy, studies: list[Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To connect takes no computing: it has not the time of an answer."""
    monkeypatch.setattr(vllm_client, "PROBE", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        waiting = [socket.socket() for _ in range(3)]
        for other in waiting:
            other.setblocking(False)
            other.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        config = VllmConfig(mode="server", servers=[url], timeout=10.0)
        sampler = ServerSampler(policy, config, SamplingConfig(max_new_tokens=4))
        prompts = [policy.encode(study) for study in studies]
        seeds = [[0]] * len(prompts)
        assert sampler.attempt(prompts, seeds, temperature=1.0, max_new_tokens=4) == [None] * len(prompts)
        assert sampler.away == {url: "no answer in 0.3 s"}
        for other in waiting:
            other.close()


def test_a_server_that_gives_some_is_waited_for_anew(
    policy: Policy, studies: list[Study], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`wait` is about servers that stay away, not about one that is back and fails again; and nobody is said to have
    waited while reports came."""
    monkeypatch.setattr(vllm_server, "IN_FLIGHT", 1)
    monkeypatch.setattr(vllm_server, "PAUSE", 0.6)
    slow = 0.8

    def every_second(path: str, number: int) -> str | None:
        if path != GENERATE or number % 2:
            return "drop" if path == GENERATE else None
        time.sleep(slow if number == 0 else 0)
        return None

    with serve(policy, script=every_second) as server:
        groups = sample(sampler_of(policy, server, wait=0.5), studies[:3])
        assert [group[0].ids[0] for group in groups] == [first_token(policy, study) for study in studies[:3]]
        assert server.paths.count(GENERATE) == 5
    assert "rank 0 waited 0 s" in capsys.readouterr().out


def test_a_stop_is_heard_while_servers_are_waited_for(policy: Policy, studies: list[Study]) -> None:
    """As by several ranks, which signals do not interrupt: they ask each other."""
    with serve(policy) as server:
        pass
    sampler = sampler_of(policy, server, wait=20.0)
    with signals.handled():
        signals.at_once(False)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(signals.Stopped, match="SIGTERM"):
            sample(sampler, studies)


@pytest.mark.parametrize(
    "reads, error",
    [
        (lambda ids: [*ids, ids[-1]], r"study s0: http.* read \d+ token ids where the trainer has \d+ .*twice"),
        (lambda ids: [ids[0] + 1, *ids[1:]], r"study s0: http.* read token id \d+ at place 0 where the trainer has"),
    ],
)
def test_another_prompt_than_the_trainers_ends_the_run(
    policy: Policy, studies: list[Study], reads: Any, error: str
) -> None:
    with serve(policy, reads=reads) as server, pytest.raises(UserError, match=error):
        sample(sampler_of(policy, server), studies[:1])
