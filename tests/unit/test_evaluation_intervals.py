"""Bootstrap intervals: known values, coverage, masking, pairing."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unirg.evaluation.intervals import (
    Statistic,
    bootstrap_mean,
    bootstrap_ratio,
    mean_statistic,
    paired_difference,
    paired_ratios,
)


def test_mean_interval_agrees_with_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(0.5, 0.2, size=2000)
    mean, low, high = bootstrap_mean(values, draws=2000)
    half_width = 1.96 * values.std() / math.sqrt(len(values))
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - half_width, abs=0.1 * half_width)
    assert high == pytest.approx(mean + half_width, abs=0.1 * half_width)


def test_micro_f1_interval_covers_the_true_value_about_95_times_in_100() -> None:
    rng = np.random.default_rng(7)
    recall, prevalence, false_rate, studies, corpora = 0.7, 0.3, 0.1, 150, 200
    expected_tp, expected_fn = prevalence * recall, prevalence * (1 - recall)
    expected_fp = (1 - prevalence) * false_rate
    truth = 2 * expected_tp / (2 * expected_tp + expected_fp + expected_fn)
    covered = 0
    for corpus in range(corpora):
        present = rng.random(studies) < prevalence
        said = np.where(present, rng.random(studies) < recall, rng.random(studies) < false_rate)
        tp, fp, fn = present & said, ~present & said, present & ~said
        _, low, high = bootstrap_ratio(2.0 * tp, 2.0 * tp + fp + fn, seed=corpus, draws=300)
        covered += low <= truth <= high
    assert 0.90 <= covered / corpora <= 0.99


def test_none_and_nan_are_left_out_and_never_count_as_zero() -> None:
    assert bootstrap_mean([1.0, None, 1.0, float("nan")]) == (1.0, 1.0, 1.0)
    assert all(math.isnan(x) for x in bootstrap_mean([None, None]))
    assert all(math.isnan(x) for x in bootstrap_mean([]))


def test_ratio_is_of_the_pooled_counts_not_the_mean_of_ratios() -> None:
    # Study 1: 1 of 1 right; study 2: 0 of 3. Pooled .25, mean of ratios .5.
    assert bootstrap_ratio([1, 0], [1, 3]).mean == pytest.approx(0.25)


def test_paired_interval_is_narrower_than_the_difference_of_two_unpaired_ones() -> None:
    rng = np.random.default_rng(3)
    difficulty = rng.normal(0.5, 0.3, size=400)
    a, b = difficulty + rng.normal(0, 0.02, 400), difficulty + 0.01 + rng.normal(0, 0.02, 400)
    paired = paired_difference(a, b)
    assert paired.mean == pytest.approx(b.mean() - a.mean())
    assert paired.low > 0  # the intervals of the two means overlap widely
    assert bootstrap_mean(a).high > bootstrap_mean(b).low
    assert paired.relative == pytest.approx((b.mean() - a.mean()) / a.mean())


def test_paired_difference_leaves_a_study_out_of_both_runs() -> None:
    assert paired_difference([0.0, 1.0, 0.5], [1.0, None, 0.5]).mean == pytest.approx(0.5)


def test_paired_runs_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same studies.*3 and 2"):
        paired_difference([1, 2, 3], [1, 2])


def test_relative_gain_over_zero_is_undefined() -> None:
    assert math.isnan(paired_difference([0.0, 0.0], [1.0, 1.0]).relative)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_bounds_hold_order_and_stay_inside_the_data(values: list[float], seed: int) -> None:
    interval = bootstrap_mean(values, seed=seed, draws=50)
    assert interval == bootstrap_mean(values, seed=seed, draws=50)
    assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9


def test_a_run_against_itself_differs_by_exactly_nothing() -> None:
    run = mean_statistic(np.random.default_rng(0).random(50))
    assert paired_ratios([run], [run])[0][:3] == (0.0, 0.0, 0.0)


def test_statistic_without_any_denominator_is_nan() -> None:
    assert math.isnan(Statistic(np.zeros(3), np.zeros(3)).value)
