"""The frozen model that the KL term of reinforcement learning refers to: the one that the run started from."""

from pathlib import Path

from infir2.config import RlConfig
from infir2.errors import CheckpointError
from infir2.launch.model import start_model
from infir2.model.config import ModelConfig
from infir2.model.transformer import CausalLM
from infir2.parallel.ranks import Ranks
from infir2.parallel.runtime import World
from infir2.rl.reference import FILE, Reference, read_reference, write_reference
from infir2.rollout.checksum import weights_checksum
from infir2.train.metrics import MetricsWriter

_CURE = "Put them back, or name other weights in the recipe and resume with --train.accept_changes true"


def reference_model(
    config: RlConfig,
    architecture: ModelConfig,
    world: World,
    model: CausalLM,
    step: int,
    metrics: MetricsWriter,
    ranks: Ranks,
) -> CausalLM:
    """The model that the run started from, frozen, whatever has been trained or saved since. ``model`` is the policy
    after ``step`` optimiser steps.

    Raises CheckpointError where the weights that the run has referred to so far are gone, changed or unknown.
    """
    run, named = Path(config.run), _start_named(config)
    known = ranks.lead(lambda: read_reference(run)) if step else None
    if known is not None and known.named != named:
        known = None  # a change of recipe that was accepted, else there would be no resume
    if step and known is None and not config.train.accept_changes:
        raise CheckpointError(
            f"{run / FILE}: does not say which weights the KL term has referred to so far; to take those of {named} as "
            "they are now, resume with --train.accept_changes true"
        )
    if known is not None and known.path is not None and not Path(known.path).is_dir():
        raise CheckpointError(f"{known.path}: the weights that the KL term of {run} refers to are gone. {_CURE}")
    reference, path = start_model(config, architecture, world, known.path if known else None)
    found = weights_checksum(reference, codes=False)
    if known is not None and found != known.checksum:
        raise CheckpointError(f"{path}: not the weights that the KL term of {run} has referred to so far. {_CURE}")
    if step == 0 and found != weights_checksum(model, codes=False):
        raise CheckpointError(f"{named}: other weights were put there while the run started; start it again")
    if known is None:
        ranks.lead(lambda: write_reference(run, Reference(named, path, found)))
        metrics.event(step, "reference", **{"from": path or named})
    return reference


def _start_named(config: RlConfig) -> str:
    """How the recipe names the weights that training starts from."""
    if config.init.checkpoint is not None:
        return f"init.checkpoint = {config.init.checkpoint}"
    if config.model.path is not None:
        return f"model.path = {config.model.path}"
    return f"model.preset = {config.model.preset}"
