"""The processes of one job, how they share work that is not on tensors, and how they come to the same decision.

One process needs no process group. With several, a gloo group of its own carries what they tell each other, because the
training group may be NCCL and because checkpoints are written by a background thread while training communicates.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from infir2.errors import UserError

T = TypeVar("T")


class Ranks:
    """All processes of the job. Every method but ``share`` is collective: each process calls it, in the same order.

    ``patience``: how long a process waits for another one's work; by default torch's half an hour.
    """

    def __init__(self, patience: timedelta | None = None) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo", timeout=patience) if several else None
        self.rank = dist.get_rank() if several else 0
        self.size = dist.get_world_size() if several else 1

    @property
    def alone(self) -> bool:
        return self.group is None

    def share(self, items: list[T]) -> list[T]:
        """This process's part of a list that every process holds in the same order."""
        return items[self.rank :: self.size]

    def lead(self, work: Callable[[], T]) -> T:
        """Do ``work`` on rank 0. Its result is returned, or its error raised, on every rank."""
        answer = [_attempt(work) if self.rank == 0 else None]
        if self.group is not None:
            dist.broadcast_object_list(answer, src=0, group=self.group)
        return _result(answer[0])

    def each(self, work: Callable[[], T]) -> list[T]:
        """Do ``work`` on every rank. All results in rank order, or the first error raised on every rank."""
        if self.group is None:
            return [work()]
        answers: list[Any] = [None] * self.size
        mine = _attempt(work)
        dist.all_gather_object(answers, mine, group=self.group)
        answers[self.rank] = mine  # as it was before the pickling, which loses an error's traceback
        return [_result(answer) for answer in answers]


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except (OSError, UserError, MemoryError, torch.OutOfMemoryError) as error:
        return None, error
    except Exception as error:  # Others may not survive the pickling between ranks; their text does.
        return None, RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)


def _result(answer: Any) -> Any:
    value, error = answer
    if error is not None:
        raise error
    return value
