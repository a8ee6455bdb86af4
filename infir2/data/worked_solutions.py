"""Worked examples to fine-tune on, made on this machine: generated questions, each with a step-by-step solution.

The questions are reasoning-gym's, the solutions are written by the solvers below, and the library's scorer has to give
every answer full marks. Stage 1 has easy questions, stage 2 harder ones. An answer reads
``<think>\\nsteps\\n</think>\\n\\\\boxed{answer}``. Whether a question is held out is decided by a hash of its text, so
no seed ever brings a held-out question into training.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from infir2.errors import DataError, did_you_mean

Split = Literal["train", "held_out"]
Solution = tuple[list[str], str]
"""Steps, final answer."""
HELD_OUT_SHARE = 0.1
_MISSES = 5000  # draws without a new question after which a family counts as used up


@dataclass(frozen=True)
class WorkedExample:
    """One question with its solution."""

    family: str
    question: str
    steps: tuple[str, ...]
    answer: str
    reference: dict[str, Any]
    """The library's own record of the question, which its scorer wants."""

    @property
    def completion(self) -> str:
        return f"<think>\n{chr(10).join(self.steps)}\n</think>\n\\boxed{{{self.answer}}}"

    def row(self) -> dict[str, Any]:
        """A row for fine-tuning."""
        messages = [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.completion}]
        return {"messages": messages, "family": self.family}

    def prompt_row(self) -> dict[str, Any]:
        """A row for reinforcement learning with the reward ``reasoning_gym``."""
        label = {"dataset": self.family, "entry": self.reference}
        return {"prompt": self.question, "label": label, "family": self.family}

    def text_row(self) -> dict[str, Any]:
        """A row for pre-training, plain text."""
        return {"text": f"{self.question}\n{self.completion}"}


@dataclass(frozen=True)
class Family:
    """One kind of question: the library's settings for both stages, and the solver."""

    solve: Callable[[dict[str, Any]], Solution]
    easy: dict[str, Any]
    hard: dict[str, Any]


def worked_examples(
    stage: int, count: int, seed: int, split: Split = "train", families: Sequence[str] = ()
) -> Iterator[WorkedExample]:
    """``count`` different examples, the families (all of them by default) in turn; the same ones every time.

    A longer stream begins with the shorter one. A family that has no new questions left is passed over; DataError
    where all of them are used up, or for an unknown family.
    """
    chosen = list(families or FAMILIES)
    for name in chosen:
        if name not in FAMILIES:
            raise DataError(f"{name}: no such family; there are {', '.join(FAMILIES)}.{did_you_mean(name, FAMILIES)}")
    streams = {name: _family(name, stage, seed, split) for name in chosen}
    made = 0
    while made < count:
        if not streams:
            raise DataError(f"only {made} of {count} different examples exist in {', '.join(chosen)} of stage {stage}")
        for name in list(streams):
            example = next(streams[name], None)
            if example is None:
                del streams[name]
                continue
            yield example
            made += 1
            if made == count:
                return


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the held-out part: a hash of its text decides."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < HELD_OUT_SHARE * 2**64


def _family(name: str, stage: int, seed: int, split: Split) -> Iterator[WorkedExample]:
    """Different questions of one family and split, solved and verified."""
    import reasoning_gym

    if stage not in (1, 2):
        raise DataError(f"stage {stage}: there are stages 1 and 2")
    family = FAMILIES[name]
    # The library draws question i from seed + i: hashing keeps the streams of neighbouring seeds apart.
    digest = hashlib.blake2b(f"{seed}:{name}:{stage}".encode(), digest_size=6).digest()
    settings = family.easy if stage == 1 else family.hard
    dataset = reasoning_gym.create_dataset(name, size=2**31, seed=int.from_bytes(digest, "little"), **settings)
    seen: set[str] = set()
    index = misses = 0
    while misses < _MISSES:
        item = dataset[index]
        index += 1
        question = item["question"].strip()
        if question in seen or is_held_out(question) != (split == "held_out"):
            misses += 1
            continue
        misses = 0
        seen.add(question)
        steps, answer = family.solve(item["metadata"])
        example = WorkedExample(name, question, tuple(steps), answer, item)
        if dataset.score_answer(answer=answer, entry=item) < 1.0:
            raise RuntimeError(f"{name}: {question!r}: {answer!r} is not the answer {item['answer']!r}")
        yield example


