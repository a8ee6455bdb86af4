"""One forward pass of the trainer's model over a batch of chunks, with keys and values in a paged cache.

The model is the trainer's object: same weights, same FP8 codes, same code. Only the attention back end is another.
"""

from collections.abc import Sequence as List
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from infir2.kernels.paged_attention import attend, write
from infir2.kernels.paged_layout import PagedCache, PagedLayout, empty_cache, query_tiles
from infir2.model.transformer import CausalLM
from infir2.rollout.scheduler import Chunk
from infir2.rollout.upload import block_tables, upload


class PagedAttention:
    """The ``attend`` that a pass gives to the model: stores the new keys and values, then looks at the cache."""

    def __init__(self, caches: list[PagedCache], layout: PagedLayout) -> None:
        self.caches, self.layout = caches, layout

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer_index: int) -> Tensor:
        """q [1, tokens, heads, head_dim], k and v [1, tokens, kv_heads, head_dim] -> like q."""
        cache = self.caches[layer_index]
        write(cache, k[0], v[0], self.layout.slots)
        return attend(q[0], cache, self.layout).unsqueeze(0)


class Runner:
    """Holds the key-value cache of every layer and runs the model.

    Raises ValueError for sharded weights, and on a GPU for heads whose size is no power of two.
    """

    def __init__(self, model: CausalLM, num_blocks: int, block_size: int, cache_dtype: torch.dtype) -> None:
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise ValueError("the weights are sharded over devices; the embedded engine needs whole ones")
        head_dim = model.config.head_dim
        if model.lm_head.weight.is_cuda and head_dim & (head_dim - 1):
            raise ValueError(f"head_dim {head_dim}: on a GPU the engine's attention takes powers of two only")
        self.model, self.num_blocks, self.block_size = model, num_blocks, block_size
        self.cache_dtype = cache_dtype
        self.caches: list[PagedCache] = []
        self.make_cache()

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @property
    def cache_bytes(self) -> int:
        return sum(cache.num_bytes for cache in self.caches)

    def make_cache(self) -> None:
        """Allocate the cache, if there is none, and cast the weights that passes will multiply."""
        config = self.model.config
        self.model.cast_weights()
        if not self.caches:
            self.caches = [
                empty_cache(
                    self.num_blocks + 1,  # the last one takes what nobody will read
                    self.block_size,
                    config.num_key_value_heads,
                    config.head_dim,
                    self.cache_dtype,
                    self.device,
                )
                for _ in range(config.num_hidden_layers)
            ]

    def free_cache(self) -> None:
        """Give the memory of the cache and of cast weights back, to the device where it came from one."""
        self.caches = []
        self.model.drop_casts()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # Not inference_mode: FP8 codes that are made here are used by the trainer's backward pass as well.
    @torch.no_grad()
    def run(self, chunks: List[Chunk]) -> Tensor:
        """Compute the chunks, those of one token first. Logits [sampling chunks, vocabulary] of their last tokens, in
        the compute dtype."""
        input_ids, position_ids, layout = self._batch(chunks)
        ends = np.cumsum([chunk.length for chunk in chunks]) - 1
        sampling = upload(ends[[chunk.samples for chunk in chunks]], self.device)

        def last_tokens_only(hidden: Tensor, weight: Tensor) -> Tensor:
            return F.linear(hidden[0, sampling], weight.to(hidden.dtype))

        with self.eagerly():
            return self.model(input_ids, position_ids, PagedAttention(self.caches, layout), last_tokens_only)

    def eagerly(self) -> AbstractContextManager:
        """On a GPU, layers that the trainer compiled run as they are written: kernels without a backward pass are as
        fast, and nothing has to be compiled again for passes of other sizes."""
        return torch.compiler.set_stance("force_eager") if self.device.type == "cuda" else nullcontext()

    def _batch(self, chunks: List[Chunk]) -> tuple[Tensor, Tensor, PagedLayout]:
        """Ids and positions of the chunks' tokens, end to end, int64 [1, tokens] each, and where they belong."""
        size, device = self.block_size, self.device
        lengths = np.array([chunk.length for chunk in chunks])
        contexts = np.array([chunk.start + chunk.length for chunk in chunks])
        starts = np.concatenate(([0], lengths.cumsum()))
        known = (chunk.sequence.tokens[chunk.start : chunk.start + chunk.length] for chunk in chunks)
        tokens = np.fromiter(chain.from_iterable(known), np.int64, starts[-1])
        positions = np.arange(starts[-1]) + (contexts - lengths - starts[:-1]).repeat(lengths)
        tables = block_tables([chunk.sequence.blocks for chunk in chunks])
        blocks = tables[np.arange(len(chunks)).repeat(lengths), positions // size].astype(np.int64)
        decoding = next((i for i, length in enumerate(lengths) if length > 1), len(chunks))
        layout = PagedLayout(
            slots=upload(blocks * size + positions % size, device),
            query_starts=upload(starts.astype(np.int32), device),
            context_lengths=upload(contexts.astype(np.int32), device),
            block_tables=upload(tables, device),
            query_tiles=upload(query_tiles(lengths.tolist(), decoding).numpy(), device),
            decoding=decoding,
        )
        return upload(tokens[None], device), upload(positions[None], device), layout
