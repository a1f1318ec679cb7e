"""The weights that a rollout engine gets, and what recipes and commands say about engines."""

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.runs import on_two_ranks
from unirg.errors import UserError
from unirg.policy import LoraConfig, Policy, load_policy
from unirg.rollout import RolloutConfig, SamplingConfig
from unirg.rollout.vllm_inputs import image_runs
from unirg.rollout.vllm_launch import command, serve
from unirg.rollout.weights import named_weights
from unirg.study import Study


def with_adapters(policy: Policy) -> Policy:
    """The same policy with adapters that are not zero any more."""
    adapted = load_policy(
        policy.config.model_copy(update={"lora": LoraConfig(rank=4)}), policy.prompt, texts=["a b"], seed=0
    )
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return adapted


def test_every_parameter_once_under_its_own_name(tiny_policy: Policy) -> None:
    weights = dict(named_weights(tiny_policy.model, torch.bfloat16))
    expected = dict(tiny_policy.model.named_parameters())
    assert list(weights) == list(expected) and "lm_head.weight" not in weights  # tied to the embedding
    assert all(torch.equal(weights[name], value.bfloat16()) for name, value in expected.items())
    assert not any(value.requires_grad for value in weights.values())


def test_adapters_are_merged_and_the_base_is_left_alone(tiny_policy: Policy) -> None:
    """Merging in place and subtracting again leaves other weights behind, by rounding: then a resumed run, which starts
    from the checkpoint's, would part from the one that went on."""
    policy = with_adapters(tiny_policy)
    before = {name: value.clone() for name, value in policy.model.named_parameters()}
    weights = dict(named_weights(policy.model, torch.float32))
    merged = dict(copy.deepcopy(policy.model).merge_and_unload().named_parameters())
    assert list(weights) == list(merged)
    for name, value in merged.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)
    changed = [name for name, value in dict(policy.base.named_parameters()).items() if ".base_layer." in name]
    assert len(changed) > 10
    assert all(torch.equal(before[name], value) for name, value in policy.model.named_parameters())


@pytest.mark.slow
def test_shards_are_put_together_on_every_rank(tmp_path: Path) -> None:
    """With adapters, on two ranks: both get what one process has."""
    assert_shards_are_put_together(tmp_path, "fsdp2")


def assert_shards_are_put_together(tmp_path: Path, strategy: str) -> None:
    on_two_ranks(tmp_path, SHARDS, strategy)


SHARDS = """
import sys
import torch
from accelerate import Accelerator
from tests.conftest import TINY
from tests.unit.test_rollout_weights import with_adapters
from unirg.distributed import distribute, is_sharded
from unirg.policy import PolicyConfig, load_policy
from unirg.prompt import PromptConfig
from unirg.rollout.weights import named_weights

accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
policy = with_adapters(load_policy(PolicyConfig(tiny=TINY), PromptConfig(), texts=["a b"], seed=0))
whole = dict(named_weights(policy.model, torch.float32))
distribute(policy.model, sys.argv[1], accelerator)
assert is_sharded(policy.model)
sharded = dict(named_weights(policy.model, torch.float32))
assert list(whole) == list(sharded)
for name, value in whole.items():
    torch.testing.assert_close(sharded[name], value, rtol=0, atol=1e-6)
print("the same", flush=True)
"""


@pytest.mark.parametrize("key", ["top_p", "top_k", "min_p"])
def test_truncated_sampling_is_refused_with_its_reason(key: str) -> None:
    with pytest.raises(ValidationError, match=f"sampling.{key}: .* biases the importance ratio"):
        SamplingConfig.model_validate({key: 0.9})


@pytest.mark.parametrize(
    "vllm, error",
    [
        ({"mode": "server"}, "needs the address of at least one"),
        ({"servers": ["http://a:1"]}, "set rollout.vllm.mode=server"),
        ({"mode": "server", "servers": ["a:8000"]}, "'a:8000' is no address such as"),
        ({"mode": "server", "servers": ["http://a"]}, "'http://a' is no address such as"),
        ({"mode": "server", "servers": ["http://a:b"]}, "'http://a:b' is no address such as"),
        ({"mode": "server", "servers": ["http://a:1", "http://a:1/"]}, "named twice"),
    ],
)
def test_servers_that_cannot_be_are_refused(vllm: dict[str, Any], error: str) -> None:
    with pytest.raises(ValidationError, match=error):
        RolloutConfig.model_validate({"engine": "vllm", "vllm": vllm})


def test_runs_of_image_tokens(tiny_policy: Policy, studies: list[Study]) -> None:
    assert image_runs([7, 7, 1, 7, 2], [7]) == [(0, 2), (3, 1)] and image_runs([1], [7]) == []
    prompt = tiny_policy.encode(studies[3])  # two films of 64 pixels: 4 merged tokens each
    runs = image_runs(prompt.ids_P.tolist(), [tiny_policy.model.config.image_token_id])
    assert [length for _, length in runs] == [4, 4]


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_server_without_vllm_says_how_to_get_it() -> None:
    with pytest.raises(UserError, match=r"pip install 'unirg\[vllm\]'"):
        serve("m", [])


def test_a_server_listens_here_alone_unless_told_otherwise() -> None:
    start, environment = command("m", ["--port", "1"], cuda=True)
    assert start[start.index("--host") + 1] == "127.0.0.1" and start[-2:] == ["--port", "1"]
    assert environment["VLLM_NO_USAGE_STATS"] == "1" and "--dtype" not in start
    start, _ = command("m", ["--host=10.0.0.7", "--dtype", "bfloat16"], cuda=False)
    assert "--host" not in start and start.count("--dtype") == 1 and "--enforce-eager" in start


@pytest.mark.parametrize("option", ["--data-parallel-size=2", "--data_parallel_size", "-dp"])
def test_copies_behind_one_address_are_refused(option: str) -> None:
    with pytest.raises(UserError, match=f"{option.partition('=')[0].replace('_', '-')}: .*start a server for each"):
        command("m", [option, "2"], cuda=True)
