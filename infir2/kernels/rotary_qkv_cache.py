"""What lies between the projections of new tokens and their attention, where nothing is kept for a backward pass: the
bias, the norm of each head's queries and keys, rotary positions, and storing keys and values in a paged cache.

``qkv`` holds queries, keys and values of all heads side by side, as one GEMM leaves them. Roundings are those of the
single steps: after the bias, the norm (see ``norm``), the rotation, each to the dtype of ``qkv``.
"""

from typing import NamedTuple

from torch import Tensor

from infir2.kernels.norm import rms_norm
from infir2.kernels.paged_attention import write
from infir2.kernels.paged_layout import PagedCache
from infir2.kernels.rotary import rotate


class HeadNorms(NamedTuple):
    """Norms of queries and keys, over one head; weights [head_dim]."""

    query_weight: Tensor
    key_weight: Tensor
    eps: float


def rotate_qkv_into_cache(
    qkv: Tensor,
    bias: Tensor | None,
    norms: HeadNorms | None,
    cos: Tensor,
    sin: Tensor,
    cache: PagedCache,
    slots: Tensor,
) -> Tensor:
    """Store the tokens' keys and values in their slots; returns their queries [tokens, heads, head_dim].

    qkv [tokens or more, (heads + 2 kv_heads) * head_dim], bias its width and dtype; cos and sin float32 [tokens,
    head_dim / 2], slots int64 [tokens].
    """
    if qkv.is_cuda:
        from infir2.kernels import rotary_qkv_cache_triton

        return rotary_qkv_cache_triton.rotate_qkv_into_cache(qkv, bias, norms, cos, sin, cache, slots)
    kv_heads, head_dim = cache.keys.shape[2:]
    qkv = qkv[: slots.numel()] if bias is None else qkv[: slots.numel()] + bias
    parts = qkv.unflatten(-1, (-1, head_dim))
    q, k, v = parts.split([parts.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        q, k = rms_norm(q, norms.query_weight, norms.eps), rms_norm(k, norms.key_weight, norms.eps)
    q, k = (turned[0] for turned in rotate(q[None], k[None], cos[None], sin[None]))
    write(cache, k, v, slots)
    return q.contiguous()
