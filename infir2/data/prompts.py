"""Prompts for reinforcement learning and evaluation: rows to token ids and labels, and the order in which they come.

A row is {"prompt": text or messages, "label": what the reward compares with}, the form of DAPO-math-17k. What cannot be
used is counted by reason with its line, as everywhere. The order is a function of the seed and the number of the
rollout; no state has to be saved.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infir2.data.chat import ChatTokenizer
from infir2.data.conversations import Message, RowSource, checked_messages
from infir2.data.documents import BadRow, RowLedger
from infir2.data.order import shuffled_prompts
from infir2.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """A question, ready to be continued."""

    question: str
    """Content of the last message, for people."""
    ids: tuple[int, ...]
    """The rendered conversation up to where the answer begins."""
    label: Any


@dataclass
class PromptCounts:
    """What became of the rows of a source."""

    rows: int = 0
    dropped: int = 0
    """Left out because the prompt is longer than allowed."""
    bad: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few of each reason as file:line."""

    def summary(self) -> str:
        parts = [f"{self.rows:,} rows"] + [f"{self.dropped:,} dropped as too long"] * bool(self.dropped)
        parts += [f"{count:,} bad: {why} ({', '.join(self.examples[why][:2])})" for why, count in self.bad.items()]
        return ", ".join(parts)


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a source, in the order of its rows."""

    prompts: tuple[Prompt, ...]
    counts: PromptCounts

    def __len__(self) -> int:
        return len(self.prompts)

    def sha256(self) -> str:
        """Equal for equal ids and labels in equal order."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(json.dumps([prompt.ids, prompt.label], sort_keys=True, default=str).encode())
        return digest.hexdigest()


def read_prompts(
    source: RowSource,
    chat: ChatTokenizer,
    max_tokens: int,
    ledger: RowLedger,
    check_label: Callable[[Any], object],
    progress: Callable[[float], object] = lambda share: None,
) -> PromptSet:
    """Read and tokenise every row of a source made with ``prompt_row``. ``check_label`` raises DataError for a label
    that the reward cannot use; ``progress`` is told the share that is done.

    Raises DataError when no prompt is left, or more rows are bad than the ledger allows.
    """
    counts, kept = PromptCounts(), []
    for row in source:
        ledger.rows += 1
        try:
            messages, label = row.parse()
            try:
                check_label(label)
            except DataError as error:
                raise BadRow("bad_label", str(error)) from None
            ids = tuple(chat.prompt(messages))
        except BadRow as error:
            ledger.count_bad(row.path, row.line, error)
            continue
        if len(ids) > max_tokens:
            counts.dropped += 1
        else:
            kept.append(Prompt(messages[-1]["content"], ids, label))
        if ledger.rows % 256 == 0:
            progress(row.passed)
    ledger.check_share()
    counts.rows, counts.bad, counts.examples = ledger.rows, dict(Counter(ledger.counts)), ledger.examples
    if not kept:
        raise DataError(f"{source.name}: no prompt is left ({counts.summary()})")
    return PromptSet(tuple(kept), counts)


def prompt_row(row: dict[str, Any]) -> tuple[list[Message], Any]:
    """Messages and label of a row. Raises BadRow: no_prompt, bad_message, bad_label."""
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise BadRow("no_prompt")
    if row.get("label") is None:
        raise BadRow("bad_label", "there is none")
    return checked_messages(prompt), row["label"]


class PromptOrder:
    """Which prompts a rollout asks: ``rows(rollout)`` first, then ``spares(rollout)`` in their order.

    The first ones visit all prompts once an epoch. Spares come from a second stream of their own, so that it does not
    matter to later rollouts how many of them were needed.
    """

    def __init__(self, count: int, seed: int, per_rollout: int) -> None:
        if per_rollout > count:
            raise DataError(f"data.train: {count} prompts are fewer than the {per_rollout} of one rollout")
        self.count, self.seed, self.per_rollout = count, seed, per_rollout
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)

    def rows(self, rollout: int) -> list[int]:
        """``per_rollout`` different prompts (rollouts count from 0)."""
        return self._take(0, rollout * self.per_rollout, self.per_rollout, set())

    def spares(self, rollout: int, most: int) -> list[int]:
        """At most ``most`` more prompts, different from each other and from ``rows(rollout)``."""
        return self._take(1, rollout * most, min(most, self.count - self.per_rollout), set(self.rows(rollout)))

    def _take(self, stream: int, start: int, wanted: int, excluded: set[int]) -> list[int]:
        """The next ``wanted`` rows of a stream that are new: where one epoch meets the next, rows may come again."""
        taken: list[int] = []
        seen = set(excluded)
        while len(taken) < wanted:
            epoch, place = divmod(start, self.count)
            row = int(self._epoch(stream, epoch)[place])
            if row not in seen:
                taken.append(row)
                seen.add(row)
            start += 1
        return taken

    def _make_epoch(self, stream: int, epoch: int) -> NDArray[np.int64]:
        return shuffled_prompts(self.count, self.seed, stream, epoch)


def order_fingerprint(prompts: PromptSet, seed: int, per_rollout: int) -> dict[str, Any]:
    """What determines the prompts of every rollout: equal ``sha256`` = the same prompts in the same order."""
    digest = hashlib.sha256(json.dumps([prompts.sha256(), seed, per_rollout]).encode()).hexdigest()
    return {"prompts": len(prompts), "seed": seed, "per_rollout": per_rollout, "sha256": digest}
