"""What RL code knows of a rollout engine, embedded or remote. SGLang and vLLM can be put behind the same methods."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from infir2.rollout.records import Completion, Request

PauseMode = Literal["keep", "recompute", "abort"]
Progress = Callable[[int, int], None]
"""``progress(finished, total)``: samples of this call, after every step."""


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do; callers decide by these and not by its type."""

    fp8_weights: bool
    """Some linear layers multiply in FP8."""
    fp8_cache: bool
    """Keys and values are stored in FP8."""
    shared_weights: bool
    """The engine reads the trainer's tensors: ``update`` need not be called between begin and end."""
    in_flight_update: bool
    """Weights may change while samples are unfinished."""
    logprobs: Literal["sampled", "temperature", "raw"]
    """What ``Completion.logprobs`` means: of the distribution drawn from, after temperature only, or untouched."""
    batch_invariant: bool
    """A sample does not depend on what else is in the batch, up to the rounding of float sums."""
    cuda_graphs: bool
    tensor_parallel: int
    """Devices that one copy of the weights is spread over."""


@dataclass(frozen=True)
class EngineStats:
    """Counters since the engine was made, and how full it is now."""

    steps: int
    seconds: float
    """Spent inside ``step``."""
    computed_tokens: int
    """Tokens that went through the model: prompts, samples, and what preemption made it compute again."""
    generated_tokens: int
    cached_tokens: int
    """Prompt tokens that were found in the cache instead of being computed."""
    preemptions: int
    waiting: int
    running: int
    blocks_held: int
    num_blocks: int
    cache_bytes: int
    """Memory of keys and values; 0 while asleep."""


class RolloutEngine(Protocol):
    """Generates samples, and lets a trainer change the weights between (or, if it can, during) calls.

    The order of an update is ``begin_update(version)``, any number of ``update``, ``end_update()``.
    """

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def weight_version(self) -> int: ...

    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[list[Completion]]:
        """The n samples of each request, in the order of the requests."""
        ...

    def pause(self, mode: PauseMode = "keep") -> list[Completion]:
        """Stop between two steps. ``keep`` leaves unfinished samples as they are, ``recompute`` drops their keys and
        values so that they are made anew at ``resume``, ``abort`` ends them and returns what they had."""
        ...

    def resume(self) -> None: ...

    def flush_cache(self) -> None:
        """Forget every cached prefix."""
        ...

    def begin_update(self, version: int) -> None: ...

    def update(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Weights by their Hugging Face names."""
        ...

    def end_update(self) -> None:
        """From here on tokens carry the new version, and no prefix of the old weights is reused."""
        ...

    def sleep(self) -> None:
        """Give device memory back. Unfinished samples are kept, their keys and values are not."""
        ...

    def wake(self) -> None: ...

    def checksum(self) -> str:
        """Equal for equal weights."""
        ...
