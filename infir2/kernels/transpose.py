"""Operands of a transposed matrix from its codes: the same codes of square blocks, row codes moved to new scales."""

import torch
from torch import Tensor

from infir2.kernels import reference
from infir2.kernels.custom_op import custom_op
from infir2.kernels.operand import empty_operand, with_layout


def transpose_operand(codes: Tensor, scale: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    """The operand of x.T from the operand of x, exactly. ValueError for all scales but ``block`` and ``tensor``."""
    if granularity not in ("block", "tensor"):
        raise ValueError(f"{granularity} scales do not transpose: quantise the transposed matrix instead")
    return transpose_codes(codes), with_layout(scale.T, granularity)


def _empty_transpose_codes(codes: Tensor) -> Tensor:
    return torch.empty(codes.shape[1], codes.shape[0], dtype=codes.dtype, device=codes.device)


@custom_op(_empty_transpose_codes)
def transpose_codes(codes: Tensor) -> Tensor:
    """codes.T, contiguous, of a contiguous matrix of one-byte elements [rows, cols]."""
    if not codes.is_cuda:
        return torch.empty(codes.T.shape, dtype=codes.dtype).copy_(codes.T)
    from infir2.kernels import transpose_triton

    return transpose_triton.transpose_codes(codes)


def _empty_transpose_rows(codes: Tensor, scale: Tensor, amax: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    return empty_operand(codes.shape[1], codes.shape[0], granularity, codes.device)


@custom_op(_empty_transpose_rows)
def transpose_rows(codes: Tensor, scale: Tensor, amax: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    """Codes [cols, rows] and scales of the transpose of the row codes; see ``row_codes``.

    granularity: ``tile`` (1x128 along the old rows), or ``channel`` (one scale each, from ``amax``).
    """
    if not codes.is_cuda:
        codes_t, scale_t = reference.transpose_rows(codes, scale, amax, granularity)
        return codes_t, with_layout(scale_t, granularity)
    from infir2.kernels import transpose_triton

    return transpose_triton.transpose_rows(codes, scale, amax, granularity)


def transpose_tiles_into(codes: Tensor, scale: Tensor, codes_t: Tensor, scale_t: Tensor) -> None:
    """``transpose_rows`` to tiles, into codes_t [cols, rows] and scale_t [cols, rows / 128].

    They may be columns of a wider operand. ValueError on a GPU where rows is not a multiple of 128.
    """
    if not codes.is_cuda:
        made, made_scale = reference.transpose_rows(codes, scale, scale, "tile")
        codes_t.copy_(made)
        scale_t.copy_(made_scale)
        return
    from infir2.kernels import transpose_triton

    transpose_triton.transpose_tiles_into(codes, scale, codes_t, scale_t)
