"""The sizes of an embedded engine."""

from dataclasses import dataclass
from typing import Literal

from infir2.errors import ConfigError


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of the engine. Raises ConfigError, naming the option, where they do not fit together."""

    cache_tokens: int = 65_536
    """Tokens whose keys and values the cache holds, over all sequences."""
    block_size: int = 16
    """Tokens of a block: what is handed out, and what prefixes are shared in."""
    max_sequences: int = 256
    """Samples that run at once."""
    max_batch_tokens: int = 4096
    """Tokens of one forward pass: longer prompts are computed in chunks."""
    decode_rounds: int = 0
    """Tokens that every sequence makes, while all decode, before the host looks at them; what a sequence makes behind
    its end is thrown away. 0: 16 on a GPU, where it saves the host's time, else 1."""
    max_length: int | None = None
    """Longest prompt plus completion; None: what the model has positions for."""
    cache_dtype: Literal["auto", "fp8"] = "auto"
    """``auto`` stores keys and values in the model's compute dtype."""
    prefix_cache: bool = True
    seed: int = 0
    """Seeds of requests that name none follow from this and the order of arrival."""

    def smaller(self) -> str:
        """What makes the engine need less memory, by the options of the command line."""
        return (
            f"lower --cache-tokens ({self.cache_tokens}), --max-batch-tokens ({self.max_batch_tokens}) or "
            f"--max-sequences ({self.max_sequences})"
        )

    def __post_init__(self) -> None:
        for name in ("cache_tokens", "block_size", "max_sequences", "max_batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is less than 1")
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(f"max_length: {self.max_length} is less than 1")
        if self.decode_rounds < 0:
            raise ConfigError(f"decode_rounds: {self.decode_rounds} is less than 0")
        if self.max_sequences > self.max_batch_tokens:
            raise ConfigError(
                f"max_batch_tokens: {self.max_batch_tokens} is less than max_sequences ({self.max_sequences}), "
                "but every running sequence decodes one token a step"
            )
        if self.block_size > self.cache_tokens:
            raise ConfigError(f"cache_tokens: {self.cache_tokens} is less than one block ({self.block_size} tokens)")
        if self.cache_dtype not in ("auto", "fp8"):
            raise ConfigError(f"cache_dtype: {self.cache_dtype!r} is neither 'auto' nor 'fp8'")
