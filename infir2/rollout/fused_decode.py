"""A decoding round's pass through the model, in as few kernels as it can be.

With one token a sequence most kernels of a layer take a few microseconds, of which the start is a good part. So here a
branch of a layer (attention, MLP) ends where the next one begins: its output projection leaves parts of a sum, and one
kernel adds them to each other and to the residual stream, normalises, and quantises. Between the q/k/v projections and
attention one kernel adds the bias, turns by rotary positions and fills the cache; attention itself writes FP8 codes for
the output projection. The modules, weights and codes are the model's own, and so is every rounding.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from infir2.fp8.fused import FusedMlp, FusedProjections
from infir2.fp8.linear import Fp8Linear
from infir2.fp8.tensor import Operand
from infir2.kernels.add_norm import add_norm, add_norm_quantize
from infir2.kernels.matmul import multiply_rows
from infir2.kernels.norm import norm_quantize, rms_norm
from infir2.kernels.paged_attention import attend, attend_quantize
from infir2.kernels.paged_layout import PagedCache, PagedLayout
from infir2.kernels.reference import BLOCK
from infir2.kernels.rotary_qkv_cache import HeadNorms, rotate_qkv_into_cache
from infir2.kernels.split_k import PartialSums
from infir2.kernels.swiglu import silu_mul, swiglu_quantize
from infir2.model.linear import side_by_side, together
from infir2.model.transformer import MLP, Attention, CausalLM, RMSNorm

Entry = Tensor | Operand
"""What a branch starts from: normalised hidden states [tokens, features], or their row codes, which may have more rows
than there are tokens, as the hardware GEMM wants them."""


class Tokens:
    """The tokens of a round: where they are, and where their keys and values belong."""

    def __init__(
        self, cos: Tensor, sin: Tensor, caches: Sequence[PagedCache], layout: PagedLayout, dtype: torch.dtype
    ) -> None:
        self.cos, self.sin, self.caches, self.layout, self.dtype = cos, sin, caches, layout, dtype
        self.count = layout.decoding
        self.rows = self.count + (-self.count % BLOCK if cos.is_cuda else 0)


class Branch(Protocol):
    """From normalised hidden states to what is added to the residual stream."""

    fp8: bool

    def __call__(self, entry: Entry, tokens: Tokens) -> Tensor | PartialSums: ...


class FusedDecode:
    """The passes of one model that ``fits``."""

    @staticmethod
    def fits(model: CausalLM) -> bool:
        """Whether what follows fused FP8 projections can go on with FP8 codes."""
        layers: Any = model.model.layers
        attentions = [layer.self_attn for layer in layers]
        return all(_goes_on_in_fp8(attention) for attention in attentions if attention.fused_projections is not None)

    def __init__(self, model: CausalLM) -> None:
        self.decoder = model.model
        branches: list[tuple[RMSNorm, Branch]] = []
        layers: Any = self.decoder.layers
        for layer in layers:
            attention = Fp8Attention if layer.self_attn.fused_projections is not None else PlainAttention
            branches.append((layer.input_layernorm, attention(layer.self_attn)))
            mlp = PlainMlp if layer.mlp.fused_mlp is None else Fp8Mlp
            branches.append((layer.post_attention_layernorm, mlp(layer.mlp)))
        self._branches = branches

    def __call__(self, ids: Tensor, positions: Tensor, caches: Sequence[PagedCache], layout: PagedLayout) -> Tensor:
        """int64 [tokens] ids and positions, one token a sequence -> normalised hidden states [tokens, features]."""
        decoder = self.decoder
        residual = decoder.embed_tokens(ids).to(decoder.compute_dtype)
        cos, sin = decoder.rotary(positions)
        tokens = Tokens(cos, sin, caches, layout, decoder.compute_dtype)
        (norm, branch), *rest = self._branches
        entry = _enter(residual, norm, branch.fp8, tokens)
        for following_norm, following in rest:
            residual, entry = _leave(residual, branch(entry, tokens), following_norm, following.fp8, tokens)
            branch = following
        return add_norm(residual, branch(entry, tokens), decoder.norm.weight, decoder.norm.eps)[1]


def _enter(hidden: Tensor, norm: RMSNorm, fp8: bool, tokens: Tokens) -> Entry:
    if not fp8:
        return rms_norm(hidden, norm.weight, norm.eps)
    padded = torch.nn.functional.pad(hidden, (0, 0, 0, tokens.rows - tokens.count))
    codes, scale, _, _ = norm_quantize(padded, norm.weight, norm.eps, False)
    return Operand(codes, scale, "tile")


def _leave(
    residual: Tensor, branch: Tensor | PartialSums, norm: RMSNorm, fp8: bool, tokens: Tokens
) -> tuple[Tensor, Entry]:
    """The branch's result added to the residual stream, and what the next branch starts from."""
    if not fp8:
        return add_norm(residual, branch, norm.weight, norm.eps)
    residual, codes, scale = add_norm_quantize(residual, branch, norm.weight, norm.eps, tokens.rows)
    return residual, Operand(codes, scale, "tile")


