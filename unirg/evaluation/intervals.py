"""95% intervals: the percentile bootstrap over studies (Efron & Tibshirani 1993, chapter 13).

Every figure of an evaluation is a ratio of two sums over studies: a mean is sum(value) / count, micro F1 is
sum(2 TP) / sum(2 TP + FP + FN), a share is sum(indicator) / count; macro F1 is the mean of such ratios over classes.
One bootstrap therefore serves them all: draw studies with replacement, take both sums, divide. Two runs on the same
studies are compared on the same draws.

Shapes: N studies, C classes, D bootstrap draws, K statistics of the same studies (resampled together: one matrix
product).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from unirg.scoring.contract import Terms

PERCENTILES = (2.5, 97.5)


class Interval(NamedTuple):
    """A figure and the ends of its 95% interval; NaN where no study could be judged."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """Run b less run a on the same studies, its 95% interval, and the gain relative to a's figure."""

    mean: float
    low: float
    high: float
    relative: float


class Statistic(NamedTuple):
    """A figure of a corpus, sum(numerator_N) / sum(denominator_N), kept by study so that it can be resampled.

    Of a figure that is a mean over classes both have the shape (N, C).
    """

    numerator_N: np.ndarray
    denominator_N: np.ndarray

    @property
    def value(self) -> float:
        """The figure on all studies; NaN where the denominator is 0, of every class where there are several."""
        return float(_mean_of_classes(_ratio(self.numerator_N.sum(axis=0), self.denominator_N.sum(axis=0))))

    @property
    def judged(self) -> int:
        """The studies that enter the figure."""
        return int((_by_class(self.denominator_N) != 0).any(axis=1).sum())


def mean_statistic(values: Sequence[float | None] | np.ndarray) -> Statistic:
    """The mean over studies; None and NaN (a metric that could not judge) count in neither sum."""
    values_N = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    known_N = ~np.isnan(values_N)
    return Statistic(np.where(known_N, values_N, 0.0), known_N.astype(np.float64))


def corpus_statistic(terms: Sequence[Terms]) -> Statistic:
    """The figure of these studies' terms (see `unirg.scoring.contract`). A class without a term, 0/0, counts 0 beside
    others that have some, as in scikit-learn; None counts in neither sum."""
    classes = next((len(pairs) for pairs in terms if pairs is not None), 1)
    unjudged = [(0.0, 0.0)] * classes
    pairs_NC2 = np.array([unjudged if pairs is None else pairs for pairs in terms], dtype=np.float64)
    pairs_NC2 = pairs_NC2.reshape(len(terms), classes, 2)
    return Statistic(pairs_NC2[:, :, 0], pairs_NC2[:, :, 1])


def bootstrap_ratio(
    numerator: Sequence[float] | np.ndarray,
    denominator: Sequence[float] | np.ndarray,
    *,
    seed: int = 0,
    draws: int = 1000,
) -> Interval:
    """sum(numerator) / sum(denominator) over studies, with its 95% interval.

    For micro F1 give 2 TP and 2 TP + FP + FN of each study. Raises ValueError where the two differ in length.
    """
    statistic = Statistic(np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64))
    _require_same_studies(len(statistic.numerator_N), len(statistic.denominator_N))
    return intervals([statistic], seed=seed, draws=draws)[0]


def intervals(statistics: Sequence[Statistic], *, seed: int = 0, draws: int = 1000) -> list[Interval]:
    """The interval of each of several statistics of the same studies."""
    values_DK = _drawn(statistics, seed, draws)
    return [Interval(s.value, *_percentiles(values_D)) for s, values_D in zip(statistics, values_DK.T, strict=True)]


def bootstrap_mean(values: Sequence[float | None] | np.ndarray, *, seed: int = 0, draws: int = 1000) -> Interval:
    """The mean over studies with its 95% interval; None and NaN are left out, never counted as zero."""
    return bootstrap_ratio(*mean_statistic(values), seed=seed, draws=draws)


