"""A packed row gives what the dense path gives, whatever is around it: lengths, loss, adapters, precision, kernels.

And the check that says so fails for a wrong position and for every leak of the mask.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import CheckpointError

from tests import families
from tests.conftest import TINY
from tests.parity import (
    LENGTHS,
    LONGEST,
    Answers,
    assert_same,
    assert_same_gradients,
    assert_same_scores,
    encode,
    gradients,
    random_answers,
    wide_policy,
)
from unirg.grpo import prefix_attention, shared_prefix
from unirg.grpo.forward import AnswerScores, answer_logps
from unirg.grpo.loss import LossConfig, Normaliser, grpo_loss
from unirg.grpo.prefix_attention import PackedLayout, PackedStudy
from unirg.grpo.shared_prefix import packed_logps
from unirg.policy import EncodedPrompt, LoraConfig, Policy


@pytest.fixture(scope="module")
def policy() -> Policy:
    return wide_policy()


@pytest.fixture(scope="module")
def prompts(policy: Policy) -> list[EncodedPrompt]:
    return encode(policy)


@pytest.fixture(scope="module")
def answers(policy: Policy) -> Answers:
    return random_answers(policy, LENGTHS)


one_group = st.lists(st.integers(1, LONGEST), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(one_group, min_size=1, max_size=4), st.integers(0, 3))
@example([[1]], 0)
@example([[1, 1, 1]], 1)
@example([[LONGEST]], 3)
@example([[3, 80, 1, 20, 33, 2], [70, 4]], 0)  # so unlike that padding them together would cost more than they do
@example([[LONGEST] * 4, [LONGEST] * 4], 0)
@example([[5] * 4, [5] * 4, [5] * 4, [5] * 4], 2)
@example([[1, LONGEST], [1], [LONGEST, 1]], 3)
def test_random_lengths(policy: Policy, prompts: list[EncodedPrompt], lengths: list[list[int]], first: int) -> None:
    chosen = [prompts[(first + i) % len(prompts)] for i in range(len(lengths))]
    assert_same(policy, chosen, random_answers(policy, lengths), packed_logps, answer_logps)


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_the_loss(policy: Policy, prompts: list[EncodedPrompt], answers: Answers, kind: Any, kl: float) -> None:
    """With a reference policy and log-probs of an older one, each path through its own forwards."""
    other = wide_policy(seed=1)
    count = sum(map(len, answers))
    advantages_B = torch.linspace(-1, 1, count)
    config, normaliser = LossConfig(kind=kind, kl=kl), Normaliser(count, sum(map(sum, LENGTHS)), LONGEST)
    metrics = []

    def step(score: Callable[..., AnswerScores]) -> tuple[AnswerScores, torch.Tensor, dict[str, torch.Tensor]]:
        with torch.no_grad():
            reference_BT = score(other, prompts, answers).logps_BT

        def loss(scores: AnswerScores) -> torch.Tensor:
            old_BT = scores.logps_BT.detach() + torch.linspace(0.5, -0.5, count)[:, None]
            result = grpo_loss(
                scores.logps_BT,
                old_BT,
                scores.mask_BT,
                advantages_B,
                config=config,
                normaliser=normaliser,
                reference_logps_BT=reference_BT if kl else None,
                entropies_BT=scores.entropies_BT,
            )
            metrics.append(result.metrics)
            return result.loss

        return gradients(policy, lambda: score(policy, prompts, answers), loss)

    ours, our_loss, our_gradients = step(packed_logps)
    scores, expected_loss, expected = step(answer_logps)
    assert_same_scores(ours, scores)
    assert ("kl" in metrics[0]) == bool(kl) and metrics[1]["clip_ratio/region_mean"] > 0
    torch.testing.assert_close(our_loss, expected_loss, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(metrics[0], metrics[1], atol=1e-5, rtol=1e-5)
    assert_same_gradients(our_gradients, expected)


@pytest.mark.parametrize("freeze", [False, True], ids=["trained tower", "frozen tower"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["weights", "adapters"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_adapters_frozen_towers_and_checkpointing(lora: LoraConfig | None, freeze: bool, checkpointing: bool) -> None:
    policy = wide_policy(lora=lora, freeze_vision=freeze, gradient_checkpointing=checkpointing)
    trained = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert any("visual" in name for name in trained) != freeze
    assert all("lora" in name for name in trained) == (lora is not None)
    assert_same(policy, encode(policy), random_answers(policy, LENGTHS), packed_logps, answer_logps)


def test_checkpointing_recomputes_with_the_layout(
    answers: Answers, policy: Policy, prompts: list[EncodedPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer attends twice, the second time in the backward; gradients are those without checkpointing. Were the
    layout lost in between, they would not be."""
    checkpointed = wide_policy(gradient_checkpointing=True)
    layouts: list[PackedLayout | None] = []
    lose = False

    def attend(*args: Any, prefix_layout: PackedLayout | None = None, **kwargs: Any) -> Any:
        layouts.append(prefix_layout)
        kept = None if lose and len(layouts) > TINY.layers else prefix_layout
        return prefix_attention.shared_prefix_attention(*args, prefix_layout=kept, **kwargs)

    registered = prefix_attention.AttentionInterface._global_mapping
    monkeypatch.setitem(registered, prefix_attention.NAME, attend)
    _, _, expected = gradients(policy, lambda: packed_logps(policy, prompts, answers))
    assert len(layouts) == TINY.layers
    layouts.clear()
    _, _, ours = gradients(checkpointed, lambda: packed_logps(checkpointed, prompts, answers))
    assert len(layouts) == 2 * TINY.layers and None not in layouts
    assert_same_gradients(ours, expected)
    layouts.clear()
    lose = True
    with pytest.raises((AssertionError, CheckpointError)):
        assert_same_gradients(
            gradients(checkpointed, lambda: packed_logps(checkpointed, prompts, answers))[2], expected
        )


