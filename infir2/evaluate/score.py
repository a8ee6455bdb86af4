"""Samples to figures: avg@k with a confidence interval, pass@k, and the paired comparison of two models.

The problem is the unit: every problem weighs the same, however many samples it has, and intervals and tests resample
problems, because samples of one problem are alike. Randomness is seeded, so the same samples give the same figures.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infir2.errors import DataError
from infir2.evaluate.student import t95

RESAMPLES = 10_000
EXACT_UP_TO = 16
"""Problems up to which the paired test goes through all 2^n assignments of signs."""
_SEED = 0


@dataclass(frozen=True)
class Sample:
    """One scored response."""

    problem: str
    index: int
    """Which of the problem's samples."""
    score: float
    """0 to 1."""
    tokens: int
    truncated: bool
    """Ended at the limit of tokens."""
    response: str
    answer: str | None = None
    decided: str = ""
    question: str = ""


@dataclass(frozen=True)
class TaskScore:
    """What the samples of one task say."""

    problems: int
    samples: int
    """Of every problem (the fewest, where some could not be scored)."""
    average: float
    """avg@k: mean over problems of the mean over samples."""
    low: float | None
    high: float | None
    """95 % confidence interval of the average; None for a single problem, which says nothing of others."""
    pass_at: dict[int, float]
    """k -> pass@k, for k = 1, 2, 4, ... and ``samples``."""
    mean_tokens: float
    median_tokens: float
    truncated: float
    """Share of the samples."""

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "pass_at": {str(k): value for k, value in self.pass_at.items()}}


@dataclass(frozen=True)
class Paired:
    """Second model minus first, on the same problems."""

    problems: int
    difference: float
    low: float | None
    high: float | None
    """95 % confidence interval of the difference; None for a single problem."""
    p_value: float
    """Of a two-sided sign-flip permutation test: how often chance alone gives so large a difference."""
    better: int
    worse: int
    """Problems on which the second model scores higher, and lower."""

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


def summarise(samples: Sequence[Sample]) -> TaskScore:
    """Raises DataError without samples."""
    if not samples:
        raise DataError("no sample could be scored")
    groups = by_problem(samples)
    means = np.array([statistics.fmean(scores) for scores in groups.values()])
    low, high = mean_interval(means)
    fewest = min(map(len, groups.values()))
    ks = sorted({2**power for power in range(fewest.bit_length()) if 2**power <= fewest} | {fewest})
    return TaskScore(
        problems=len(groups),
        samples=fewest,
        average=float(means.mean()),
        low=low,
        high=high,
        pass_at={
            k: statistics.fmean(pass_at_k(len(s), sum(x >= 1 for x in s), k) for s in groups.values()) for k in ks
        },
        mean_tokens=statistics.fmean(sample.tokens for sample in samples),
        median_tokens=float(statistics.median(sample.tokens for sample in samples)),
        truncated=statistics.fmean(sample.truncated for sample in samples),
    )


def by_problem(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """Scores of each problem, in the order of the samples."""
    groups: dict[str, list[float]] = {}
    for sample in samples:
        groups.setdefault(sample.problem, []).append(sample.score)
    return groups


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from n of which ``correct`` are:
    1 - C(n - correct, k) / C(n, k) (Chen et al., arXiv 2107.03374)."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def mean_interval(values: NDArray[np.float64], lowest: float = 0.0) -> tuple[float, float] | tuple[None, None]:
    """95 % confidence interval of the mean of independent values in [``lowest``, 1]: percentiles of a bootstrap. None
    for a single value.

    The percentiles lie as far outside of 2.5 % and 97.5 % as Student's t lies outside of the normal distribution, and
    further by the root of n / (n - 1), by which n resampled values vary too little (the "expanded percentiles" of
    Hesterberg: What teachers should know about the bootstrap, 2015). Without that, intervals of 10 values miss the mean
    twice as often as they say.

    Where all values are equal, resampling shows no spread. Other values may still exist, and be so rare that none was
    drawn: a share of them that n draws miss with a chance of 2.5 %. The interval is where the mean lies if they are all
    the lowest, or all the highest, that a value can be. For 0 and 1, which are named before any is drawn, this is the
    exact (Clopper-Pearson) interval. For others one draw is spent on naming the value: over all values v of chances
    p(v) below 1 - share, the sum of p(v)^n is at most (1 - share)^(n - 1).
    """
    count, value = len(values), float(values[0])
    if count == 1:
        return None, None
    if np.ptp(values) > 1e-9:  # equal up to rounding: 0.3 - 0.1 and 0.4 - 0.2
        outside = 100 * statistics.NormalDist().cdf(-math.sqrt(count / (count - 1)) * t95(count - 1))
        low, high = np.percentile(_bootstrap_means(values), [outside, 100 - outside])
        return float(low), float(high)
    share = 1.0 - 0.025 ** (1 / (count if value in (0.0, 1.0) else count - 1))
    return value - share * (value - lowest), value + share * (1.0 - value)


def paired(first: Sequence[Sample], second: Sequence[Sample]) -> Paired:
    """Compare two models problem by problem. Raises DataError unless both have the same problems."""
    ours, theirs = by_problem(first), by_problem(second)
    if ours.keys() != theirs.keys():
        raise DataError("the two models were not asked the same problems, so they cannot be paired")
    differences = np.array([statistics.fmean(theirs[name]) - statistics.fmean(ours[name]) for name in ours])
    low, high = mean_interval(differences, lowest=-1.0)
    return Paired(
        problems=len(differences),
        difference=float(differences.mean()),
        low=low,
        high=high,
        p_value=sign_flip_p_value(differences),
        better=int((differences > 0).sum()),
        worse=int((differences < 0).sum()),
    )


def sign_flip_p_value(differences: NDArray[np.float64]) -> float:
    """Share of the assignments of signs whose mean is at least as far from 0 as the one seen: all of them for few
    problems, else RESAMPLES random ones and the one seen."""
    seen = abs(differences.sum())
    size = len(differences)
    if size <= EXACT_UP_TO:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=size)))
        return float((np.abs(signs @ differences) >= seen - 1e-12).mean())
    generator = np.random.default_rng(_SEED)
    extreme = 1
    for _ in range(0, RESAMPLES, 1000):  # a thousand at a time, for memory
        signs = generator.integers(0, 2, (1000, size)) * 2.0 - 1.0
        extreme += int((np.abs(signs @ differences) >= seen - 1e-12).sum())
    return extreme / (RESAMPLES + 1)


def _bootstrap_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    generator = np.random.default_rng(_SEED)
    parts = [values[generator.integers(0, len(values), (1000, len(values)))].mean(1) for _ in range(RESAMPLES // 1000)]
    return np.concatenate(parts)
