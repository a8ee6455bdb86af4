"""What a training checkpoint holds: live tensors under parameter names.

Only tensors go into the tensor files. Hyper-parameters come from the configuration and counters from meta.json, so
nothing has to be pickled. The dictionaries made here refer to the live tensors: loading into them loads the model and
the optimiser in place.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tied weight once, under the first of its names.

    Plain tensors, or the sharded DTensors of an FSDP2 model. They share storage with the model.
    """
    return {name: tensor.detach() for name, tensor in _named_tensors(model).items()}


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """AdamW's moments and step counts by parameter name: ``{"model.norm.weight": {"exp_avg": ..., "step": ...}}``.

    Parameters that have not been stepped get zero moments and step 0, which is how AdamW itself would start them, so
    the result of a fresh optimiser can be loaded into. Works on plain parameters and on FSDP2 DTensors.
    """
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        raise TypeError(f"checkpoints hold the state of Adam and AdamW, not of {type(optimizer).__name__}")
    names = {id(tensor): name for name, tensor in _named_tensors(model).items()}
    result: dict[str, dict[str, Tensor]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not parameter.requires_grad:
                continue
            state = optimizer.state[parameter]
            if not state:
                state.update(_fresh_adam_state(parameter, group))
            result[names[id(parameter)]] = dict(state)
    return result


def flatten(tensors: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """A nested state dict as ``{"model.norm.weight": tensor}``. Raises TypeError for anything that is not a tensor."""
    flat: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = f"{prefix}{key}"
        found = flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
        for leaf, tensor in found.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{leaf}: checkpoints hold tensors; put a {type(tensor).__name__} into meta")
            if leaf in flat:
                raise TypeError(f"{leaf}: two tensors have this name")
            flat[leaf] = tensor
    return flat


def cpu_copy(tensor: Tensor) -> Tensor:
    """A copy in host memory that later training steps do not change; a DTensor keeps its sharding."""
    return tensor.detach().to("cpu", copy=True)


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    # Not named_parameters(): state_dict makes FSDP2 put its sharded parameters back first.
    first: dict[int, str] = {}
    everything = model.state_dict(keep_vars=True)
    for name, tensor in everything.items():
        first.setdefault(id(tensor), name)
    return {name: everything[name] for name in first.values()}


def _fresh_adam_state(parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    on_device = group["capturable"] or group["fused"]
    state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")}
    for name in ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ())):
        state[name] = torch.zeros_like(parameter, requires_grad=False, memory_format=torch.preserve_format)
    return state
