"""An update makes no pass that it does not need, and is the same however its groups are split over forwards."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import REPORTS, TINY
from unirg.grpo.choose import choose_forward, share_prompts
from unirg.grpo.forward import Forward
from unirg.grpo.loop import check_sampler, first_pass, load_reference, update
from unirg.grpo.loss import Normaliser
from unirg.grpo.rollouts import Group
from unirg.policy import Policy, PolicyConfig, load_policy
from unirg.prompt import PromptConfig
from unirg.recipe.schema import Recipe
from unirg.rollout.hf import HFSampler
from unirg.study import Study
from unirg.training import RanksStop, StageRun, Stopwatch

ADVANTAGES = (1.2, -0.4, 0.3, -1.1)


def grpo_work(policy: Policy, folder: Path, **options: Any) -> StageRun:
    stage = {"name": "g", "kind": "grpo", "steps": 1, "optimiser": {"learning_rate": 1e-3}, "rewards": [{"name": "x"}]}
    policy_config = policy.config.model_dump(mode="json")
    recipe = {"name": "x", "data": {"adapter": "phantom"}, "policy": policy_config, "stages": [stage | options]}
    validated = Recipe.model_validate(recipe)
    return StageRun(validated, validated.stages[0], folder, Accelerator(cpu=True), policy, [], policy.model)


def sampled_groups(policy: Policy, studies: Sequence[Study]) -> list[Group]:
    prompts = [policy.encode(study) for study in studies]
    seeds = [[10 * i + g for g in range(len(ADVANTAGES))] for i in range(len(studies))]
    groups = []
    for study, prompt, samples in zip(
        studies, prompts, HFSampler(policy).sample(prompts, seeds, temperature=1.0, max_new_tokens=12), strict=True
    ):
        groups.append(Group(study, prompt, samples, advantages=list(ADVANTAGES), trained=list(range(len(samples)))))
    return groups


def counts(groups: list[Group]) -> Normaliser:
    lengths = [len(group.samples[i].ids) for group in groups for i in group.trained]
    return Normaliser(len(lengths), sum(lengths), 12)


def forward_of(work: StageRun, reference: Policy | None, groups: list[Group]) -> Forward:
    answers = [[sample.ids for sample in group.samples] for group in groups]
    return choose_forward(work, share_prompts(work, reference), [group.prompt for group in groups], answers)


def count_passes(policies: dict[str, Policy]) -> Counter[str]:
    """Counts passes through the vision tower and the language model of each policy."""
    seen: Counter[str] = Counter()
    for name, policy in policies.items():
        for part, module in (("films", policy.base.model.visual), ("tokens", policy.base.model.language_model)):

            def passed(*_: Any, key: str = f"{name} {part}") -> None:
                seen[key] += 1

            module.register_forward_hook(passed)
    return seen


@pytest.mark.parametrize("shared", [True, False])
def test_on_policy_there_is_one_pass(tiny_policy: Policy, studies: list[Study], tmp_path: Path, shared: bool) -> None:
    """Old log-probs and the correction for the sampler come out of the pass that trains."""
    work = grpo_work(tiny_policy, tmp_path, shared_prefix=shared)
    groups = sampled_groups(tiny_policy, studies)
    forward = forward_of(work, None, groups)
    seen = count_passes({"policy": tiny_policy})
    metrics = update(work, groups, counts(groups), forward, None, Stopwatch())
    assert seen == {"policy films": 1, "policy tokens": 1}
    assert 0 <= metrics["sampling/sampling_logp_difference/max"] < 1e-4
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)


def test_the_reference_is_run_where_it_counts(tiny_policy: Policy, studies: list[Study], tmp_path: Path) -> None:
    groups = sampled_groups(tiny_policy, studies)
    work = grpo_work(tiny_policy, tmp_path, loss={"kl": 0.1})
    reference = load_reference(work)
    assert reference is not None
    forward = forward_of(work, reference, groups)
    seen = count_passes({"policy": tiny_policy, "reference": reference})
    update(work, groups, counts(groups), forward, reference, Stopwatch())
    assert seen == {"policy films": 1, "policy tokens": 1, "reference films": 1, "reference tokens": 1}
    work = grpo_work(tiny_policy, tmp_path)
    update(work, groups, counts(groups), forward, reference, Stopwatch())
    assert seen["reference tokens"] == 1


def test_adapters_off_are_the_reference(studies: list[Study], tmp_path: Path) -> None:
    config = PolicyConfig(tiny=TINY, lora={"rank": 4})
    policy = load_policy(config, PromptConfig(style="short"), texts=REPORTS * 20, seed=0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    groups = sampled_groups(policy, studies)
    work = grpo_work(policy, tmp_path, loss={"kl": 0.1})
    assert load_reference(work) is None
    forward = forward_of(work, None, groups)
    seen = count_passes({"policy": policy})
    metrics = update(work, groups, counts(groups), forward, None, Stopwatch())
    assert seen["policy tokens"] == 2 and metrics["kl"] > 1e-3


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("iterations", [1, 2])
def test_split_groups_make_the_same_update(
    tiny_policy: Policy, studies: list[Study], tmp_path: Path, shared: bool, iterations: int
) -> None:
    groups = sampled_groups(tiny_policy, studies)
    groups[1].trained = []  # nothing to learn from: it has no forward
    groups[2].trained = [0, 3]
    results = []
    for options in ({}, {"tokens_per_forward": 60}, {"studies_per_forward": 1}):
        options |= {"shared_prefix": shared, "iterations": iterations, "loss": {"kl": 0.1, "clip_low": 0.01}}
        work = grpo_work(tiny_policy, tmp_path, **options)
        reference = load_reference(work)
        forward = forward_of(work, reference, groups)
        seen = count_passes({"policy": tiny_policy})
        for group in groups:
            group.old_logps = {i: torch.tensor(group.samples[i].logps) - 0.02 for i in group.trained}
        tiny_policy.model.zero_grad()
        metrics = update(work, groups, counts(groups), forward, reference, Stopwatch())
        gradients = {name: p.grad.clone() for name, p in tiny_policy.model.named_parameters() if p.grad is not None}
        results.append((seen["policy tokens"], metrics, gradients))
    assert results[0][0] == 1 and results[1][0] > 3 and results[2][0] == 3
    for _, metrics, gradients in results[1:]:
        for name, value in results[0][1].items():
            # Advantages of both signs cancel in the loss: its rounding is that of its terms, which are near 1.
            assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        norm = torch.stack([g.norm() for g in results[0][2].values()]).norm()
        apart = torch.stack([(gradients[name] - g).norm() for name, g in results[0][2].items()]).norm()
        assert norm > 0 and apart / norm < 1e-5


@pytest.mark.parametrize(
    ("options", "later"), [({}, 0), ({"studies_per_forward": 3}, 1), ({"tokens_per_forward": 60}, 6)]
)
def test_a_forward_made_before_the_scores_makes_the_same_update(
    tiny_policy: Policy, studies: list[Study], tmp_path: Path, options: dict[str, Any], later: int
) -> None:
    """Reports that turn out to be masked are in it, and train nothing; the others have no second forward."""
    groups = sampled_groups(tiny_policy, studies)
    work = grpo_work(tiny_policy, tmp_path, loss={"kl": 0.1}, **options)
    reference = load_reference(work)
    forward = forward_of(work, reference, groups)
    results = []
    for early in (False, True):
        for group in groups:
            group.trained = list(range(len(group.samples)))
        first = first_pass(work, groups, forward, reference, Stopwatch()) if early else None
        groups[0].trained, groups[1].trained = [1, 2], []
        tiny_policy.model.zero_grad()
        seen = count_passes({"policy": tiny_policy})
        metrics = update(work, groups, counts(groups), forward, reference, Stopwatch(), first)
        gradients = {name: p.grad.clone() for name, p in tiny_policy.model.named_parameters() if p.grad is not None}
        results.append((seen["policy tokens"], metrics, gradients))
    (_, expected, grads), (passes, metrics, ours) = results
    assert passes == later
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    apart = torch.stack([(ours[name] - g).norm() for name, g in grads.items()]).norm()
    assert norm > 0 and apart / norm < 1e-5


def test_a_step_with_nothing_to_learn_from(tiny_policy: Policy, studies: list[Study], tmp_path: Path) -> None:
    """Every report masked: the gradient is zero and no metric is made up."""
    groups = sampled_groups(tiny_policy, studies)
    for group in groups:
        group.trained = []
    work = grpo_work(tiny_policy, tmp_path)
    metrics = update(work, groups, Normaliser(0, 0, 12), forward_of(work, None, groups), None, Stopwatch())
    assert metrics["loss"] == 0 and "sampling/importance_sampling_ratio/mean" not in metrics
    assert all(not p.grad.any() for p in tiny_policy.model.parameters() if p.grad is not None)


def test_reports_of_another_model_end_the_run(tiny_policy: Policy, studies: list[Study], tmp_path: Path) -> None:
    """An engine that samples from something else than the policy gives log-probs that are far from the trainer's."""
    groups = sampled_groups(tiny_policy, studies)
    work = grpo_work(tiny_policy, tmp_path)
    forward = forward_of(work, None, groups)
    check_sampler(work, update(work, groups, counts(groups), forward, None, Stopwatch()))
    for group in groups:
        group.samples = [replace(sample, logps=tuple(p - 0.6 for p in sample.logps)) for sample in group.samples]
    with pytest.raises(RanksStop, match=r"stage g: .* are 0\.60 nats a token from the trainer's"):
        check_sampler(work, update(work, groups, counts(groups), forward, None, Stopwatch()))
