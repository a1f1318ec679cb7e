"""A plan on many ranks and beside vLLM: what is sharded, what is alive when, how many reports are decoded at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unirg import cli
from unirg.data import load_studies
from unirg.plan.command import with_servers
from unirg.plan.compute import StageCost, _reports, stage_cost
from unirg.plan.machine import GPUS, Cluster
from unirg.plan.memory import weights_of
from unirg.plan.policy import Lengths, plan_policy
from unirg.plan.stage import Setting, plan_stage
from unirg.policy import Policy
from unirg.recipe.load import load_recipe
from unirg.rollout.hf import HFSampler
from unirg.stages import initial_policy

TEXT = """
name: planned
data: {adapter: phantom, train: 24}
prompt: {style: short}
policy: {tiny: {hidden: 64, heads: 2, layers: 2, mlp: 96, vision_hidden: 32, vision_layers: 2}}
stages:
  - {name: vision, kind: vision, steps: 10, studies_per_step: 8, optimiser: {learning_rate: 1.0e-3}}
  - {name: sft, kind: sft, steps: 10, studies_per_step: 8, evaluate_every: 5, optimiser: {learning_rate: 1.0e-3}}
  - name: grpo
    kind: grpo
    steps: 10
    studies_per_step: 8
    group_size: 4
    optimiser: {learning_rate: 1.0e-3}
    rewards: [{name: bleu}]
"""
COLOCATED = "rollout={engine: vllm}"
SERVERS = "rollout={engine: vllm, vllm: {mode: server, servers: ['http://10.0.0.7:8000', 'http://10.0.0.8:8000']}}"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plan") / "recipe.yaml"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def counted(path: Path) -> tuple[Policy, Lengths, dict[str, StageCost]]:
    """The policy, its lengths and what a step of each stage costs one rank."""
    recipe = load_recipe(path, [])
    policy, lengths = plan_policy(recipe, None, None)
    costs = {stage.name: stage_cost([(policy, 1.0)], lengths, recipe, stage, 1) for stage in recipe.stages}
    return policy, lengths, costs


Plan = Callable[..., dict[str, Any]]


@pytest.fixture
def plan(path: Path, counted: tuple[Policy, Lengths, dict[str, StageCost]]) -> Plan:
    """A stage's plan on so many H100, by its name and overrides."""
    policy, lengths, costs = counted

    def planned(
        name: str, *overrides: str, nodes: int = 1, gpus: int = 1, cost: StageCost | None = None, **seconds: float
    ) -> dict[str, Any]:
        recipe = load_recipe(path, overrides)
        stage = next(stage for stage in recipe.stages if stage.name == name)
        cluster = with_servers(recipe, Cluster(GPUS["h100"], nodes, gpus))
        weights = weights_of(policy, stage)
        return plan_stage(Setting(recipe, stage, weights, cost or costs[name], lengths, cluster, seconds))

    return planned


def size(module: Any) -> int:
    """Bytes of a module's weights."""
    return sum(p.nbytes for p in module.parameters())


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_a_vision_stage_shards_the_tower_alone(plan: Plan, counted: Any, strategy: str) -> None:
    policy = counted[0]
    model, tower = size(policy.model), size(policy.base.model.visual)
    found = plan("vision", f"distributed.strategy={strategy}", gpus=4)
    held = found["memory"]["optimiser"]
    assert held["weights"] == model - tower + tower / 4 and held["gradients"] == tower / 4
    assert "shards over ranks" in found["phases"] and "gradients over ranks" not in found["phases"]
    assert "DeepSpeed's bucket" not in held  # its engine does not run vision stages
    alone = plan("vision", gpus=4)["memory"]["optimiser"]
    assert alone["weights"] == model and alone["gradients"] == tower


def test_a_frozen_tower_stays_frozen_after_a_vision_stage(path: Path) -> None:
    recipe = load_recipe(path, ["policy.freeze_vision=true", "stages.sft.evaluate_every=null"])
    policy, lengths = plan_policy(recipe, None, None)
    trained = sum(p.nbytes for p in policy.model.parameters() if p.requires_grad)
    vision, sft = (stage_cost([(policy, 1.0)], lengths, recipe, stage, 1) for stage in recipe.stages[:2])
    assert sft.optimiser_state == pytest.approx(2 * trained, rel=0.01)
    assert vision.optimiser_state > 2 * size(policy.base.model.visual)
    assert trained == size(policy.model) - size(policy.base.model.visual)


