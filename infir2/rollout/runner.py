"""One forward pass of the trainer's model over a batch of chunks, with keys and values in a paged cache.

The model is the trainer's object: same weights, same FP8 codes, same code. Only the attention back end is another.
"""

from collections.abc import Sequence as List

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from infir2.kernels.paged_attention import attend, write
from infir2.kernels.paged_layout import PagedCache, PagedLayout, empty_cache, query_tiles
from infir2.kernels.reference import FP8
from infir2.model.transformer import CausalLM
from infir2.rollout.scheduler import Chunk


class PagedAttention:
    """The ``attend`` that a pass gives to the model: stores the new keys and values, then looks at the cache."""

    def __init__(self, caches: list[PagedCache], layout: PagedLayout) -> None:
        self.caches, self.layout = caches, layout

    # Layers that the trainer compiled leave their compiled code here: every batch is another layout.
    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer_index: int) -> Tensor:
        """q [1, tokens, heads, head_dim], k and v [1, tokens, kv_heads, head_dim] -> like q."""
        cache = self.caches[layer_index]
        write(cache, k[0], v[0], self.layout.slots)
        return attend(q[0], cache, self.layout).unsqueeze(0)


class Runner:
    """Holds the key-value cache of every layer and runs the model. Raises ValueError for sharded weights."""

    def __init__(self, model: CausalLM, num_blocks: int, block_size: int, fp8_cache: bool) -> None:
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise ValueError("the weights are sharded over devices; the embedded engine needs whole ones")
        self.model, self.num_blocks, self.block_size = model, num_blocks, block_size
        self.cache_dtype = FP8 if fp8_cache else model.model.compute_dtype
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
        """Compute the chunks. Logits [sampling chunks, vocabulary] of their last tokens, in the compute dtype."""
        input_ids, position_ids = self._tokens(chunks)
        ends = torch.tensor([chunk.length for chunk in chunks]).cumsum(0) - 1
        sampling = ends[torch.tensor([chunk.samples for chunk in chunks])].to(self.device)

        def last_tokens_only(hidden: Tensor, weight: Tensor) -> Tensor:
            return F.linear(hidden[0, sampling], weight.to(hidden.dtype))

        attention = PagedAttention(self.caches, self._layout(chunks))
        return self.model(input_ids, position_ids, attention, last_tokens_only)

    def _tokens(self, chunks: List[Chunk]) -> tuple[Tensor, Tensor]:
        """Ids and positions of the chunks' tokens, end to end: int64 [1, tokens] each."""
        ids: list[int] = []
        positions: list[int] = []
        for chunk in chunks:
            ids += chunk.sequence.tokens[chunk.start : chunk.start + chunk.length]
            positions += range(chunk.start, chunk.start + chunk.length)
        both = torch.tensor([ids, positions], dtype=torch.int64).to(self.device)
        return both[:1], both[1:]

    def _layout(self, chunks: List[Chunk]) -> PagedLayout:
        size = self.block_size
        starts, contexts, slots = [0], [], []
        for chunk in chunks:
            blocks, end = chunk.sequence.blocks, chunk.start + chunk.length
            starts.append(starts[-1] + chunk.length)
            contexts.append(end)
            slots += [blocks[i // size] * size + i % size for i in range(chunk.start, end)]
        width = max(len(chunk.sequence.blocks) for chunk in chunks)
        tables = [chunk.sequence.blocks + [0] * (width - len(chunk.sequence.blocks)) for chunk in chunks]
        return PagedLayout(
            slots=torch.tensor(slots, dtype=torch.int64).to(self.device),
            query_starts=torch.tensor(starts, dtype=torch.int32).to(self.device),
            context_lengths=torch.tensor(contexts, dtype=torch.int32).to(self.device),
            block_tables=torch.tensor(tables, dtype=torch.int32).to(self.device),
            query_tiles=query_tiles([chunk.length for chunk in chunks]).to(self.device),
            decoding=all(chunk.length == 1 for chunk in chunks),
        )
