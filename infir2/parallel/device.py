"""The device that this process computes on: which one, waiting for it, and its memory. On a CPU all but the first do
nothing."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def default_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait_for(device: torch.device) -> None:
    """Until all that was started is done: a GPU works on after the call that started it."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def free_memory() -> None:
    """Give what nothing refers to any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def fresh_memory() -> Iterator[None]:
    """Free the memory behind what is done here, so that the next finds as much."""
    try:
        yield
    finally:
        free_memory()


def reset_peak(device: torch.device) -> None:
    """Count the peak of the memory from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: torch.device, unit: float = 2**30, reserved: bool = False) -> float | None:
    """Peak since ``reset_peak``, in units of so many bytes, of what tensors took, or of all that torch has reserved: a
    CUDA graph's tensors come and go unseen. None on a CPU, where it is not counted."""
    if device.type != "cuda":
        return None
    return (torch.cuda.max_memory_reserved() if reserved else torch.cuda.max_memory_allocated()) / unit
