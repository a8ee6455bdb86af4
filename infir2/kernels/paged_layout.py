"""How keys and values lie in a paged cache, and where the tokens of a forward pass belong in it.

A layer's cache is a pool of blocks of ``block_size`` tokens. A sequence's block table names its blocks in order, so
token i lies in slot ``table[i // block_size] * block_size + i % block_size`` of the pool. A pass brings new tokens of
several sequences, end to end: one each while decoding, many for a chunk of a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infir2.kernels.reference import FP8

QUERY_TILE = 128
"""New tokens of one sequence that a program of the prompt kernel takes."""


@dataclass(frozen=True)
class PagedCache:
    """Keys and values of one layer, [blocks, block_size, kv_heads, head_dim], in any order but with whole heads."""

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None = None
    """float32 [blocks, block_size, kv_heads] where keys and values are float8_e4m3fn codes, else None."""
    value_scale: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Of keys, values and scales together."""
        tensors = (self.keys, self.values, self.key_scale, self.value_scale)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def strides(self) -> dict[str, int]:
        """From one block, token and head to the next, in heads: the same for keys, values and their scales."""
        names = ("BLOCK_STRIDE", "TOKEN_STRIDE", "HEAD_STRIDE")
        return {name: stride // self.keys.shape[-1] for name, stride in zip(names, self.keys.stride())}

    def pools(self, in_pairs: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, values and their scales, for a kernel; without scales, something in their place that it never touches.

        in_pairs: FP8 codes as int16, two in each.
        """
        keys, values = self.keys, self.values
        if in_pairs:
            keys, values = keys.view(torch.int16), values.view(torch.int16)
        if self.key_scale is None or self.value_scale is None:
            return keys, values, keys, values
        return keys, values, self.key_scale, self.value_scale


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
    query_tiles: Tensor
    """int32 [tiles, 2]: (sequence, first of its new tokens) of every tile of up to ``QUERY_TILE`` new tokens of the
    sequences that do not decode."""
    decoding: int = 0
    """How many sequences, the first ones, decode: they have one new token each, and no tiles."""


def empty_cache(
    blocks: int,
    block_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    heads_first: bool | None = None,
) -> PagedCache:
    """An uninitialised cache; ``dtype`` float8_e4m3fn makes an FP8 one.

    heads_first: whether, within a block, the tokens of one head lie together, not the heads of one token. None: on a
    GPU, where a program reads one head, and memory that is read in longer pieces is read faster.
    """
    heads_first = torch.device(device).type == "cuda" if heads_first is None else heads_first
    shape = (blocks, kv_heads, block_size) if heads_first else (blocks, block_size, kv_heads)

    def pool(*size: int, dtype: torch.dtype) -> Tensor:
        empty = torch.empty(size, dtype=dtype, device=device)
        return empty.transpose(1, 2) if heads_first else empty

    keys, values = (pool(*shape, head_dim, dtype=dtype) for _ in range(2))
    if dtype != FP8:
        return PagedCache(keys, values)
    return PagedCache(keys, values, *(pool(*shape, dtype=torch.float32) for _ in range(2)))


def query_tiles(lengths: Sequence[int], decoding: int = 0) -> Tensor:
    """``PagedLayout.query_tiles`` of sequences with so many new tokens each, on the CPU; those that see most first,
    for they take longest."""
    tiles = [(i, start) for i in range(decoding, len(lengths)) for start in range(0, lengths[i], QUERY_TILE)]
    tiles.sort(key=lambda tile: -tile[1])
    return torch.tensor(tiles, dtype=torch.int32).view(-1, 2)
