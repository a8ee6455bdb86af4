"""What one server accepts at most. Everything above a limit is refused with a 4xx that names it."""

from dataclasses import dataclass

from infir2.errors import ConfigError


@dataclass(frozen=True)
class ServerLimits:
    """Raises ConfigError, naming the limit, for one below 1."""

    body_bytes: int = 4 << 20
    """Size of a request's body."""
    body_seconds: float = 60.0
    """Time a client has to send it."""
    max_tokens: int | None = None
    """New tokens of one sample; None: what the model has positions for."""
    samples: int = 128
    """Samples of one request: prompts times n."""
    pending: int = 2048
    """Samples that run or wait, over all clients; more are answered with 429."""

    def __post_init__(self) -> None:
        for name in ("body_bytes", "body_seconds", "max_tokens", "samples", "pending"):
            value = getattr(self, name)
            if value is not None and value < (0.001 if name == "body_seconds" else 1):
                raise ConfigError(f"{name}: {value} lets nothing through")
