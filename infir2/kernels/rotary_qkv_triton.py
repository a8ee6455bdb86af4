"""Triton kernels of ``rotary_qkv``, which holds their twins. Imported only where CUDA tensors are met.

A block of 128 columns holds one head or more. It is handled as the first and the second halves of its heads, which
rotary positions turn into each other. Nothing is fused into one rounding: the twin's bits come out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.kernels.codes_triton import (
    absolute,
    larger,
    raise_maxima,
    store_maxima,
    tile_codes,
    tile_scales,
    to_float32,
)
from infir2.kernels.operand import zeroed_rows
from infir2.kernels.reference import BLOCK


@triton.jit
def _columns(block, HALF: tl.constexpr):
    """Columns of the first halves of a block's heads; the second halves lie HALF further."""
    j = tl.arange(0, 64)
    return block * 128 + j // HALF * (2 * HALF) + j % HALF


@triton.jit
def _angles(cos_ptr, sin_ptr, r, inside, HALF: tl.constexpr):
    place = r[:, None] * HALF + (tl.arange(0, 64) % HALF)[None, :]
    return tl.load(cos_ptr + place, mask=inside, other=0.0), tl.load(sin_ptr + place, mask=inside, other=0.0)


@triton.jit
def _part(block, q_ptr, k_ptr, v_ptr, q_blocks, kv_blocks):
    """The matrix that a block of columns belongs to, its number there, and the matrix's width."""
    if block < q_blocks:
        ptr, here, width = q_ptr, block, q_blocks
    elif block < q_blocks + kv_blocks:
        ptr, here, width = k_ptr, block - q_blocks, kv_blocks
    else:
        ptr, here, width = v_ptr, block - q_blocks - kv_blocks, kv_blocks
    return ptr, here, width * 128


