"""Math answers: extraction, normalisation, comparison by the real math-verify, and bombs that must not hold it up."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infir2.errors import DataError
from infir2.reward.extract import after_thinking, final_answer, last_answer_line, last_boxed
from infir2.reward.math import MathScorer, normalize, same_integer
from infir2.reward.score import Score
from infir2.reward.workers import WorkerPool


@pytest.fixture(scope="module")
def scorer() -> Iterator[MathScorer]:
    made = MathScorer(limit_s=1.5, workers=2)
    yield made
    made.close()


# extraction -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{34}", "34"),
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x : x > 1\right\}}", r"\left\{x : x > 1\right\}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{7} and \boxed{8", "7"),
        (r"\boxed{8", None),
        ("no box", None),
        (r"\boxed{}", ""),
        (r"\\boxed{5}", None),  # a line break and a word
        ("{" * 50 + r"\boxed{3}", "3"),
    ],
)
def test_last_boxed(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so\nAnswer: 34", "34"),
        ("Answer: 1\nAnswer: 2\n", "2"),
        ("**Answer:** 34", "34"),
        ("**Answer**: $34$", "$34$"),
        ("The final answer: 3/4", "3/4"),
        ("ANSWER : C", "C"),
        ("Answer:", None),
        ("answers: 3", None),
        ("nothing", None),
    ],
)
def test_last_answer_line(text: str, expected: str | None) -> None:
    assert last_answer_line(text) == expected


def test_thinking() -> None:
    truncated = r"<think>so \boxed{34}"
    whole = r"<think>perhaps \boxed{1}</think>it is \boxed{34}"
    assert final_answer(truncated) is None
    assert final_answer(truncated, "ignore") == "34"
    assert final_answer(whole) == "34"
    assert final_answer(r"perhaps \boxed{1}</think>\boxed{34}", "required") == "34"
    assert final_answer(r"\boxed{34}") == "34"
    assert final_answer(r"\boxed{34}", "required") is None
    assert final_answer(r"a</think>\boxed{1}<think>b") is None
    assert final_answer(r"<think>\boxed{34}</think>no box here") is None
    assert after_thinking("x" * 300_000) == "x" * 100_000


@pytest.mark.parametrize(
    "unit", [r"\boxed{", "{", "}", r"\boxed{}", "answer:", "</think>", "<think>", r"\boxed    ", "\\"]
)
def test_extraction_is_linear(unit: str) -> None:
    began = time.monotonic()
    final_answer(unit * (1_000_000 // len(unit)))
    assert time.monotonic() - began < 2


# comparison -----------------------------------------------------------------------------------------------------------
EQUAL = [
    ("34", "34"), ("34.", "34"), ("34.0", "34"), ("034", "34"), ("-0", "0"), ("+5", "5"), ("$34$", "34"),
    (r"\(34\)", "34"), ("1,234", "1234"), ("1{,}234", "1234"), (r"34^\circ", "34"), (r"34\%", "34"), (r"\$34", "34"),
    (r"5\text{ cm}", "5"), (r"5 \text{ cm}^2", "5"), ("x = 5", "5"), ("5 apples", "5"), (r"\frac12", "1/2"),
    (r"\dfrac{1}{2}", r"\frac{1}{2}"), (r"\frac{1}{2}", "0.5"), (r"\frac{6}{8}", r"\frac{3}{4}"), ("(1,2)", "(1, 2)"),
    (r"\left(1,2\right)", "(1,2)"), (r"\{2,1\}", r"\{1,2\}"), (r"\sqrt{8}", r"2\sqrt{2}"), ("(x+1)^2", "x^2+2x+1"),
    (r"\pi/2", r"\frac{\pi}{2}"), (r"\text{Monday}", "Monday"), (r"x \in [0,1)", "[0,1)"), (r"2\pi r", r"2 \pi r"),
    ("5 m", "5"), ("1.5 hours", "1.5"), ("5 square units", "5"), (r"5 \mathrm{~cm}", "5"), (r"5\text{ m/s}", "5"),
    ("x = 5 cm", "5"), ("5 cm^2", "5"), ("10 positive integers", "10"), (r"5 \text{ miles per hour}.", "5"),
    (r"5\text{ apples}", "5"), ("90 degrees", "90"), ("50 percent", "50"), ("2.5 mol", "2.5"), ("5", "5 dollars"),
    (r"\frac{1}{2}\text{ cm}", r"\frac{1}{2}"), (r"12\pi\text{ cm}", r"12\pi"), ("5", "5 paths"),
    ("12 345", "12345"), ("- 1,234", "-1234"), (r"\,1,234\;", "1234"), ("12 345 km", "12345"),
    ("-.5 cm", "-.5"), ("12 345.", "12345"),
    (r"1\,234", "1234"), (r"1,\!234", "1234"), ("1 234 567", "1,234,567"), ("(12,345)", "(12, 345)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
]  # fmt: skip
DIFFERENT = [
    ("35", "34"), ("-34", "34"), ("3.4", "34"), ("2^{10}", "1024"), (r"\frac{68}{2}", "34"), ("34 or 35", "34"),
    ("34, 35", "34"), (r"\int_0^1 x^2 dx", r"\frac{1}{3}"), (r"\sum_{k=1}^3 \frac1{2^k}", r"\frac78"), ("", "34"),
    ("0.333", r"\frac13"), (r"\text{Tuesday}", r"\text{Monday}"), ("(2,1)", "(1,2)"), ("[0,1]", "[0,1)"),
    ("x^2", "x^3"), (r"\frac13,\frac12", r"\frac13"), ("nonsense", r"\frac12"), ("1234567890" * 200, "34"),
    (r"\frac{3!}{4!}", r"\frac14"),
    ("10ab", "10"), ("10", "10ab"), ("10 ab", "10"), ("6ab", "6xy"), ("2pi", "2"), ("2.5ab", "2.5"), ("2.5", "2.5ab"),
    (r"3\mathbf{i}", "3"), ("5m", "5"), ("5 thousands", "5"), ("3 fifths", "3"), ("2 million", "2"),
    (r"2\text{ dozen}", "2"),
    (r"34\text{ or 35}", "34"), (r"34.5\text{ or }35", "34.5"), ("3 4", "34"), (r"3\quad 4", "34"), (r"3\,4", "34"),
    ("12, 345", "12345"), ("1 23", "123"), ("1 2 345", "12345"), ("2 1/2", "21/2"), ("3 4.5", "34.5"),
]  # fmt: skip


def test_equal_and_different_answers(scorer: MathScorer) -> None:
    pairs = [(rf"<think>hm</think>\boxed{{{answer}}}", label) for answer, label in EQUAL + DIFFERENT]
    scores = scorer.score_many(pairs)
    right = [1.0] * len(EQUAL) + [0.0] * len(DIFFERENT)
    wrong = [(pair, score) for pair, score, value in zip(pairs, scores, right) if score.value != value]
    assert wrong == []


def test_what_decided(scorer: MathScorer) -> None:
    answers = [
        r"\boxed{34}",
        "Answer: 34.0",
        r"\boxed{35}",
        "<think>x",
        "x",
        r"\boxed{2^5}",
        r"\boxed{" + "1" * 2000 + "}",
    ]
    decided = [score.decided for score in scorer.score_many([(answer, "34") for answer in answers])]
    assert decided == ["string", "integer", "integer", "truncated", "no answer", "unevaluated", "too long"]
    (symbolic,) = scorer.score_many([(r"\boxed{0.25}", r"\frac{1}{4}")])
    assert symbolic == Score(1.0, "0.25", "symbolic")


def test_dapo_form(scorer: MathScorer) -> None:
    response = "<think>\nlong\n</think>\nSo there are 34.\n\nAnswer: $34$"
    assert [s.value for s in scorer.score_many([(response, "34"), (response, 34), (response, "35")])] == [1, 1, 0]


def test_whole_number_labels_can_be_symbolic(scorer: MathScorer) -> None:
    loose = MathScorer(integer_labels="symbolic")
    loose._pool = scorer._pool  # saves a start
    assert [s.value for s in loose.score_many([(r"\boxed{2^{10}}", "1024"), (r"\boxed{2^{9}}", "1024")])] == [1, 0]


@pytest.mark.parametrize("label", [None, "", "  ", True, ["34"], r"\boxed{}"])
def test_bad_labels(scorer: MathScorer, label: object) -> None:
    with pytest.raises(DataError, match="label"):
        scorer.score_many([(r"\boxed{1}", label)])


number = st.integers(-(10**30), 10**30).map(str)
labels = st.one_of(
    number,
    st.tuples(number, st.integers(1, 999)).map(lambda t: rf"\frac{{{t[0]}}}{{{t[1]}}}"),
    st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: f"{x:.4f}"),
    st.lists(number, min_size=2, max_size=4).map(lambda xs: "(" + ", ".join(xs) + ")"),
    st.lists(number, min_size=1, max_size=4).map(lambda xs: r"\{" + ", ".join(xs) + r"\}"),
    st.tuples(number, st.integers(2, 99)).map(lambda t: rf"{t[0]}\sqrt{{{t[1]}}} + \pi"),
    st.sampled_from(
        [r"\text{even}", "x^2 + 1", r"\left(\frac12, 3\right]", r"90^\circ", "1,234", r"50\%", "A", "y = 2x"]
    ),
)


@given(labels, st.sampled_from([r"\boxed{%s}", r"<think>\boxed{0}</think>The end: $\boxed{%s}$.", "Answer: %s"]))
@settings(max_examples=300, deadline=None)
def test_every_label_equals_itself(label: str, form: str) -> None:
    pool_not_needed = MathScorer(workers=1)
    (score,) = pool_not_needed.score_many([(form % label, label)])
    assert score.value == 1.0
    assert score.decided in ("string", "integer")


@given(st.integers(-(10**40), 10**40), st.integers(-(10**40), 10**40))
def test_integers_are_compared_as_integers(a: int, b: int) -> None:
    assert same_integer(str(a), f"{b:+}") == (a == b)
    assert same_integer(str(a), f"{a}.00") is True
    assert same_integer(str(a), "x") is None


@given(st.text(alphabet=r"0123456789.,+-^{}\frac$ %xyz()=!_textin", max_size=60))
@settings(max_examples=300, deadline=None)
def test_normalize_never_fails(text: str) -> None:
    assert isinstance(normalize(text), str)


# bombs ----------------------------------------------------------------------------------------------------------------
BOMBS = [
    r"9^{9^{9^{9^{9}}}}",
    r"(" * 140 + "x" + ")" * 140,
    r"\frac{" * 40 + "1" + "}{2}" * 40,
    r"10^{10^{9}} + \frac{1}{7}",
    r"\left(x+y+z+1\right)^{4000}",
    r"\sqrt{" * 45 + "2" + "}" * 45,
    "x" * 299,
    r"2^{2^{2^{2^{2^{2}}}}}-1",
    r"\sin(" * 30 + "x" + ")" * 30,
    "1+" * 149 + "1",
]


def test_a_thousand_pairs_with_bombs_in_bounded_time(scorer: MathScorer) -> None:
    """One pair in a hundred is a bomb, each with a label that calls for symbolic comparison."""
    rng = random.Random(0)
    pairs, expected = [], []
    for place in range(1000):
        if place % 100 == 50:
            pairs.append((rf"\boxed{{{BOMBS[place // 100]}}}", r"\frac{1}{7}"))
            expected.append(0)
        else:
            a, b, right = rng.randrange(1, 40), rng.randrange(41, 80), rng.random() < 0.5
            label = rf"\frac{{{a}}}{{{b}}}" if place % 10 == 0 else str(a * b)
            answer = f"{a if right else a + 1}/{b}" if place % 10 == 0 else str(a * b + (not right))
            pairs.append((rf"<think>so</think>\boxed{{{answer}}}", label))
            expected.append(int(right))
    began = time.monotonic()
    scores = scorer.score_many(pairs)
    took = time.monotonic() - began
    assert [int(score.value) for score in scores] == expected
    assert sum(score.decided == "timeout" for score in scores) >= 1
    assert took < 30


def test_texts_that_are_too_large_never_reach_a_parser() -> None:
    scorer = MathScorer(workers=1)
    began = time.monotonic()
    digits, nested = "9" * 10_000_000, r"\frac{1}{" * 100_000
    scores = scorer.score_many([(rf"\boxed{{{digits}}}", "7"), (nested, "7"), (r"\boxed{" + nested, r"\frac17")])
    assert [score.value for score in scores] == [0, 0, 0]
    assert time.monotonic() - began < 5
    scorer.close()


# the pool -------------------------------------------------------------------------------------------------------------
def test_slow_items_are_killed_and_the_others_keep_their_order() -> None:
    pool = WorkerPool("sleep", limit_s=0.3, workers=2)
    began = time.monotonic()
    found = pool.run([0.0, 30, 0.01, 30, 0.02, "not a number", 0.03])
    assert "'str'" in found[5].pop("detail")
    assert found == [
        {"value": 0.0}, {"timeout": True}, {"value": 0.01}, {"timeout": True}, {"value": 0.02}, {"error": "TypeError"},
        {"value": 0.03},
    ]  # fmt: skip
    assert time.monotonic() - began < 10
    assert pool.run([]) == []
    pool.close()


def test_a_signal_does_not_cut_a_large_item_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infir2.reward.workers._START_S", 5.0)
    pool = WorkerPool("sleep", limit_s=1.0, workers=1)
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)  # while the worker starts, and its pipe is full
    try:
        (reply,) = pool.run([["x" * 1_000_000]])
        assert reply["error"] == "TypeError"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        pool.close()


def test_a_killed_worker_is_replaced_and_close_leaves_no_process() -> None:
    pool = WorkerPool("sleep", limit_s=5, workers=1)
    assert pool.run([0.0]) == [{"value": 0.0}]
    first = pool._workers[0]._process.pid
    threading.Timer(0.3, os.kill, (first, signal.SIGKILL)).start()
    assert pool.run([1.5]) == [{"timeout": True}]
    assert pool.run([0.0]) == [{"value": 0.0}]
    second = pool._workers[0]._process.pid
    assert second != first
    pool.close()
    for pid in (first, second):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert pool.run([0.0]) == [{"value": 0.0}]  # and can be used again
    pool.close()


def test_scoring_in_threads(scorer: MathScorer) -> None:
    """math-verify's own time limits fail outside the main thread; ours do not care."""
    found: list[float] = []

    def score() -> None:
        found.extend(s.value for s in scorer.score_many([(r"\boxed{0.5}", r"\frac12"), (r"\boxed{0.6}", r"\frac12")]))

    threads = [threading.Thread(target=score) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1.0, 0.0] * 4
