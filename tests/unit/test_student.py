"""Student's t: quantiles, and intervals of a few values."""

import math

import pytest

from infir2.evaluate.student import student_interval, t95


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (15, 2.131), (16, 2.119905), (20, 2.085963), (30, 2.042272), (120, 1.979930), (10**6, 1.959966)],
)
def test_quantiles_of_t(freedom: int, quantile: float) -> None:
    """Values of published tables."""
    assert t95(freedom) == pytest.approx(quantile, abs=2e-6)


def test_an_interval_by_hand() -> None:
    half = 4.303 * 1.0 / math.sqrt(3)  # standard deviation 1
    assert student_interval([1.0, 2.0, 3.0]) == (pytest.approx(2 - half), pytest.approx(2 + half))
    assert student_interval([1.0]) == (None, None)
