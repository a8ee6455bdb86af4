"""Attention over a paged key-value cache, in plain torch: the definition that a fused kernel has to reproduce.

A layer's cache is a pool of blocks of ``block_size`` tokens. A sequence's block table names its blocks in order, so
token i lies in slot ``table[i // block_size] * block_size + i % block_size`` of the pool. A pass brings new tokens of
several sequences, end to end: one each while decoding, many for a chunk of a prompt. ``write`` puts their keys and
values into the cache, then ``attend`` lets each see the tokens of its own sequence up to its own position.

Scores, softmax and the weighted sum are float32, rounded once at the end. An FP8 cache holds E4M3 codes and one
power-of-two scale for each token and head, made by the quantiser that makes every other FP8 number.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from infir2.kernels import reference
from infir2.kernels.reference import FP8

_GATHERED = 1 << 26  # float32 keys gathered at a time: 256 MiB, and as much for values


@dataclass(frozen=True)
class PagedCache:
    """Keys and values of one layer, [blocks, block_size, kv_heads, head_dim]."""

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None = None
    """float32 [blocks, block_size, kv_heads] where keys and values are float8_e4m3fn codes, else None."""
    value_scale: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        tensors = (self.keys, self.values, self.key_scale, self.value_scale)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(frozen=True)
class PagedLayout:
    """Where the tokens of a pass belong. The queries of a sequence are the last tokens of its context."""

    slots: Tensor
    """int64 [tokens]: the slot that each new token's key and value go to."""
    query_starts: Tensor
    """int32 [sequences + 1]: where each sequence's new tokens start; 0 first, the number of tokens last."""
    context_lengths: Tensor
    """int32 [sequences]: tokens of the sequence in the cache, the new ones included."""
    block_tables: Tensor
    """int32 [sequences, most blocks]: entries behind a sequence's context are ignored (but must be valid numbers)."""


def empty_cache(
    blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
) -> PagedCache:
    """An uninitialised cache; ``dtype`` float8_e4m3fn makes an FP8 one."""
    shape = (blocks, block_size, kv_heads)
    keys, values = (torch.empty(*shape, head_dim, dtype=dtype, device=device) for _ in range(2))
    if dtype != FP8:
        return PagedCache(keys, values)
    key_scale, value_scale = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    return PagedCache(keys, values, key_scale, value_scale)


def write(cache: PagedCache, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Store the keys and values [tokens, kv_heads, head_dim] of new tokens in the slots (int64 [tokens]), in place."""
    for pool, scales, new in ((cache.keys, cache.key_scale, keys), (cache.values, cache.value_scale, values)):
        if scales is None:
            pool.flatten(0, 1)[slots] = new.to(pool.dtype)
            continue
        codes, scale = reference.quantize(new.flatten(0, 1), "channel", "ue8m0")
        # As bytes: indexed writes do not know float8.
        pool.view(torch.uint8).flatten(0, 1)[slots] = codes.view(torch.uint8).view(new.shape)
        scales.flatten(0, 1)[slots] = scale.view(new.shape[:-1])


def attend(q: Tensor, cache: PagedCache, layout: PagedLayout) -> Tensor:
    """Causal attention of the new tokens: q [tokens, heads, head_dim] -> the same shape and dtype.

    Consecutive groups of heads / kv_heads heads share keys and values. Scores are scaled by head_dim ** -0.5.
    """
    out = torch.empty_like(q)
    starts = layout.query_starts.long()
    lengths = starts.diff()
    block_size, kv_heads, head_dim = cache.keys.shape[1:]
    # Sequences with equally many queries are computed together: all that decode, in particular.
    for length in lengths.unique().tolist():
        alike = (lengths == length).nonzero().squeeze(1)
        blocks = -(-int(layout.context_lengths[alike].max()) // block_size)
        for rows in alike.split(max(1, _GATHERED // (blocks * block_size * kv_heads * head_dim))):
            tokens = starts[rows, None] + torch.arange(length, device=q.device)
            out[tokens] = _attend_alike(
                q[tokens], cache, layout.block_tables[rows, :blocks], layout.context_lengths[rows]
            )
    return out


def _attend_alike(q: Tensor, cache: PagedCache, tables: Tensor, context_lengths: Tensor) -> Tensor:
    """q [sequences, queries, heads, head_dim], tables [sequences, blocks] -> like q."""
    sequences, queries, heads, head_dim = q.shape
    block_size, kv_heads = cache.keys.shape[1:3]
    slots = tables.long()[:, :, None] * block_size + torch.arange(block_size, device=q.device)
    position = torch.arange(slots[0].numel(), device=q.device)
    # Behind its context a sequence sees its first token instead: what lies there is not its own, and 0 times it could
    # be NaN.
    slots = torch.where(position < context_lengths[:, None], slots.flatten(1), slots[:, 0, :1])
    # A query is the token at context length - queries + its number; it sees positions up to its own.
    last = context_lengths[:, None] - queries + torch.arange(queries, device=q.device)
    unseen = position > last[:, :, None]

    rows = slots[:, None] * kv_heads + torch.arange(kv_heads, device=q.device)[:, None]
    keys, values = _gather(cache.keys, cache.key_scale, rows), _gather(cache.values, cache.value_scale, rows)
    grouped = q.float().view(sequences, queries, kv_heads, heads // kv_heads, head_dim).permute(0, 2, 3, 1, 4)
    scores = (grouped * head_dim**-0.5).flatten(2, 3) @ keys.transpose(-1, -2)
    scores = scores.view(sequences, kv_heads, -1, queries, position.numel())
    weights = scores.masked_fill_(unseen[:, None, None], -torch.inf).softmax(-1).flatten(2, 3)
    mixed = (weights @ values).view(sequences, kv_heads, -1, queries, head_dim)
    return mixed.permute(0, 3, 1, 2, 4).reshape(q.shape).to(q.dtype)


def _gather(pool: Tensor, scales: Tensor | None, rows: Tensor) -> Tensor:
    """Rows (slot * kv_heads + head) of keys or values: [...] -> float32 [..., head_dim]."""
    flat, shape = rows.flatten(), (*rows.shape, pool.shape[-1])
    if scales is None:
        return pool.flatten(0, 2).index_select(0, flat).float().view(shape)
    codes = pool.view(torch.uint8).flatten(0, 2).index_select(0, flat).view(FP8)
    return (codes.float() * scales.flatten().index_select(0, flat).unsqueeze(-1)).view(shape)
