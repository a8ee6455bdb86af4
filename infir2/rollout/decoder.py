"""Several decoding rounds without the host: each samples a token of every sequence and feeds it to the next.

All that a round needs lies on the device: tokens, positions, block tables, sampling parameters. So on a GPU a round is
one CUDA graph, replayed, and the host looks at the tokens of many rounds at once. On a CPU the same function runs as it
is. A sequence that ends on the way goes on to the end of the run; what it makes then is thrown away.
"""

from collections.abc import Sequence as List
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from infir2.kernels.paged_layout import PagedLayout
from infir2.kernels.sample import SamplingBatch, sample
from infir2.rollout.fused_decode import FusedDecode
from infir2.rollout.runner import PagedAttention, Runner
from infir2.rollout.sequence import Sequence
from infir2.rollout.upload import pinned


@dataclass(frozen=True)
class Rounds:
    """What the sequences of a run made: one list a sequence, one element a round."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    raw_logprobs: list[list[float]]


class DecodeBuffers:
    """The state of a run on the device, for up to ``size`` sequences and ``most`` rounds."""

    def __init__(self, size: int, most: int, width: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.integers = zeros(6, size, dtype=torch.int64)
        self.token, self.position, self.limit, self.top_k, self.keys, self.counters = self.integers.unbind()
        self.temperature, self.top_p = zeros(size, dtype=torch.float32), zeros(size, dtype=torch.float64)
        self.tables = zeros(size, width, dtype=torch.int32)
        self.round = zeros(1, dtype=torch.int64)
        self.tokens = zeros(most, size, dtype=torch.int64)
        self.logprobs, self.raw_logprobs = (zeros(most, size, dtype=torch.float32) for _ in range(2))
        self.starts = torch.arange(size + 1, dtype=torch.int32, device=device)
        self.no_tiles = zeros(0, 2, dtype=torch.int32)
        # The tables on the host, and whose they are: a sequence's list of blocks only grows while it is the same list.
        self._tables = np.zeros((size, width), dtype=np.int32)
        self._blocks: list[list[int]] = [[] for _ in range(size)]
        self._known = [0] * size

    def load(self, sequences: List[Sequence], spare_block: int) -> None:
        """Fill the rows; rows without a sequence decode a token of their own into the spare block."""
        size, used = self.tables.shape[0], len(sequences)
        integers = np.zeros((6, size), dtype=np.int64)
        temperature, top_p = np.zeros(size, dtype=np.float32), np.ones(size)
        params = [sequence.params for sequence in sequences]
        integers[:, :used] = (
            [s.tokens[-1] for s in sequences],
            [len(s.tokens) - 1 for s in sequences],
            # Behind its last possible token a sequence stays where it is: no block is set aside for more.
            [s.prompt_length + s.params.max_new_tokens - 1 for s in sequences],
            [p.top_k for p in params],
            [s.key for s in sequences],
            [s.num_generated for s in sequences],
        )
        temperature[:used], top_p[:used] = [p.temperature for p in params], [p.top_p for p in params]
        for row in range(size):
            self._load_table(row, sequences[row].blocks if row < used else [spare_block])
        for target, values in (
            (self.integers, integers),
            (self.temperature, temperature),
            (self.top_p, top_p),
            (self.tables, self._tables),
        ):
            target.copy_(pinned(values, target.device), non_blocking=True)
        self.round.zero_()

    def _load_table(self, row: int, blocks: list[int]) -> None:
        if self._blocks[row] is not blocks:
            self._tables[row] = 0
            self._blocks[row], self._known[row] = blocks, 0
        known, count = self._known[row], len(blocks)
        if count > known:
            self._tables[row, known:count] = blocks[known:]
            self._known[row] = count


class Decoder:
    """Runs rounds with a runner's model and cache."""

    def __init__(self, runner: Runner, most_rounds: int, max_sequences: int, max_length: int) -> None:
        self.runner, self.most_rounds = runner, most_rounds
        self.max_sequences, self.width = max_sequences, -(-max_length // runner.block_size)
        self._buffers: dict[int, DecodeBuffers] = {}
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._fused = FusedDecode(runner.model) if FusedDecode.fits(runner.model) else None

    @torch.no_grad()
    def run(self, sequences: List[Sequence], rounds: int) -> Rounds:
        """Decode ``rounds`` tokens of every sequence; blocks for them must be there."""
        size = self._size(len(sequences))
        filtered = any(s.params.temperature > 0 and (s.params.top_k or s.params.top_p < 1) for s in sequences)
        if size not in self._buffers:
            self._buffers[size] = DecodeBuffers(size, self.most_rounds, self.width, self.runner.device)
        buffers = self._buffers[size]
        buffers.load(sequences, self.runner.num_blocks)
        graph = self._graph(size, filtered) if self.runner.device.type == "cuda" else None
        for _ in range(rounds):
            if graph is None:
                self._round(buffers, filtered)
            else:
                graph.replay()
        columns = (buffers.tokens, buffers.logprobs, buffers.raw_logprobs)
        return Rounds(*(column[:rounds, : len(sequences)].T.tolist() for column in columns))

    def forget(self) -> None:
        """Drop what was recorded: the cache or the weights lie elsewhere now."""
        self._graphs.clear()
        self._buffers.clear()

    def _size(self, sequences: int) -> int:
        """Rows of the buffers: on a GPU a few sizes serve all, so that few graphs are recorded."""
        if self.runner.device.type != "cuda":
            return sequences
        sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 257, 16), *range(320, self.max_sequences + 64, 64)]
        return min(next(size for size in sizes if size >= sequences), max(self.max_sequences, sequences))

    def _graph(self, size: int, filtered: bool) -> torch.cuda.CUDAGraph:
        if (size, filtered) not in self._graphs:
            buffers = self._buffers[size]
            state = {name: value.clone() for name, value in vars(buffers).items() if isinstance(value, Tensor)}
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # what is compiled or chosen at a first call must not be recorded
                for _ in range(2):
                    self._round(buffers, filtered)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as one that writes a checkpoint of the trainer, may use the GPU meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._round(buffers, filtered)
            for name, tensor in state.items():
                getattr(buffers, name).copy_(tensor)
            self._graphs[size, filtered] = graph
        return self._graphs[size, filtered]

    def _round(self, state: DecodeBuffers, filtered: bool) -> None:
        """One token of every row, in place."""
        runner, size = self.runner, state.token.numel()
        position = torch.minimum(state.position, state.limit)
        block = state.tables.gather(1, (position // runner.block_size)[:, None]).squeeze(1).long()
        layout = PagedLayout(
            slots=block * runner.block_size + position % runner.block_size,
            query_starts=state.starts,
            context_lengths=(position + 1).int(),
            block_tables=state.tables,
            query_tiles=state.no_tiles,
            decoding=size,
        )

        logits = self._logits(state.token, position, layout)
        batch = SamplingBatch(state.temperature, state.top_k, state.top_p, state.keys, state.counters, filtered)
        sampled = sample(logits, batch)
        state.tokens.index_copy_(0, state.round, sampled.tokens[None])
        state.logprobs.index_copy_(0, state.round, sampled.logprobs[None])
        state.raw_logprobs.index_copy_(0, state.round, sampled.raw_logprobs[None])
        state.token.copy_(sampled.tokens)
        for counter in (state.position, state.counters, state.round):
            counter.add_(1)

    def _logits(self, ids: Tensor, positions: Tensor, layout: PagedLayout) -> Tensor:
        """Of one token of every sequence: [sequences, vocabulary] in the compute dtype."""
        model, caches = self.runner.model, self.runner.caches
        if self._fused is not None:
            hidden = self._fused(ids, positions, caches, layout)
            return F.linear(hidden, model.lm_head.weight_in(hidden.dtype))

        def logits_of_all(hidden: Tensor, weight: Tensor) -> Tensor:
            return F.linear(hidden[0], weight.to(hidden.dtype))

        with self.runner.eagerly():
            return model(ids[None], positions[None], PagedAttention(caches, layout), logits_of_all)
