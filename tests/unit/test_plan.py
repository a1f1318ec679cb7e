"""A plan counts what the program does: parameters, optimiser state, FLOPs and memory are those of real models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unirg import checkpoint, cli
from unirg.data import load_studies
from unirg.grpo.shared_prefix import packed_forward, packed_logps, prepare
from unirg.plan.compute import StageCost, _update, stage_cost
from unirg.plan.disk import checkpoint_bytes, run_bytes, written
from unirg.plan.machine import GPUS
from unirg.plan.memory import moments, weights_of
from unirg.plan.policy import Lengths, in_depth, parameters, plan_policy
from unirg.policy import Policy, vision_tower
from unirg.recipe.load import load_recipe
from unirg.recipe.schema import Recipe
from unirg.stages import initial_policy
from unirg.steps import build_optimiser

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

TEXT = """
name: planned
data: {adapter: phantom, train: 24}
prompt: {style: short}
policy: {tiny: {hidden: 64, heads: 2, layers: 2, mlp: 96, vision_hidden: 32, vision_layers: 2}}
stages:
  - {name: sft, kind: sft, steps: 10, studies_per_step: 8, optimiser: {learning_rate: 1.0e-3}}
  - name: grpo
    kind: grpo
    steps: 10
    studies_per_step: 8
    group_size: 4
    loss: {kl: 0.1}
    optimiser: {learning_rate: 1.0e-3}
    rewards: [{name: bleu}]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(TEXT)
    return file


def planned(path: Path, *overrides: str) -> tuple[Recipe, Policy, Lengths]:
    recipe = load_recipe(path, overrides)
    return (recipe, *plan_policy(recipe, None, None))


def real(recipe: Recipe) -> Policy:
    return initial_policy(recipe, None, load_studies(recipe.data, "train"))


@pytest.mark.parametrize("override", ["policy.freeze_vision=true", "policy.lora={rank: 4}", "seed=0"])
def test_parameters_are_those_of_the_policy_that_trains(path: Path, override: str) -> None:
    recipe, policy, _ = planned(path, override)
    built = real(recipe)
    assert {name: p.shape for name, p in policy.model.named_parameters()} == {
        name: p.shape for name, p in built.model.named_parameters()
    }
    assert [p.requires_grad for p in policy.model.parameters()] == [p.requires_grad for p in built.model.parameters()]
    counts = parameters(policy)
    assert sum(counts.values()) == sum(p.numel() for p in built.model.parameters())
    assert counts["embeddings"] == built.base.get_input_embeddings().weight.numel() and counts["head"] == 0
    adapters = sum(p.numel() for name, p in built.model.named_parameters() if "lora_" in name)
    in_tower = sum(p.numel() for p in vision_tower(built.base).parameters())
    assert counts["adapters"] == adapters and 0 < counts["vision tower"] <= in_tower
    assert all(p.is_meta for p in policy.model.parameters())


def test_lengths_are_those_of_the_studies(path: Path) -> None:
    recipe, _, lengths = planned(path)
    studies, built = load_studies(recipe.data, "train"), real(recipe)
    prompts = [len(built.encode(study)) for study in studies]
    assert min(prompts) <= len(lengths.prompt) <= len(lengths.longest_prompt) == max(prompts)
    assert lengths.report < lengths.longest_report


def test_optimiser_state_is_that_of_a_real_step(path: Path) -> None:
    recipe, policy, lengths = planned(path)
    stage = recipe.stages[0]
    built = real(recipe)
    optimiser = build_optimiser(stage.optimiser, built.model.named_parameters())
    for p in built.model.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    held = sum(x.nbytes for values in optimiser.state.values() for x in values.values())
    cost = stage_cost([(policy, 1.0)], lengths, recipe, stage, 1)
    assert cost.optimiser_state == held
    # AdamW's foreach form makes one more copy of what it trains.
    trained = sum(p.nbytes for p in built.model.parameters())
    assert 0.9 * trained < cost.optimiser_peak < 1.1 * trained  # matrices, then the rest


