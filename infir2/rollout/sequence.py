"""One sample in the making: what was asked, what has been sampled, where its keys and values lie. Needs no torch."""

from dataclasses import dataclass, field
from enum import Enum

from infir2.rollout.blocks import block_hash
from infir2.rollout.records import FinishReason, SamplingParams


class State(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    """Holds no blocks: new, or preempted."""
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """Sample ``index`` of a request. The scheduler owns the cache fields, the engine those of sampling."""

    request_id: str
    index: int
    arrival: int
    """Number in the order of arrival: the lower, the older; the oldest is served first and preempted last."""
    tokens: list[int]
    """The prompt, then what has been sampled."""
    params: SamplingParams
    stop_ids: frozenset[int] = frozenset()
    key: int = 0
    """Random numbers of token i are a function of (key, i)."""

    prompt_length: int = field(init=False)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    state: State = State.WAITING
    finish_reason: FinishReason | None = None

    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    """Leading tokens whose keys and values are in the cache."""
    registered: int = 0
    """Leading blocks that have been offered for reuse."""
    epoch: int = -1
    """The allocator's epoch when the sequence was admitted."""
    cached_tokens: int | None = None
    """Tokens found in the cache at the first admission."""
    _hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def remaining(self) -> int:
        """Known tokens that are not in the cache yet: 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    def hashes(self, block_size: int) -> list[bytes]:
        """The name of the prefix that ends with each full block of known tokens."""
        while (end := (len(self._hashes) + 1) * block_size) <= len(self.tokens):
            parent = self._hashes[-1] if self._hashes else b""
            self._hashes.append(block_hash(parent, self.tokens[end - block_size : end]))
        return self._hashes
