"""SwiGLU, silu(gate) * up, with its output quantised to row codes in the same pass, forward and backward.

gate and up lie side by side in one matrix [tokens, 2 * inner], as one GEMM leaves them. All arithmetic is float32 with
one rounding to the dtype of the input, then the quantiser's. The backward pass makes silu(gate) * up once more instead
of having it kept; it can start from the matrix itself or from its row codes (``kept``).
"""

import torch
from torch import Tensor

from infir2.kernels import reference
from infir2.kernels.operand import empty_rows
from infir2.kernels.rows import encode_rows


def swiglu(gate_up: Tensor) -> Tensor:
    """[tokens, 2 * inner] -> [tokens, inner]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of gate_up, in the dtype of ``grad`` [tokens, inner]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    wide, sigmoid = grad.float(), torch.sigmoid(gate)
    grad_gate = wide * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([grad_gate, wide * gate * sigmoid], dim=-1).to(grad.dtype)


@torch.library.custom_op("infir2::swiglu_quantize", mutates_args=())
def swiglu_quantize(gate_up: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, scale) of swiglu(gate_up), then (codes, scale) of gate_up itself: empty unless ``keep``."""
    if gate_up.is_cuda:
        from infir2.kernels import rows_triton

        return rows_triton.swiglu_quantize(gate_up, keep)
    kept = encode_rows(gate_up, False) if keep else empty_rows(0, gate_up.shape[1], False, gate_up.device)
    return *encode_rows(swiglu(gate_up), False)[:2], *kept[:2]


@swiglu_quantize.register_fake
def _(gate_up: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, double = gate_up.shape
    kept = empty_rows(tokens if keep else 0, double, False, gate_up.device)
    return *empty_rows(tokens, double // 2, False, gate_up.device)[:2], *kept[:2]


@torch.library.custom_op("infir2::swiglu_backward_quantize", mutates_args=())
def swiglu_backward_quantize(
    grad: Tensor, gate_up: Tensor, kept_scale: Tensor, amax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row codes (codes, scale, amax) of gate_up's gradient, then of swiglu(gate_up).

    ``gate_up`` holds values, or codes made with ``keep``, of which ``kept_scale`` holds the scales.
    """
    if grad.is_cuda:
        from infir2.kernels import rows_triton

        return rows_triton.swiglu_backward_quantize(grad, gate_up, kept_scale, amax)
    if gate_up.dtype == reference.FP8:
        gate_up = reference.dequantize(gate_up, kept_scale, "tile")
    value = swiglu(gate_up).to(grad.dtype)
    return *encode_rows(swiglu_backward(grad, gate_up), amax), *encode_rows(value, amax)


@swiglu_backward_quantize.register_fake
def _(
    grad: Tensor, gate_up: Tensor, kept_scale: Tensor, amax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, inner = grad.shape
    return (
        *empty_rows(tokens, 2 * inner, amax, grad.device),
        *empty_rows(tokens, inner, amax, grad.device),
    )
