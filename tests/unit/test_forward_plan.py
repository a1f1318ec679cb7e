"""Forwards are planned so that every answer is in exactly one, within the budget wherever that is possible."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unirg.grpo.forward import DENSE, Forward, Part, plan_forwards
from unirg.grpo.shared_prefix import shared_prefix

PACKED = shared_prefix("sdpa")


def tokens(forward: Forward, parts: list[Part], prompts: list[int], answers: list[list[int]]) -> int:
    return forward.tokens([(prompts[p.group], [answers[p.group][a] for a in p.answers]) for p in parts])


@given(
    batch=st.lists(st.tuples(st.integers(1, 60), st.lists(st.integers(1, 40), max_size=9)), min_size=1, max_size=6),
    budget=st.none() | st.integers(1, 400),
    groups=st.none() | st.integers(1, 3),
    forward=st.sampled_from([PACKED, DENSE]),
)
def test_every_answer_once_within_the_budget(
    batch: list[tuple[int, list[int]]], budget: int | None, groups: int | None, forward: Forward
) -> None:
    prompts, answers = [p for p, _ in batch], [own for _, own in batch]
    plan = plan_forwards(forward, prompts, answers, budget=budget, groups=groups)
    seen = [(part.group, a) for parts in plan for part in parts for a in part.answers]
    assert seen == [(g, a) for g, own in enumerate(answers) for a in range(len(own))]
    for parts in plan:
        assert parts and all(part.answers for part in parts)
        assert groups is None or len(parts) <= groups
        alone = len(parts) == 1 and len(parts[0].answers) == 1
        assert budget is None or alone or tokens(forward, parts, prompts, answers) <= budget


@given(
    prompt=st.integers(1, 50),
    answers=st.lists(st.integers(1, 30), min_size=1, max_size=10),
    budget=st.integers(30, 300),
)
def test_no_more_parts_than_the_budget_asks_for(prompt: int, answers: list[int], budget: int) -> None:
    plan = plan_forwards(PACKED, [prompt], [answers], budget=budget)
    if tokens(PACKED, [Part(0, tuple(range(len(answers))))], [prompt], [answers]) <= budget:
        assert len(plan) == 1
    counts = [len(part.answers) for parts in plan for part in parts]
    assert max(counts) - min(counts) <= 1 or len(plan) < len(counts)  # even parts, unless two share a forward


@pytest.mark.parametrize(("forward", "expected"), [(PACKED, 100 + 29 + 19 + 50 + 9), (DENSE, 3 * (100 + 30))])
def test_what_a_forward_holds(forward: Forward, expected: int) -> None:
    assert forward.tokens([(100, [30, 20]), (50, [10])]) == expected
