"""AdamW over float32 parameters with both moments kept in bfloat16: half of the optimiser's memory."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from infir2.kernels.adamw import Update, adamw_

MOMENTS = ("exp_avg", "exp_avg_sq")


class Bfloat16MomentsAdamW(torch.optim.AdamW):
    """torch's AdamW with another state and another step: see ``infir2.kernels.adamw``.

    Its state has torch's names (exp_avg, exp_avg_sq, step), lies on each parameter's shard and is there from the
    beginning, so checkpoints can be loaded into it before the first step. The step counts are on the CPU: reading them
    waits for nothing. FSDP2's shards of whole rows are rounded as the whole parameter would be.
    """

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, foreach=False, fused=False, **options)
        for group in self.param_groups:
            for parameter in group["params"]:
                moments = {name: torch.zeros_like(parameter, dtype=torch.bfloat16) for name in MOMENTS}
                self.state[parameter] = {"step": torch.zeros((), dtype=torch.float32, device="cpu"), **moments}
        self.register_load_state_dict_post_hook(_round_moments)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, number)
                number += 1
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[parameter]
        state["step"] += 1
        count = int(state["step"])
        update = Update.of(group["lr"], group["betas"], group["eps"], group["weight_decay"], count, number)
        value, grad, mean, square = map(_local, (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]))
        if value.numel():
            adamw_(value, grad.contiguous(), mean, square, update, _first_index(parameter))


def _round_moments(optimizer: torch.optim.Optimizer) -> None:
    """torch gives what it loads the parameter's dtype; numbers that were bfloat16 lose nothing on the way."""
    for state in optimizer.state.values():
        for name in MOMENTS:
            state[name] = state[name].bfloat16()


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _first_index(parameter: Tensor) -> int:
    """Index in the whole parameter of the first element that this process holds."""
    if not isinstance(parameter, DTensor):
        return 0
    row = 0
    for dimension, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            mesh = parameter.device_mesh
            row = first_row(parameter.shape[0], mesh.size(dimension), mesh.get_local_rank(dimension))
    return row * parameter.shape[1:].numel()


def first_row(rows: int, parts: int, part: int) -> int:
    """Where a part begins when rows are cut as torch.chunk does: into equal parts, but for the last ones."""
    return min(-(-rows // parts) * part, rows)
