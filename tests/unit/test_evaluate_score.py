"""The figures of an evaluation: averages, pass@k, intervals and the paired test, against numbers computed by hand."""

from itertools import product

import numpy as np
import pytest

from infir2.errors import DataError
from infir2.evaluate import score
from infir2.evaluate.score import Sample, mean_interval, paired, pass_at_k, sign_flip_p_value, summarise


def samples(scores: dict[str, list[float]], tokens: int = 10) -> list[Sample]:
    return [
        Sample(problem, index, score, tokens + index, index == 0, "text")
        for problem, found in scores.items()
        for index, score in enumerate(found)
    ]


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample() -> None:
    for n, correct, k in ((5, 2, 1), (5, 2, 3), (6, 1, 2), (4, 4, 2), (4, 0, 4), (8, 3, 8)):
        right = [True] * correct + [False] * (n - correct)
        subsets = [s for s in product((0, 1), repeat=n) if sum(s) == k]
        share = sum(any(r for r, chosen in zip(right, s) if chosen) for s in subsets) / len(subsets)
        assert pass_at_k(n, correct, k) == pytest.approx(share)
    with pytest.raises(ValueError, match="pass@5"):
        pass_at_k(4, 1, 5)


def test_a_summary_by_hand() -> None:
    score = summarise(samples({"a": [1, 0, 0, 1], "b": [0, 0, 0, 0], "c": [1, 1, 1, 1]}))
    assert (score.problems, score.samples) == (3, 4)
    assert score.average == pytest.approx((0.5 + 0 + 1) / 3)
    assert score.pass_at == {1: pytest.approx(0.5), 2: pytest.approx((5 / 6 + 0 + 1) / 3), 4: pytest.approx(2 / 3)}
    assert (score.mean_tokens, score.median_tokens, score.truncated) == (11.5, 11.5, 0.25)
    assert 0 <= score.low < score.average < score.high <= 1
    uneven = summarise(samples({"a": [1, 0, 0], "b": [1]}))
    assert uneven.average == pytest.approx((1 / 3 + 1) / 2), "every problem weighs the same"
    assert uneven.pass_at == {1: pytest.approx(2 / 3)}
    with pytest.raises(DataError, match="no sample"):
        summarise([])


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator, covered = np.random.default_rng(1), 0
    for _ in range(60):
        chances = generator.beta(2, 3, 60)  # mean 0.4
        low, high = mean_interval(generator.binomial(8, chances) / 8)
        covered += low <= 0.4 <= high
    assert 52 <= covered <= 60, "95 % of 60 is 57"
    low, high = mean_interval(np.zeros(30))
    assert (low, 1 - high) == (0, pytest.approx(0.025 ** (1 / 30)))
    assert mean_interval(np.ones(30)) == (pytest.approx(1 - high), 1)


@pytest.mark.parametrize(("count", "covered"), [(5, 0.90), (10, 0.93), (30, 0.94)])
def test_intervals_of_few_values_cover_the_truth_as_well(
    monkeypatch: pytest.MonkeyPatch, count: int, covered: float
) -> None:
    """Plain percentiles do so in 84, 90 and 93.5 % of cases."""
    monkeypatch.setattr(score, "RESAMPLES", 2000)
    generator, cases = np.random.default_rng(2), 800
    intervals = [mean_interval(generator.normal(0.5, 0.1, count)) for _ in range(cases)]
    assert covered < sum(low <= 0.5 <= high for low, high in intervals) / cases < 0.97


def test_equal_values_have_an_interval_that_covers_what_was_not_drawn() -> None:
    """The value v has chance p, others are all at one end: if n draws are all v, the mean is in the interval, unless n
    draws of v are no more than 2.5 % likely."""
    for value, lowest, count in product((-1.0, -0.25, 0.0, 0.5, 1.0), (-1.0, 0.0), (2, 5, 30)):
        if value < lowest:
            continue
        low, high = mean_interval(np.full(count, value), lowest)
        assert lowest <= low <= value <= high <= 1
        assert high - low > 0
        for chance, other in product(np.linspace(0.001, 1, 200), (lowest, 1.0)):
            mean = chance * value + (1 - chance) * other
            assert low - 1e-9 <= mean <= high + 1e-9 or chance**count <= 0.025 + 1e-9
    noise = np.array([0.3 - 0.1, 0.4 - 0.2, 0.5 - 0.3] * 5)
    assert len(set(noise)) > 1
    low, high = mean_interval(noise, -1.0)
    assert high - low > 0.1, "equal but for rounding"
    assert mean_interval(np.array([0.5])) == mean_interval(np.array([1.0])) == (None, None)
    pair = paired(samples({"a": [0]}), samples({"a": [1]}))
    assert (pair.low, pair.high, pair.difference) == (None, None, 1)
    assert summarise(samples({"a": [0, 1]})).low is None


def test_the_paired_test_by_hand() -> None:
    """Three differences of 0.5, 0.25 and -0.25: of 8 assignments of signs, 4 have a sum at least 0.5 from 0."""
    first = samples({"a": [0, 0, 0, 0], "b": [1, 0, 0, 0], "c": [1, 1, 0, 0]})
    second = samples({"c": [1, 0, 0, 0], "a": [1, 1, 0, 0], "b": [1, 1, 0, 0]})
    pair = paired(first, second)
    assert (pair.problems, pair.better, pair.worse) == (3, 2, 1)
    assert pair.difference == pytest.approx(0.5 / 3)
    sums = [abs(0.5 * a + 0.25 * b - 0.25 * c) for a, b, c in product((-1, 1), repeat=3)]
    assert pair.p_value == pytest.approx(sum(s >= 0.5 - 1e-12 for s in sums) / 8)
    assert pair.low <= pair.difference <= pair.high
    same = paired(first, first)
    assert (same.difference, same.p_value, same.low) == (0, 1, -same.high)
    assert same.high == pytest.approx(1 - 0.025 ** (1 / 3)), "three problems do not show that there is no difference"
    with pytest.raises(DataError, match="not asked the same problems"):
        paired(first, samples({"a": [1]}))


def test_the_random_p_value_is_near_the_exact_one_and_uniform_without_a_difference() -> None:
    generator = np.random.default_rng(3)
    differences = generator.normal(0.3, 1, 16)
    exact = sign_flip_p_value(differences)
    padded = sign_flip_p_value(np.concatenate([differences, [0.0]]))  # 17 problems: sampled; a zero changes nothing
    assert padded == pytest.approx(exact, abs=0.02)
    values = [sign_flip_p_value(generator.normal(0, 1, 12)) for _ in range(200)]
    assert 2 <= sum(value <= 0.05 for value in values) <= 20
    assert abs(np.mean(values) - 0.5) < 0.07