def planted(target: Any, name: str, fault: Any) -> Callable[..., AnswerScores]:
    """The packed forward with something of it replaced."""

    def packed(*args: Any, **kwargs: Any) -> AnswerScores:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, name, fault)
            return packed_logps(*args, **kwargs)

    return packed


def coarse_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """SDPA by hand, its scores rounded to bfloat16."""
    scores = (query.bfloat16() @ key.bfloat16().transpose(-1, -2)) * kwargs["scale"]
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if kwargs.get("is_causal") else kwargs["attn_mask"]
    return scores.masked_fill(~seen, float("-inf")).softmax(-1).to(value.dtype) @ value


def test_bfloat16_is_no_less_precise_than_on_the_dense_path(prompts: list[EncodedPrompt]) -> None:
    """Root mean square over 12 drawings of the weights with 32 answers each, against the dense path in float32.

    Both paths round as often, in another order: their errors are draws of one size. Over 40 drawings the ratio of one
    drawing's errors had mean 1.00 and deviation 0.015; that of 12 deviates by 0.004, and 1.02 is five times that. One
    rounding too many, of the scores before the softmax, is beyond it (1.07).
    """
    paths = {"dense": answer_logps, "packed": packed_logps}
    paths["coarse"] = planted(prefix_attention, "scaled_dot_product_attention", coarse_attention)
    squares = {name: torch.zeros(2) for name in paths}
    policy = wide_policy()
    for seed in range(12):
        families.draw(policy.model, seed)
        answers = random_answers(policy, [[6, 9, 14, 20, 11, 3, 8, 17]] * len(prompts), seed)
        truth, _, expected = gradients(policy, lambda a=answers: answer_logps(policy, prompts, a))
        norm = torch.stack([g.norm() for g in expected.values()]).norm()
        for name, score in paths.items():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                scores, _, grads = gradients(policy, lambda s=score, a=answers: s(policy, prompts, a))
            logps = (scores.logps_BT - truth.logps_BT).detach()[truth.mask_BT.bool()].square().mean()
            apart = torch.stack([(grads[key] - g).norm() for key, g in expected.items()]).norm() / norm
            squares[name] += torch.stack([logps, apart.square()])
    ratios = {name: (sums / squares["dense"]).sqrt() for name, sums in squares.items()}
    assert (ratios["packed"] < 1.02).all(), ratios  # of log-probs, of gradients
    assert (ratios["coarse"] > 1.02).all(), ratios


def relaid(change: Callable[[Sequence[PackedStudy]], Sequence[PackedStudy]]) -> Callable[..., AnswerScores]:
    """The packed forward with ids and positions as they should be, and the attention of other studies."""
    return planted(shared_prefix, "PackedLayout", lambda studies, *rest: PackedLayout(tuple(change(studies)), *rest))


def future_mask(*args: Any) -> torch.Tensor:
    return torch.ones_like(answer_mask(*args))


right_position = EncodedPrompt.next_position.fget  # type: ignore[attr-defined]
answer_mask = prefix_attention._answer_mask
FAULTS = {
    "answers one position too far": planted(
        EncodedPrompt, "next_position", property(lambda prompt: right_position(prompt) + 1)
    ),
    "answers one position too near": planted(
        EncodedPrompt, "next_position", property(lambda prompt: right_position(prompt) - 1)
    ),
    "an answer sees the one before": relaid(
        lambda studies: [PackedStudy(s.start, s.prompt, (sum(s.answers),)) for s in studies]
    ),
    "an answer does not see the prompt's last token": relaid(
        lambda studies: [PackedStudy(s.start, s.prompt - 1, (1 + s.answers[0], *s.answers[1:])) for s in studies]
    ),
    "a study sees the one before": relaid(
        lambda studies: [PackedStudy(0, studies[1].start + studies[1].prompt, studies[1].answers), *studies[2:]]
    ),
    "an answer sees its own future": planted(prefix_attention, "_answer_mask", future_mask),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(policy: Policy, prompts: list[EncodedPrompt], answers: Answers, name: str) -> None:
    """In the scores, and in the gradients for themselves."""
    if name == "a study sees the one before":
        answers = [[answer[:1] for answer in answers[0]], *answers[1:]]  # so that the first study is its prompt alone
    assert_same(policy, prompts, answers, packed_logps, answer_logps)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(policy, prompts, answers, FAULTS[name], answer_logps)
    ours = gradients(policy, lambda: FAULTS[name](policy, prompts, answers))[2]
    with pytest.raises(AssertionError, match="gradients differ"):
        assert_same_gradients(ours, gradients(policy, lambda: answer_logps(policy, prompts, answers))[2])
