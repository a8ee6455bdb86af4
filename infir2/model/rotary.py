"""Angles of rotary positions: proportional to the position, at a frequency of its own for every pair of dimensions."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from infir2.model.config import Llama3RopeScaling, ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of every pair: float32 [head_dim / 2], on the CPU whatever the default device is."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponent)
    return frequencies if config.rope_scaling is None else _stretch(frequencies, config.rope_scaling)


class Rotary(nn.Module):
    """Cosine and sine of every position of a batch."""

    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        # to_empty() would leave garbage here and .to(bfloat16) would round: only the device is allowed to change.
        super()._apply(fn, recurse)
        if not self.inv_freq.is_meta:
            self.inv_freq = inverse_frequencies(self.config).to(self.inv_freq.device)
        return self

    @torch.no_grad()
    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [batch, length] -> cosine and sine, float32 [batch, length, head_dim / 2]."""
        inv_freq = self.inv_freq
        if inv_freq.device != position_ids.device:  # built on meta and filled without to_empty()
            inv_freq = inverse_frequencies(self.config).to(position_ids.device)
        angles = position_ids.unsqueeze(-1).float() * inv_freq
        return angles.cos(), angles.sin()

    def extra_repr(self) -> str:
        scaling: Any = self.config.rope_scaling
        return f"head_dim={self.config.head_dim}, theta={self.config.rope_theta:g}, scaling={scaling}"


def _stretch(frequencies: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    """Slow frequencies (long wavelengths) divided by the factor, fast ones kept, the band between interpolated."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)
