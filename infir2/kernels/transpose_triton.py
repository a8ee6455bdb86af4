"""Triton kernels that transpose codes: as they are, or row codes moved to the scales of the transpose.

``transpose`` and ``reference`` define the results. Four rows of codes are packed into one 32-bit word before the
transposition goes through shared memory: byte by byte it would take four times as long.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.kernels.codes_triton import AMAX_PARTS, magnitude_bits, scale_and_reciprocal
from infir2.kernels.operand import empty_operand
from infir2.kernels.reference import BLOCK


@triton.jit
def _load_tile(ptr, r, c, rows, cols, stride):
    inside = (r < rows)[:, None] & (c < cols)[None, :]
    return tl.load(ptr + r.to(tl.int64)[:, None] * stride + c[None, :], mask=inside, other=0.0)


@triton.jit
def _packed_codes(a, b, c, d):
    """Four float32 numbers to e4m3 in one word, the first in its lowest byte; beyond +-448 they saturate."""
    return tl.inline_asm_elementwise(
        """{ .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high}; }""",
        "=r,f,f,f,f", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _store_transposed(packed, out_ptr, word, c, words, cols):
    """packed [32 words of four rows, 128 columns] -> out [cols, words]."""
    inside = (c < cols)[:, None] & (word < words)[None, :]
    tl.store(out_ptr + c.to(tl.int64)[:, None] * words + word[None, :], tl.trans(packed), mask=inside)


@triton.jit
def _load_values(codes_ptr, scale_ptr, r, c, col_block, rows, cols):
    scale = tl.load(scale_ptr + col_block.to(tl.int64) * rows + r, mask=r < rows, other=1.0)
    return _load_tile(codes_ptr, r, c, rows, cols, cols).to(tl.float32) * scale[:, None]


@triton.jit
def _transpose_kernel(
    codes_ptr, scale_ptr, amax_ptr, words_ptr, scale_t_ptr, rows, cols, stride, CHANNEL: tl.constexpr
):
    """A 128 x 128 tile of codes, moved to its new scales: exact but for what becomes subnormal there."""
    row_block, col_block = tl.program_id(0), tl.program_id(1)
    word = row_block * 32 + tl.arange(0, 32)
    c = col_block * 128 + tl.arange(0, 128)
    v0 = _load_values(codes_ptr, scale_ptr, 4 * word, c, col_block, rows, cols)
    v1 = _load_values(codes_ptr, scale_ptr, 4 * word + 1, c, col_block, rows, cols)
    v2 = _load_values(codes_ptr, scale_ptr, 4 * word + 2, c, col_block, rows, cols)
    v3 = _load_values(codes_ptr, scale_ptr, 4 * word + 3, c, col_block, rows, cols)
    if CHANNEL:
        bits = tl.zeros([128], tl.int32)
        for part in tl.static_range(AMAX_PARTS):
            largest = tl.load(amax_ptr + part * cols + c, mask=c < cols, other=0.0)
            bits = tl.maximum(bits, magnitude_bits(largest))
    else:
        pairs = tl.maximum(
            tl.maximum(magnitude_bits(v0), magnitude_bits(v1)), tl.maximum(magnitude_bits(v2), magnitude_bits(v3))
        )
        bits = tl.max(pairs, axis=0)
    scale_t, reciprocal = scale_and_reciprocal(bits)
    reciprocal = reciprocal[None, :]
    packed = _packed_codes(v0 * reciprocal, v1 * reciprocal, v2 * reciprocal, v3 * reciprocal)
    packed = tl.where((bits < 0x7F800000)[None, :], packed, 0)
    _store_transposed(packed, words_ptr, word, c, stride, cols)
    if CHANNEL:
        tl.store(scale_t_ptr + c, scale_t, mask=(c < cols) & (row_block == 0))
    else:
        tl.store(scale_t_ptr + row_block.to(tl.int64) * cols + c, scale_t, mask=c < cols)


@triton.jit
def _transpose_bytes_kernel(bytes_ptr, words_ptr, rows, cols, stride):
    word = tl.program_id(0) * 32 + tl.arange(0, 32)
    c = tl.program_id(1) * 128 + tl.arange(0, 128)
    b0 = _load_tile(bytes_ptr, 4 * word, c, rows, cols, cols).to(tl.int32)
    b1 = _load_tile(bytes_ptr, 4 * word + 1, c, rows, cols, cols).to(tl.int32)
    b2 = _load_tile(bytes_ptr, 4 * word + 2, c, rows, cols, cols).to(tl.int32)
    b3 = _load_tile(bytes_ptr, 4 * word + 3, c, rows, cols, cols).to(tl.int32)
    _store_transposed(b0 | (b1 << 8) | (b2 << 16) | (b3 << 24), words_ptr, word, c, stride, cols)


def transpose_rows(codes: Tensor, scale: Tensor, amax: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    """See ``transpose.transpose_rows``."""
    rows, cols = codes.shape
    codes_t, scale_t = empty_operand(cols, rows, granularity, codes.device)
    words = _words(codes_t)
    _transpose_kernel[_grid(rows, cols)](
        codes, scale, amax, words, scale_t, rows, cols, words.shape[1], CHANNEL=granularity == "channel", num_warps=4
    )
    return _written(words, codes_t), scale_t


def transpose_tiles_into(codes: Tensor, scale: Tensor, codes_t: Tensor, scale_t: Tensor) -> None:
    """See ``transpose.transpose_tiles_into``."""
    rows, cols = codes.shape
    if rows % BLOCK:
        raise ValueError(f"{rows} rows are not whole blocks of {BLOCK}")
    words = codes_t.view(torch.int32)
    _transpose_kernel[_grid(rows, cols)](
        codes, scale, scale, words, scale_t, rows, cols, words.stride(0), CHANNEL=False, num_warps=4
    )


def transpose_codes(codes: Tensor) -> Tensor:
    """See ``transpose.transpose_codes``."""
    rows, cols = codes.shape
    codes_t = torch.empty(cols, rows, dtype=codes.dtype, device=codes.device)
    words = _words(codes_t)
    _transpose_bytes_kernel[_grid(rows, cols)](codes.view(torch.uint8), words, rows, cols, words.shape[1], num_warps=8)
    return _written(words, codes_t)


def _grid(rows: int, cols: int) -> tuple[int, int]:
    return triton.cdiv(rows, BLOCK), triton.cdiv(cols, BLOCK)


def _words(codes_t: Tensor) -> Tensor:
    """The memory of ``codes_t`` as 32-bit words; wider memory of its own where its rows are not whole words."""
    cols, rows = codes_t.shape
    if rows and rows % 4 == 0:
        return codes_t.view(torch.int32)
    return torch.empty(cols, -(-rows // 4), dtype=torch.int32, device=codes_t.device)


def _written(words: Tensor, codes_t: Tensor) -> Tensor:
    """``codes_t`` once the kernel has filled ``words``."""
    if codes_t.shape[1] % 4:
        codes_t.copy_(words.view(codes_t.dtype)[:, : codes_t.shape[1]])
    return codes_t
