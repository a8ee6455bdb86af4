"""What is told where a device has too little memory for a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from infir2.config import CptConfig, RlConfig, SftConfig, TrainingConfig
from infir2.errors import UserError


def too_little(error: BaseException) -> BaseException | None:
    """The failure to get memory that an error is or follows from."""
    while not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):  # a CPU's: no class
        if (cause := error.__cause__ or error.__context__) is None:
            return None
        error = cause
    return error


@contextmanager
def telling_what_helps(config: TrainingConfig) -> Iterator[None]:
    """Raise UserError, with the keys that make a run smaller, where the block ends for want of memory."""
    try:
        yield
    except RuntimeError as error:
        if (cause := too_little(error)) is None:
            raise
        # Behind these sentences torch gives advice that the keys make needless.
        told = ". ".join(str(cause).split(". ")[:3]).rstrip(".")
        raise UserError(
            f"training needs more memory than this device has: {' or '.join(_cures(config))}; --dry-run estimates what "
            f"each part takes, and the same command goes on from the last checkpoint ({told})"
        ) from None


def _cures(config: TrainingConfig) -> list[str]:
    cures = []
    if isinstance(config, CptConfig):
        if (size := config.train.micro_batch) > 1:
            cures.append(f"lower train.micro_batch ({size})")
    elif isinstance(config, SftConfig | RlConfig):
        cures.append(f"lower data.max_tokens_per_gpu ({config.data.max_tokens_per_gpu})")
    if (now := config.train.activation_checkpointing) != "full":
        cures.append(f'set train.activation_checkpointing = "full" ("{now}")')
    if isinstance(config, RlConfig):
        return [*cures, f"lower rollout.cache_tokens ({config.rollout.cache_tokens})"]
    if (copies := config.parallel.replicate) > 1:
        return [*cures, f"lower parallel.replicate ({copies})"]
    return [*cures, "train with more processes"]
