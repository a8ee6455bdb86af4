"""From trainer to rollout: make the engine sample with the trainer's weights of now, under a version."""

from collections.abc import Iterator

from torch import Tensor

from infir2.model.transformer import CausalLM
from infir2.rollout.interface import RolloutEngine


def sync_weights(model: CausalLM, engine: RolloutEngine, version: int) -> None:
    """Afterwards the engine has the model's weights and calls them ``version``; nothing is done where it does already.

    An engine that shares the trainer's tensors is only told: its parameters and FP8 codes are the trainer's own. Any
    other is sent every parameter by its Hugging Face name.
    """
    if engine.weight_version == version:
        return
    engine.begin_update(version)
    if not engine.capabilities.shared_weights:
        engine.update(named_weights(model))
    engine.end_update()


def named_weights(model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once, in the compute dtype: what the trainer's layers multiply with, and what its FP8 codes are
    made of (the masters are rounded to bfloat16 first), so that the receiver's quantiser makes the same codes."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach().to(model.model.compute_dtype)