def _chain_sum(facts: dict[str, Any]) -> Solution:
    first, *rest = facts["expression"].split(" ")
    total = int(first)
    steps: list[str] = []
    for sign, number in zip(rest[::2], rest[1::2]):
        total = _step(total, sign, int(number), steps)
    return steps, str(total)


def _basic_arithmetic(facts: dict[str, Any]) -> Solution:
    """One operation a line, in the order in which they bind: brackets, then products, then from the left."""
    words: list[str] = re.findall(r"\d+|[-+*()]", facts["expression"])
    steps: list[str] = []
    value, rest = _sum(words, steps)
    assert not rest
    return steps, str(value)


def _sum(words: list[str], steps: list[str]) -> tuple[int, list[str]]:
    value, words = _product(words, steps)
    while words and words[0] in "+-":
        sign, other, words = words[0], *_product(words[1:], steps)
        value = _step(value, sign, other, steps)
    return value, words


def _product(words: list[str], steps: list[str]) -> tuple[int, list[str]]:
    value, words = _atom(words, steps)
    while words and words[0] == "*":
        other, words = _atom(words[1:], steps)
        value = _step(value, "*", other, steps)
    return value, words


def _atom(words: list[str], steps: list[str]) -> tuple[int, list[str]]:
    if words[0] == "-":
        value, words = _atom(words[1:], steps)
        return -value, words
    if words[0] == "(":
        value, words = _sum(words[1:], steps)
        return value, words[1:]
    return int(words[0]), words[1:]


def _step(left: int, sign: str, right: int, steps: list[str]) -> int:
    """One operation; sums of more than one digit column by column, from the right: 48-39(18-9=9, 3-3=0)=9."""
    result = {"+": left + right, "-": left - right, "*": left * right}[sign]
    columns = [] if sign == "*" else _columns(left, right if sign == "+" else -right)
    spelled = f"({', '.join(columns)})" if columns else ""
    steps.append(f"{left}{sign}{f'({right})' if right < 0 else right}{spelled}={result}")
    return result


def _columns(left: int, right: int) -> list[str]:
    """left + right, one column a piece: numbers of one sign are added, else the smaller is taken from the larger."""
    large, small = max(abs(left), abs(right)), min(abs(left), abs(right))
    if large < 10:
        return []
    same = (left < 0) == (right < 0)
    pieces, carry = [], 0
    for place in range(len(str(large))):
        a, b = large // 10**place % 10, small // 10**place % 10
        if same:
            pieces.append(f"{a}+{b}{'+1' * carry}={a + b + carry}")
            carry = (a + b + carry) // 10
        else:
            a -= carry
            carry = int(a < b)
            pieces.append(f"{a + 10 * carry}-{b}={a + 10 * carry - b}")
    return pieces


def _products(facts: dict[str, Any]) -> Solution:
    """The first number times every digit of the second, added up."""
    first, second = (int(word) for word in facts["expression"].split(" * "))
    parts = [int(digit) * 10**power for power, digit in enumerate(reversed(str(second))) if digit != "0"]
    steps = [f"{first}*{part}={first * part}" for part in parts]
    total = first * parts[0] if parts else 0
    for part in parts[1:]:
        total = _step(total, "+", first * part, steps)
    return steps or [f"{first}*0=0"], str(total)


def _euclid(a: int, b: int, steps: list[str]) -> int:
    while b:
        steps.append(f"{a} mod {b} = {a % b}")
        a, b = b, a % b
    return a


def _gcd(facts: dict[str, Any]) -> Solution:
    first, *rest = facts["numbers"]
    steps: list[str] = []
    for number in rest:
        first = _euclid(max(first, number), min(first, number), steps)
    return steps, str(first)


