"""Scaled FP8 GEMM behind one signature: ``scaled_mm(a, b)`` = a @ b.T of two quantised operands.

On Hopper (compute capability 9.0) it is cuBLAS through ``torch.nn.functional.scaled_mm``, always with slow (float32)
accumulation: fast accumulation loses three bits over 16,384 terms. There a few hundred tokens, as a pass of decoding
has, times weights go through Triton (``split_k_triton``). Elsewhere, and for shapes that the hardware path cannot
take, the operands are dequantised and multiplied: on a CPU in float32, on a GPU in bfloat16 with float32 sums.
"""

import torch
from torch import Tensor

from infir2.kernels import reference
from infir2.kernels.custom_op import custom_op
from infir2.kernels.reference import BLOCK
from infir2.kernels.split_k import PartialSums

# (a granularity, b granularity) that cuBLAS multiplies on Hopper -> torch's names for them.
_CUBLAS_PAIRS = {
    ("tile", "block"): ("BlockWise1x128", "BlockWise128x128"),
    ("tile", "tile"): ("BlockWise1x128", "BlockWise1x128"),
    ("channel", "channel"): ("RowWise", "RowWise"),
    ("tensor", "tensor"): ("TensorWise", "TensorWise"),
}

# Up to so many rows, with fewer 128 x 128 output tiles than this and long sums, the Triton kernel of few rows is faster
# than cuBLAS, which then leaves half of the multiprocessors without work. (Of o_proj's square weights it is not.)
_FEW_ROWS = 256
_FEW_TILES = 64


def describe_backend(device: torch.device) -> tuple[str, str]:
    """(name, reason) of the path that FP8 GEMMs take on this device: ``cublas`` or ``reference``."""
    if device.type != "cuda":
        return "reference", f"{device.type} has no FP8 GEMM: operands are dequantised and multiplied in float32"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) == (9, 0):
        return "cublas", "compute capability 9.0: cuBLAS multiplies every granularity natively"
    return "reference", (
        f"compute capability {major}.{minor}: block-scaled FP8 GEMMs need 9.0 (Hopper); "
        "operands are dequantised and multiplied in bfloat16"
    )


def pad_tokens(x: Tensor) -> Tensor:
    """``x`` [tokens, features]; on a GPU with rows of zeros up to a multiple of 128, as the hardware GEMM wants it.

    They add nothing to any product.
    """
    missing = -x.shape[0] % BLOCK if x.is_cuda else 0
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


def unsupported_reason(rows: int, contraction: int) -> str | None:
    """Why the hardware path cannot take an operand of this shape, or None where it can."""
    for name, size in (("rows", rows), ("contraction", contraction)):
        if size % BLOCK:
            return f"{name} {size} is not a multiple of {BLOCK}"
    return None


def _empty_scaled_mm(
    a: Tensor,
    a_scale: Tensor,
    a_granularity: str,
    b: Tensor,
    b_scale: Tensor,
    b_granularity: str,
    out_dtype: torch.dtype,
) -> Tensor:
    return torch.empty(a.shape[0], b.shape[0], dtype=out_dtype, device=a.device)


@custom_op(_empty_scaled_mm)
def scaled_mm(
    a: Tensor,
    a_scale: Tensor,
    a_granularity: str,
    b: Tensor,
    b_scale: Tensor,
    b_granularity: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """a @ b.T: codes [M, K] and [N, K] with their scales -> [M, N] in ``out_dtype``, bfloat16 or float32.

    Sums are float32. Granularities as in ``reference``, scales laid out as ``operand`` says. ValueError for an unknown
    granularity.
    """
    if not a.is_cuda:
        return reference.scaled_mm(a, a_scale, a_granularity, b, b_scale, b_granularity, out_dtype)
    if _few_tiles(a, b, a_granularity, b_granularity):
        from infir2.kernels import split_k_triton

        return split_k_triton.scaled_mm(a, a_scale, b, b_scale, out_dtype)
    if not _cublas_takes(a, b, a_granularity, b_granularity):
        left = reference.dequantize(a, a_scale, a_granularity, torch.bfloat16)
        right = reference.dequantize(b, b_scale, b_granularity, torch.bfloat16)
        return torch.mm(left, right.T, out_dtype=out_dtype) if out_dtype == torch.float32 else left @ right.T
    types = torch.nn.functional.ScalingType
    recipe_a, recipe_b = (getattr(types, name) for name in _CUBLAS_PAIRS[(a_granularity, b_granularity)])
    return torch.nn.functional.scaled_mm(
        a, b.T, a_scale, recipe_a, _right_scale(b_scale, b_granularity), recipe_b, output_dtype=out_dtype
    )


def multiply_rows(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, rows: int, out_dtype: torch.dtype
) -> Tensor | PartialSums:
    """The first ``rows`` rows of a @ b.T, for a caller who can add partial sums (see ``split_k``).

    Codes [rows or more, contraction] with ``tile`` scales and [outputs, contraction] with ``block`` scales -> [rows,
    outputs] in ``out_dtype``, or what adds up to that.
    """
    if a.is_cuda and _few_tiles(a, b, "tile", "block"):
        from infir2.kernels import split_k_triton

        return split_k_triton.multiply(a, a_scale, b, b_scale, rows, out_dtype)
    return scaled_mm(a, a_scale, "tile", b, b_scale, "block", out_dtype)[:rows]


def _few_tiles(a: Tensor, b: Tensor, a_granularity: str, b_granularity: str) -> bool:
    rows, outputs = a.shape[0], b.shape[0]
    return (
        (a_granularity, b_granularity) == ("tile", "block")
        and 0 < rows <= _FEW_ROWS
        and -(-rows // BLOCK) * (outputs // BLOCK) < _FEW_TILES
        and a.shape[1] >= 2 * outputs
        and torch.cuda.get_device_capability(a.device) == (9, 0)
        and unsupported_reason(outputs, a.shape[1]) is None
    )


def _cublas_takes(a: Tensor, b: Tensor, a_granularity: str, b_granularity: str) -> bool:
    return (
        (a_granularity, b_granularity) in _CUBLAS_PAIRS
        and torch.cuda.get_device_capability(a.device) == (9, 0)
        and unsupported_reason(a.shape[0], a.shape[1]) is None
        and unsupported_reason(b.shape[0], b.shape[1]) is None
    )


def _right_scale(scale: Tensor, granularity: str) -> Tensor:
    """The right operand's scales as torch expects them for b.T: block scales with the padding that ``operand`` gave."""
    if granularity == "block":
        rows, missing = scale.shape[0], -scale.shape[1] % 4
        padded = scale.shape[1] + missing
        # Memory that torch.compile laid out may end with the last scale, or have no room between the rows.
        dense = rows > 1 and scale.stride(0) != padded
        if missing and (dense or scale.untyped_storage().nbytes() < (scale.storage_offset() + rows * padded) * 4):
            return torch.nn.functional.pad(scale, (0, missing)).T
        return scale.as_strided((rows, padded), (padded, 1)).T
    if granularity == "channel":
        return scale.T
    return scale
