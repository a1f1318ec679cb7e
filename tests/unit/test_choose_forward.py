"""The first step's choice of a forward: the check passes what is exact and stops what is not; no sharing says why."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from unirg import run as run_folder
from unirg.errors import UserError
from unirg.grpo import choose, prefix_attention, shared_prefix
from unirg.grpo.choose import choose_forward, fastest_kernel, self_check, share_prompts
from unirg.grpo.forward import DENSE, Forward
from unirg.grpo.prefix_attention import PackedStudy
from unirg.policy import Policy, PolicyConfig, load_policy
from unirg.prompt import PromptConfig
from unirg.recipe.schema import GrpoStage
from unirg.rollout.hf import HFSampler
from unirg.study import Study
from unirg.training import StageRun

RATE = {"learning_rate": 1e-5}


def work_of(policy: Policy, folder: Path, **options: Any) -> StageRun:
    stage = GrpoStage(kind="grpo", name="rl", steps=1, rewards=[{"name": "rouge_l"}], optimiser=RATE, **options)
    return StageRun(None, stage, folder, Accelerator(cpu=True), policy, [])  # type: ignore[arg-type]


def chosen(work: StageRun, prompts: list[Any], answers: list[list[tuple[int, ...]]]) -> Forward:
    return choose_forward(work, share_prompts(work, None), prompts, answers)


@pytest.fixture
def sampled(tiny_policy: Policy, studies: list[Study]) -> tuple[Policy, list[Any], list[list[tuple[int, ...]]]]:
    """A policy wide enough awake that positions and masks matter, with groups that it sampled."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tiny_policy.model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    prompts = [tiny_policy.encode(study) for study in studies]
    seeds = [[10 * i + g for g in range(4)] for i in range(len(studies))]
    groups = HFSampler(tiny_policy).sample(prompts, seeds, temperature=1.0, max_new_tokens=12)
    return tiny_policy, prompts, [[sample.ids for sample in group] for group in groups]


def positions_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    right = shared_prefix._positions

    def wrong(prompt: Any, answers: Any) -> torch.Tensor:
        positions = right(prompt, answers).clone()
        positions[..., len(prompt) :] += 1
        return positions

    monkeypatch.setattr(shared_prefix, "_positions", wrong)


def answers_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(layout: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, _: Any) -> Any:
        shared = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2)

    monkeypatch.setattr(prefix_attention, "_sdpa", leaky)


def prompts_end_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    right = prefix_attention._answer_mask

    def short(layout: Any, i: int, longest: int, window: int | None) -> torch.Tensor:
        mask = right(layout, i, longest, window).clone()
        mask[:, layout.studies[i].prompt - 1] = False
        return mask

    monkeypatch.setattr(prefix_attention, "_answer_mask", short)


