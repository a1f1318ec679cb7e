"""Forwards are planned so that every answer is in exactly one, within the budget wherever that is possible."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unirg.grpo.forward import DENSE, Forward, Part, plan_forwards
from unirg.grpo.shared_prefix import packed_forward

PACKED = packed_forward("sdpa")


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
        assert len({part.group for part in parts}) == len(parts)  # no prompt twice
        alone = len(parts) == 1 and len(parts[0].answers) == 1
        assert budget is None or alone or tokens(forward, parts, prompts, answers) <= budget


@pytest.mark.parametrize(("budget", "forwards"), [(16384, 1), (1400, 2), (1323, 3), (1000, 3)])
def test_one_long_answer_does_not_part_the_others(budget: int, forwards: int) -> None:
    """A truncated report among short ones: those still share their prompt."""
    plan = plan_forwards(PACKED, [300], [[75] * 15 + [1024]], budget=budget)
    assert len(plan) == forwards


@pytest.mark.parametrize(("forward", "expected"), [(PACKED, 100 + 29 + 19 + 50 + 9), (DENSE, 3 * (100 + 30))])
def test_what_a_forward_holds(forward: Forward, expected: int) -> None:
    assert forward.tokens([(100, [30, 20]), (50, [10])]) == expected
