"""What makes a training run smaller, told where a device has too little memory for it."""

from contextlib import AbstractContextManager

from infir2.config import CptConfig, RlConfig, SftConfig, TrainingConfig
from infir2.parallel.device import enough_memory


def enough_for_training(config: TrainingConfig) -> AbstractContextManager[None]:
    """Raise UserError, with the keys that make a run smaller, where the block ends for want of memory."""
    return enough_memory(
        "training",
        f"{' or '.join(_cures(config))}; --dry-run estimates what each part takes, and the same command goes on from "
        "the last checkpoint",
    )


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
