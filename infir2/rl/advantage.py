"""Rewards of a group of samples of one prompt -> their advantages. Pure.

GRPO (arXiv 2402.03300, section 4.1.2): a sample is as good as it is better than the mean of its group.
"""

import statistics
from collections.abc import Sequence

SPREAD = 1e-6
"""Standard deviation up to which the rewards of a group count as the same."""


def has_spread(rewards: Sequence[float]) -> bool:
    """Whether a group tells good samples from bad ones; DAPO trains on such groups only (arXiv 2503.14476, 3.2)."""
    return statistics.stdev(rewards) > SPREAD


def group_advantages(rewards: Sequence[float], std_normalization: bool = True) -> list[float]:
    """(r - mean) / (std + 1e-6) with the unbiased standard deviation; without normalisation r - mean (Dr. GRPO,
    arXiv 2503.20783). All zero for a group without spread. Two rewards or more."""
    mean = statistics.fmean(rewards)
    scale = statistics.stdev(rewards) + SPREAD if std_normalization else 1.0
    if not has_spread(rewards):
        return [0.0] * len(rewards)
    return [(reward - mean) / scale for reward in rewards]
