"""Triton FP8 GEMM for few rows: tokens with ``tile`` scales times weights with ``block`` scales.

A pass of decoding reads all weights for a few hundred rows of tokens. The 128 x 128 tiles of a large GEMM are then too
few to keep every multiprocessor reading. Here tiles are smaller, and the contraction is cut into parts: each part
leaves its float32 sums in a workspace, and a second kernel adds them in the order of the parts, so that the same
operands always give the same bits. ``reference.scaled_mm`` defines the result.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from infir2.kernels.reference import BLOCK


class Launch(NamedTuple):
    """How the work is cut: output tiles of rows x cols, the contraction in parts."""

    rows: int
    cols: int
    parts: int
    num_warps: int = 4
    num_stages: int = 4


def launch_for(rows: int, outputs: int, contraction: int) -> Launch:
    """As many parts as run at the same time on the 132 multiprocessors of a Hopper GPU, of at least 8 blocks each.

    A multiprocessor holds three programs of 64 x 64, two of 64 x 128; one more part would be a second wave.
    """
    height, slots, cols = triton.cdiv(rows, 64), 3 * 132, 64
    if height * triton.cdiv(outputs, cols) > 192:
        slots, cols = 2 * 132, 128
    parts = min(slots // (height * triton.cdiv(outputs, cols)), contraction // BLOCK // 8)
    return Launch(64, cols, max(parts, 1))


@triton.jit(do_not_specialize=["rows", "b_scale_stride"])
def _parts_kernel(
    a, a_scale_ptr, b, b_scale_ptr, out_ptr, rows, outputs, contraction, b_scale_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """One part of one output tile; out [parts, rows, outputs]. Tiles of the same weights run side by side."""
    if JOINED:
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_col = tl.program_id(1) * COLS
    part, parts = tl.program_id(2), tl.num_programs(2)
    blocks = contraction // 128
    first, end = part * blocks // parts, (part + 1) * blocks // parts
    a_scale_ptr += row
    b_scale_ptr += first_col // 128 * b_scale_stride
    inside = row < rows
    # The scales of a block are read while the block before it is multiplied.
    scale = tl.load(a_scale_ptr + first * rows, mask=inside, other=0.0) * tl.load(b_scale_ptr + first)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for block in range(first, end):
        following = tl.minimum(block + 1, end - 1)
        a_scale = tl.load(a_scale_ptr + following * rows, mask=inside, other=0.0)
        b_scale = tl.load(b_scale_ptr + following)
        left = a.load([tl.program_id(0) * ROWS, block * 128])
        right = b.load([first_col, block * 128])
        # Tensor cores keep some 14 bits of a sum of FP8 products: only 128 of them are added there.
        total += tl.dot(left, right.T) * scale[:, None]
        scale = a_scale * b_scale
    col = first_col + tl.arange(0, COLS)
    out = out_ptr + (part.to(tl.int64) * rows + row)[:, None] * outputs + col[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (col < outputs)[None, :])


@triton.jit(do_not_specialize=["parts"])
def _add_parts_kernel(sums_ptr, out_ptr, size, parts, EACH: tl.constexpr):
    """out [size] = the sum of sums [parts, size]."""
    gdc_wait()  # it starts before the sums are there, to be ready when they are
    i = tl.program_id(0) * EACH + tl.arange(0, EACH)
    total = tl.load(sums_ptr + i, mask=i < size, other=0.0)
    for _ in range(1, parts):
        sums_ptr += size
        total += tl.load(sums_ptr + i, mask=i < size, other=0.0)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < size)


def scaled_mm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype, launch: Launch | None = None
) -> Tensor:
    """a @ b.T: ``tile`` codes [rows, contraction] and ``block`` codes [outputs, contraction], scales laid out as
    ``operand`` does, the contraction and outputs in multiples of 128 -> [rows, outputs]."""
    (rows, contraction), outputs = a.shape, b.shape[0]
    launch = launch or launch_for(rows, outputs, contraction)
    out = torch.empty(rows, outputs, dtype=out_dtype, device=a.device)
    joined = launch.parts > 1
    sums = torch.empty(launch.parts, rows, outputs, dtype=torch.float32, device=a.device) if joined else out
    _parts_kernel[(triton.cdiv(rows, launch.rows), triton.cdiv(outputs, launch.cols), launch.parts)](
        TensorDescriptor.from_tensor(a, [launch.rows, BLOCK]), a_scale,
        TensorDescriptor.from_tensor(b, [launch.cols, BLOCK]), b_scale,
        sums, rows, outputs, contraction, b_scale.stride(0),
        ROWS=launch.rows, COLS=launch.cols, JOINED=joined,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    if joined:
        _join(sums, out)
    return out


def _join(sums: Tensor, out: Tensor) -> None:
    each = 1024
    options: dict[str, Any] = {"num_warps": 4, "launch_pdl": True}
    _add_parts_kernel[(triton.cdiv(out.numel(), each),)](sums, out, out.numel(), sums.shape[0], EACH=each, **options)
