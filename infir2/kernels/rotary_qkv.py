"""Between the q/k/v projections and attention in training: bias, rotary positions, and the way back to row codes.

Forward, one GEMM's result becomes queries, keys and values. Backward, their gradients are turned back and quantised for
the projections' GEMMs without lying side by side in memory before. Roundings are those of the single steps: after the
bias and after the rotation, each to the dtype of what comes in.
"""

import torch
from torch import Tensor

from infir2.kernels.custom_op import custom_op
from infir2.kernels.operand import empty_rows
from infir2.kernels.reference import BLOCK
from infir2.kernels.rotary import rotate
from infir2.kernels.row_codes import encode_rows

BIAS_PARTS = 128
"""Rows of the bias gradient on a GPU: so many programs walk down the tokens of a block of columns."""


def heads_fit(head_dim: int, sizes: list[int]) -> bool:
    """Whether these functions take heads of that size in projections of these widths: whole heads in a block of 128."""
    return head_dim >= 32 and BLOCK % head_dim == 0 and all(size % BLOCK == 0 for size in sizes)


def _empty_rotate_qkv(
    qkv: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, head_dim = qkv.shape[0], 2 * cos.shape[1]
    q = qkv.new_empty(tokens, qkv.shape[1] // head_dim - 2 * kv_heads, head_dim)
    return q, qkv.new_empty(tokens, kv_heads, head_dim), qkv.new_empty(tokens, kv_heads, head_dim)


@custom_op(_empty_rotate_qkv)
def rotate_qkv(
    qkv: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [tokens, (heads + 2 kv_heads) * head_dim] -> q [tokens, heads, head_dim], k and v [tokens, kv_heads,
    head_dim]: the bias (of qkv's dtype) added, queries and keys turned.

    cos and sin: float32 [tokens, head_dim / 2].
    """
    if qkv.is_cuda:
        from infir2.kernels import rotary_qkv_triton

        return rotary_qkv_triton.rotate_qkv(qkv, bias, cos, sin, kv_heads)
    qkv = qkv if bias is None else qkv + bias
    parts = qkv.unflatten(1, (-1, 2 * cos.shape[1]))
    q, k, v = parts.split([parts.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    q, k = (turned[0] for turned in rotate(q[None], k[None], cos[None], sin[None]))
    return q, k, v.clone()


def _empty_rotate_qkv_backward_quantize(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, rows: int, amax: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cols = sum(part.shape[1] * part.shape[2] for part in (dq, dk, dv))
    parts = (BIAS_PARTS if dq.is_cuda else 1) if bias else 0
    return *empty_rows(rows, cols, amax, dq.device), dq.new_empty(parts, cols, dtype=torch.float32)


@custom_op(_empty_rotate_qkv_backward_quantize)
def rotate_qkv_backward_quantize(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, rows: int, amax: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradients of what ``rotate_qkv`` gives, shaped alike, that of its qkv as row codes, and of its bias.

    (codes, scale, amax) as ``row_codes`` says, of ``rows`` tokens, those that are missing being zeros; then float32
    rows to be added up to the bias's gradient (none unless ``bias``). amax: whether the columns' maxima are taken.
    """
    if dq.is_cuda:
        from infir2.kernels import rotary_qkv_triton

        return rotary_qkv_triton.rotate_qkv_backward_quantize(dq, dk, dv, cos, sin, rows, amax, bias, BIAS_PARTS)
    grad = rotate_qkv_backward(dq, dk, dv, cos, sin)
    padded = torch.cat([grad, grad.new_zeros(rows - grad.shape[0], grad.shape[1])])
    return *encode_rows(padded, amax), grad.float().sum(0, keepdim=True)[: int(bias)]


def rotate_qkv_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient that ``rotate_qkv_backward_quantize`` quantises, [tokens, (heads + 2 kv_heads) * head_dim]."""
    dq, dk = (turned[0] for turned in rotate(dq[None], dk[None], cos[None], -sin[None]))
    return torch.cat([part.flatten(1) for part in (dq, dk, dv)], dim=1)
