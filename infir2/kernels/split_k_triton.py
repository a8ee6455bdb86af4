"""Triton FP8 GEMM for few rows: tokens with ``tile`` scales times weights with ``block`` scales.

A pass of decoding reads all weights for a few hundred rows of tokens. A large GEMM's tiles are then too few to keep
every multiprocessor busy, so the contraction is cut into parts (see ``split_k``): each leaves its float32 sums in a
workspace, and another kernel, this file's or one that goes on with the result, adds them in their order, so that the
same operands always give the same bits. Tiles are as high as they can be: all programs together read the tokens once
for every tile of columns and the weights once for every tile of rows, all of it from the cache on the chip, which is
what bounds them. ``reference.scaled_mm`` defines the result.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from infir2.kernels.reference import BLOCK
from infir2.kernels.split_k import PartialSums, Split


class Tile(NamedTuple):
    """What a program multiplies at a time: rows of tokens x columns of outputs."""

    rows: int
    cols: int
    num_warps: int
    num_stages: int


# The tile for up to so many rows of tokens.
_TILES = {
    128: Tile(64, 128, num_warps=4, num_stages=6),
    256: Tile(128, 128, num_warps=8, num_stages=4),
}
_PROGRAMS = 132  # that run at the same time, one on each multiprocessor of a Hopper GPU
_LEAST_STEPS = 3  # of 128 terms each, that are worth a program
# Programs for weights (outputs, contraction) for which the rule below is not the best: down_proj of Qwen2.5-7B, 1.5B.
_PROGRAMS_FOR = {(3584, 18_944): 66, (1536, 8960): 48}


def tile_for(rows: int) -> Tile:
    """The lowest tile that holds all rows, or else the highest."""
    return next((tile for most, tile in _TILES.items() if rows <= most), _TILES[max(_TILES)])


def split_for(outputs: int, contraction: int, cols: int) -> Split:
    """Whatever the rows: as many programs as run at the same time, the same number for every tile."""
    tiles, blocks = outputs // cols, contraction // BLOCK
    parts = max(1, min(_PROGRAMS // tiles, blocks // _LEAST_STEPS))
    return Split(tiles, blocks, _PROGRAMS_FOR.get((outputs, contraction), tiles * parts))


@triton.jit
def _owner(step, steps, programs):
    """See ``Split.owner``."""
    return ((step + 1) * programs - 1) // steps


@triton.jit(do_not_specialize=["rows", "blocks", "a_scale_stride", "b_scale_stride"])
def _parts_kernel(
    a, a_scale_ptr, b, b_scale_ptr, out_ptr, rows, outputs, blocks, a_scale_stride, b_scale_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A piece of the line of steps for ROWS rows; out [parts, rows, outputs]."""
    gdc_launch_dependents()
    gdc_wait()
    first_row = tl.program_id(0) * ROWS
    program, programs = tl.program_id(1), tl.num_programs(1)
    steps = outputs // COLS * blocks
    step, stop = program * steps // programs, (program + 1) * steps // programs
    row = first_row + tl.arange(0, ROWS)
    while step < stop:
        tile = step // blocks
        first = step - tile * blocks
        end = tl.minimum(blocks, first + stop - step)
        first_col = tile * COLS
        b_scales = b_scale_ptr + first_col // 128 * b_scale_stride
        total = tl.zeros([ROWS, COLS], tl.float32)
        # The scales of a block are read while the block before it is multiplied.
        a_scale = tl.load(a_scale_ptr + first * a_scale_stride + row, mask=row < rows, other=0.0)
        b_scale = tl.load(b_scales + first)
        for block in range(first, end):
            scale = a_scale * b_scale
            following = tl.minimum(block + 1, end - 1)
            a_scale = tl.load(a_scale_ptr + following * a_scale_stride + row, mask=row < rows, other=0.0)
            b_scale = tl.load(b_scales + following)
            # Tensor cores keep some 14 bits of a sum of FP8 products: only 128 of them are added there.
            total += tl.dot(a.load([first_row, block * 128]), b.load([first_col, block * 128]).T) * scale[:, None]
        part, col = program - _owner(tile * blocks, steps, programs), first_col + tl.arange(0, COLS)
        out = out_ptr + (part.to(tl.int64) * rows + row)[:, None] * outputs + col[None, :]
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None])
        step += end - first


