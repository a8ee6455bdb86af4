"""What a token takes in the engine's key-value cache, before there is one: for dry runs and for filling a GPU."""

import torch

from infir2.kernels.reference import FP8


def stored_dtype(cache_dtype: str, compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype of keys and values in the cache. cache_dtype: as in ``EngineOptions``, "auto" or "fp8"."""
    return FP8 if cache_dtype == "fp8" else compute_dtype


def bytes_per_token(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Keys and values of all layers; in FP8 each head also has a float32 scale."""
    head = head_dim * dtype.itemsize + (torch.float32.itemsize if dtype == FP8 else 0)
    return 2 * layers * kv_heads * head