class PlainAttention:
    fp8 = False

    def __init__(self, module: Attention) -> None:
        self.module, self.norms = module, _head_norms(module)

    def __call__(self, entry: Entry, tokens: Tokens) -> Tensor:
        assert isinstance(entry, Tensor)
        module, cache = self.module, tokens.caches[self.module.layer_index]
        qkv = side_by_side(entry, module.q_proj, module.k_proj, module.v_proj)
        q = rotate_qkv_into_cache(qkv, None, self.norms, tokens.cos, tokens.sin, cache, tokens.layout.slots)
        return module.o_proj(attend(q, cache, tokens.layout).flatten(1))


class Fp8Attention:
    fp8 = True

    def __init__(self, module: Attention) -> None:
        assert isinstance(module.fused_projections, FusedProjections)
        assert isinstance(module.o_proj, Fp8Linear)
        self.layer_index, self.norms = module.layer_index, _head_norms(module)
        self.group, self.output = module.fused_projections.group, module.o_proj
        self.biased = self.group.linears[0].bias is not None

    def __call__(self, entry: Entry, tokens: Tokens) -> Tensor | PartialSums:
        assert isinstance(entry, Operand)
        cache, layout = tokens.caches[self.layer_index], tokens.layout
        qkv = entry.matmul(self.group.operand(), tokens.dtype)
        bias = self.group.joined_bias(qkv) if self.biased else None
        q = rotate_qkv_into_cache(qkv, bias, self.norms, tokens.cos, tokens.sin, cache, layout.slots)
        mixed = Operand(*attend_quantize(q, cache, layout, tokens.rows), "tile")
        return _multiply(mixed, self.output.weight_operand(), tokens)


class PlainMlp:
    fp8 = False

    def __init__(self, module: MLP) -> None:
        self.module = module

    def __call__(self, entry: Entry, tokens: Tokens) -> Tensor:
        assert isinstance(entry, Tensor)
        gate, up = together(entry, self.module.gate_proj, self.module.up_proj)
        return self.module.down_proj(silu_mul(gate, up))


class Fp8Mlp:
    fp8 = True

    def __init__(self, module: MLP) -> None:
        assert isinstance(module.fused_mlp, FusedMlp)
        self.group, self.down = module.fused_mlp.group, module.fused_mlp.down

    def __call__(self, entry: Entry, tokens: Tokens) -> Tensor | PartialSums:
        assert isinstance(entry, Operand)
        gate_up = entry.matmul(self.group.operand(), tokens.dtype)
        codes, scale, _, _ = swiglu_quantize(gate_up, False)
        return _multiply(Operand(codes, scale, "tile"), self.down.operand(), tokens)


def _multiply(a: Operand, b: Operand, tokens: Tokens) -> Tensor | PartialSums:
    return multiply_rows(a.codes, a.scale, b.codes, b.scale, tokens.count, tokens.dtype)


def _head_norms(module: Attention) -> HeadNorms | None:
    if module.q_norm is None or module.k_norm is None:
        return None
    return HeadNorms(module.q_norm.weight, module.k_norm.weight, module.q_norm.eps)


def _goes_on_in_fp8(module: Attention) -> bool:
    fused, output = module.fused_projections, module.o_proj
    if not isinstance(fused, FusedProjections) or not isinstance(output, Fp8Linear):
        return False
    biased = {linear.bias is not None for linear in fused.group.linears}
    return output.recipe.row_codes and output.bias is None and len(biased) == 1