def test_no_gradients_are_there_while_reports_are_written(plan: Plan) -> None:
    sft, grpo = (plan(name)["memory"] for name in ("sft", "grpo"))
    assert sft["optimiser"]["gradients"]
    assert "gradients" not in sft["evaluation"] and "gradients" not in grpo["sampling"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_of_keys_and_values_is_the_real_one(path: Path, dtype: str) -> None:
    recipe = load_recipe(path, [f"policy.dtype={dtype}"])
    policy, lengths = plan_policy(recipe, None, None)
    reports = _reports(policy, lengths, 8, 4, 8, 256, 1.0)
    studies = load_studies(recipe.data, "train")
    built = initial_policy(recipe, None, studies)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        _, cache, mask_BP = HFSampler(built)._prefill([built.encode(study) for study in studies[:2]])
    layers: Any = cache.layers
    token = sum(x.nbytes for layer in layers for x in (layer.keys, layer.values)) / mask_BP.numel()
    assert reports.kv_cache == token * 8 * 4 * (len(lengths.prompt) + reports.longest_report)
    assert reports.kv_numbers == token / layers[0].keys.element_size()


def test_memory_is_that_of_the_fullest_forward(path: Path, counted: Any) -> None:
    policy, lengths, costs = counted
    whole, most = costs["grpo"].forward_tokens, costs["grpo"].peaks["backward"][0]
    assert whole == 8 * (len(lengths.longest_prompt) + 4 * (lengths.longest_report - 1))  # within the budget
    recipe = load_recipe(path, [f"stages.grpo.tokens_per_forward={whole // 3}"])
    cost = stage_cost([(policy, 1.0)], lengths, recipe, recipe.stages[-1], 1)
    assert cost.forward_tokens == whole // 3  # no whole number of typical groups
    assert cost.peaks["backward"][0] == pytest.approx(most / 3, rel=0.1)


def test_reports_decoded_at_once_are_those_that_the_engine_is_asked_for(plan: Plan) -> None:
    few, many = (
        plan("grpo", COLOCATED, f"stages.grpo.sampling.rows_per_forward={rows}")["phases"]["decode"]["seconds"]
        for rows in (4, 16)
    )
    assert few > 2 * many  # 32 reports
    assert GPUS["h100"].vllm_rows == 1024 and GPUS["a100-80"].vllm_rows == 256


def test_weights_on_their_way_to_vllm(path: Path, plan: Plan, counted: Any) -> None:
    weights, h100 = size(counted[0].model), GPUS["h100"]
    pushed = plan("grpo", SERVERS, gpus=2)["phases"]["weight push"]
    assert pushed["seconds"] == pytest.approx(weights / h100.stream) and pushed["bound"] == "network"
    copied = plan("grpo", COLOCATED, gpus=2)["phases"]["weight push"]
    assert copied["seconds"] == pytest.approx(2 * weights / (h100.bandwidth * h100.bandwidth_share))
    adapted, _ = plan_policy(load_recipe(path, ["policy.lora={rank: 4}"]), None, None)
    assert weights_of(adapted, load_recipe(path, []).stages[-1]).count * 4 == weights  # adapters are merged
    # Ranks of two nodes gather what they share before a colocated engine has it.
    gathered = plan("grpo", COLOCATED, "distributed.strategy=fsdp2", nodes=2)["phases"]["weight push"]
    assert gathered["seconds"] == pytest.approx(weights / 2 / h100.network)


def test_rewards_are_hidden_by_the_reference_pass_too(path: Path, plan: Plan, counted: Any) -> None:
    policy, lengths, _ = counted
    recipe = load_recipe(path, ["stages.grpo.loss.kl=0.1"])
    cost = stage_cost([(policy, 1.0)], lengths, recipe, recipe.stages[-1], 1)
    waits = plan("grpo", bleu=1.0)["phases"]["rewards"]["seconds"]
    phases = plan("grpo", "stages.grpo.loss.kl=0.1", cost=cost, bleu=1.0)["phases"]
    saved = waits - phases["rewards"]["seconds"]
    assert saved == pytest.approx(phases["reference"]["seconds"], rel=1e-3)  # all is one forward


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--sampling-gpus", "1", SERVERS), "--sampling-gpus: 1 are fewer than the 2 servers that rollout.vllm.server"),
        (
            ("rollout={engine: vllm, vllm: {gpu_memory_utilization: 1.0e-6}}",),
            "weights and a cache; raise rollout.vllm.gpu_memory_utilization, use servers, or take a GPU with more",
        ),
    ],
)
def test_bad_input_in_words(
    path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert cli.main(["plan", str(path), "--gpus", "1", *arguments]) == 2
    assert said in capsys.readouterr().err
