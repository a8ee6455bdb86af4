"""Learning-rate schedules against numbers worked out by hand."""

import math
from typing import Any

import pytest

from infir2.config import OptimSection
from infir2.train.schedule import learning_rate

PAPER: dict[str, Any] = {"lr": 1e-4, "min_lr": 1e-5, "warmup_steps": 5_000, "decay_steps": 5_000}
STEPS = 40_000


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, 2e-8),
        (2_500, 5e-5),
        (5_000, 1e-4),
        (5_001, 1e-4),
        (20_000, 1e-4),
        (35_000, 1e-4),
        (36_250, 1e-5 + 9e-5 * (0.5 + math.sqrt(0.125))),  # a quarter of the way down: (1 + cos 45°) / 2
        (37_500, 5.5e-5),
        (40_000, 1e-5),
    ],
)
def test_the_papers_wsd_schedule(step: int, expected: float) -> None:
    assert learning_rate(step, STEPS, OptimSection(**PAPER)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("step", "expected"), [(35_001, 1e-4 - 9e-5 / 5_000), (37_500, 5.5e-5), (40_000, 1e-5)])
def test_linear_decay(step: int, expected: float) -> None:
    assert learning_rate(step, STEPS, OptimSection(**PAPER, decay="linear")) == pytest.approx(expected, rel=1e-12)


def test_wsd_never_rises_after_the_warmup_and_never_leaves_its_limits() -> None:
    optim = OptimSection(**PAPER)
    rates = [learning_rate(step, STEPS, optim) for step in range(1, STEPS + 1)]
    assert rates[:5_000] == sorted(rates[:5_000])
    assert rates[5_000:] == sorted(rates[5_000:], reverse=True)
    assert max(rates) == 1e-4
    assert min(rates[5_000:]) == pytest.approx(1e-5, rel=1e-12)
    assert rates.count(1e-4) == 30_001  # the last warm-up step and the 30,000 stable ones


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_a_decay_run_is_the_end_of_the_whole_schedule(decay: str) -> None:
    whole = OptimSection(**PAPER, decay=decay)
    alone = OptimSection(**PAPER | {"warmup_steps": 0}, decay=decay)
    for step in (1, 2, 1_234, 4_999, 5_000):
        assert learning_rate(step, 5_000, alone) == learning_rate(35_000 + step, STEPS, whole)


def test_cosine_goes_from_the_warmup_to_the_last_step() -> None:
    optim = OptimSection(lr=1.0, min_lr=0.1, schedule="cosine", warmup_steps=10, decay_steps=7)  # decay_steps: wsd's
    rates = [learning_rate(step, 110, optim) for step in (1, 10, 35, 60, 110)]
    expected = [0.1, 1.0, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 0.55, 0.1]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_constant_stays_after_the_warmup() -> None:
    optim = OptimSection(lr=3e-4, min_lr=1e-5, schedule="constant", warmup_steps=4)
    assert [learning_rate(step, 8, optim) for step in (1, 2, 4, 5, 8)] == [7.5e-5, 1.5e-4, 3e-4, 3e-4, 3e-4]


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_edges(schedule: str) -> None:
    no_ramps = OptimSection(lr=1e-3, schedule=schedule)
    assert learning_rate(1, 10, no_ramps) == pytest.approx(1e-3, rel=0.03)  # no warm-up: the first step counts
    only_warmup = OptimSection(lr=1e-3, schedule=schedule, warmup_steps=10)
    assert learning_rate(10, 10, only_warmup) == 1e-3
    no_decay = learning_rate(10, 10, OptimSection(lr=1e-3, min_lr=1e-5, schedule=schedule))
    assert no_decay == pytest.approx(1e-5 if schedule == "cosine" else 1e-3)
