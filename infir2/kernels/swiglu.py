"""SwiGLU, silu(gate) * up, with its output quantised to row codes in the same pass, forward and backward.

    silu(g) = g s(g),   d silu / d g = s(g) + silu(g) (1 - s(g)),   with s(g) = 1 / (1 + e^-g)

(Shazeer: GLU variants improve transformer, 2020.)
gate and up lie side by side in one matrix [tokens, 2 * inner], as one GEMM leaves them. All arithmetic is float32, and
the quantiser's rounding is the only one. The backward pass makes silu(gate) * up once more instead of having it kept;
it can start from the matrix itself or from its row codes (``kept``).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from infir2.kernels import reference
from infir2.kernels.custom_op import custom_op
from infir2.kernels.dispatch import inference_on_cuda
from infir2.kernels.operand import empty_rows
from infir2.kernels.row_codes import encode_rows


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [tokens, 2 * inner] in any float dtype -> float32 [tokens, inner]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of two tensors of one shape, in their dtype, each factor rounded to it."""
    if inference_on_cuda(gate):
        from infir2.kernels import swiglu_triton

        return swiglu_triton.silu_mul(gate, up)
    return F.silu(gate) * up


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of gate_up [tokens, 2 * inner] in float32, from that of swiglu(gate_up), ``grad`` [tokens, inner]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    wide, sigmoid = grad.float(), torch.sigmoid(gate)
    silu = gate * sigmoid
    return torch.cat([wide * up * (sigmoid + silu * (1 - sigmoid)), wide * silu], dim=-1)


def _empty_swiglu_quantize(gate_up: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, double = gate_up.shape
    kept = empty_rows(tokens if keep else 0, double, False, gate_up.device)
    return *empty_rows(tokens, double // 2, False, gate_up.device)[:2], *kept[:2]


@custom_op(_empty_swiglu_quantize)
def swiglu_quantize(gate_up: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, scale) of swiglu(gate_up), then (codes, scale) of gate_up itself: empty unless ``keep``.

    gate_up [tokens, 2 * inner], bfloat16 or float32. ValueError on a GPU where inner is not a multiple of 128.
    """
    if gate_up.is_cuda:
        from infir2.kernels import swiglu_triton

        return swiglu_triton.swiglu_quantize(gate_up, keep)
    kept = encode_rows(gate_up, False) if keep else empty_rows(0, gate_up.shape[1], False, gate_up.device)
    return *encode_rows(swiglu(gate_up), False)[:2], *kept[:2]


def _empty_swiglu_backward_quantize(
    grad: Tensor, gate_up: Tensor, kept_scale: Tensor, amax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, inner = grad.shape
    return (
        *empty_rows(tokens, 2 * inner, amax, grad.device),
        *empty_rows(tokens, inner, amax, grad.device),
    )


@custom_op(_empty_swiglu_backward_quantize)
def swiglu_backward_quantize(
    grad: Tensor, gate_up: Tensor, kept_scale: Tensor, amax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row codes (codes, scale, amax) of gate_up's gradient, then of swiglu(gate_up).

    grad [tokens, inner]. ``gate_up`` [tokens, 2 * inner] holds values, or codes made with ``keep``, of which
    ``kept_scale`` holds the scales. amax: whether the columns' maxima are taken. Errors as in ``swiglu_quantize``.
    """
    if grad.is_cuda:
        from infir2.kernels import swiglu_triton

        return swiglu_triton.swiglu_backward_quantize(grad, gate_up, kept_scale, amax)
    if gate_up.dtype == reference.FP8:
        gate_up = reference.dequantize(gate_up, kept_scale, "tile")
    return *encode_rows(swiglu_backward(grad, gate_up), amax), *encode_rows(swiglu(gate_up), amax)
