"""Where training starts from: the run's own newest checkpoint, else that of [init], else the first weights."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infir2.checkpoint import manifest
from infir2.checkpoint.folders import META, read_meta, step_folders
from infir2.checkpoint.store import CheckpointStore
from infir2.config import TrainingConfig
from infir2.errors import CheckpointError
from infir2.launch.resume import changes_on_resume
from infir2.launch.stage_data import StageData
from infir2.model.config import ModelConfig, from_hf
from infir2.train.loop import TrainState


@dataclass(frozen=True)
class Start:
    """Where training starts from."""

    progress: TrainState = field(default_factory=TrainState)
    data_offset: int = 0
    """Samples used before step 1."""
    events: Sequence[tuple[str, dict[str, Any]]] = ()
    """What the metrics are to be told of it: (event, details)."""


def restore(
    config: TrainingConfig, store: CheckpointStore, tensors: dict[str, Any], architecture: ModelConfig, data: StageData
) -> Start:
    """Load a checkpoint into ``tensors``, where there is one to start from.

    Raises CheckpointError, with ``tensors`` as they were, for one that the recipe does not go on from.
    """
    newest = store.latest()
    damaged = [("damaged_checkpoint", {"problem": problem}) for problem in store.problems]
    if newest is not None:
        start = _resumed(config, store, newest, tensors, architecture, data)
    elif config.init.checkpoint is not None:
        start = _initialised(config, store, config.init.checkpoint, tensors, architecture, data)
    else:
        start = Start()
    return dataclasses.replace(start, events=[*damaged, *start.events])


def check_newest(
    config: TrainingConfig, architecture: ModelConfig, data: Callable[[], StageData] | None = None
) -> None:
    """``check_resume`` amid long work on the data, by the newest checkpoint of which meta.json is whole."""
    folders = (path for _, path in step_folders(Path(config.run) / "checkpoints"))
    found = ((path, meta) for path in folders if (meta := _whole_meta(path)) is not None)
    for checkpoint, meta in itertools.islice(found, 1):
        check_resume(config, architecture, checkpoint, meta, data() if data else None)


def check_resume(
    config: TrainingConfig,
    architecture: ModelConfig,
    checkpoint: Path,
    meta: Mapping[str, Any],
    data: StageData | None,
) -> list[str]:
    """What the recipe has changed since ``checkpoint`` of its run; ``data`` None: as far as can be told without them.

    Raises CheckpointError for what keeps the run from going on.
    """
    _check_architecture(checkpoint, meta, architecture, "Restore it, or give another run folder with --run")
    if data is not None and meta["data"]["sha256"] != data.fingerprint["sha256"]:
        raise CheckpointError(
            f"{checkpoint}: was made with other data or another order ({data.order_keys} changed); "
            "restore them, or start a new run with init.checkpoint"
        )
    if meta["global_batch"] != config.train.global_batch:
        raise CheckpointError(
            f"{checkpoint}: was made with train.global_batch = {meta['global_batch']}, the recipe says "
            f"{config.train.global_batch}; restore it, or start a new run with init.checkpoint"
        )
    steps, files = (data.loop.steps, data.files) if data is not None else (None, {})
    return changes_on_resume(config, steps, files, meta, checkpoint)


def _whole_meta(checkpoint: Path) -> dict[str, Any] | None:
    """meta.json as it was written; None where it is damaged."""
    try:
        entries = manifest.read(checkpoint)
    except manifest.Unreadable:
        raise
    except CheckpointError:
        return None
    if META not in entries or manifest.problem_with(checkpoint, META, entries[META]):
        return None
    return read_meta(checkpoint)


def _resumed(
    config: TrainingConfig,
    store: CheckpointStore,
    newest: Path,
    tensors: dict[str, Any],
    architecture: ModelConfig,
    data: StageData,
) -> Start:
    """From the run's own newest checkpoint."""
    meta = read_meta(newest)  # the tensors are loaded when nothing speaks against it
    changes = check_resume(config, architecture, newest, meta, data)
    store.load(newest, tensors, cast=("optim",))  # moments: optim.moments may have changed
    changed = [("recipe_changed", {"change": change}) for change in changes]
    return Start(TrainState(**meta["progress"]), meta["data_offset"], [("resume", {"from": str(newest)}), *changed])


def _initialised(
    config: TrainingConfig,
    store: CheckpointStore,
    named: str,
    tensors: dict[str, Any],
    architecture: ModelConfig,
    data: StageData,
) -> Start:
    """From the checkpoint of another run, which [init] names."""
    source, keep_optimizer = store.find(named), config.init.keep_optimizer
    wanted = tensors if keep_optimizer else {"model": tensors["model"]}
    _check_architecture(source, read_meta(source), architecture, "Name another, or leave out the model section")
    meta = store.load(source, wanted, ignore=() if keep_optimizer else ("optim",), cast=("optim",))
    same_data = data.continues and meta["data"]["sha256"] == data.fingerprint["sha256"]
    seen = meta["data_offset"] + meta["progress"]["step"] * meta["global_batch"]
    event = {"from": str(source), "data": "continued" if same_data else "from its beginning"}
    return Start(data_offset=seen if same_data else 0, events=[("init", event)])


def _check_architecture(path: Path, meta: Mapping[str, Any], architecture: ModelConfig, cure: str) -> None:
    """Raise CheckpointError, naming the fields, where a checkpoint holds another model than the recipe's."""
    trained = from_hf(meta["architecture"], f"{path}/meta.json")
    ours, theirs = dataclasses.asdict(architecture), dataclasses.asdict(trained)
    differ = [f"{key} {theirs[key]} (the recipe's: {ours[key]})" for key in ours if ours[key] != theirs[key]]
    if differ := [line for line in differ if not line.startswith("initializer_range ")]:
        more = f" and {len(differ) - 4} more" if len(differ) > 4 else ""
        raise CheckpointError(
            f"{path}: holds another model than the recipe's model section describes: {', '.join(differ[:4])}{more}. "
            f"{cure}"
        )
