"""Linear layers in the dtype of their input, and what makes them fast while generating.

Then a pass has few tokens, so its time is that of reading the weights. ``keep_cast`` keeps a float32 master's copy in
the compute dtype, ``join`` lays the weights of linears that read the same input one below the other, and ``together``
multiplies those by one GEMM. Passes that want gradients take no notice of any of it; on a GPU theirs of a float32
master come out of the GEMM in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Joined:
    """Weights of several linears in one tensor, and their biases in another, in the compute dtype."""

    weight: Tensor
    bias: Tensor | None
    sizes: tuple[int, ...]
    owned: bool
    """Whether weight and bias hold the parameters themselves and not copies of them."""

    def serves(self, first: "Linear", dtype: torch.dtype) -> bool:
        """Whether it is in ``dtype`` and the parameters, if it holds them, have not been put elsewhere since."""
        return self.weight.dtype == dtype and (not self.owned or self.weight.data_ptr() == first.weight.data_ptr())


class Linear(nn.Linear):
    """y = x Wᵀ + b in the dtype of x, with float32 master weights."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=torch.float32)
        self.cast: Tensor | None = None
        """The weight in the compute dtype, where ``keep_cast`` or ``join`` has made it and it is still true."""
        self.joined: Joined | None = None
        """Of the first of several joined linears."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self._gradient_is_wide(x):
            return _WideGradient.apply(x, self.weight, bias)
        return F.linear(x, self.weight_in(x.dtype), bias)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight in ``dtype``; the copy, where there is one and no gradient is to reach the weight."""
        if self.cast is not None and self.cast.dtype == dtype and not torch.is_grad_enabled():
            return self.cast
        return self.weight.to(dtype)

    def _gradient_is_wide(self, x: Tensor) -> bool:
        wider = self.weight.dtype == torch.float32 != x.dtype
        return wider and x.is_cuda and torch.is_grad_enabled() and not isinstance(self.weight, DTensor)


class _WideGradient(torch.autograd.Function):
    """x Wᵀ + b of a float32 master W: its gradient leaves the GEMM as it was summed, in float32. What autograd makes of
    ``F.linear(x, W.to(x.dtype))`` is rounded to the dtype of x, then copied to float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, master: Tensor, bias: Tensor | None) -> Tensor:
        weight = master.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        dx = grad @ weight if ctx.needs_input_grad[0] else None
        dw = torch.mm(flat.T, x.flatten(0, -2), out_dtype=torch.float32) if ctx.needs_input_grad[1] else None
        return dx, dw, flat.sum(0) if ctx.needs_input_grad[2] else None


def together(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """What each of the linears makes of ``x``: by one GEMM where they are joined and no gradient is wanted."""
    if (joined := _joined(x, linears[0])) is not None:
        return F.linear(x, joined.weight, joined.bias).split(joined.sizes, dim=-1)
    return tuple(linear(x) for linear in linears)


def side_by_side(x: Tensor, *linears: nn.Module) -> Tensor:
    """``together`` in one matrix."""
    if (joined := _joined(x, linears[0])) is not None:
        return F.linear(x, joined.weight, joined.bias)
    return torch.cat([linear(x) for linear in linears], dim=-1)


def _joined(x: Tensor, first: nn.Module) -> Joined | None:
    """Of linears the first of which is given: their joined weights, if ``x`` can be multiplied by them."""
    if not isinstance(first, Linear) or first.joined is None or torch.is_grad_enabled():
        return None
    return first.joined if first.joined.serves(first, x.dtype) else None


@torch.no_grad()
def join(linears: Sequence[nn.Module], dtype: torch.dtype) -> None:
    """Lay the weights (and biases) of plain linears with the same input one below the other, in ``dtype``.

    Masters in another dtype get their place there as ``cast``, which ``keep_cast`` fills. Frozen parameters in
    ``dtype`` are moved there, which costs no memory. Trained ones stay where they are: a copy would double them.
    """
    plain = [linear for linear in linears if type(linear) is Linear]
    parameters = [parameter for linear in plain for parameter in linear.parameters()]
    owned = all(parameter.dtype == dtype for parameter in parameters)
    mixed = not owned and any(parameter.dtype == dtype for parameter in parameters)
    if len(plain) < len(linears) or mixed or (owned and any(parameter.requires_grad for parameter in parameters)):
        return
    first = plain[0]
    if first.joined is None or not first.joined.serves(first, dtype) or first.joined.owned != owned:
        sizes = tuple(linear.out_features for linear in plain)
        weight, bias = (
            None if getattr(first, name) is None else torch.cat([getattr(linear, name).to(dtype) for linear in plain])
            for name in ("weight", "bias")
        )
        assert weight is not None
        first.joined = Joined(weight, bias, sizes, owned)
        for linear, rows in zip(plain, weight.split(sizes), strict=True):
            if owned:
                linear.weight.data = rows
            else:
                linear.cast = rows
    if first.joined.bias is not None:
        for linear, rows in zip(plain, first.joined.bias.split(first.joined.sizes), strict=True):
            if owned:
                linear.bias.data = rows
            else:
                rows.copy_(linear.bias)


@torch.no_grad()
def keep_cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Keep a plain linear's weight in ``dtype`` as a copy, if it is not in it; an earlier copy is overwritten."""
    if type(module) is Linear and module.weight.dtype != dtype:
        if module.cast is None:
            module.cast = torch.empty_like(module.weight, dtype=dtype)
        module.cast.copy_(module.weight)


def drop_casts(module: nn.Module) -> None:
    """Forget the copies of a linear's weight. What was moved stays where it is: it is the parameters."""
    if isinstance(module, Linear):
        module.cast = None
        if module.joined is not None and not module.joined.owned:
            module.joined = None
