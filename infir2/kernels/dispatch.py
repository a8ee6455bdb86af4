"""When a kernel without a backward pass may take the place of its plain-torch twin."""

import torch
from torch import Tensor


def inference_on_cuda(x: Tensor) -> bool:
    """On CUDA, where no gradient is wanted, and outside torch.compile, which fuses the twin by itself."""
    return x.is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
