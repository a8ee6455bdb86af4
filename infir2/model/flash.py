"""Attention by the flash-attn-4 package, where it is installed and the GPU is a Hopper or a newer one for data centres:
the fastest for whole rows and, by far, for packed documents (docs/performance.md has the figures)."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

_LARGEST_HEAD = 128
_HOPPER, _CONSUMER_BLACKWELL = (9, 0), (12, 0)  # the latter's backward pass is not deterministic when that is asked for
_left_out = False


class _Kernels(NamedTuple):
    whole: Callable[..., Any]
    packed: Callable[..., Any]


def takes(q: Tensor) -> bool:
    """Whether ``whole_rows`` and ``packed`` can be used for queries [..., head_dim] of this dtype, on this device."""
    return (
        q.is_cuda
        and not _left_out
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= _LARGEST_HEAD
        and _HOPPER <= torch.cuda.get_device_capability(q.device) < _CONSUMER_BLACKWELL
        and _kernels() is not None
    )


@contextmanager
def left_out() -> Iterator[None]:
    """What is computed meanwhile is computed as if the package were not installed."""
    global _left_out
    _left_out = True
    try:
        yield
    finally:
        _left_out = False


def whole_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention: q [batch, length, heads, head_dim], k and v [batch, length, kv_heads, head_dim] -> like q."""
    kernels = _kernels()
    assert kernels is not None
    return kernels.whole(q, k, v, causal=True, deterministic=torch.are_deterministic_algorithms_enabled())[0]


def packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """The same of documents that lie one behind the other: q [tokens, heads, head_dim], k and v [tokens, kv_heads,
    head_dim], cu_seqlens int32 [documents + 1], none longer than ``longest``."""
    kernels = _kernels()
    assert kernels is not None
    return kernels.packed(
        q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest,
        causal=True, deterministic=torch.are_deterministic_algorithms_enabled(),
    )[0]  # fmt: skip


@functools.cache
def _kernels() -> _Kernels | None:
    # Of an argument that we do not use, at every first call of a kernel.
    warnings.filterwarnings("ignore", "Argument aux_data .* cannot be converted to a JitArgument")
    try:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
    except ModuleNotFoundError as missing:
        if missing.name is None or not missing.name.startswith("flash_attn"):
            warnings.warn(f"flash-attn-4 is not used: it needs {missing.name}, which is not installed", stacklevel=2)
        return None
    except (ImportError, OSError, RuntimeError) as error:
        warnings.warn(f"flash-attn-4 is installed, but not used: it does not load ({error})", stacklevel=2)
        return None
    return _Kernels(flash_attn_func, flash_attn_varlen_func)