def test_what_is_exact_passes_and_is_told(sampled: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy, prompts, answers = sampled
    policy.model.train()
    before = torch.get_rng_state()
    forward = chosen(work_of(policy, tmp_path), prompts, answers)
    assert forward.name == "shared prefix (sdpa)" and policy.model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert "rl  shared prefix (sdpa): packed and dense log-probs differ by" in capsys.readouterr().out
    assert "allowed 0.0001" in json.loads((tmp_path / "manifest.json").read_text())["forwards"]["rl"]["found"]


@pytest.mark.parametrize("fault", [positions_off_by_one, answers_see_each_other, prompts_end_too_early])
def test_a_wrong_forward_stops_the_run_with_the_numbers(
    sampled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    policy, prompts, answers = sampled
    fault(monkeypatch)
    with pytest.raises(
        UserError, match=r"stage rl: packed and dense .* float32, allowed 0\.0001\), on studies s\d, s\d"
    ) as stop:
        chosen(work_of(policy, tmp_path), prompts, answers)
    assert "stages.rl.shared_prefix=false" in str(stop.value)
    fallback = chosen(work_of(policy, tmp_path, shared_prefix_mismatch="dense"), prompts, answers)
    assert fallback is DENSE


@pytest.mark.parametrize("fault", [positions_off_by_one, answers_see_each_other, prompts_end_too_early])
def test_float32_weights_are_checked_in_float32_where_a_run_computes_in_bfloat16(
    sampled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    policy, prompts, answers = sampled
    policy.config = policy.config.model_copy(update={"dtype": "bfloat16"})
    assert chosen(work_of(policy, tmp_path), prompts, answers).name == "shared prefix (sdpa)"
    fault(monkeypatch)
    with pytest.raises(UserError, match=r"float32, allowed 0\.0001"):
        chosen(work_of(policy, tmp_path), prompts, answers)


def test_adapters_on_bfloat16_weights_are_checked_in_bfloat16(
    sampled: Any, studies: list[Study], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, _, answers = sampled
    policy.save(tmp_path / "model")
    config = PolicyConfig(model=str(tmp_path / "model"), lora={"rank": 2}, dtype="bfloat16")
    policy = load_policy(config, PromptConfig(style="short"))
    forward = chosen(work_of(policy, tmp_path), [policy.encode(study) for study in studies], answers)
    assert forward.name == "shared prefix (sdpa)" and "bfloat16, allowed 0.12" in capsys.readouterr().out


def test_log_probs_that_are_no_numbers_stop_the_run(
    sampled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, prompts, answers = sampled
    monkeypatch.setattr(choose, "self_check", lambda *_: (float("nan"), ["s0"]))
    with pytest.raises(UserError, match=r"differ by inf.*on studies s0"):
        chosen(work_of(policy, tmp_path), prompts, answers)


def test_the_check_keeps_to_the_budget(sampled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a group that a forward cannot hold, a part is compared, on either path."""
    policy, prompts, answers = sampled
    assert shared_prefix.prepare(policy) is None
    held: list[int] = []
    policy.base.get_input_embeddings().register_forward_hook(lambda module, ids, out: held.append(out[..., 0].numel()))
    budget = 2 * (len(prompts[0]) + 12)
    difference, _ = self_check(policy, shared_prefix.packed_forward("sdpa"), prompts, answers, budget)
    assert 0 < difference < 1e-4
    assert len(held) == 2 and max(held) <= budget


def test_a_model_that_cannot_share_goes_on_and_says_why(
    sampled: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, prompts, answers = sampled
    policy.base.config.model_type = "another_vl"
    assert chosen(work_of(policy, tmp_path), prompts, answers) is DENSE
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1 and "once per report" in lines[0] and "another_vl" in lines[0]
    assert policy.base.config.get_text_config()._attn_implementation == "sdpa"


def test_sharing_can_be_switched_off(sampled: Any, tmp_path: Path) -> None:
    policy, prompts, answers = sampled
    assert chosen(work_of(policy, tmp_path, shared_prefix=False), prompts, answers) is DENSE
    assert policy.base.config.get_text_config()._attn_implementation == "sdpa"


@pytest.mark.parametrize("kernel", ["flex", "flash"])
def test_a_kernel_that_cannot_run_here_is_refused(sampled: Any, tmp_path: Path, kernel: str) -> None:
    policy, prompts, answers = sampled
    with pytest.raises(UserError, match=rf"stages\.rl\.shared_prefix_kernel: {kernel} needs a CUDA device"):
        chosen(work_of(policy, tmp_path, shared_prefix_kernel=kernel), prompts, answers)


def test_the_fastest_kernel_is_one_that_runs(tiny_policy: Policy) -> None:
    told: list[str] = []
    row = (PackedStudy(0, 20, (5, 0, 7)), PackedStudy(32, 9, (4,)))
    assert fastest_kernel(tiny_policy, row, ["flash", "flex", "sdpa"], told.append) == "sdpa"
    assert [line.split(" cannot run here: ")[0] for line in told] == ["kernel flash", "kernel flex"]


def test_sampling_and_saving_do_not_notice(sampled: Any, studies: list[Study], tmp_path: Path) -> None:
    policy, prompts, answers = sampled
    seeds = [[7, 8]] * len(prompts)
    before = HFSampler(policy).sample(prompts, seeds, temperature=1.0, max_new_tokens=12)
    dense = DENSE.logps(policy, prompts, answers).logps_BT
    assert shared_prefix.prepare(policy) is None
    assert HFSampler(policy).sample(prompts, seeds, temperature=1.0, max_new_tokens=12) == before
    assert torch.equal(DENSE.logps(policy, prompts, answers).logps_BT, dense)
    policy.save(tmp_path)
    assert "shared_prefix" not in (tmp_path / "config.json").read_text()


def test_versions_of_the_choice_are_in_the_manifest_of_the_run(sampled: Any, tmp_path: Path) -> None:
    policy, prompts, answers = sampled
    run_folder.update_manifest(tmp_path, forwards={"earlier": "dense"})
    chosen(work_of(policy, tmp_path), prompts, answers)
    assert set(json.loads((tmp_path / "manifest.json").read_text())["forwards"]) == {"earlier", "rl"}
