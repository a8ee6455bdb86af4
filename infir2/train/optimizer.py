"""AdamW over the float32 master weights."""

from typing import Any

import torch
from torch import nn

from infir2.config import OptimSection
from infir2.fp8.convert import refresh_weights
from infir2.train.bfloat16_moments import Bfloat16MomentsAdamW


def build_optimizer(model: nn.Module, optim: OptimSection) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay on matrices; biases and norms are not decayed. ``optim.moments`` says whether
    it is torch's or ours with moments in bfloat16.

    After every step the FP8 layers quantise their new weights.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    optimizer: torch.optim.AdamW
    if optim.moments == "bfloat16":
        optimizer = Bfloat16MomentsAdamW(groups, **options)
    else:
        optimizer = torch.optim.AdamW(groups, fused=parameters[0].is_cuda, **options)
    optimizer.register_step_post_hook(lambda *_: refresh_weights(model))
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
