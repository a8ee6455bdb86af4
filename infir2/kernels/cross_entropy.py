"""Cross-entropy from hidden states without ever holding the logits of all tokens.

The head's GEMM, the softmax and their gradients run over chunks of tokens; one pass makes the loss and its gradient, so
no GEMM is done twice.
"""

from typing import Any

import torch
from torch import Tensor

from infir2.kernels.logit_chunks import HELD_CHUNKS, add_product, chunk_tokens, chunks
from infir2.kernels.matmul import pad_tokens, scaled_mm
from infir2.kernels.operand import empty_operand
from infir2.kernels.quantize import quantize
from infir2.kernels.reference import BLOCK
from infir2.kernels.row_codes import encode_rows, quantize_rows
from infir2.kernels.transpose import transpose_operand, transpose_tiles_into

Codes = tuple[Tensor, Tensor]
"""Row codes and their scales."""


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor, ignore: int = -100, fp8: bool = False) -> Tensor:
    """Sum over tokens of -log softmax(hidden W^T)[label], float32 scalar; labels equal to ``ignore`` do not count.

    hidden [tokens, features] in bfloat16 or float32, weight [vocabulary, features], labels int64 [tokens]. The GEMMs
    run in hidden's dtype with float32 sums, the softmax in float32, the weight gradient is summed in float32.

    fp8: all three GEMMs run in FP8, of hidden and the logits' gradient in 1x128 tiles (along the vocabulary for the
    gradient of hidden, along the tokens for the weight's) and the weight in 128x128 blocks.
    """
    if not torch.is_grad_enabled():  # of which a Function is not told: a weight that is trained still asks for its own
        hidden, weight = hidden.detach(), weight.detach()
    return _CrossEntropySum.apply(hidden, weight, labels, ignore, fp8)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, ignore: int, fp8: bool) -> Tensor:
        want_hidden, want_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        training = want_hidden or want_weight
        head: Any = _Fp8Head(weight, hidden, want_hidden) if fp8 else _Head(weight, hidden)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for here in chunks(hidden.shape[0], weight.shape[0]):
            logits = head.logits(here)
            nll, codes = softmax_gradient_(logits, labels[here], ignore, training and not fp8, training and fp8)
            total += nll.sum()
            gradient = codes or logits
            if grad_hidden is not None:
                head.input_gradient(gradient, grad_hidden[here])
            if want_weight:
                head.add_weight_gradient(gradient, here)
        grad_weight = head.weight_gradient
        if want_weight and grad_weight is None:  # no tokens
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


class _Head:
    """The three GEMMs with the head's weight, in hidden's dtype, over chunks of the tokens."""

    def __init__(self, weight: Tensor, hidden: Tensor) -> None:
        self.weight, self.hidden = weight.to(hidden.dtype), hidden
        self.weight_gradient: Tensor | None = None

    def logits(self, here: slice) -> Tensor:
        return self.hidden[here] @ self.weight.T

    def input_gradient(self, gradient: Any, out: Tensor) -> None:
        torch.mm(gradient, self.weight, out=out)

    def add_weight_gradient(self, gradient: Any, here: slice) -> None:
        self.weight_gradient = add_product(self.weight_gradient, gradient, self.hidden[here], torch.float32)


class _Fp8Head:
    """The same in FP8, of a weight whose codes are made anew for every batch.

    The weight's gradient contracts along the tokens. So that its float32 sums are not read and written for every chunk,
    the transposed codes of many chunks are held, and multiplied at once.
    """

    def __init__(self, weight: Tensor, hidden: Tensor, backward: bool) -> None:
        self.codes, self.scale = quantize(weight.to(torch.bfloat16), "block", "ue8m0", False)
        self.transposed = transpose_operand(self.codes, self.scale, "block") if backward else None
        self.hidden = hidden
        self.weight_gradient: Tensor | None = None
        self._x: Codes | None = None
        self._held: tuple[_HeldTiles, _HeldTiles] | None = None

    def logits(self, here: slice) -> Tensor:
        hidden = self.hidden[here]
        codes, scale, _ = quantize_rows(pad_tokens(hidden), False)
        self._x = (codes, scale)
        return scaled_mm(codes, scale, "tile", self.codes, self.scale, "block", hidden.dtype)[: len(hidden)]

    def input_gradient(self, gradient: Any, out: Tensor) -> None:
        assert self.transposed is not None
        codes, scale = gradient
        out.copy_(scaled_mm(codes, scale, "tile", *self.transposed, "block", out.dtype)[: len(out)])

    def add_weight_gradient(self, gradient: Any, here: slice) -> None:
        assert self._x is not None
        vocabulary, features = self.codes.shape
        if self._held is None:
            left = self.hidden.shape[0] - here.start
            left += -left % BLOCK if self.hidden.is_cuda else 0
            room = min(left, HELD_CHUNKS * chunk_tokens(vocabulary))
            device = self.hidden.device
            self._held = _HeldTiles(vocabulary, room, device), _HeldTiles(features, room, device)
        logits, x = self._held
        logits.add(gradient)
        x.add(self._x)
        if logits.full:
            product = scaled_mm(logits.codes, logits.scale, "tile", x.codes, x.scale, "tile", torch.float32)
            self.weight_gradient = product if self.weight_gradient is None else self.weight_gradient.add_(product)
            self._held = None


class _HeldTiles:
    """Room for an operand [rows, tokens] in 1x128 tiles along the tokens, filled from row codes of some tokens each."""

    def __init__(self, rows: int, tokens: int, device: torch.device) -> None:
        self.codes, self.scale = empty_operand(rows, tokens, "tile", device)
        self._filled = 0

    @property
    def full(self) -> bool:
        return self._filled == self.codes.shape[1]

    def add(self, row_codes: Codes) -> None:
        codes, scale = row_codes
        start, stop = self._filled, self._filled + len(codes)
        blocks = slice(start // BLOCK, -(-stop // BLOCK))
        transpose_tiles_into(codes, scale, self.codes[:, start:stop], self.scale[:, blocks])
        self._filled = stop


def softmax_gradient_(
    logits: Tensor, labels: Tensor, ignore: int, gradient: bool, encode: bool = False
) -> tuple[Tensor, Codes | None]:
    """-log softmax(logits)[label] of every row, float32 [rows], 0 where the label equals ``ignore``, and what is asked
    for of the gradient of their sum, softmax - onehot (0 in ignored rows), computed in float32.

    logits [rows, vocabulary] in any float dtype, labels int64 [rows]. gradient: it overwrites the logits, rounded to
    their dtype. encode: its row codes and scales (see ``row_codes``) come back; on a GPU with rows of zeros up to a
    multiple of 128.
    """
    if logits.is_cuda:
        from infir2.kernels import cross_entropy_triton

        return cross_entropy_triton.softmax_gradient_(logits, labels, ignore, gradient, encode)
    valid, index = labels != ignore, labels.clamp(min=0)[:, None]
    wide = logits.float()
    lse = wide.logsumexp(dim=-1, keepdim=True)
    nll = torch.where(valid, (lse - wide.gather(1, index)).squeeze(1), 0.0)
    if not (gradient or encode):
        return nll, None
    probs = wide.sub_(lse).exp_()
    probs.scatter_add_(1, index, torch.full_like(lse, -1.0))
    probs.mul_(valid[:, None])
    if gradient:
        logits.copy_(probs)
    return nll, encode_rows(probs, False)[:2] if encode else None
