"""The decoder: embedding, layers of attention and SwiGLU, norm, output head.

Parameters are float32 masters under Hugging Face's names. The compute dtype is that of the hidden states: every layer
casts its weight to it, and the residual stream stays in it. One device; FP8, checkpointing, compilation and sharding
are applied to these modules from outside.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from infir2.kernels.norm import fork, rms_norm
from infir2.kernels.rotary import rotate
from infir2.kernels.swiglu import silu_mul
from infir2.model.attention import Attend
from infir2.model.config import ModelConfig
from infir2.model.linear import Linear, drop_casts, join, keep_cast, together
from infir2.model.rotary import Rotary

Head = Callable[[Tensor, Tensor], Any]
"""``head(hidden [batch, length, hidden], weight [vocabulary, hidden])``: a loss that needs no logits."""

# Faster ways to compute the same, put in from outside: (residual stream, norm weight, norm epsilon) -> outputs of the
# q, k and v projections, and the residual stream; the same and (cos, sin) -> what ``Attention.heads`` returns;
# (residual stream, update, norm weight, norm epsilon) -> what ``MLP`` makes of them.
FusedProjections = Callable[[Tensor, Tensor, float], tuple[tuple[Tensor, ...], Tensor]]
FusedHeads = Callable[[Tensor, Tensor, float, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
FusedMlp = Callable[[Tensor, Tensor, Tensor, float], Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension: normalised in float32, scaled in the dtype of x."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x), x), for a branch and for the residual stream: both gradients of x then meet in one kernel."""
        return fork(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps:g}"


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; Qwen3 also normalises each head's queries and keys."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.fused_projections: FusedProjections | None = None
        self.fused_heads: FusedHeads | None = None

    def heads(self, hidden: Tensor, norm: RMSNorm, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The residual stream [batch, length, hidden], through ``norm`` -> q, k, v [batch, length, heads, head_dim],
        and itself."""
        if self.fused_heads is not None:
            return self.fused_heads(hidden, norm.weight, norm.eps, cos, sin)
        projections, hidden = self._project(hidden, norm)
        # The number of heads is what is left over: tensor parallelism gives each device a part of them.
        q, k, v = (projected.unflatten(-1, (-1, self.head_dim)) for projected in projections)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return *rotate(q, k, cos, sin), v, hidden

    def _project(self, hidden: Tensor, norm: RMSNorm) -> tuple[tuple[Tensor, ...], Tensor]:
        if self.fused_projections is not None:
            return self.fused_projections(hidden, norm.weight, norm.eps)
        normed, hidden = norm.fork(hidden)
        return together(normed, self.q_proj, self.k_proj, self.v_proj), hidden


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.fused_mlp: FusedMlp | None = None

    def forward(self, hidden: Tensor, update: Tensor, norm: RMSNorm) -> Tensor:
        """The residual stream [batch, length, hidden] and what is to be added to it -> their sum x, and added to it
        what this makes of x, through ``norm``."""
        if self.fused_mlp is not None:
            return self.fused_mlp(hidden, update, norm.weight, norm.eps)
        normed, hidden = norm.fork(hidden + update)
        gate, up = together(normed, self.gate_proj, self.up_proj)
        return hidden + self.down_proj(silu_mul(gate, up))


class DecoderLayer(nn.Module):
    """Attention, then MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer_index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """[batch, length, hidden] -> the same; ``cos`` and ``sin`` are float32 [batch, length, head_dim / 2]."""
        q, k, v, hidden = self.before(hidden, cos, sin)
        return self.after(hidden, attend(q, k, v, self.self_attn.layer_index))

    def before(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The residual stream -> queries, keys and values, and itself."""
        return self.self_attn.heads(hidden, self.input_layernorm, cos, sin)

    def after(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The residual stream and attention's output [batch, length, heads, head_dim] -> the next layer's stream."""
        return self.mlp(hidden, self.self_attn.o_proj(attended.flatten(-2)), self.post_attention_layernorm)


class Decoder(nn.Module):
    """Token ids -> normalised hidden states of the last layer."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, dtype=torch.float32)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config)

    def forward(self, input_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """int64 [batch, length] ids and positions -> [batch, length, hidden] in the compute dtype."""
        hidden = self.embed_tokens(input_ids).to(self.compute_dtype)
        cos, sin = self.rotary(position_ids)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, attend)
        return self.norm.fork(hidden)[0]


class CausalLM(nn.Module):
    """A language model: decoder and output head.

    Build a large model under ``torch.device("meta")``, call ``to_empty(device=...)``, and fill its parameters: from
    ``initial_values(seed)``, whether they are whole or sharded (``init_weights(seed)`` does it for whole ones), or from
    stored weights. With tied embeddings ``lm_head.weight`` is ``model.embed_tokens.weight`` and stays so.
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, compute_dtype)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self._tie()

    def forward(self, input_ids: Tensor, position_ids: Tensor, attend: Attend, head: Head | None = None) -> Any:
        """Logits [batch, length, vocabulary] in the compute dtype, or what ``head`` makes of the hidden states.

        ``input_ids`` and ``position_ids`` are int64 [batch, length]; ``attend`` is a back end of infir2.model.attention
        or one with the same signature.
        """
        hidden = self.model(input_ids, position_ids, attend)
        if head is None:
            return self.lm_head(hidden)
        return head(hidden, self.lm_head.weight if torch.is_grad_enabled() else self.lm_head.weight_in(hidden.dtype))

    def cast_weights(self) -> None:
        """Prepare the weights for generating, where a pass over few tokens would else spend its time on casting float32
        masters and on many small GEMMs: keep them in the compute dtype, and those that read the same input together.
        To be called again when weights have changed; earlier copies are overwritten in place."""
        dtype = self.model.compute_dtype
        for module in self.modules():
            if isinstance(module, Attention):
                join((module.q_proj, module.k_proj, module.v_proj), dtype)
            elif isinstance(module, MLP):
                join((module.gate_proj, module.up_proj), dtype)
        for module in self.modules():
            keep_cast(module, dtype)

    def drop_casts(self) -> None:
        """Forget the copies: their memory is free, and nobody can meet an old weight."""
        for module in self.modules():
            drop_casts(module)

    def initial_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """(name, whole float32 tensor on the CPU) of every parameter, tied ones once.

        Each is drawn from a generator of its own, so the values depend on (seed, name, shape) alone and not on the
        order, the device or the sharding. Weights are normal with the config's standard deviation.
        """
        for name, parameter in self.named_parameters():
            yield name, _initial_value(name, parameter.shape, self.config.initializer_range, seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill the (whole, unsharded) parameters with ``initial_values(seed)``."""
        parameters = dict(self.named_parameters())
        for name, value in self.initial_values(seed):
            parameters[name].copy_(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CausalLM":
        # Moving off the meta device makes every module a new parameter, which would untie the head.
        super()._apply(fn, recurse)
        self._tie()
        return self

    def _tie(self) -> None:
        if self.config.tie_word_embeddings and self.lm_head.weight is not self.model.embed_tokens.weight:
            self.lm_head.weight = self.model.embed_tokens.weight


def _initial_value(name: str, shape: torch.Size, std: float, seed: int) -> Tensor:
    """Ones for norms, zeros for biases, else normal numbers from a generator seeded by (seed, name)."""
    if name.endswith("bias"):
        return torch.zeros(shape, device="cpu")
    if "norm" in name:
        return torch.ones(shape, device="cpu")
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)
