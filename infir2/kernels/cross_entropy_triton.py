"""Triton kernel of the cross-entropy: logits to their gradient, in place or as FP8 codes, reading them twice.

The twin is ``cross_entropy.softmax_gradient_``. Imported only where CUDA logits are met. One program takes a row. The
second pass goes backwards, so that it meets what the first one read last while that is still in the chip's cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infir2.kernels.codes_triton import encode_tiles
from infir2.kernels.operand import empty_rows
from infir2.kernels.reference import BLOCK

_LOG2E = tl.constexpr(1.4426950408889634)
_VECTOR = tl.constexpr(8)  # numbers that a thread reads at once


@triton.jit
def _summed(largest, total, logits, start, vocabulary, SIZE: tl.constexpr, THREADS: tl.constexpr, WHOLE: tl.constexpr):
    """Every thread's largest logit, and its sum of exponentials below that, after SIZE more logits."""
    reads = tl.arange(0, SIZE // (THREADS * _VECTOR))[:, None, None] * THREADS
    c = (reads + tl.arange(0, THREADS)[None, :, None]) * _VECTOR + tl.arange(0, _VECTOR)[None, None, :]
    if WHOLE:
        x = tl.load(logits + start + c).to(tl.float32)
    else:
        x = tl.load(logits + start + c, mask=start + c < vocabulary, other=-float("inf")).to(tl.float32)
    higher = tl.maximum(largest, tl.max(tl.max(x, axis=2), axis=0))
    powers = tl.exp2(x * _LOG2E - (higher * _LOG2E)[None, :, None])
    return higher, total * tl.exp2((largest - higher) * _LOG2E) + tl.sum(tl.sum(powers, axis=2), axis=0)


@triton.jit
def _write_gradient(
    logits, codes, scale, start, lse2, label, valid, vocabulary, rows,
    SIZE: tl.constexpr, GRADIENT: tl.constexpr, ENCODE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """softmax - onehot of SIZE logits, in place, and as row codes."""
    tile = tl.arange(0, SIZE // 128)
    place = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = start + place < vocabulary
    if WHOLE:
        x = tl.load(logits + start + place).to(tl.float32)
    else:
        x = tl.load(logits + start + place, mask=inside, other=-float("inf")).to(tl.float32)
    gradient = tl.where(valid, tl.exp2(x * _LOG2E - lse2), 0.0)
    if valid & (label >= start) & (label < start + SIZE):
        gradient -= tl.where(place == label - start, 1.0, 0.0)
    if GRADIENT:
        if WHOLE:
            tl.store(logits + start + place, gradient)
        else:
            tl.store(logits + start + place, gradient, mask=inside)
    if ENCODE:
        encoded, scales, _ = encode_tiles(gradient)
        first = start // 128 + tile
        if WHOLE:
            tl.store(codes + start + place, encoded)
            tl.store(scale + first.to(tl.int64) * rows, scales)
        else:
            tl.store(codes + start + place, encoded, mask=inside)
            tl.store(scale + first.to(tl.int64) * rows, scales, mask=first * 128 < vocabulary)


@triton.jit
def _softmax_gradient_kernel(
    logits_ptr, labels_ptr, nll_ptr, codes_ptr, scale_ptr, rows, vocabulary, stride, ignore,
    GRADIENT: tl.constexpr, ENCODE: tl.constexpr, SIZE: tl.constexpr, THREADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A maximum and a sum of exponentials in every thread, joined at the end; float32 throughout."""
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * stride
    label = tl.load(labels_ptr + row)
    valid = label != ignore
    largest = tl.full([THREADS], -2.0e38, tl.float32)
    total = tl.zeros([THREADS], tl.float32)
    whole = vocabulary // SIZE
    for step in tl.range(whole, num_stages=STAGES):
        largest, total = _summed(largest, total, logits, step * SIZE, vocabulary, SIZE, THREADS, True)
    if whole * SIZE < vocabulary:
        largest, total = _summed(largest, total, logits, whole * SIZE, vocabulary, SIZE, THREADS, False)
    top = tl.max(largest, axis=0)
    lse = top + tl.log(tl.sum(total * tl.exp2((largest - top) * _LOG2E), axis=0))
    target = tl.load(logits + tl.where(valid, label, 0)).to(tl.float32)
    tl.store(nll_ptr + row, tl.where(valid, lse - target, 0.0))
    if GRADIENT or ENCODE:
        tl.debug_barrier()  # the target was read by every thread before anything is overwritten
        codes, scale, lse2 = codes_ptr + row * vocabulary, scale_ptr + row, lse * _LOG2E
        if whole * SIZE < vocabulary:
            _write_gradient(
                logits, codes, scale, whole * SIZE, lse2, label, valid, vocabulary, rows,
                SIZE, GRADIENT, ENCODE, False,
            )  # fmt: skip
        for step in tl.range(whole, num_stages=STAGES):
            start = (whole - 1 - step) * SIZE
            _write_gradient(
                logits, codes, scale, start, lse2, label, valid, vocabulary, rows, SIZE, GRADIENT, ENCODE, True
            )


# Shape of the launches: logits that a program takes at a time, warps, and such parts in flight.
_SIZE, _WARPS, _STAGES = 8192, 32, 4


def softmax_gradient_(
    logits: Tensor, labels: Tensor, ignore: int, gradient: bool, encode: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """See ``cross_entropy.softmax_gradient_``."""
    tokens, vocabulary = logits.shape
    nll = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    rows = tokens + -tokens % BLOCK if encode else 0
    codes, scale, _ = empty_rows(rows, vocabulary, False, logits.device)
    codes[tokens:].view(torch.uint8).zero_()
    scale[tokens:] = 1.0
    _softmax_gradient_kernel[(tokens,)](
        logits, labels, nll, codes, scale, rows, vocabulary, logits.stride(0), ignore,
        GRADIENT=gradient, ENCODE=encode, SIZE=_SIZE, THREADS=32 * _WARPS, STAGES=_STAGES, num_warps=_WARPS,
    )  # fmt: skip
    return nll, (codes, scale) if encode else None
