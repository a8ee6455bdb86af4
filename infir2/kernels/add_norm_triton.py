"""Triton kernel of the end of a decoder layer's branch; ``add_norm`` defines the result. A program takes one row.

Imported only where CUDA tensors are met.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from infir2.kernels.codes_triton import encode
from infir2.kernels.dependent_launch import has_dependent_launch, launch_options
from infir2.kernels.reference import BLOCK
from infir2.kernels.split_k import PartialSums
from infir2.kernels.split_k_triton import add_parts


@triton.jit(do_not_specialize=["part_stride", "scale_stride", "tiles", "blocks", "programs"])
def _add_norm_kernel(
    residual_ptr, branch_ptr, weight_ptr, sum_ptr, out_ptr, scale_ptr,
    cols, residual_stride, branch_stride, scale_stride, eps, part_stride, tiles, blocks, programs,
    WIDTH: tl.constexpr, MOST: tl.constexpr, EVEN: tl.constexpr, TILES: tl.constexpr, QUANTIZE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The row as [TILES, 128]. MOST: how many parts the branch has at most; 0: it is no parts but whole."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    c = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = c < cols
    dtype: tl.constexpr = residual_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(dtype).to(tl.float32)
    before = tl.load(residual_ptr + row * residual_stride + c, mask=inside, other=0.0).to(tl.float32)
    place = row * branch_stride + c
    if MOST == 0:
        branch = tl.load(branch_ptr + place, mask=inside, other=0.0).to(tl.float32)
    else:
        branch = add_parts(branch_ptr, place, c, part_stride, tiles, blocks, programs, WIDTH, MOST, EVEN, inside)
        branch = branch.to(dtype).to(tl.float32)
    x = (before + branch).to(dtype)
    tl.store(sum_ptr + row * cols + c, x, mask=inside)
    x = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(tl.sum(x * x, axis=1), axis=0) / cols + eps)
    normed = (weight * (x * rstd).to(dtype).to(tl.float32)).to(dtype)
    if QUANTIZE:
        codes, scale = encode(normed.to(tl.float32))
        tl.store(out_ptr + row * cols + c, codes, mask=inside)
        tl.store(scale_ptr + tile * scale_stride + row, scale, mask=tile * 128 < cols)
    else:
        tl.store(out_ptr + row * cols + c, normed, mask=inside)


def add_norm(
    residual: Tensor, branch: Tensor | PartialSums, weight: Tensor, eps: float, out: Tensor, scale: Tensor | None
) -> Tensor:
    """The new residual; fills ``out`` with the normed values, or with ``scale`` with their codes."""
    rows, cols = residual.shape
    total = torch.empty(rows, cols, dtype=residual.dtype, device=residual.device)
    tiles = triton.next_power_of_2(triton.cdiv(cols, BLOCK))
    if isinstance(branch, PartialSums):
        data, split = branch.sums, branch.split
        shape = {"WIDTH": cols // split.tiles, "MOST": split.most, "EVEN": split.even}
        numbers = (cols, rows * cols, split.tiles, split.blocks, split.programs)
    else:
        data, shape = branch, {"WIDTH": BLOCK, "MOST": 0, "EVEN": True}
        numbers = (branch.stride(0), 0, 1, 1, 1)
    dependent = has_dependent_launch(residual.device)
    _add_norm_kernel[(rows,)](
        residual, data, weight, total, out, out if scale is None else scale,
        cols, residual.stride(0), numbers[0], 0 if scale is None else scale.stride(1), eps, *numbers[1:],
        **shape, TILES=tiles, QUANTIZE=scale is not None, DEPENDENT=dependent, num_warps=max(1, min(8, tiles // 4)),
        **launch_options(dependent),
    )  # fmt: skip
    return total
