"""A checksum of a model's weights that is computed where they lie, to tell whether two engines hold the same."""

from collections.abc import Iterator
from hashlib import sha256

import torch
from torch import Tensor, nn

from infir2.fp8.linear import Fp8Linear

_CHUNK = 1 << 22  # bytes at a time: their int64 products take eight times as much
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)


@torch.no_grad()
def weights_checksum(model: nn.Module, codes: bool = True) -> str:
    """Hex digest over the name, dtype, shape and bits of every parameter and, with ``codes``, of every FP8 layer's
    codes and scales.

    It finds differences that happen by accident; it is no defence against someone who wants two models to collide.
    """
    digest = sha256()
    for name, tensor in _tensors(model) if codes else model.named_parameters():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {_folded(tensor)}\n".encode())
    return digest.hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    for name, module in model.named_modules():
        if isinstance(module, Fp8Linear):
            operand = module.weight_operand()
            yield f"{name}.codes", operand.codes
            yield f"{name}.scale", operand.scale


def _folded(tensor: Tensor) -> int:
    """Sum over bytes of (byte + 1) times a hash of its place, in 64 bits."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, data.numel(), _CHUNK):
        part = data[start : start + _CHUNK].long()
        place = (torch.arange(start + 1, start + 1 + part.numel(), device=data.device)) * _ODD
        total += ((place ^ (place >> 29)) * (part + 1)).sum()
    return int(total)
