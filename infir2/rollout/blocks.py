"""Which blocks of the paged key-value cache are whose, in integers: ownership, reuse of equal prefixes, eviction.

A block is free, held (by one sequence, or shared by several), or cached: held by nobody but still full of the keys and
values of a known prefix. Cached blocks are handed out again to a sequence with that prefix, or, the longest unused
first, as if they were free.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Name of the prefix that ends with this full block: a hash of the prefix before it and the block's tokens."""
    return blake2b(array("q", tokens).tobytes(), key=parent, digest_size=16).digest()


class BlockAllocator:
    """Owner of block numbers 0 .. num_blocks - 1."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a cache of {num_blocks} blocks of {block_size} tokens holds nothing")
        self.num_blocks, self.block_size = num_blocks, block_size
        self.epoch = 0
        """Counts flushes: what was computed in an earlier epoch must not be registered."""
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # no references, but registered; longest unused first
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Blocks that ``allocate`` can give."""
        return len(self._free) + len(self._cached)

    @property
    def held(self) -> int:
        """Blocks that some sequence holds."""
        return self.num_blocks - self.available

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens fill."""
        return -(-tokens // self.block_size)

    def references(self, block: int) -> int:
        """How many sequences hold the block."""
        return self._references[block]

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest registered prefix; nobody holds them yet: ``acquire`` them."""
        found = []
        for name in hashes:
            if (block := self._block_of.get(name)) is None:
                break
            found.append(block)
        return found

    def acquire(self, blocks: Iterable[int]) -> None:
        """Hold registered blocks, alone or with others."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks for one sequence alone. Raises ValueError where fewer are available."""
        if count > self.available:
            raise ValueError(f"{count} blocks asked for, {self.available} available")
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
            self._references[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Give up a sequence's blocks, in the order of its tokens; the registered ones stay cached."""
        # Backwards: a prefix is of use without its end, an end is of none without its prefix.
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise ValueError(f"block {block} is released but nobody holds it")
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def register(self, block: int, name: bytes) -> None:
        """Let others reuse a held block that has been filled. Of two blocks with the same content the first counts."""
        if self._references[block] < 1:
            raise ValueError(f"block {block} is registered but nobody holds it")
        if name not in self._block_of and block not in self._hash_of:
            self._block_of[name], self._hash_of[block] = block, name

    def flush(self) -> None:
        """Forget all prefixes: the weights have changed. Held blocks stay held."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._hash_of.clear()
        self._block_of.clear()
        self.epoch += 1

    def _forget(self, block: int) -> None:
        del self._block_of[self._hash_of.pop(block)]
