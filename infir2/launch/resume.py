"""What a recipe may change when its run is resumed: anything but what decides the course that training has taken."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infir2.config import OptimSection, TrainingConfig
from infir2.errors import CheckpointError
from infir2.train.schedule import learning_rate

# Free: what is written and kept, where things lie, how the work is spread and how much memory it takes. The first
# weights are free because a resume takes its own; whether the architecture is the same is checked on its own, and so
# are the data and other files, by what they hold, and the order of the data, which the seed decides.
_FREE_SECTIONS = {"run", "log", "parallel", "init", "data", "eval"}
_FREE = {
    *("model.path", "model.preset", "model.vocab_size", "model.init_std", "fp8.health_every"),
    *("train.save_every", "train.keep_checkpoints", "train.keep_every", "train.async_save"),
    *("train.eval_every", "train.eval_sequences", "train.max_skipped_steps", "train.accept_changes"),
    *("train.micro_batch", "train.activation_checkpointing", "train.compile", "train.cuda_graphs"),
    *("train.deterministic", "train.seed", "reward.file"),
    *("rollout.cache_tokens", "rollout.max_sequences", "rollout.max_batch_tokens", "reward.workers"),
}
# Decisive where a KL term holds the policy to the model that the run started from.
_START = {"init.checkpoint", "model.path", "model.preset", "model.init_std"}
# Free as long as no step that has been done would have had another learning rate.
_SCHEDULE = {
    *("train.steps", "train.epochs", "optim.lr", "optim.min_lr", "optim.schedule"),
    *("optim.warmup_steps", "optim.warmup_fraction", "optim.decay_steps", "optim.decay"),
}


def changes_on_resume(
    config: TrainingConfig, steps: int | None, files: Mapping[str, str], meta: Mapping[str, Any], checkpoint: Path
) -> list[str]:
    """What the recipe says otherwise than the one that made ``checkpoint``, as "key: old -> new".

    ``steps`` is the length of the run (None: not known, so the schedule is not looked at), ``files`` the digests of
    those whose content decides (see StageData), ``meta`` the checkpoint's. Raises CheckpointError for changes after
    which the run would no longer be the one that its recipe describes, unless train.accept_changes is set.
    """
    old, new = _keys(meta.get("config") or {}), _keys(config.model_dump(mode="json"))
    changed = [key for key in new if key in old and old[key] != new[key]]
    held = _START if new.get("policy.kl_coef") else set()
    free = _FREE | _SCHEDULE
    decisive = [
        key for key in changed if key in held or (key.partition(".")[0] not in _FREE_SECTIONS and key not in free)
    ]
    step = _first_other_rate(config, steps, meta) if steps is not None else None
    schedule = [key for key in changed if key in _SCHEDULE] if step else []
    lines = {key: f"{key}: {old[key]} -> {new[key]}" for key in changed}
    before = meta.get("files") or {}
    for key in files:
        if key in before and before[key] != files[key]:
            lines[key] = f"{key}: {new[key]} (SHA-256 {before[key][:12]} -> {files[key][:12]})"
            decisive.append(key)
    if (decisive or schedule) and not config.train.accept_changes:
        why = f" (step {step} would have had another learning rate)" if schedule else ""
        raise CheckpointError(
            f"{checkpoint}: was made with another recipe: {', '.join(lines[key] for key in decisive + schedule)}{why}. "
            "Restore it, start a new run with init.checkpoint, or resume all the same with --train.accept_changes true"
        )
    return list(lines.values())


def _first_other_rate(config: TrainingConfig, steps: int, meta: Mapping[str, Any]) -> int | None:
    """The first of the steps done so far that the recipe now gives another learning rate than it had."""
    before = (meta.get("config") or {}).get("optim")
    length = meta.get("steps")
    if before is None or length is None:
        return None
    optim = OptimSection.model_validate(before)
    if optim == config.optim and length == steps:
        return None
    done = range(1, meta["progress"]["step"] + 1)
    return next((n for n in done if learning_rate(n, length, optim) != learning_rate(n, steps, config.optim)), None)


def _keys(table: Mapping[str, Any]) -> dict[str, Any]:
    """{"optim.lr": 0.001, ...}"""
    flat: dict[str, Any] = {}
    for section, values in table.items():
        inner = values.items() if isinstance(values, Mapping) else None
        flat |= {section: values} if inner is None else {f"{section}.{key}": value for key, value in inner}
    return flat