@triton.jit
def _rotate_qkv_kernel(
    qkv_ptr, bias_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, tokens, stride, q_blocks, kv_blocks,
    BIAS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (r < tokens)[:, None]
    c = _columns(block, HALF)
    place = r[:, None] * stride + c[None, :]
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    first = to_float32(tl.load(qkv_ptr + place, mask=inside, other=0.0))
    second = to_float32(tl.load(qkv_ptr + place + HALF, mask=inside, other=0.0))
    if BIAS:
        first = to_float32((first + to_float32(tl.load(bias_ptr + c))[None, :]).to(dtype))
        second = to_float32((second + to_float32(tl.load(bias_ptr + c + HALF))[None, :]).to(dtype))
    if block < q_blocks + kv_blocks:
        cos, sin = _angles(cos_ptr, sin_ptr, r, inside, HALF)
        first, second = first * cos - second * sin, second * cos + first * sin
    ptr, here, width = _part(block, q_ptr, k_ptr, v_ptr, q_blocks, kv_blocks)
    place = r[:, None] * width + _columns(here, HALF)[None, :]
    tl.store(ptr + place, first.to(dtype), mask=inside)
    tl.store(ptr + place + HALF, second.to(dtype), mask=inside)


@triton.jit
def _rotate_qkv_backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, codes_ptr, scale_ptr, amax_ptr, bias_ptr,
    tokens, rows, cols, strip, q_blocks, kv_blocks,
    AMAX: tl.constexpr, BIAS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A strip of tokens of one block, ROWS at a time; maxima and sums of its columns stay in registers."""
    block = tl.program_id(1)
    begin = tl.program_id(0) * strip
    end = tl.minimum(begin + strip, rows)
    ptr, here, width = _part(block, dq_ptr, dk_ptr, dv_ptr, q_blocks, kv_blocks)
    c, own = _columns(block, HALF), _columns(here, HALF)
    dtype: tl.constexpr = dq_ptr.dtype.element_ty
    turns = block < q_blocks + kv_blocks
    highest = tl.zeros([ROWS], tl.float32)
    columns, further_columns = tl.zeros([ROWS, 64], tl.float32), tl.zeros([ROWS, 64], tl.float32)
    sums, further_sums = tl.zeros([ROWS, 64], tl.float32), tl.zeros([ROWS, 64], tl.float32)
    for start in tl.range(begin, end, ROWS, num_stages=STAGES):
        r = start.to(tl.int64) + tl.arange(0, ROWS)
        inside, there = (r < tokens)[:, None], (r < end)
        place = r[:, None] * width + own[None, :]
        first = to_float32(tl.load(ptr + place, mask=inside, other=0.0))
        second = to_float32(tl.load(ptr + place + HALF, mask=inside, other=0.0))
        cos, sin = _angles(cos_ptr, sin_ptr, r, inside & turns, HALF)
        left, right = first * cos + second * sin, second * cos - first * sin
        first = to_float32(tl.where(turns, left, first).to(dtype))
        second = to_float32(tl.where(turns, right, second).to(dtype))
        largest = larger(tl.reduce(absolute(first), 1, larger), tl.reduce(absolute(second), 1, larger))
        factor, mask, scale = tile_scales(largest)
        factor, mask = tl.broadcast_to(factor[:, None], first.shape), tl.broadcast_to(mask[:, None], first.shape)
        place = r[:, None] * cols + c[None, :]
        tl.store(codes_ptr + place, tile_codes(first, factor, mask), mask=there[:, None])
        tl.store(codes_ptr + place + HALF, tile_codes(second, factor, mask), mask=there[:, None])
        tl.store(scale_ptr + block.to(tl.int64) * rows + r, scale, mask=there)
        if AMAX:
            columns, highest = raise_maxima(columns, highest, first, largest)
            further_columns = larger(further_columns, absolute(second))
        if BIAS:
            sums += first
            further_sums += second
    if AMAX:
        store_maxima(amax_ptr, columns, highest, c, c < cols, cols)
        store_maxima(amax_ptr, further_columns, highest, c + HALF, c < cols, cols)
    if BIAS:
        bias_ptr += tl.program_id(0) * cols
        tl.store(bias_ptr + c, tl.sum(sums, axis=0))
        tl.store(bias_ptr + c + HALF, tl.sum(further_sums, axis=0))


# Shapes of the launches: rows of a tile of 128 columns, tiles in flight, warps.
_FORWARD = {"ROWS": 16, "num_warps": 4}
_BACKWARD = {"ROWS": 4, "STAGES": 3, "num_warps": 1}


def rotate_qkv(
    qkv: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``rotary_qkv.rotate_qkv``."""
    tokens, head_dim = qkv.shape[0], 2 * cos.shape[1]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    q, k, v = (qkv.new_empty(tokens, count, head_dim) for count in (heads, kv_heads, kv_heads))
    _rotate_qkv_kernel[(triton.cdiv(tokens, _FORWARD["ROWS"]), qkv.shape[1] // BLOCK)](
        qkv, qkv if bias is None else bias, cos.contiguous(), sin.contiguous(), q, k, v, tokens, qkv.stride(0),
        heads * head_dim // BLOCK, kv_heads * head_dim // BLOCK,
        BIAS=bias is not None, HALF=head_dim // 2, **_FORWARD, enable_fp_fusion=False,
    )  # fmt: skip
    return q, k, v


def rotate_qkv_backward_quantize(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, rows: int, amax: bool, bias: bool, parts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``rotary_qkv.rotate_qkv_backward_quantize``; by ``parts`` programs a block of columns."""
    q_blocks, kv_blocks = (part.shape[1] * part.shape[2] // BLOCK for part in (dq, dk))
    cols = (q_blocks + 2 * kv_blocks) * BLOCK
    codes, scale, largest = zeroed_rows(rows, cols, amax, dq.device)
    tile = _BACKWARD["ROWS"]
    strip = triton.cdiv(triton.cdiv(rows, parts), tile) * tile
    sums = torch.empty(parts if bias else 0, cols, dtype=torch.float32, device=dq.device)
    # Programs that find no tokens write zeros into their row of the sums.
    _rotate_qkv_backward_kernel[(parts, q_blocks + 2 * kv_blocks)](
        dq.contiguous(), dk.contiguous(), dv.contiguous(), cos.contiguous(), sin.contiguous(),
        codes, scale, largest.view(torch.int32), sums, dq.shape[0], rows, cols, strip, q_blocks, kv_blocks,
        AMAX=amax, BIAS=bias, HALF=dq.shape[2] // 2, **_BACKWARD, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scale, largest, sums
