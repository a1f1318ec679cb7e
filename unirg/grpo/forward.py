"""What a forward is, and the dense one: log-probs of given answers under the policy, one row per answer, each with its
own copy of the prompt.

Images are encoded once per study where the model allows it. Shapes: B answers, P padded prompt, T padded answer, V
vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from unirg.grpo.loss import logps_and_entropy
from unirg.policy import EncodedPrompt, Policy
from unirg.rollout.hf import left_padded


@dataclass(frozen=True)
class AnswerScores:
    """Per-token log-probs and entropies of answers (B, T), zero where `mask_BT` is 0; entropies carry no gradient."""

    logps_BT: torch.Tensor
    entropies_BT: torch.Tensor
    mask_BT: torch.Tensor


@dataclass(frozen=True)
class Forward:
    """A way to compute log-probs of answers: `logps` with the arguments and result of `answer_logps`, and `tokens`, how
    many positions the language model computes for parts given as (prompt length, answer lengths)."""

    name: str
    logps: Callable[..., AnswerScores]
    tokens: Callable[[Sequence[tuple[int, Sequence[int]]]], int]


@dataclass(frozen=True)
class Part:
    """Answers of one group that go into one forward: the group's place in the batch, and which of its answers."""

    group: int
    answers: tuple[int, ...]


def plan_forwards(
    forward: Forward,
    prompts: Sequence[int],
    answers: Sequence[Sequence[int]],
    *,
    budget: int | None = None,
    groups: int | None = None,
) -> list[list[Part]]:
    """Splits a batch, given as prompt lengths and the lengths of each prompt's answers, into forwards.

    Everything stays in order; a forward holds at most `groups` groups and, with a budget, at most so many tokens. A
    group that alone is over the budget goes answer by answer, as many to a forward as fit, each forward with the prompt
    again; one answer is never split. Groups without answers are left out.
    """

    def fits(parts: Sequence[Part]) -> bool:
        tokens = forward.tokens([(prompts[p.group], [answers[p.group][a] for a in p.answers]) for p in parts])
        return (budget is None or tokens <= budget) and (groups is None or len(parts) <= groups)

    plan: list[list[Part]] = []
    for g, own in enumerate(answers):
        whole = Part(g, tuple(range(len(own))))
        pieces = [whole] if fits([whole]) else [Part(g, (a,)) for a in whole.answers]
        for piece in pieces if own else ():
            last = plan[-1] if plan else []
            if last and last[-1].group == g:
                joined = [*last[:-1], Part(g, last[-1].answers + piece.answers)]
            else:
                joined = [*last, piece]
            if last and fits(joined):
                plan[-1] = joined
            else:
                plan.append([piece])
    return plan


def answer_logps(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    answers: Sequence[Sequence[Sequence[int]]],
    *,
    temperature: float = 1.0,
) -> AnswerScores:
    """Log-probs of `answers[i]`, the token ids of the answers to `prompts[i]`; rows follow in that order."""
    count = sum(map(len, answers))
    if extra := film_stand_in(policy, prompts):
        prompts, answers = [*prompts, *extra], [*answers, [[]]]
    rows = [i for i, group in enumerate(answers) for _ in group]
    flat = [list(answer) for group in answers for answer in group]
    batch = left_padded(policy, [prompts[i] for i in rows])
    length = max(len(answer) for answer in flat)
    ids_BT = torch.full((len(flat), length), policy.pad_id)
    mask_BT = torch.zeros(len(flat), length, dtype=torch.long)
    for row, answer in enumerate(flat):
        ids_BT[row, : len(answer)] = torch.tensor(answer, dtype=torch.long)
        mask_BT[row, : len(answer)] = 1
    ids_BT, mask_BT = ids_BT.to(policy.device), mask_BT.to(policy.device)
    first_B = torch.tensor([prompts[i].next_position for i in rows], device=policy.device)
    positions_BT = first_B[:, None] + torch.arange(length, device=policy.device)
    if batch["position_ids"].dim() == 3:
        positions_BT = positions_BT.expand(3, -1, -1)
    keep = length + 1
    types_BT = torch.zeros_like(ids_BT)
    takes_keep = "logits_to_keep" in policy.forward_takes
    out = (policy.engine or policy.model)(
        input_ids=torch.cat([batch["input_ids"], ids_BT], dim=1),
        attention_mask=torch.cat([batch["attention_mask"], mask_BT], dim=1),
        position_ids=torch.cat([batch["position_ids"], positions_BT], dim=-1),
        **({"token_type_ids": torch.cat([t, types_BT], 1)} if (t := batch.get("token_type_ids")) is not None else {}),
        **policy.image_inputs(prompts, rows),
        use_cache=False,
        **({"logits_to_keep": keep} if takes_keep else {}),
    )
    logits_BTV = out.logits[:, -keep:-1]
    logps_BT, entropies_BT = logps_and_entropy(logits_BTV, ids_BT, temperature, policy.banned_ids)
    scores = (logps_BT * mask_BT, entropies_BT.detach() * mask_BT, mask_BT)
    return AnswerScores(*(x_BT[:count] for x_BT in scores))


def film_stand_in(policy: Policy, prompts: Sequence[EncodedPrompt]) -> list[EncodedPrompt]:
    """A blank film's prompt for a forward whose own have no film, where every rank must call the vision tower; its
    answer is no one's, so that it adds zeros to the tower's gradients."""
    return [policy.blank] if policy.blank is not None and not any(prompt.images for prompt in prompts) else []


def dense_tokens(parts: Sequence[tuple[int, Sequence[int]]]) -> int:
    """Positions of the padded batch that holds a row for each answer of the parts."""
    rows = sum(len(lengths) for _, lengths in parts)
    longest = max((length for _, lengths in parts for length in lengths), default=0)
    return rows * (max(prompt for prompt, _ in parts) + longest)


DENSE = Forward("dense", answer_logps, dense_tokens)
