"""What decoder layers keep for their backward pass, counted on the meta device: nothing is computed or allocated."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from infir2.fp8.linear import Fp8Linear
from infir2.model.transformer import CausalLM
from infir2.parallel.apply import compile_layer


def kept_by_layers(model: CausalLM, tokens: int, compiled: bool = False) -> list[int]:
    """Bytes that each layer of a model on the meta device keeps of ``tokens`` tokens.

    compiled: as torch.compile would keep it, which takes some seconds to find out. Of FP8 layers that is no less.
    """
    config = model.config
    cos = torch.empty(1, tokens, config.head_dim // 2, device="meta")
    hidden = torch.empty(
        *(1, tokens, config.hidden_size), dtype=model.model.compute_dtype, device="meta", requires_grad=True
    )
    found: dict[bool, int] = {}  # layers are of two kinds at most
    kinds = [any(isinstance(module, Fp8Linear) for module in layer.modules()) for layer in model.model.layers]
    for layer, is_fp8 in zip(model.model.layers, kinds):
        if is_fp8 not in found:
            if compiled and not is_fp8:
                # The backend that cuts into forward and backward pass as the default one does, and builds nothing.
                layer = copy.copy(layer)
                compile_layer(layer, "aot_eager_decomp_partition")
            found[is_fp8] = _kept(layer, hidden, cos)
    return [found[is_fp8] for is_fp8 in kinds]


def _kept(layer: nn.Module, hidden: Tensor, cos: Tensor) -> int:
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        layer(hidden, cos, cos, _attend)  # makes the FP8 weights
    lasting = {_memory(tensor) for tensor in (*layer.parameters(), *_fp8_weights(layer), cos)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _memory(tensor) not in lasting:
            kept[_memory(tensor)] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden, cos, cos, _attend)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _fp8_weights(layer: nn.Module) -> list[Tensor]:
    linears = [module for module in layer.modules() if isinstance(module, Fp8Linear)]
    operands = [operand for linear in linears for operand in (linear._operand, linear._operand_t)]
    return [tensor for operand in operands if operand is not None for tensor in (operand.codes, operand.scale)]


def _memory(tensor: Tensor) -> int:
    """Tells memory apart from other memory, whichever views of it there are."""
    return tensor.untyped_storage()._cdata


def _attend(q: Tensor, k: Tensor, v: Tensor, layer_index: int) -> Tensor:
    return _Attention.apply(q, k, v)


class _Attention(torch.autograd.Function):
    """Keeps what flash attention keeps, in any of its implementations."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, sums = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)
        return out
