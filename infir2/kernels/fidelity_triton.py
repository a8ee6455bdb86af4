"""The Triton kernel of ``fidelity``: every program adds up one strip of tiles, torch adds up the programs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.kernels.reference import BLOCK

_ROWS = 16
_STEPS = 8


@triton.jit
def _fidelity_kernel(
    values_ptr, codes_ptr, scale_ptr, sums_ptr, rows, cols, programs,
    values_stride, codes_stride, scale_row_stride, scale_col_stride,
    HEIGHT: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """HEIGHT rows share a scale; a stride of 0 says that all rows, or all columns, do."""
    col_block = tl.program_id(1)
    c = col_block * 128 + tl.arange(0, 128)
    nonzero = tl.zeros([ROWS, 128], tl.float32)
    lost = tl.zeros([ROWS, 128], tl.float32)
    top = tl.zeros([ROWS, 128], tl.float32)
    signal = tl.zeros([ROWS, 128], tl.float32)
    noise = tl.zeros([ROWS, 128], tl.float32)
    for step in range(STEPS):
        r = ((tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (r < rows)[:, None] & (c < cols)[None, :]
        value = tl.load(values_ptr + r[:, None] * values_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
        code = tl.load(codes_ptr + r[:, None] * codes_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
        scale_at = (r // HEIGHT) * scale_row_stride + col_block * scale_col_stride
        scale = tl.load(scale_ptr + scale_at, mask=r < rows, other=1.0)
        missed = value - code * scale[:, None]
        nonzero += tl.where(value != 0, 1.0, 0.0)
        lost += tl.where((value != 0) & (code == 0), 1.0, 0.0)
        top += tl.where(tl.abs(code) == 448.0, 1.0, 0.0)
        signal += value * value
        noise += tl.where(inside, missed * missed, 0.0)
    at = sums_ptr + col_block * tl.num_programs(0) + tl.program_id(0)
    tl.store(at, tl.sum(tl.sum(nonzero, axis=1), axis=0))
    tl.store(at + programs, tl.sum(tl.sum(lost, axis=1), axis=0))
    tl.store(at + 2 * programs, tl.sum(tl.sum(top, axis=1), axis=0))
    tl.store(at + 3 * programs, tl.sum(tl.sum(signal, axis=1), axis=0))
    tl.store(at + 4 * programs, tl.sum(tl.sum(noise, axis=1), axis=0))


def fidelity(values: Tensor, codes: Tensor, scale: Tensor, granularity: str) -> Tensor:
    """See ``fidelity.fidelity``."""
    values, codes = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (values, codes))
    rows, cols = values.shape
    grid = (triton.cdiv(rows, _ROWS * _STEPS), triton.cdiv(cols, BLOCK))
    programs = grid[0] * grid[1]
    sums = torch.empty(5, programs, dtype=torch.float32, device=values.device)
    _fidelity_kernel[grid](
        values, codes, scale, sums, rows, cols, programs, values.stride(0), codes.stride(0),
        0 if granularity == "tensor" else scale.stride(0), scale.stride(1) if granularity in ("tile", "block") else 0,
        HEIGHT=BLOCK if granularity == "block" else 1, ROWS=_ROWS, STEPS=_STEPS,
    )  # fmt: skip
    return sums.sum(dim=1, dtype=torch.float64)