def profiled_peak(work: Any) -> int:
    """The most bytes held at once beyond what was there before, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flops_and_memory_of_an_update_are_the_real_ones(path: Path, dtype: str, checkpointing: bool) -> None:
    settings = [f"policy.dtype={dtype}", f"policy.gradient_checkpointing={str(checkpointing).lower()}"]
    recipe, policy, lengths = planned(path, *settings, "policy.tiny.layers=4", "policy.tiny.vision_layers=4")
    assert prepare(policy) is None
    ahead, back = _update(policy, packed_forward("sdpa"), [lengths.prompt] * 4, [[40] * 6] * 4, checkpointing)

    built = real(recipe)
    assert prepare(built) is None
    built.model.train()
    answers = [[[5] * 40] * 6] * 4

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            return packed_logps(built, [lengths.prompt] * 4, answers).logps_BT.sum()

    def update() -> None:
        forward().backward()

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = forward()
        assert ahead.flops == counter.get_total_flops()
        loss.backward()
    # The backward of fused attention is counted with its recomputation; that of the plain one, which torch can count
    # on a CPU, has none: of this policy's FLOPs 2.7%, of a large one's far less.
    assert 1 <= (ahead.flops + back.flops) / counter.get_total_flops() < 1.03

    built.model.zero_grad(set_to_none=True)
    gradients = sum(p.nbytes for p in built.model.parameters())
    measured = profiled_peak(update)
    assert 0.8 < max(ahead.peak, back.peak + gradients) / measured < 1.25


def test_checkpointing_trades_flops_for_memory(path: Path) -> None:
    _, policy, lengths = planned(path, "policy.tiny.layers=6")
    forward = packed_forward("sdpa")
    assert prepare(policy) is None
    plain, again = (_update(policy, forward, [lengths.prompt] * 4, [[40] * 4] * 4, on) for on in (False, True))
    assert again[0].flops == plain[0].flops and again[1].flops > 1.3 * plain[1].flops
    assert max(c.peak for c in again) < 0.6 * max(c.peak for c in plain)


def test_shallow_policies_add_up_to_the_deep_one(path: Path) -> None:
    sizes = ("policy.tiny.layers=9", "policy.tiny.vision_layers=8", "policy.dtype=bfloat16")
    sizes += ("policy.gradient_checkpointing=true",)
    recipe, policy, lengths = planned(path, *sizes)
    shallow = in_depth(recipe, policy)
    assert len(shallow) == 3 and sum(share for _, share in shallow) == pytest.approx(1)
    whole, summed = (stage_cost(some, lengths, recipe, recipe.stages[-1], 1) for some in ([(policy, 1.0)], shallow))
    both = [
        cost.phases | {"prefill": cost.sampling.prefill, "decode": cost.sampling.decode} for cost in (whole, summed)
    ]
    for name, phase in both[0].items():
        assert both[1][name].flops == pytest.approx(phase.flops, rel=1e-9)
        seconds = [phases[name].seconds(GPUS["h100"])[0] for phases in both]
        assert seconds[1] == pytest.approx(seconds[0], rel=0.02)
    for name in ("kv_cache", "kv_numbers", "studies", "size", "report"):
        assert getattr(summed.sampling, name) == pytest.approx(getattr(whole.sampling, name), rel=0.02)
    assert summed.optimiser_state == pytest.approx(whole.optimiser_state, rel=0.02)
    for name, (alive, _) in (whole.peaks | whole.sampling.peaks).items():
        assert (summed.peaks | summed.sampling.peaks)[name][0] == pytest.approx(alive, rel=0.02)
    assert summed.unshared == pytest.approx(whole.unshared)


def grpo_cost(path: Path, *overrides: str, world: int = 1) -> tuple[Recipe, Policy, StageCost]:
    recipe, policy, lengths = planned(path, *overrides)
    return recipe, policy, stage_cost([(policy, 1.0)], lengths, recipe, recipe.stages[-1], world)


def test_sharing_prompts_and_training_on_fewer_reports_save_flops(path: Path) -> None:
    _, _, shared = grpo_cost(path)
    for name in ("forward", "backward", "reference"):
        assert 0 < shared.phases[name].flops < 0.9 * shared.unshared[name]
    _, _, dense = grpo_cost(path, "stages.grpo.shared_prefix=false")
    assert dense.phases["forward"].flops == pytest.approx(shared.unshared["forward"], rel=0.01)
    _, _, fewer = grpo_cost(path, "stages.grpo.train_on=2")
    assert fewer.phases["backward"].flops < 0.8 * shared.phases["backward"].flops
    assert fewer.sampling.decode.flops == shared.sampling.decode.flops


def test_a_rank_does_its_share_and_holds_its_shard(path: Path) -> None:
    recipe, policy, one = grpo_cost(path, "distributed.strategy=fsdp2")
    _, _, four = grpo_cost(path, "distributed.strategy=fsdp2", world=4)
    assert four.phases["forward"].flops == pytest.approx(one.phases["forward"].flops / 4)
    weights = weights_of(policy, recipe.stages[-1])
    held = {world: moments(recipe, recipe.stages[-1], weights, one, world, GPUS["h100"]) for world in (2, 4)}
    for moment, parts in held[2].items():
        for name in ("weights", "optimiser", "reference policy", "gradients"):
            if name in parts:
                assert held[4][moment][name] == parts[name] / 2
    whole = recipe.model_copy(update={"distributed": recipe.distributed.model_copy(update={"strategy": "ddp"})})
    replicated = moments(whole, recipe.stages[-1], weights, one, 4, GPUS["h100"])["forward and backward"]
    assert replicated["weights"] == weights.all and replicated["gradients"] == weights.trained


def test_zero3_shards_as_fsdp2_and_holds_deepspeeds_own_copy(path: Path) -> None:
    recipe, policy, cost = grpo_cost(path, "policy.dtype=bfloat16", "distributed.strategy=zero3", world=4)
    stage, weights = recipe.stages[-1], weights_of(policy, recipe.stages[-1])
    fsdp2 = recipe.model_copy(update={"distributed": recipe.distributed.model_copy(update={"strategy": "fsdp2"})})
    ours, theirs = (moments(r, stage, weights, cost, 4, GPUS["h100"]) for r in (fsdp2, recipe))
    for moment, parts in ours.items():
        for name in ("weights", "optimiser", "reference policy"):
            assert theirs[moment].get(name) == parts.get(name)
        assert theirs[moment]["gradients"] == weights.trained / 4  # in a buffer that it never frees
        assert theirs[moment]["DeepSpeed's copy of what is trained"] == weights.trained / 4
    # It gathers float32, of which autocast makes its copy; FSDP2 gathers what autocast wants.
    assert theirs["sampling"]["gathered weights"] == weights.all > ours["sampling"]["gathered weights"]
    copies = [parts["sampling"]["bfloat16 weights (autocast)"] for parts in (ours, theirs)]
    assert copies[0] <= 2 * weights.rest < copies[1]


def test_a_checkpoint_has_the_planned_size(path: Path, tmp_path: Path) -> None:
    recipe, policy, _ = planned(path)
    stage, built = recipe.stages[0], real(recipe)
    optimiser = build_optimiser(stage.optimiser, built.model.named_parameters())
    for p in built.model.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    checkpoint.save(tmp_path / "sft", 1, dict(built.model.named_parameters()), optimiser, {})
    size = sum(file.stat().st_size for file in (tmp_path / "sft").rglob("*.safetensors"))
    weights = weights_of(policy, stage)
    assert size == pytest.approx(checkpoint_bytes(weights), rel=0.02)  # names and counts of steps come to it
    every = stage.model_copy(update={"steps": 10, "checkpoint_every": 3})
    assert written(every, weights) == (3, 3 * checkpoint_bytes(weights) + weights.all)
    # Two are kept while a third is written, beside the policies that the two stages leave.
    assert run_bytes(recipe, policy) == 3 * checkpoint_bytes(weights) + 2 * weights.all


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main(["plan", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_command(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, path, "--gpus", 2, "--json", "--reward-seconds", "bleu=0.01", "stages.sft.steps=5")
    assert status == 0
    found = json.loads(out)
    sft, grpo = found["stages"]
    assert sft["steps"] == 5 and grpo["phases"]["rewards"]["cpu_seconds"] == {"bleu": pytest.approx(0.32)}
    assert grpo["step_seconds"] == pytest.approx(sum(phase["seconds"] for phase in grpo["phases"].values()))
    assert grpo["phases"]["reading studies"]["seconds"] > 0
    assert "nothing was measured on a h100" in found["assumptions"][0]
    status, out, _ = run(capsys, path, "--gpus", 2)
    assert status == 0 and "not counted: bleu" in out


def test_vllm_servers_are_planned_for(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rollout = "rollout={engine: vllm, vllm: {mode: server, servers: ['http://10.0.0.7:8000']}}"
    seconds = {}
    for engines in (1, 4):
        status, out, _ = run(capsys, path, "--gpus", 2, "--sampling-gpus", engines, "--json", rollout)
        grpo = json.loads(out)["stages"][-1]
        seconds[engines] = grpo["phases"]["prefill"]["seconds"]
        assert (
            status == 0
            and grpo["phases"]["weight push"]["seconds"] > 0
            and "KV cache" not in grpo["memory"]["sampling"]
        )
    assert seconds[4] == pytest.approx(seconds[1] / 4)


def test_evaluations_and_checkpoints_are_paid_for(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["evaluation.metrics=[{name: bleu}]", "--reward-seconds", "bleu=0.5", "--gpus", "2"]
    found = {}
    for every in ("null", "5", "2"):
        _, out, _ = run(capsys, path, "--json", *settings, f"stages.sft.evaluate_every={every}")
        found[every] = json.loads(out)["stages"][0]
    assert "evaluations" not in found["null"]["beside_steps"]
    evaluations = {every: found[every]["beside_steps"]["evaluations"] for every in ("5", "2")}
    assert [evaluations[every]["count"] for every in ("5", "2")] == [2, 5]
    assert evaluations["2"]["scoring"] == 5 * 0.5 * 200  # every rank scores every study
    assert evaluations["2"]["seconds"] > evaluations["2"]["scoring"]
    assert evaluations["2"]["seconds"] == pytest.approx(2.5 * evaluations["5"]["seconds"])
    whole = found["2"]
    beside = sum(part["seconds"] for part in whole["beside_steps"].values())
    assert whole["run_hours"] == pytest.approx((10 * whole["step_seconds"] + beside) / 3600)
    assert whole["gpu_hours"] == pytest.approx(2 * whole["run_hours"])
    assert "KV cache" in whole["memory"]["evaluation"] and "evaluation" not in found["null"]["memory"]


def test_one_step_ahead(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def grpo(*arguments: str) -> dict[str, Any]:
        _, out, _ = run(capsys, path, "--gpus", 2, "--json", "stages.grpo.loss.correction=truncate", *arguments)
        return json.loads(out)["stages"][-1]

    servers = "rollout={engine: vllm, vllm: {mode: server, servers: ['http://10.0.0.7:8000']}}"
    ahead = grpo(servers, "stages.grpo.ahead=true")
    seconds = {name: phase["seconds"] for name, phase in ahead["phases"].items()}
    sampling = seconds["prefill"] + seconds["decode"]
    assert ahead["step_seconds"] == pytest.approx(max(sampling, sum(seconds.values()) - sampling))
    assert ahead["sampling_gpu_hours"] == pytest.approx(ahead["run_hours"])
    # Rewards are hidden by the whole step, and waited for where they take longer.
    slow = grpo(servers, "stages.grpo.ahead=true", "--reward-seconds", "bleu=1")
    assert slow["step_seconds"] == pytest.approx(8 * 4 / 2)
    # The Hugging Face engine's copy is on the trainer's own device.
    plain, copied = grpo(), grpo("stages.grpo.ahead=true")
    own = [stage["step_seconds"] - stage["phases"]["reading studies"]["seconds"] for stage in (plain, copied)]
    assert own[0] == pytest.approx(own[1])
    assert copied["memory"]["optimiser"]["sampler's copy"] == plain["memory"]["sampling"]["weights"]


def test_studies_that_a_rank_keeps_are_read_once(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shares = {}
    for steps in (3, 30):  # 24 studies, 8 a step
        _, out, _ = run(capsys, path, "--gpus", 1, "--json", f"stages.sft.steps={steps}")
        found = json.loads(out)
        ms = next(float(text.split()[5]) for text in found["assumptions"] if text.startswith("a study is read in"))
        shares[steps] = found["stages"][0]["phases"]["reading studies"]["seconds"] / (8 * ms / 1000)
    assert shares == {3: pytest.approx(1, rel=0.01), 30: pytest.approx(0.1, rel=0.01)}


def test_what_does_not_fit_says_what_to_try(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unirg.plan.memory.RESERVE", 30e9)  # an RTX 4090 has 24 GB
    status, out, _ = run(capsys, path, "--gpus", 2, "--gpu", "rtx4090", "--json")
    grpo = json.loads(out)["stages"][-1]
    assert status == 1 and not grpo["fits"] and grpo["bound"].startswith("memory: does not fit, needs 30 GB")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpu", "h900"), "--gpu: 'h900' is not known; there are h100"),
        (("--gpus", "3"), "studies_per_step 8 must divide evenly by 3 ranks"),
        (("--gpus", "0"), "--gpus: expected at least 1, got 0"),
        (("--sampling-gpus", "2"), "--sampling-gpus: the recipe samples on the training GPUs"),
        (("--compute-share", "1.5"), "--compute-share: expected a share above 0"),
        (("--reward-seconds", "r9=1"), "no reward or metric 'r9'; there are bleu"),
        (("--reward-seconds", "bleu=fast"), "expected LABEL=SECONDS such as r1=0.001, got 'bleu=fast'"),
        (("policy={model: no/such-folder}",), "'no/such-folder' is no folder here and not in the hub's cache, and HF"),
        (("policy={model: /no/such/folder}",), "policy.model: '/no/such/folder': there is no such folder"),
        (
            ("--config", "missing.json", "policy={model: m}"),
            "--config: 'missing.json': there is no such file or folder",
        ),
        (("--prompt-tokens", "5000"), "they make a prompt of 5258 tokens, and policy.max_prompt_tokens allows 4096"),
        (("--config", "x.json"), "--config: the recipe builds its policy itself (policy.tiny)"),
    ],
)
def test_bad_input_in_words(
    path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    status, _, err = run(capsys, path, *arguments)
    assert status == 2 and said in err


def test_a_recipe_without_grpo_is_planned_too(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(TEXT[: TEXT.index("  - name: grpo")])
    status, out, _ = run(capsys, path, "--gpus", 2)
    assert status == 0 and "10 steps" in out
