"""What a training stage gives to the run that launch/training.py wires: its data, and what it does with them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infir2.config import TrainSection
from infir2.model.transformer import CausalLM
from infir2.train.loop import Feed, TrainState
from infir2.train.metrics import MetricsWriter
from infir2.types import Batch


@dataclass(frozen=True)
class StageData:
    """What a stage's data give to the loop."""

    loop: TrainSection
    """The recipe's train section, with its number of steps."""
    feed: Callable[[int], Feed]
    """Samples used before step 1 -> what the loop is fed with."""
    fingerprint: dict[str, Any]
    """Decides, by its key ``sha256``, whether a checkpoint was made with the same data in the same order."""
    order_keys: str = "sources, weights, seq_len or seed"
    """What in the recipe decides the fingerprint, for the message about one that changed."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Key of the recipe -> SHA-256 of the file that it names, where what the file says decides the run's course."""
    continues: bool = True
    """Whether a run that starts from another run's checkpoint goes on where that one was in the same data."""
    held_out: Callable[[], Sequence[Batch]] = list
    """This rank's held-out batches; the same number on every rank."""
    evaluate: Callable[[Callable[[], object]], Mapping[str, float]] | None = None
    """Held-out results now (see Callbacks); None: the loss on ``held_out``."""
    begin: Callable[[CausalLM, TrainState, MetricsWriter], None] = lambda model, progress, metrics: None
    """Called once before the first step, when the model has the weights that training starts from."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """What the data hold, for an event in the metrics; empty = no event."""
    check: Callable[[Path], None] = lambda run: None
    """Looks, on every rank, at whether the files are whole; may remember in the run folder what it has seen."""
    write: Callable[[Path], None] = lambda run: None
    """Writes what the stage keeps in its run folder."""