def _lcm(facts: dict[str, Any]) -> Solution:
    first, *rest = facts["numbers"]
    steps: list[str] = []
    for number in rest:
        divisor = _euclid(max(first, number), min(first, number), steps)
        steps += [f"gcd = {divisor}", f"{number} / {divisor} = {number // divisor}"]
        steps.append(f"{first} * {number // divisor} = {math.lcm(first, number)}")
        first = math.lcm(first, number)
    return steps, str(first)


def _count_bits(facts: dict[str, Any]) -> Solution:
    number, ones, steps = int(facts["number"]), 0, []
    while number:
        ones += number % 2
        steps.append(f"{number} = 2 * {number // 2} + {number % 2}, ones {ones}")
        number //= 2
    return steps or ["0 has none"], str(ones)


def _letter_counting(facts: dict[str, Any]) -> Solution:
    letter, total, steps = facts["target_letter"], 0, []
    for word in facts["span"]:
        total += word.lower().count(letter)
        steps.append(f"{' '.join(word)}: {word.lower().count(letter)}, {total} in all")
    return steps, str(total)


def _number_sorting(facts: dict[str, Any]) -> Solution:
    """Take the next number out of those that are left, again and again."""
    left = list(facts["original_numbers"])
    pick = min if facts["direction"] == "ascending" else max
    done, steps = [], []
    while left:
        chosen = pick(left, key=float)
        left.remove(chosen)
        done.append(chosen)
        steps.append(f"{chosen}, left {' '.join(left) or 'none'}")
    return steps, str(done)


def _spell_backward(facts: dict[str, Any]) -> Solution:
    word = facts["word"]
    return [" ".join(word), " ".join(reversed(word))], word[::-1]


def _prime_factorization(facts: dict[str, Any]) -> Solution:
    number, divisor, factors, steps = int(facts["number"]), 2, [], []
    while divisor * divisor <= number:
        if number % divisor:
            divisor += 1
            continue
        steps.append(f"{number} = {divisor} * {number // divisor}")
        factors.append(divisor)
        number //= divisor
    factors.append(number)
    return [*steps, f"{number} is prime"], " × ".join(map(str, factors))


def _settings(**values: Any) -> dict[str, Any]:
    return values


FAMILIES: dict[str, Family] = {
    "chain_sum": Family(
        _chain_sum,
        # What a model of half a million parameters learns in a minute, and then in two.
        _settings(min_terms=2, max_terms=3, min_digits=1, max_digits=1),
        _settings(min_terms=2, max_terms=4, min_digits=1, max_digits=2),
    ),
    "basic_arithmetic": Family(
        _basic_arithmetic,
        # Always with parentheses: without them the library reckons from left to right and gives 5 + 2 * 3 as 21.
        _settings(min_terms=2, max_terms=3, max_digits=1, operators=("+", "-", "*")),
        _settings(min_terms=3, max_terms=5, max_digits=2, operators=("+", "-", "*")),
    ),
    "products": Family(_products, _settings(min_digits=1, max_digits=2), _settings(min_digits=2, max_digits=4)),
    "gcd": Family(_gcd, _settings(max_value=60), _settings(min_numbers=2, max_numbers=3, min_value=10, max_value=2000)),
    "lcm": Family(_lcm, _settings(max_value=20), _settings(min_value=10, max_value=200)),
    "count_bits": Family(_count_bits, _settings(max_n=255), _settings(min_n=256, max_n=65_535)),
    "letter_counting": Family(
        _letter_counting, _settings(min_words=2, max_words=4), _settings(min_words=5, max_words=12)
    ),
    "number_sorting": Family(
        _number_sorting,
        _settings(min_numbers=3, max_numbers=4, max_decimals=0),
        _settings(min_numbers=4, max_numbers=8, max_decimals=2),
    ),
    "spell_backward": Family(
        _spell_backward, _settings(min_word_len=3, max_word_len=5), _settings(min_word_len=5, max_word_len=10)
    ),
    "prime_factorization": Family(
        _prime_factorization, _settings(min_value=2, max_value=500), _settings(min_value=500, max_value=5000)
    ),
}
