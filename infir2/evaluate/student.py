"""The mean of a few independent values, such as those of some seeds, and how sure it is: Student's t."""

import math
import statistics
from collections.abc import Sequence

# Two-sided 95 % quantiles for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def student_interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """95 % confidence interval of the mean; None for less than two values."""
    if len(values) < 2:
        return None, None
    mean = statistics.fmean(values)
    half = t95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def t95(freedom: int) -> float:
    """Two-sided 95 % quantile: from a table, beyond it Abramowitz and Stegun 26.7.5 (error < 1e-6)."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))
