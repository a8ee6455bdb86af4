"""Triton kernel of row codes; ``row_codes`` defines them. Imported only where a CUDA tensor is quantised.

Tiles are small, so that many programs share a multiprocessor, and where column maxima are taken each program walks down
a strip of rows and keeps them in registers until its end. Inside a strip 32 bits hold every offset.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.kernels.codes_triton import raise_maxima, store_maxima, store_tiles, strip_grid, to_float32
from infir2.kernels.operand import contiguous_rows, zeroed_rows


@triton.jit
def _rows_kernel(
    x_ptr, codes_ptr, scale_ptr, amax_ptr, rows, cols, stride,
    AMAX: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * (STEPS * ROWS)
    col_block = tl.program_id(1)
    c = col_block * 128 + tl.arange(0, 128)
    x_ptr += first.to(tl.int64) * stride
    codes_ptr += first.to(tl.int64) * cols
    scale_ptr += col_block.to(tl.int64) * rows + first
    columns = tl.zeros([ROWS, 128], tl.float32)
    highest = tl.zeros([ROWS], tl.float32)
    for step in tl.range(STEPS, num_stages=STAGES):
        r = step * ROWS + tl.arange(0, ROWS)
        inside = (r < rows - first)[:, None] & (c < cols)[None, :]
        value = to_float32(tl.load(x_ptr + (r[:, None] * stride + c[None, :]), mask=inside, other=0.0))
        largest = store_tiles(value, codes_ptr, scale_ptr, r, c, inside, rows - first, cols, LANES)
        if AMAX:
            columns, highest = raise_maxima(columns, highest, value, largest)
    if AMAX:
        store_maxima(amax_ptr, columns, highest, c, c < cols, cols)


# Shapes of the launches: rows of a tile of 128 columns, tiles of a strip, tiles in flight, warps. With column maxima
# strips are long.
_PLAIN = {"ROWS": 16, "STEPS": 1, "STAGES": 1, "num_warps": 4}
_STRIP = {"ROWS": 4, "STEPS": 32, "STAGES": 3, "num_warps": 1}


def quantize_rows(x: Tensor, amax: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See ``row_codes.quantize_rows``."""
    x = contiguous_rows(x)
    rows, cols = x.shape
    codes, scale, largest = zeroed_rows(rows, cols, amax, x.device)
    shape = _STRIP if amax else _PLAIN
    vectors = x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0
    _rows_kernel[strip_grid(rows, cols, shape)](
        x, codes, scale, largest.view(torch.int32), rows, cols, x.stride(0), AMAX=amax, LANES=vectors, **shape
    )
    return codes, scale, largest