@triton.jit
def add_parts(
    sums_ptr, place, col, part_stride, tiles, blocks, programs, COLS: tl.constexpr, MOST: tl.constexpr,
    EVEN: tl.constexpr, inside,
):  # fmt: skip
    """The float32 sum of all parts of the elements at ``place``, which lie in columns ``col``."""
    total = tl.load(sums_ptr + place, mask=inside, other=0.0)
    parts = tl.full(col.shape, MOST, tl.int32)
    if not EVEN:
        steps, tile = tiles * blocks, col // COLS
        parts = _owner((tile + 1) * blocks - 1, steps, programs) - _owner(tile * blocks, steps, programs) + 1
    for part in tl.static_range(1, MOST):
        total += tl.load(sums_ptr + part * part_stride + place, mask=inside & (part < parts), other=0.0)
    return total


@triton.jit(do_not_specialize=["part_stride", "tiles", "blocks", "programs"])
def _join_parts_kernel(
    sums_ptr, out_ptr, part_stride, outputs, tiles, blocks, programs,
    COLS: tl.constexpr, MOST: tl.constexpr, EVEN: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """out [rows * outputs] = the sum of sums [parts, rows * outputs]."""
    gdc_launch_dependents()
    gdc_wait()  # it starts before the sums are there, to be ready when they are
    i = tl.program_id(0) * EACH + tl.arange(0, EACH)
    inside = i < part_stride
    total = add_parts(sums_ptr, i, i % outputs, part_stride, tiles, blocks, programs, COLS, MOST, EVEN, inside)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=inside)


def multiply(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, rows: int, out_dtype: torch.dtype,
    tile: Tile | None = None, split: Split | None = None,
) -> Tensor | PartialSums:  # fmt: skip
    """The first ``rows`` rows of a @ b.T, where it is not cut into parts in ``out_dtype``.

    ``tile`` codes [rows or more, contraction] and ``block`` codes [outputs, contraction], scales laid out as
    ``operand`` does, the contraction and outputs in multiples of 128.
    """
    outputs, contraction = b.shape
    tile = tile or tile_for(rows)
    split = split or split_for(outputs, contraction, tile.cols)
    whole = split.programs == split.tiles
    shape, dtype = ((rows, outputs), out_dtype) if whole else ((split.most, rows, outputs), torch.float32)
    out = torch.empty(shape, dtype=dtype, device=a.device)
    _parts_kernel[(triton.cdiv(rows, tile.rows), split.programs)](
        TensorDescriptor.from_tensor(a[:rows], [tile.rows, BLOCK]), a_scale,
        TensorDescriptor.from_tensor(b, [tile.cols, BLOCK]), b_scale,
        out, rows, outputs, split.blocks, a_scale.stride(1), b_scale.stride(0),
        ROWS=tile.rows, COLS=tile.cols,
        num_warps=tile.num_warps, num_stages=tile.num_stages, launch_pdl=True,
    )  # fmt: skip
    return out if whole else PartialSums(out, split)


def scaled_mm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype,
    tile: Tile | None = None, split: Split | None = None,
) -> Tensor:  # fmt: skip
    """a @ b.T [rows, outputs], of what ``multiply`` takes."""
    product = multiply(a, a_scale, b, b_scale, a.shape[0], out_dtype, tile, split)
    return product if isinstance(product, Tensor) else join(product, out_dtype)


def join(parts: PartialSums, out_dtype: torch.dtype) -> Tensor:
    """See ``PartialSums.total``."""
    sums, split, each = parts.sums, parts.split, 1024
    _, rows, outputs = sums.shape
    out = torch.empty(rows, outputs, dtype=out_dtype, device=sums.device)
    _join_parts_kernel[(triton.cdiv(out.numel(), each),)](
        sums, out, rows * outputs, outputs, split.tiles, split.blocks, split.programs,
        COLS=outputs // split.tiles, MOST=split.most, EVEN=split.even, EACH=each, num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return out
