"""The numerics of FP8, in plain torch: what every kernel must reproduce, and the path that runs on a CPU.

An operand of a GEMM is a matrix [rows, contraction] of float8_e4m3fn codes and float32 scales, x ~= code * scale,
one scale for each block of the matrix. The granularity says how large a block is:

    tile     1 x 128             scales [rows, ceil(contraction / 128)]         activations and gradients
    block    128 x 128           scales [ceil(rows / 128), ceil(contraction / 128)]   weights
    channel  1 x contraction     scales [rows, 1]
    tensor   rows x contraction  scales [1, 1]

Rules, the same for all of them:
- amax, the largest absolute value of a block, is taken in float32. A last block may be partial.
- scale format ``ue8m0``: the smallest power of two s with amax <= 448 * s, by arithmetic on the exponent bits, so no
  rounding is involved. ``fp32``: amax / 448, one IEEE division.
- amax is floored at 448 * 2^-126, so that the smallest scale, 2^-126, is a normal float32 and the smallest bfloat16
  subnormal still has a non-zero code. A block of zeros has scale 1.
- code = x / scale in float32, clamped to +-448, rounded to nearest even; e4m3 subnormals are kept.
- A block that holds Inf or NaN gets the scale NaN and zero codes: the fault reaches the loss and the gradient norm,
  where the trainer sees it, instead of being saturated away.
"""

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
BLOCK = 128
AMAX_FLOOR = FP8_MAX * 2.0**-126
GRANULARITIES = ("tile", "block", "channel", "tensor")
SCALE_FORMATS = ("ue8m0", "fp32")
_VALUES = torch.arange(256, dtype=torch.uint8).view(FP8).float()
"""What each of the 256 codes stands for."""


def block_shape(granularity: str, rows: int, cols: int) -> tuple[int, int]:
    """Rows and columns that share one scale. Raises ValueError for an unknown granularity."""
    shapes = {"tile": (1, BLOCK), "block": (BLOCK, BLOCK), "channel": (1, cols), "tensor": (rows, cols)}
    if granularity not in shapes:
        raise ValueError(f"unknown granularity {granularity!r}; expected one of {GRANULARITIES}")
    return shapes[granularity]


def scale_shape(granularity: str, rows: int, cols: int) -> tuple[int, int]:
    """Shape of the scales of a [rows, cols] operand."""
    height, width = block_shape(granularity, rows, cols)
    return -(-rows // max(height, 1)), -(-cols // max(width, 1))


def scale_from_amax(amax: Tensor, scale_format: str) -> Tensor:
    """float32 scales of blocks whose largest absolute value is ``amax`` (float32, any shape).

    Raises ValueError for an unknown scale format.
    """
    if scale_format == "ue8m0":
        bits = amax.view(torch.int32)
        # amax = m * 2^e with 1 <= m < 2; 448 = 1.75 * 2^8. The scale is 2^(e-8) where m <= 1.75, else 2^(e-7).
        exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(torch.int32)
        scale = (exponent.clamp(min=1) << 23).view(torch.float32)
    elif scale_format == "fp32":
        # A tensor divisor: CUDA turns division by a number into multiplication by its rounded reciprocal.
        scale = amax.clamp(min=AMAX_FLOOR) / torch.full_like(amax, FP8_MAX)
    else:
        raise ValueError(f"unknown scale format {scale_format!r}; expected one of {SCALE_FORMATS}")
    scale = torch.where(amax == 0, 1.0, scale)
    return torch.where(torch.isfinite(amax), scale, torch.nan)


def quantize(x: Tensor, granularity: str, scale_format: str, transpose: bool = False) -> tuple[Tensor, Tensor]:
    """Codes (float8_e4m3fn, contiguous) and scales (float32) of ``x`` [rows, cols], bfloat16 or float32.

    With ``transpose`` the operand is x.T: codes [cols, rows], blocks along the rows of ``x``. Raises ValueError for an
    unknown granularity or scale format.
    """
    rows, cols = (x.shape[1], x.shape[0]) if transpose else x.shape
    height, width = block_shape(granularity, rows, cols)
    # A transpose is made of the codes, not of x: on a CPU that moves a quarter of the bytes.
    blocks = _blocks(x.float(), width, height) if transpose else _blocks(x.float(), height, width)
    scale = scale_from_amax(blocks.abs().amax(dim=(1, 3)), scale_format)
    values = (blocks / scale[:, None, :, None]).clamp_(-FP8_MAX, FP8_MAX).nan_to_num_(0.0)
    codes = values.flatten(2, 3).flatten(0, 1)[: x.shape[0], : x.shape[1]].to(FP8)
    return (codes.T.contiguous(), scale.T.contiguous()) if transpose else (codes.contiguous(), scale)


def dequantize(codes: Tensor, scale: Tensor, granularity: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """code * scale, [rows, cols]. Exact in float32 and bfloat16 where the scales are powers of two."""
    rows, cols = codes.shape
    working = torch.float64 if dtype == torch.float64 else torch.float32
    blocks = _blocks(_decoded(codes).to(working), *block_shape(granularity, rows, cols))
    values = blocks.mul_(scale.to(working)[:, None, :, None])
    return values.flatten(2, 3).flatten(0, 1)[:rows, :cols].to(dtype)


def _decoded(codes: Tensor) -> Tensor:
    """The float32 values of codes; on a CPU from a table, which is several times faster than torch's conversion."""
    if codes.device.type != "cpu":
        return codes.to(torch.float32)
    return _VALUES.index_select(0, codes.reshape(-1).view(torch.uint8).int()).view(codes.shape)


def transpose_rows(codes: Tensor, scale: Tensor, amax: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    """The operand of the transpose of codes * scale (``tile``, ue8m0): exact unless it gets subnormal or saturates.

    Its scales: ``tile``, those of its own blocks; ``channel``, those of the ``amax`` [any, cols] of the columns, which
    may be a little less than the codes say (they were rounded): the codes saturate then.
    """
    values = dequantize(codes, scale, "tile")
    if granularity != "channel":
        return quantize(values, granularity, "ue8m0", transpose=True)
    scale_t = scale_from_amax(amax.amax(dim=0), "ue8m0")
    moved = (values / scale_t).clamp_(-FP8_MAX, FP8_MAX).nan_to_num_(0.0)
    return moved.to(FP8).T.contiguous(), scale_t[:, None]


def scaled_mm(
    a: Tensor,
    a_scale: Tensor,
    a_granularity: str,
    b: Tensor,
    b_scale: Tensor,
    b_granularity: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """a @ b.T of two quantised operands, [M, K] and [N, K] -> [M, N]: float32 products and sums, one final rounding."""
    left = dequantize(a, a_scale, a_granularity)
    right = dequantize(b, b_scale, b_granularity)
    return (left @ right.T).to(out_dtype)


def _blocks(x: Tensor, height: int, width: int) -> Tensor:
    """[rows, cols] -> [row blocks, height, column blocks, width], zero-padded where the last is partial."""
    rows, cols = x.shape
    pad_rows, pad_cols = -rows % height, -cols % width
    if pad_rows or pad_cols:
        x = torch.nn.functional.pad(x, (0, pad_cols, 0, pad_rows))
    return x.reshape((rows + pad_rows) // height, height, (cols + pad_cols) // width, width)
