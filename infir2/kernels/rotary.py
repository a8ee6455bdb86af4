"""Rotary positions (Su et al.: RoFormer, 2021): dimensions i and i + head_dim / 2 of a head are turned by an angle.

    a' = a cos - b sin,   b' = b cos + a sin

Which dimensions make a pair is as in Hugging Face's models, whose weights it has to fit.
"""

import torch
from torch import Tensor

from infir2.kernels.dispatch import inference_on_cuda


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn every head of queries [batch, length, heads, head_dim] and keys [batch, length, kv_heads, head_dim].

    ``cos`` and ``sin`` are float32 [batch, length, head_dim / 2]; the result is float32, rounded once to the dtype of
    ``q`` and ``k``.
    """
    half = q.shape[-1] // 2
    if inference_on_cuda(q) and half & (half - 1) == 0:  # the kernel takes powers of two
        from infir2.kernels import rotary_triton

        return rotary_triton.rotate(q, k, cos, sin)
    return _turned(q, cos, sin), _turned(k, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
