"""The Triton kernel of AdamW with bfloat16 moments; its twin, and what it computes, are in ``adamw``.

Every operation is rounded on its own, none fused into another, so that the twin's bits come out. The pass is bound by
memory (20 bytes an element), which leaves room for that and for the hash.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from infir2.kernels.rounding import MULTIPLIERS

_FIRST = tl.constexpr(MULTIPLIERS[0])
_SECOND = tl.constexpr(MULTIPLIERS[1])
_BLOCK = 2048


@triton.jit
def _scramble(x):
    x = (x ^ (x >> 16)) * tl.full([], _FIRST, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full([], _SECOND, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _round_to_bfloat16(value, noise):
    bits = value.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return ((bits + tl.where(finite, noise, 0)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=["first", "key"])
def _adamw_kernel(
    parameter_ptr, grad_ptr, mean_ptr, square_ptr, size, first, key,
    decay, beta1, rest1, beta2, rest2, step_size, root_scale, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    parameter = tl.load(parameter_ptr + at, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0).to(tl.float32) * beta1 + grad * rest1
    square = tl.load(square_ptr + at, mask=inside, other=0.0).to(tl.float32) * beta2 + grad * grad * rest2
    change = tl.div_rn(mean, tl.sqrt_rn(square) * root_scale + eps)
    tl.store(parameter_ptr + at, parameter * decay - change * step_size, mask=inside)
    noise = _scramble((at + first).to(tl.uint32) ^ key.to(tl.uint32))
    tl.store(mean_ptr + at, _round_to_bfloat16(mean, noise >> 16), mask=inside)
    tl.store(square_ptr + at, _round_to_bfloat16(square, noise & 0xFFFF), mask=inside)


def adamw_(parameter: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, update: Any, first: int) -> None:
    """See ``adamw.adamw_``; ``update`` is its Update."""
    size = parameter.numel()
    _adamw_kernel[(triton.cdiv(size, _BLOCK),)](
        parameter, grad, exp_avg, exp_avg_sq, size, first, update.key,
        update.decay, update.beta1, 1 - update.beta1, update.beta2, 1 - update.beta2,
        update.step_size, update.root_scale, update.eps, BLOCK=_BLOCK, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
