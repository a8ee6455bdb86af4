"""Attention over a paged key-value cache. In plain torch here, which defines it; CUDA tensors go through Triton.

``write`` puts the keys and values of a pass's new tokens into the cache, then ``attend`` lets each of them see the
tokens of its own sequence up to its own position.

Scores, softmax and the weighted sum are float32, rounded once at the end. An FP8 cache holds E4M3 codes and one
power-of-two scale for each token and head, made by the quantiser that makes every other FP8 number.
"""

import torch
from torch import Tensor

from infir2.kernels import reference
from infir2.kernels.operand import empty_operand
from infir2.kernels.paged_layout import PagedCache, PagedLayout
from infir2.kernels.reference import BLOCK, FP8
from infir2.kernels.row_codes import quantize_rows

_GATHERED = 1 << 26  # float32 keys gathered at a time: 256 MiB, and as much for values


def write(cache: PagedCache, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Store the keys and values [tokens, kv_heads, head_dim] of new tokens in the slots (int64 [tokens]), in place.

    Any float dtype: an FP8 cache gets codes and scales, any other its own dtype.
    """
    if keys.is_cuda:
        from infir2.kernels import paged_attention_triton

        return paged_attention_triton.write(cache, keys, values, slots)
    place = slots // cache.keys.shape[1], slots % cache.keys.shape[1]
    for pool, scales, new in ((cache.keys, cache.key_scale, keys), (cache.values, cache.value_scale, values)):
        if scales is None:
            pool[place] = new.to(pool.dtype)
            continue
        codes, scale = reference.quantize(new.flatten(0, 1), "channel", "ue8m0")
        # As bytes: indexed writes do not know float8.
        pool.view(torch.uint8)[place] = codes.view(torch.uint8).view(new.shape)
        scales[place] = scale.view(new.shape[:-1])


def attend(q: Tensor, cache: PagedCache, layout: PagedLayout) -> Tensor:
    """Causal attention of the new tokens, whose keys are in the cache: q [tokens, heads, head_dim] -> like q.

    Consecutive groups of heads / kv_heads heads share keys and values. Scores are scaled by head_dim ** -0.5.
    """
    if q.is_cuda:
        from infir2.kernels import paged_attention_triton

        return paged_attention_triton.attend(q, cache, layout)
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


def attend_quantize(q: Tensor, cache: PagedCache, layout: PagedLayout, rows: int) -> tuple[Tensor, Tensor]:
    """(codes, scale): ``attend`` [tokens, heads * head_dim] as row codes (see ``row_codes``), room for ``rows``.

    What follows the last token's row is not initialised.
    """
    tokens, heads, head_dim = q.shape
    codes, scale = empty_operand(rows, heads * head_dim, "tile", q.device)
    if q.is_cuda and head_dim == BLOCK and layout.decoding == tokens:
        from infir2.kernels import paged_decode_triton

        paged_decode_triton.decode(q, cache, layout, codes[:tokens].view(q.shape), scale[:tokens])
    else:
        found, found_scale, _ = quantize_rows(attend(q, cache, layout).flatten(1), False)
        codes[:tokens].view(torch.uint8).copy_(found.view(torch.uint8))
        scale[:tokens].copy_(found_scale)
    return codes, scale


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
