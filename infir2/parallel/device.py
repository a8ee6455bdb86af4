"""The device that this process computes on: which one, waiting for it, and its memory. On a CPU all but the first do
nothing."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from infir2.errors import UserError


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


# A CPU's allocator, CUDA and NCCL outside of torch's allocator, and cuBLAS have no class of errors for it.
_TOO_LITTLE = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def too_little_memory(error: BaseException) -> BaseException | None:
    """The failure to get memory that an error is or follows from."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    while not (isinstance(error, kinds) or any(words in str(error) for words in _TOO_LITTLE)):
        if (cause := error.__cause__ or error.__context__) is None:
            return None
        error = cause
    return error


def in_short(failure: BaseException) -> str:
    """What torch says of too little memory: behind these sentences it gives advice that ours makes needless."""
    text = str(failure).strip() or type(failure).__name__
    return ". ".join(text.splitlines()[0].split(". ")[:3]).rstrip(".")


@contextmanager
def enough_memory(what: str, cures: str) -> Iterator[None]:
    """Raise UserError, with what makes ``what`` need less, where the block ends for want of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (failure := too_little_memory(error)) is None:
            raise
        raise UserError(f"{what} needs more memory than this device has: {cures} ({in_short(failure)})") from None


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
