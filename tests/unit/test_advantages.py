"""Advantages: known values, what is masked, rounding noise, and properties that any scores must satisfy."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unirg.grpo.advantages import advantages, most_extreme

NAN = float("nan")
SCORE = st.integers(-20, 20).map(lambda x: x / 4)  # steps of 1/4 are exact in binary, so ties are ties


def grouped(size: int) -> st.SearchStrategy[list[list[float]]]:
    return st.lists(st.lists(SCORE, min_size=size, max_size=size), min_size=1, max_size=4)


def flat(groups: list[list[float]]) -> list[float]:
    return [score for group in groups for score in group]


def test_known_values_of_one_group() -> None:
    # mean 1, sample standard deviation sqrt((1 + 1 + 0 + 0) / 3)
    result = advantages({"r": [0.0, 2.0, 1.0, 1.0]}, {"r": 1.0}, group_size=4)
    expected = 1 / ((2 / 3) ** 0.5 + 1e-4)
    torch.testing.assert_close(result.advantages_N, torch.tensor([-expected, expected, 0.0, 0.0]))
    torch.testing.assert_close(result.rewards_N, torch.tensor([0.0, 2.0, 1.0, 1.0]))
    assert result.zero_variance_groups == 0 and result.groups == 1


def test_scales_differ_only_in_what_divides() -> None:
    scores = {"r": [0.0, 2.0, 10.0, 14.0]}
    centred = torch.tensor([-1.0, 1.0, -2.0, 2.0])
    torch.testing.assert_close(advantages(scores, {"r": 1.0}, 2, scale="none").advantages_N, centred)
    batch = torch.tensor([0.0, 2.0, 10.0, 14.0]).std() + 1e-4
    torch.testing.assert_close(advantages(scores, {"r": 1.0}, 2, scale="batch").advantages_N, centred / batch)


def test_normalise_then_sum_keeps_a_small_reward_audible() -> None:
    # In the sum, the reward of the larger scale decides the order alone; normalised, the two weigh the same.
    scores = {"small": [0.0, 0.0, 1.0, 1.0], "large": [0.0, 100.0, 0.0, 100.0]}
    weights = {"small": 1.0, "large": 1.0}
    summed = advantages(scores, weights, 4).advantages_N
    assert summed[1] - summed[0] > 90 * (summed[2] - summed[0])
    normalised = advantages(scores, weights, 4, "normalise_then_sum").advantages_N
    torch.testing.assert_close(normalised[1], normalised[2], atol=1e-3, rtol=0)
    assert normalised[3] > 1 > -1 > normalised[0]


def test_unjudged_report_is_masked_and_leaves_the_baseline_alone() -> None:
    with_hole = advantages({"r": [0.0, None, 2.0, NAN, 1.0]}, {"r": 1.0}, 5)
    without = advantages({"r": [0.0, 2.0, 1.0]}, {"r": 1.0}, 3)
    assert with_hole.mask_N.tolist() == [True, False, True, False, True]
    torch.testing.assert_close(with_hole.advantages_N[with_hole.mask_N], without.advantages_N)
    assert with_hole.advantages_N[1] == 0 and with_hole.rewards_N[1].isnan()


def test_report_lacking_a_reward_its_group_has_is_masked_when_summing() -> None:
    scores = {"a": [1.0, 2.0, 3.0, 0.0], "penalty": [-5.0, -5.0, None, -5.0]}
    result = advantages(scores, {"a": 1.0, "penalty": 1.0}, 4)
    assert result.mask_N.tolist() == [True, True, False, True]  # its sum, 3, would have looked best by far
    assert result.advantages_N.argmax() == 1
    kept = advantages(scores, {"a": 1.0, "penalty": 1.0}, 4, "normalise_then_sum")
    assert kept.mask_N.all() and kept.advantages_N.argmax() == 2


def test_reward_that_a_whole_group_lacks_is_left_out_for_that_group() -> None:
    scores = {"a": [1.0, 2.0, 1.0, 2.0], "b": [None, None, 0.0, 4.0]}
    result = advantages(scores, {"a": 1.0, "b": 1.0}, 2)
    assert result.mask_N.all()
    torch.testing.assert_close(result.advantages_N.sign(), torch.tensor([-1.0, 1.0, -1.0, 1.0]))


def test_reward_of_weight_zero_is_only_logged() -> None:
    result = advantages({"a": [1.0, 2.0], "watched": [None, 7.0]}, {"a": 1.0, "watched": 0.0}, 2)
    alone = advantages({"a": [1.0, 2.0]}, {"a": 1.0}, 2)
    assert result.mask_N.all()
    torch.testing.assert_close(result.advantages_N, alone.advantages_N)


@pytest.mark.parametrize("aggregation", ["sum_then_normalise", "normalise_then_sum"])
@pytest.mark.parametrize("base", [0.3, 30.0, 3e5])
def test_rounding_noise_is_no_signal(aggregation: str, base: float) -> None:
    noise = [base, base * (1 + 1e-7), base * (1 - 6e-8), base]
    result = advantages({"r": noise}, {"r": 1.0}, 4, aggregation)
    assert result.advantages_N.tolist() == [0.0] * 4
    assert result.zero_variance_groups == 1


def test_one_judged_report_teaches_nothing() -> None:
    for aggregation in ("sum_then_normalise", "normalise_then_sum"):
        result = advantages({"r": [None, 3.0, None, None, 0.0, 1.0, 0.0, 1.0]}, {"r": 1.0}, 4, aggregation)
        assert result.advantages_N[:4].tolist() == [0.0] * 4
        assert result.zero_variance_groups == 1 and result.groups == 2


def test_a_step_without_any_score_is_no_error() -> None:
    result = advantages({"r": [None] * 4}, {"r": 1.0}, 2)
    assert not result.mask_N.any() and result.advantages_N.tolist() == [0.0] * 4 and result.zero_variance_groups == 2


@pytest.mark.parametrize(
    ("scores", "weights", "size", "message"),
    [
        ({"a": [1.0]}, {"b": 1.0}, 1, "same labels"),
        ({"a": [1.0, 2.0], "b": [1.0]}, {"a": 1.0, "b": 1.0}, 1, "'b': 1"),
        ({"a": [1.0, 2.0, 3.0]}, {"a": 1.0}, 2, "groups of 2"),
        ({"a": [1.0]}, {"a": 0.0}, 1, "weight"),
    ],
)
def test_input_that_does_not_fit_is_named(scores: dict, weights: dict, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        advantages(scores, weights, size)


@settings(max_examples=60, deadline=None)
@given(groups=grouped(4), holes=st.sets(st.integers(0, 15)), scale=st.sampled_from(["group", "batch", "none"]))
def test_a_group_sums_to_zero(groups: list[list[float]], holes: set[int], scale: str) -> None:
    scores = [None if i in holes else score for i, score in enumerate(flat(groups))]
    result = advantages({"r": scores}, {"r": 2.0}, 4, scale=scale)
    torch.testing.assert_close(result.advantages_N.view(-1, 4).sum(1), torch.zeros(len(groups)), atol=2e-5, rtol=0)
    assert result.advantages_N.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    a=grouped(4),
    b=grouped(4),
    order=st.permutations(range(4)),
    aggregation=st.sampled_from(["sum_then_normalise", "normalise_then_sum"]),
)
def test_reordering_a_group_reorders_its_advantages(
    a: list[list[float]], b: list[list[float]], order: list[int], aggregation: str
) -> None:
    studies = min(len(a), len(b))
    a, b = a[:studies], b[:studies]
    weights = {"a": 1.0, "b": -0.5}
    straight = advantages({"a": flat(a), "b": flat(b)}, weights, 4, aggregation).advantages_N
    shuffled = {"a": flat([[g[i] for i in order] for g in a]), "b": flat([[g[i] for i in order] for g in b])}
    torch.testing.assert_close(
        advantages(shuffled, weights, 4, aggregation).advantages_N, straight.view(-1, 4)[:, list(order)].flatten()
    )


@settings(max_examples=60, deadline=None)
@given(groups=grouped(4), shift=SCORE, factor=st.sampled_from([0.5, 2.0, 8.0]))
def test_shift_changes_nothing_and_scale_none_is_linear(groups: list[list[float]], shift: float, factor: float) -> None:
    scores, weights = flat(groups), {"r": 1.0}
    for aggregation in ("sum_then_normalise", "normalise_then_sum"):
        torch.testing.assert_close(
            advantages({"r": [s + shift for s in scores]}, weights, 4, aggregation).advantages_N,
            advantages({"r": scores}, weights, 4, aggregation).advantages_N,
        )
    scaled = advantages({"r": [s * factor for s in scores]}, weights, 4, scale="none").advantages_N
    torch.testing.assert_close(scaled, factor * advantages({"r": scores}, weights, 4, scale="none").advantages_N)


@settings(max_examples=60, deadline=None)
@given(groups=grouped(6), keep=st.integers(1, 6))
def test_most_extreme_has_the_largest_variance_of_all_subsets(groups: list[list[float]], keep: int) -> None:
    values = torch.tensor(flat(groups))
    kept = most_extreme(values, 6, keep)
    assert len(kept) == keep * len(groups) and kept.tolist() == sorted(set(kept.tolist()))
    for s, group in enumerate(groups):
        mine = [i - 6 * s for i in kept.tolist() if s == i // 6]
        assert len(mine) == keep
        group_6 = torch.tensor(group, dtype=torch.float64)
        best = max(group_6[list(subset)].var(correction=0) for subset in combinations(range(6), keep))
        torch.testing.assert_close(group_6[mine].var(correction=0), best)


def test_most_extreme_refuses_to_keep_more_than_there_are() -> None:
    with pytest.raises(ValueError, match="keep is 5"):
        most_extreme(torch.zeros(4), 4, 5)
