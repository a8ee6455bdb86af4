"""How long work takes on a device."""

import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from infir2.parallel.device import wait_for

T = TypeVar("T")
_FLUSH_BYTES = 256 << 20  # larger than any L2 cache, written between repetitions


def timed(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """(seconds, result), from an idle device to an idle device."""
    wait_for(device)
    began = time.perf_counter()
    result = work()
    wait_for(device)
    return time.perf_counter() - began, result


def median_ms(work: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Median milliseconds, by the clock; what ``work`` returns is freed in them."""

    def once() -> None:
        work()

    return statistics.median(timed(once, device)[0] for _ in range(repeats)) * 1e3


def median_kernel_ms(work: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """The same of a single kernel, once it has been run: on a GPU by events, with the L2 cache overwritten before each
    repetition, so that the call itself does not count."""
    work()
    if device.type != "cuda":
        return median_ms(work, repeats, device)
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    pairs = []
    for _ in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        pairs.append((start, end))
    wait_for(device)
    return statistics.median(start.elapsed_time(end) for start, end in pairs)
