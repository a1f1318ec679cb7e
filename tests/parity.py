"""What "packed equals dense" means: the same log-probs, entropies and gradients, to float32 rounding; and the policy,
prompts and answers that it is asked of."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests import families
from tests.conftest import REPORTS, TINY, invented_studies
from unirg.grpo.forward import AnswerScores
from unirg.grpo.shared_prefix import prepare
from unirg.policy import EncodedPrompt, Policy, PolicyConfig, load_policy
from unirg.prompt import PromptConfig
from unirg.study import Study

Answers = list[list[list[int]]]
Objective = Callable[[AnswerScores], torch.Tensor]
LONGEST = 24
LENGTHS = ([1, 9, LONGEST], [20, 3], [7], [1, 1, 5])  # of one token, of the longest, alone


def wide_policy(seed: int = 0, **settings: Any) -> Policy:
    """The tiny Qwen3-VL, prepared, with matrices drawn wide."""
    policy = load_policy(PolicyConfig(tiny=TINY, **settings), PromptConfig(style="short"), texts=REPORTS * 20)
    families.draw(policy.model, seed)
    assert prepare(policy) is None
    policy.model.train()
    return policy


def encode(policy: Policy) -> list[EncodedPrompt]:
    """Prompts with one film, with two, with none, and with a frontal, a lateral and a prior film and a prior report."""
    studies = invented_studies()
    text = Study("text", indication="cough", findings="The lungs are clear.")
    followed = dataclasses.replace(studies[3], id="followed", prior=studies[1])
    prompts = [policy.encode(study) for study in (studies[0], studies[3], text, followed)]
    assert [len(prompt.images.get("image_grid_thw", ())) for prompt in prompts] == [1, 2, 0, 3]
    return prompts


def random_answers(policy: Policy, lengths: Sequence[Sequence[int]], seed: int = 0) -> Answers:
    """Answers of those lengths, of any ids that a sampler could draw."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.tensor(sorted(set(range(policy.base.config.get_text_config().vocab_size)) - set(policy.banned_ids)))
    return [[allowed[torch.randint(len(allowed), (n,), generator=generator)].tolist() for n in own] for own in lengths]


def weighted(scores: AnswerScores) -> torch.Tensor:
    """A loss in which every token counts with a weight of its own, of either sign."""
    generator = torch.Generator().manual_seed(1)
    weights_BT = torch.randn(scores.logps_BT.shape, generator=generator)
    return (scores.logps_BT * weights_BT).sum() / scores.mask_BT.sum()


def gradients(
    policy: Policy, score: Callable[[], AnswerScores], objective: Objective = weighted
) -> tuple[AnswerScores, torch.Tensor, dict[str, torch.Tensor]]:
    """Scores, loss and the gradients of all trainable parameters."""
    policy.model.zero_grad(set_to_none=True)
    scores = score()
    loss = objective(scores)
    loss.backward()
    grads = {name: p.grad.detach().clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad(set_to_none=True)
    return scores, loss.detach(), grads


def assert_same_scores(ours: AnswerScores, expected: AnswerScores) -> None:
    assert torch.equal(ours.mask_BT, expected.mask_BT)
    torch.testing.assert_close(ours.logps_BT, expected.logps_BT, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.entropies_BT, expected.entropies_BT, atol=1e-5, rtol=0)


def assert_same_gradients(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To 1e-5 of their common norm, and to 1e-5 of each parameter's own; the floor of the latter is for gradients that
    are nothing but rounding, such as those of the biases of keys, which cancel in the softmax."""
    assert ours.keys() == expected.keys() and ours
    total = torch.stack([g.norm() for g in expected.values()]).norm()
    assert total > 0 and torch.isfinite(total)
    apart = {name: (ours[name] - g).norm() for name, g in expected.items()}
    relative = float(torch.stack(list(apart.values())).norm() / total)
    assert relative < 1e-5, f"gradients differ by {relative:.1e} of their norm"
    for name, g in expected.items():
        assert apart[name] < 1e-5 * g.norm() + 1e-7 * total, f"{name}: {apart[name]:.1e} of {g.norm():.1e}"


def assert_same(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    answers: Answers,
    packed: Callable[..., AnswerScores],
    dense: Callable[..., AnswerScores],
    objective: Objective = weighted,
) -> None:
    """`packed` and `dense`, called with policy, prompts and answers, agree in everything that training reads."""
    ours, our_loss, our_gradients = gradients(policy, lambda: packed(policy, prompts, answers), objective)
    scores, loss, expected = gradients(policy, lambda: dense(policy, prompts, answers), objective)
    assert_same_scores(ours, scores)
    torch.testing.assert_close(our_loss, loss, atol=1e-5, rtol=1e-5)
    assert_same_gradients(our_gradients, expected)