def paired_ratios(
    a: Sequence[Statistic], b: Sequence[Statistic], *, seed: int = 0, draws: int = 1000
) -> list[Difference]:
    """b - a for each pair of statistics, all of the same studies in the same order and on the same bootstrap draws.

    `relative` is (b - a) / |a|, NaN where a is 0. Raises ValueError where the numbers of studies differ.
    """
    for first, second in zip(a, b, strict=True):
        _require_same_studies(len(first.numerator_N), len(second.numerator_N))
    values_DK = _drawn(b, seed, draws) - _drawn(a, seed, draws)
    differences = []
    for first, second, values_D in zip(a, b, values_DK.T, strict=True):
        difference = second.value - first.value
        relative = float(_ratio(difference, abs(first.value)))
        differences.append(Difference(difference, *_percentiles(values_D), relative))
    return differences


def paired_difference(
    a: Sequence[float | None] | np.ndarray,
    b: Sequence[float | None] | np.ndarray,
    *,
    seed: int = 0,
    draws: int = 1000,
) -> Difference:
    """Mean of b less mean of a, per-study scores of two runs on the same studies in the same order.

    A study that either run could not be judged on is left out of both. Raises ValueError where the lengths differ.
    """
    _require_same_studies(len(a), len(b))
    judged = [x is not None and y is not None and not np.isnan(x) and not np.isnan(y) for x, y in zip(a, b)]
    both = [mean_statistic([x if keep else None for x, keep in zip(run, judged)]) for run in (a, b)]
    return paired_ratios(both[:1], both[1:], seed=seed, draws=draws)[0]


@lru_cache(maxsize=2)
def _draws(studies: int, seed: int, draws: int) -> np.ndarray:
    """How often each study is drawn, counts_DN; the same for every statistic of a corpus, hence cached."""
    rng = np.random.default_rng(seed)
    counts_DN = np.empty((draws, studies))
    for row in counts_DN:
        row[:] = np.bincount(rng.integers(studies, size=studies), minlength=studies)
    return counts_DN


def _drawn(statistics: Sequence[Statistic], seed: int, draws: int) -> np.ndarray:
    """The statistics of each bootstrap draw, values_DK; NaN where a draw has no judged study."""
    if not statistics or not len(statistics[0].numerator_N):
        return np.full((draws, len(statistics)), np.nan)
    counts_DN = _draws(len(statistics[0].numerator_N), seed, draws)
    # The classes of all statistics side by side, and where each statistic after the first begins.
    numerators = np.concatenate([_by_class(statistic.numerator_N) for statistic in statistics], axis=1)
    denominators = np.concatenate([_by_class(statistic.denominator_N) for statistic in statistics], axis=1)
    starts = np.cumsum([_by_class(statistic.numerator_N).shape[1] for statistic in statistics])[:-1]
    ratios = np.split(_ratio(counts_DN @ numerators, counts_DN @ denominators), starts, axis=1)
    return np.stack([_mean_of_classes(ratios_DC) for ratios_DC in ratios], axis=1)


def _by_class(values_N: np.ndarray) -> np.ndarray:
    """values_NC; a figure without classes has one."""
    return values_N[:, None] if values_N.ndim == 1 else values_N


def _mean_of_classes(ratios: np.ndarray) -> np.ndarray:
    """The mean over the last axis, an undefined ratio counting 0 unless all are; a single ratio as it is."""
    if ratios.ndim == 0:
        return ratios
    undefined = np.isnan(ratios)
    return np.where(undefined.all(axis=-1), np.nan, np.where(undefined, 0.0, ratios).mean(axis=-1))


def _ratio(numerator: np.ndarray | float, denominator: np.ndarray | float) -> np.ndarray:
    """Division that gives NaN, without a warning, where the denominator is 0."""
    safe = np.where(np.equal(denominator, 0), np.nan, denominator)
    return np.asarray(numerator / safe)


def _percentiles(values_D: np.ndarray) -> tuple[float, float]:
    known = values_D[~np.isnan(values_D)]
    if known.size == 0:
        return float("nan"), float("nan")
    low, high = np.percentile(known, PERCENTILES)
    return float(low), float(high)


def _require_same_studies(a: int, b: int) -> None:
    if a != b:
        raise ValueError(f"paired values must be of the same studies, in the same order: got {a} and {b} of them")
