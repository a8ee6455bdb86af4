"""What the next forward pass computes: continuous batching under a budget of tokens. Integers only, no torch.

Every pass mixes sequences that decode (one token each) with chunks of prompts. Older sequences go first in everything:
in the order of admission, in the share of the budget, and in keeping their blocks. When the cache is full the youngest
is preempted: it gives up its blocks and is computed again later. So the oldest always advances, and all finish.
"""

from bisect import insort
from collections.abc import Sequence as List
from dataclasses import dataclass

from infir2.rollout.blocks import BlockAllocator
from infir2.rollout.records import FinishReason
from infir2.rollout.sequence import Sequence, State


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + length) of a sequence, to be computed in one pass."""

    sequence: Sequence
    start: int
    length: int
    samples: bool
    """Whether the chunk ends with the last known token, so that the next one can be sampled."""


class Scheduler:
    """Call ``schedule``, compute its chunks, call ``advance``, append the sampled tokens, ``finish`` what is done."""

    def __init__(
        self, blocks: BlockAllocator, max_sequences: int, max_batch_tokens: int, prefix_cache: bool = True
    ) -> None:
        if not 1 <= max_sequences <= max_batch_tokens:
            raise ValueError(
                f"max_batch_tokens ({max_batch_tokens}) must be at least max_sequences ({max_sequences}), "
                "which must be at least 1: every running sequence decodes a token a step"
            )
        self.blocks = blocks
        self.max_sequences, self.max_batch_tokens, self.prefix_cache = max_sequences, max_batch_tokens, prefix_cache
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.cached_tokens = 0  # found in the cache at first admissions

    def fits(self, tokens: int) -> bool:
        """Whether a sequence that grows to so many tokens fits into the cache when it has it for itself."""
        return self.blocks.blocks_for(tokens) <= self.blocks.num_blocks

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. Raises ValueError where it could never run."""
        longest = sequence.prompt_length + sequence.params.max_new_tokens
        if sequence.prompt_length < 1 or not self.fits(longest):
            raise ValueError(f"a sequence of up to {longest} tokens cannot run in a cache of {self.blocks.num_blocks}")
        insort(self.waiting, sequence, key=_arrival)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next pass, those of one token first; they hold at most ``max_batch_tokens`` tokens. Empty
        when nothing is left."""
        before = self.preemptions
        # Decoding sequences come first: a token of the budget is set aside for each of them.
        spare = self.max_batch_tokens - sum(sequence.remaining == 1 for sequence in self.running)
        chunks = []
        for sequence in list(self.running):
            if sequence.state is not State.RUNNING or not self._make_room(sequence):
                break  # preempted, and with it all that are younger
            length = sequence.remaining
            if length > 1:
                length = min(length, spare)
                spare -= length
            if length:
                chunks.append(_chunk(sequence, length))
        if self.preemptions == before:
            self._admit(chunks, spare)
        return sorted(chunks, key=lambda chunk: chunk.length > 1)

    def reserve(self, rounds: int) -> int:
        """Blocks for ``rounds`` further tokens of every running sequence, or for as many as there is room for; how
        many that are, at least 1. To be called after ``schedule``, while all sequences decode."""

        def missing(sequence: Sequence, rounds: int) -> int:
            longest = sequence.prompt_length + sequence.params.max_new_tokens
            tokens = min(len(sequence.tokens) + rounds - 1, longest)
            return max(0, self.blocks.blocks_for(tokens) - len(sequence.blocks))

        while rounds > 1 and sum(missing(s, rounds) for s in self.running) > self.blocks.available:
            rounds -= 1
        for sequence in self.running if rounds > 1 else ():
            sequence.blocks += self.blocks.allocate(missing(sequence, rounds))
        return max(rounds, 1)

    def advance(self, chunks: List[Chunk]) -> None:
        """The chunks have been computed: their keys and values are in the cache."""
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.computed = chunk.start + chunk.length
            full = sequence.computed // self.blocks.block_size
            if full > sequence.registered and self.prefix_cache and sequence.epoch == self.blocks.epoch:
                hashes = sequence.hashes(self.blocks.block_size)
                for i in range(sequence.registered, full):
                    self.blocks.register(sequence.blocks[i], hashes[i])
            sequence.registered = full

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Take a sequence out, whatever its state, and free its blocks."""
        if sequence.state is State.FINISHED:
            return
        (self.running if sequence.state is State.RUNNING else self.waiting).remove(sequence)
        self._drop(sequence)
        sequence.state, sequence.finish_reason = State.FINISHED, reason

    def retract(self) -> None:
        """Send every running sequence back to the queue, without its blocks."""
        while self.running:
            self._requeue(self.running[-1])

    def _make_room(self, sequence: Sequence) -> bool:
        """Give the sequence blocks for all its tokens, preempting the youngest as needed; False if that was itself."""
        need = self.blocks.blocks_for(len(sequence.tokens)) - len(sequence.blocks)
        while need > self.blocks.available:
            victim = self.running[-1]
            self._requeue(victim)
            self.preemptions += 1
            if victim is sequence:
                return False
        sequence.blocks += self.blocks.allocate(max(need, 0))
        return True

    def _admit(self, chunks: list[Chunk], spare: int) -> None:
        """Start waiting sequences, the oldest first, while budget, places and blocks last."""
        size = self.blocks.block_size
        coming = self._prefixes_in_the_making()
        for sequence in list(self.waiting):
            if spare < 1 or len(self.running) >= self.max_sequences:
                return
            # The last token is always computed: its hidden state is what the next one is sampled from.
            hashes = sequence.hashes(size)[: (len(sequence.tokens) - 1) // size] if self.prefix_cache else []
            hit = self.blocks.match(hashes)
            if len(hit) < len(hashes) and hashes[len(hit)] in coming:
                continue  # another sequence is computing this very prefix: wait and share it
            need = self.blocks.blocks_for(len(sequence.tokens)) - len(hit)
            unheld = sum(self.blocks.references(block) == 0 for block in hit)
            # A block for the growth of each running sequence, else the newcomer would soon be preempted.
            if need + len(self.running) > self.blocks.available - unheld:
                return  # no overtaking: else many short sequences could keep a long one waiting for ever
            self._start(sequence, hit, need)
            chunks.append(_chunk(sequence, min(sequence.remaining, spare)))
            spare -= chunks[-1].length
            coming.update(hashes[len(hit) :])

    def _start(self, sequence: Sequence, hit: list[int], need: int) -> None:
        self.blocks.acquire(hit)
        sequence.blocks = hit + self.blocks.allocate(need)
        sequence.computed, sequence.registered = len(hit) * self.blocks.block_size, len(hit)
        sequence.epoch, sequence.state = self.blocks.epoch, State.RUNNING
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
            self.cached_tokens += sequence.computed
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_arrival)

    def _prefixes_in_the_making(self) -> set[bytes]:
        """Prefixes that running sequences will have registered when their prompts are computed."""
        size, names = self.blocks.block_size, set()
        for sequence in self.running:
            if self.prefix_cache and sequence.remaining > 1 and sequence.epoch == self.blocks.epoch:
                names.update(sequence.hashes(size)[sequence.computed // size :])
        return names

    def _requeue(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._drop(sequence)
        sequence.state = State.WAITING
        insort(self.waiting, sequence, key=_arrival)

    def _drop(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks)
        # Another list: the decoder takes for granted that the same one only grows.
        sequence.blocks, sequence.computed, sequence.registered = [], 0, 0


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


def _chunk(sequence: Sequence, length: int) -> Chunk:
    return Chunk(sequence, sequence.computed, length, samples=length == sequence.remaining)
