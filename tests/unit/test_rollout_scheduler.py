"""Blocks and scheduler on integers: a pretended cache records what each slot holds, and no rule may be broken."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infir2.rollout.blocks import BlockAllocator, block_hash
from infir2.rollout.records import SamplingParams
from infir2.rollout.scheduler import Chunk, Scheduler
from infir2.rollout.sequence import Sequence, State


@dataclass
class Machine:
    """A scheduler with a cache that remembers, for each slot, which prefix was written there and by which weights."""

    num_blocks: int = 8
    block_size: int = 4
    max_sequences: int = 4
    max_batch_tokens: int = 8
    prefix_cache: bool = True
    version: int = 0
    added: list[Sequence] = field(default_factory=list)
    max_hit: int = 0

    def __post_init__(self) -> None:
        self.blocks = BlockAllocator(self.num_blocks, self.block_size)
        self.scheduler = Scheduler(self.blocks, self.max_sequences, self.max_batch_tokens, self.prefix_cache)
        self.slots: dict[int, tuple[tuple[int, ...], int]] = {}
        self.admitted_at: dict[Sequence, int] = {}

    def add(self, prompt: list[int], new: int) -> Sequence:
        number = len(self.added)
        sequence = Sequence(f"r{number}", 0, number, list(prompt), SamplingParams(max_new_tokens=new))
        self.scheduler.add(sequence)
        self.added.append(sequence)
        return sequence

    def step(self) -> list[Chunk]:
        waiting_before = set(self.scheduler.waiting)
        chunks = self.scheduler.schedule()
        assert sum(chunk.length for chunk in chunks) <= self.max_batch_tokens
        assert len(self.scheduler.running) <= self.max_sequences
        assert len({chunk.sequence for chunk in chunks}) == len(chunks)
        for chunk in chunks:
            if chunk.sequence in waiting_before:
                self.admitted_at[chunk.sequence] = self.version
                self._check_hit(chunk)
        for chunk in chunks:  # all writes, then all reads: as a layer does it
            self._write(chunk)
        for chunk in chunks:
            self._read(chunk)
        self.scheduler.advance(chunks)
        for chunk in chunks:
            if chunk.samples:
                self._sample(chunk.sequence)
        self.check()
        return chunks

    def _check_hit(self, chunk: Chunk) -> None:
        """What was found in the cache is this sequence's own prefix, made by today's weights."""
        sequence = chunk.sequence
        assert self.prefix_cache or chunk.start == 0
        assert chunk.start % self.block_size == 0
        assert chunk.start < len(sequence.tokens)
        self.max_hit = max(self.max_hit, chunk.start)
        for i in range(chunk.start):
            assert self.slots[self._slot(sequence, i)] == (tuple(sequence.tokens[: i + 1]), self.version)

    def _write(self, chunk: Chunk) -> None:
        for i in range(chunk.start, chunk.start + chunk.length):
            block = chunk.sequence.blocks[i // self.block_size]
            assert self.blocks.references(block) == 1, "a shared block is written to"
            self.slots[self._slot(chunk.sequence, i)] = (tuple(chunk.sequence.tokens[: i + 1]), self.version)

    def _read(self, chunk: Chunk) -> None:
        for i in range(chunk.start + chunk.length):
            prefix, version = self.slots[self._slot(chunk.sequence, i)]
            assert prefix == tuple(chunk.sequence.tokens[: i + 1])
            assert version >= self.admitted_at[chunk.sequence]

    def _slot(self, sequence: Sequence, i: int) -> int:
        return sequence.blocks[i // self.block_size] * self.block_size + i % self.block_size

    def _sample(self, sequence: Sequence) -> None:
        sequence.tokens.append(sum(sequence.tokens) % 3)
        if sequence.num_generated >= sequence.params.max_new_tokens:
            self.scheduler.finish(sequence, "length")

    def check(self) -> None:
        """References are exactly the holdings; every block is free, cached or held, and only one of them."""
        held: dict[int, int] = {}
        for sequence in self.added:
            assert (sequence.state is State.RUNNING) == (sequence in self.scheduler.running)
            assert (sequence.state is State.WAITING) == (sequence in self.scheduler.waiting)
            assert sequence.state is State.RUNNING or not sequence.blocks
            assert len(set(sequence.blocks)) == len(sequence.blocks)
            for block in sequence.blocks:
                held[block] = held.get(block, 0) + 1
        for block in range(self.num_blocks):
            assert self.blocks.references(block) == held.get(block, 0)
        free, cached = self.blocks._free, list(self.blocks._cached)
        assert sorted([*free, *cached, *held]) == list(range(self.num_blocks))
        assert all(block in self.blocks._hash_of for block in cached)
        assert {name: block for block, name in self.blocks._hash_of.items()} == self.blocks._block_of

    def run_dry(self) -> None:
        budget = 50 + 20 * sum(len(s.tokens) + s.params.max_new_tokens for s in self.added)
        while self.scheduler.running or self.scheduler.waiting:
            assert self.step(), "something is unfinished but nothing is scheduled"
            budget -= 1
            assert budget, "no end in sight"
        assert self.blocks.held == 0


ACTIONS = st.one_of(
    # Few symbols, so that prompts share prefixes by themselves.
    st.tuples(st.just("add"), st.lists(st.integers(0, 1), min_size=1, max_size=20), st.integers(1, 12)),
    st.tuples(st.just("again"), st.integers(0, 50), st.integers(1, 12)),
    st.tuples(st.just("step"), st.integers(1, 4), st.just(0)),
    st.tuples(st.just("abort"), st.integers(0, 50), st.just(0)),
    st.tuples(st.just("update"), st.just(0), st.just(0)),
    st.tuples(st.just("retract"), st.just(0), st.just(0)),
)


def play(machine: Machine, actions: list[tuple]) -> None:
    for kind, what, new in actions:
        if kind == "add":
            machine.add(what, new)
        elif kind == "again" and machine.added:
            again = machine.added[what % len(machine.added)]
            machine.add(again.tokens[:20], new)  # its sampled tokens too, as the next turn of a chat would
        elif kind == "step":
            for _ in range(what):
                machine.step()
        elif kind == "abort" and machine.added:
            machine.scheduler.finish(machine.added[what % len(machine.added)], "abort")
        elif kind == "update":
            machine.version += 1
            machine.blocks.flush()
        elif kind == "retract":
            machine.scheduler.retract()
        machine.check()
    machine.run_dry()


@settings(max_examples=250, deadline=None)
@given(
    actions=st.lists(ACTIONS, max_size=40),
    num_blocks=st.integers(8, 14),
    max_sequences=st.integers(1, 6),
    spare=st.integers(0, 12),
    prefix_cache=st.booleans(),
)
def test_no_rule_is_broken_whatever_happens(
    actions: list[tuple], num_blocks: int, max_sequences: int, spare: int, prefix_cache: bool
) -> None:
    machine = Machine(num_blocks, 4, max_sequences, max_sequences + spare, prefix_cache)
    play(machine, actions)
    finished = [sequence for sequence in machine.added if sequence.finish_reason == "length"]
    assert all(sequence.num_generated == sequence.params.max_new_tokens for sequence in finished)
    assert all(sequence.finish_reason in ("length", "abort") for sequence in machine.added)


def test_a_tiny_cache_preempts_the_youngest_and_all_finish_the_same() -> None:
    roomy, tiny = Machine(num_blocks=64, max_batch_tokens=16), Machine(num_blocks=7, max_batch_tokens=16)
    for machine in (roomy, tiny):
        for first in range(4):
            machine.add([first, 5, 5, 5, 5], 20)
        machine.run_dry()
    assert roomy.scheduler.preemptions == 0
    assert tiny.scheduler.preemptions > 0
    assert [s.tokens for s in tiny.added] == [s.tokens for s in roomy.added]


def test_the_oldest_advances_in_every_step() -> None:
    machine = Machine(num_blocks=7, max_batch_tokens=16)
    sequences = [machine.add([first, 5, 5, 5, 5], 20) for first in range(4)]
    while machine.scheduler.running or machine.scheduler.waiting:
        oldest = next(s for s in sequences if s.state is not State.FINISHED)
        assert machine.step()[0].sequence is oldest


def test_decoding_goes_on_while_a_long_prompt_is_computed_in_chunks() -> None:
    machine = Machine(num_blocks=64, max_batch_tokens=6)
    short = machine.add([1], 30)
    machine.step()
    long = machine.add(list(range(40)), 2)
    seen = []
    while long.num_generated == 0:
        before = short.num_generated
        seen.append({chunk.sequence.request_id: chunk.length for chunk in machine.step()})
        assert short.num_generated == before + 1
    assert [step["r1"] for step in seen] == [5] * 8


def test_a_large_waiting_request_is_not_overtaken() -> None:
    machine = Machine(num_blocks=8, max_sequences=8, max_batch_tokens=64)
    first = machine.add([1] * 9, 8)
    machine.step()
    large = machine.add([2] * 24, 4)
    small = [machine.add([3 + i], 2) for i in range(3)]
    while large.state is State.WAITING:
        machine.step()
        assert first.state is State.FINISHED or all(s.state is State.WAITING for s in small)


def test_a_newcomer_leaves_room_for_those_who_run() -> None:
    machine = Machine(num_blocks=4, max_batch_tokens=64)
    machine.add([1] * 8, 5)
    machine.step()  # two blocks full, a third about to be needed
    machine.add([2] * 7, 1)  # would fill the other two
    machine.run_dry()
    assert machine.scheduler.preemptions == 0


def test_samples_of_one_prompt_wait_for_it_and_share_its_blocks() -> None:
    machine = Machine(num_blocks=32, max_batch_tokens=8)
    group = [machine.add(list(range(18)), 4) for _ in range(3)]
    computed = 0
    while not all(s.num_generated for s in group):
        computed += sum(chunk.length for chunk in machine.step())
    # 18 tokens once, then for the others what stands behind the four full blocks (and a few decoded tokens).
    assert [s.cached_tokens for s in group] == [0, 16, 16]
    assert group[0].blocks[:4] == group[1].blocks[:4] == group[2].blocks[:4]
    assert machine.blocks.references(group[0].blocks[0]) == 3
    assert computed <= 18 + 2 * 2 + 4
    machine.run_dry()


def test_a_prefix_is_reused_after_its_sequence_has_gone_until_the_weights_change() -> None:
    machine = Machine(num_blocks=32, max_batch_tokens=64)
    prompt = list(range(13))
    machine.add(prompt, 1)
    machine.run_dry()
    assert machine.add(prompt, 1).cached_tokens is None
    machine.run_dry()
    assert machine.added[-1].cached_tokens == 12
    machine.add([99, *prompt[1:]], 1)
    machine.run_dry()
    assert machine.added[-1].cached_tokens == 0
    machine.version += 1
    machine.blocks.flush()
    machine.add(prompt, 1)
    machine.run_dry()
    assert machine.added[-1].cached_tokens == 0


@pytest.mark.parametrize("prompt_length", [2, 6])
def test_what_began_before_an_update_is_never_registered(prompt_length: int) -> None:
    machine = Machine(num_blocks=32, max_batch_tokens=64)
    old = machine.add([7] * prompt_length, 14)
    machine.step()
    machine.version += 1
    machine.blocks.flush()
    if prompt_length > 4:  # someone else makes the first block anew, so that the old sequence's next ones could follow
        machine.add([7] * 5, 1)
        machine.step()
    machine.run_dry()
    machine.add(old.tokens, 1)
    machine.run_dry()
    assert machine.added[-1].cached_tokens == (4 if prompt_length > 4 else 0)


def test_a_whole_prompt_in_the_cache_still_computes_its_last_token() -> None:
    machine = Machine(num_blocks=32, max_batch_tokens=64)
    for _ in range(2):
        machine.add([5] * 8, 1)
        machine.run_dry()
    assert machine.added[1].cached_tokens == 4


def test_the_longest_unused_prefix_is_evicted_first_and_its_end_before_its_beginning() -> None:
    blocks = BlockAllocator(4, 2)
    old, new = blocks.allocate(2), blocks.allocate(2)
    names = [block_hash(b"", [1, 1]), block_hash(b"", [2, 2])]
    chained = [names[0], block_hash(names[0], [1, 1])], [names[1], block_hash(names[1], [2, 2])]
    for held, hashes in ((old, chained[0]), (new, chained[1])):
        for block, name in zip(held, hashes):
            blocks.register(block, name)
        blocks.release(held)
    assert blocks.available == 4
    assert blocks.allocate(1) == [old[1]]
    assert blocks.match(chained[0]) == [old[0]]
    blocks.acquire(blocks.match(chained[0]))
    assert blocks.allocate(2) == [new[1], new[0]]
    assert blocks.match(chained[1]) == []
    with pytest.raises(ValueError, match="1 blocks asked for, 0 available"):
        blocks.allocate(1)


def test_faults_of_the_caller_are_noticed() -> None:
    blocks = BlockAllocator(2, 2)
    block = blocks.allocate(1)
    blocks.release(block)
    with pytest.raises(ValueError, match="nobody holds it"):
        blocks.release(block)
    with pytest.raises(ValueError, match="nobody holds it"):
        blocks.register(block[0], b"x")
    with pytest.raises(ValueError, match="must be at least max_sequences"):
        Scheduler(blocks, 8, 4)
    machine = Machine()
    with pytest.raises(ValueError, match="up to 33 tokens cannot run"):
        machine.add([1] * 30, 3)
