"""Attention back ends for training: callables that a forward pass is given, made once a batch.

All of them take ``(q, k, v, layer_index)`` with q [batch, length, heads, head_dim] and k, v [batch, length, kv_heads,
head_dim], and return a tensor like q. Heads share keys and values in consecutive groups of heads / kv_heads.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from infir2.model import flash
from infir2.types import Batch

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]
Implementation = Literal["auto", "causal", "varlen", "each", "mask"]

# Measured on Hopper: cuDNN is about twice as fast as torch's own flash kernel, which torch would take by default.
_CUDA_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_HALF = (torch.bfloat16, torch.float16)


def document_attention(
    batch: Batch, compute_dtype: torch.dtype = torch.bfloat16, implementation: Implementation = "auto"
) -> Attend:
    """Causal attention in which a token sees only its own document.

    ``auto`` takes plain causal attention where every row is one document, else variable-length flash attention on CUDA
    (bfloat16 or float16; flash-attn-4's or torch's own), ``each`` on a CPU (one call a document: the work grows with
    the documents' lengths, not with the batch's), else a boolean mask, which costs length x length memory. Documents
    end where rows end.
    Raises ValueError for a batch that breaks that, or for an implementation that this batch or device cannot use.
    """
    rows, length = batch.input_ids.shape
    if batch.max_seqlen > length:
        raise ValueError(f"a document of {batch.max_seqlen} tokens crosses the rows of a batch of {length} tokens each")
    # Lengths add up to rows x length, so as many documents as rows, one of them full, means that all are.
    one_each = batch.cu_seqlens.numel() == rows + 1 and batch.max_seqlen == length
    on_cuda = batch.input_ids.device.type == "cuda"
    if implementation == "auto":
        varlen = on_cuda and compute_dtype in _HALF and varlen_kernel() is not None
        packed: Implementation = "varlen" if varlen else "mask" if on_cuda else "each"
        implementation = "causal" if one_each else packed
    if implementation == "causal":
        if not one_each:
            raise ValueError("causal document attention needs exactly one document in every row")
        return causal_attention
    if implementation == "varlen":
        return _varlen_attention(batch)
    if implementation == "each":
        return _attention_of_each(batch)
    return _masked_attention(document_mask(batch))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, layer_index: int) -> Tensor:
    """Plain causal attention over whole rows (an ``Attend``)."""
    if flash.takes(q):
        return flash.whole_rows(q, k, v)
    native = q.device.type == "cpu" or q.dtype in _HALF  # else only the math back end shares keys between heads
    if not native:
        k, v = _repeat(k, q), _repeat(v, q)
    shared = k.shape[2] != q.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type != "cuda":
        # In float32 throughout: for short documents its backward pass is up to ten times faster on a CPU.
        q, k, v, dtype = q.float(), k.float(), v.float(), q.dtype
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared).transpose(1, 2).to(dtype)
    with sdpa_kernel(_CUDA_ORDER, set_priority=True):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared).transpose(1, 2)


def document_mask(batch: Batch) -> Tensor:
    """True where a query (third dimension) sees a key (fourth): bool [batch, 1, length, length]."""
    rows, length = batch.input_ids.shape
    _check_rows(batch)
    ends = batch.cu_seqlens[1:].long()
    tokens = torch.arange(rows * length, device=ends.device)
    document = torch.searchsorted(ends, tokens, right=True).view(rows, 1, length)
    order = torch.arange(length, device=ends.device)
    same = document.unsqueeze(-1) == document.unsqueeze(-2)
    return same & (order.unsqueeze(-1) >= order)


def _check_rows(batch: Batch) -> None:
    """Raise ValueError for a document that goes on in the next row, where looking does not wait for a GPU."""
    rows, length = batch.input_ids.shape
    if batch.cu_seqlens.device.type == "cpu":
        crossed = set(range(length, rows * length + 1, length)) - set(batch.cu_seqlens[1:].tolist())
        if crossed:
            raise ValueError(f"a document crosses the end of a row at token {min(crossed)} of the flattened batch")


def _attention_of_each(batch: Batch) -> Attend:
    _check_rows(batch)
    lengths = [n for n in batch.cu_seqlens.diff().tolist() if n]

    def attend(q: Tensor, k: Tensor, v: Tensor, layer_index: int) -> Tensor:
        queries, keys, values = (t.flatten(0, 1)[None].split(lengths, dim=1) for t in (q, k, v))
        outputs = [causal_attention(*one, layer_index) for one in zip(queries, keys, values)]
        return torch.cat(outputs, dim=1).view_as(q)

    return attend


def _masked_attention(mask: Tensor) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, layer_index: int) -> Tensor:
        # Repeated, because with a mask the memory-saving kernels do not share keys between heads.
        k, v = _repeat(k, q).transpose(1, 2), _repeat(v, q).transpose(1, 2)
        return scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask).transpose(1, 2)

    return attend


def _varlen_attention(batch: Batch) -> Attend:
    kernel = varlen_kernel()
    if kernel is None:
        raise ValueError("this torch has no torch.nn.attention.varlen")
    cu_seqlens, longest = batch.cu_seqlens, batch.max_seqlen

    def attend(q: Tensor, k: Tensor, v: Tensor, layer_index: int) -> Tensor:
        flat = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        if flash.takes(q):
            return flash.packed(*flat, cu_seqlens, longest).view_as(q)
        return kernel(*flat, cu_seqlens, cu_seqlens, max_q=longest, max_k=longest).view_as(q)

    return attend


@functools.cache
def varlen_kernel() -> Callable[..., Any] | None:
    """torch's variable-length flash attention made causal and grouped, whichever signature it has; None without it.

    torch 2.11 takes ``window_size`` and shares keys between heads by itself; later versions ask for ``enable_gqa``.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    accepted = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in accepted else {"is_causal": True}
    if "enable_gqa" in accepted:
        options["enable_gqa"] = True
    return functools.partial(varlen_attn, **options)


def _repeat(shared: Tensor, q: Tensor) -> Tensor:
    """Keys or values [batch, length, kv_heads, head_dim], repeated to the heads of ``q``."""
    groups = q.shape[2] // shared.shape[2]
    return shared if groups == 1 else shared.repeat_interleave(groups, dim=2)
