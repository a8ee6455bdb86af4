"""Triton kernels of paged attention for sequences that decode; ``paged_attention`` defines the result.

Decoding is bound by reading the cache: a program takes one sequence, one key-value head with all query heads that
share it, and a part of the context; ``_join_kernel`` puts the parts together. Sums are float32. Softmax weights are
rounded before they meet the values: to the dtype of q, or for an FP8 cache to float16.

The codes of an FP8 cache are read in pairs, as 16-bit numbers: so they can be transposed on their way to the tensor
cores as bfloat16 can, and become float16, in which they are exact, by one instruction for two of them. The lower code
of a pair is an even dimension of the head, the upper one an odd one: two products of half the size take the place of
one. Whatever else would leave float16's range is put in relation: a query to its own largest element, a softmax weight
times its value's scale to the largest scale so far, both by powers of two.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from infir2.kernels.codes_triton import encode
from infir2.kernels.dependent_launch import has_dependent_launch, launch_options
from infir2.kernels.paged_layout import PagedCache, PagedLayout
from infir2.kernels.reference import BLOCK

# Programs that there should be at least, so that the whole device reads, by what the cache holds.
_PROGRAMS = {torch.bfloat16: 512, torch.float8_e4m3fn: 512, torch.float32: 1024}
# Shapes of the kernel: keys and values at a time, warps, tiles on their way at once (and one being worked on).
_SHAPES: dict[torch.dtype, dict[str, int]] = {
    torch.bfloat16: {"KEYS": 32, "num_warps": 1, "num_stages": 4},
    torch.float8_e4m3fn: {"KEYS": 128, "num_warps": 2, "num_stages": 2},
    torch.float32: {"KEYS": 32, "num_warps": 4, "num_stages": 2},
}


@triton.jit
def _halves(pairs):
    """The lower and the upper e4m3 code of 16-bit numbers, each as float16."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 codes; .reg .b16 lower, upper;
        prmt.b32 codes, $2, 0, 0x3120;
        mov.b32 {lower, upper}, codes;
        cvt.rn.f16x2.e4m3x2 $0, lower;
        cvt.rn.f16x2.e4m3x2 $1, upper; }""",
        "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _power_below(x):
    """The largest power of two that is not above x > 0, and its reciprocal; 1 and 1 of zeros and subnormals."""
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.where(bits == 0, 0x3F800000, bits)
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def _load_queries(q_rows, GROUP: tl.constexpr, LANES: tl.constexpr, HEAD: tl.constexpr, PAIRS: tl.constexpr):
    """Even and odd dimensions (all in both, unless PAIRS) of the queries that share a head, float32."""
    inside = (tl.arange(0, LANES) < GROUP)[:, None]
    if PAIRS:
        even = q_rows + 2 * tl.arange(0, HEAD // 2)[None, :]
        low = tl.load(even, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(even + 1, mask=inside, other=0.0).to(tl.float32)
    else:
        low = tl.load(q_rows + tl.arange(0, HEAD)[None, :], mask=inside, other=0.0).to(tl.float32)
        high = low
    return low, high


@triton.jit
def _load_rows(pool_ptr, row, HEAD: tl.constexpr, PAIRS: tl.constexpr, DTYPE: tl.constexpr):
    """Keys or values as ``_load_queries`` parts them."""
    WIDTH: tl.constexpr = HEAD // 2 if PAIRS else HEAD
    x = tl.load(pool_ptr + row.to(tl.int64)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])
    if PAIRS:
        low, high = _halves(x)
        low, high = low.to(DTYPE), high.to(DTYPE)
    else:
        low = x.to(DTYPE)
        high = low
    return low, high


@triton.jit(do_not_specialize=["table_stride"])
def _decode_kernel(
    q_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, tables_ptr, contexts_ptr, out_ptr, extra_ptr,
    q_stride, table_stride, extra_stride, softmax_scale,
    GROUP: tl.constexpr, LANES: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr, TOKEN_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr,
    PARTS: tl.constexpr, KEYS: tl.constexpr, FP8: tl.constexpr, PAIRS: tl.constexpr, WIDE: tl.constexpr,
    QUANTIZE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """``extra`` are the logarithms of the weights' sums, for joining, or with QUANTIZE the scales of the codes.

    Strides within the cache are in rows of HEAD elements. WIDE: products are those of float32.
    """
    DTYPE: tl.constexpr = tl.float32 if WIDE else tl.float16 if FP8 else q_ptr.dtype.element_ty
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    # Programs that read neighbouring memory, the heads of one sequence, run side by side.
    head, sequence, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context = tl.load(contexts_ptr + sequence)
    length = tl.cdiv(tl.cdiv(context, PARTS), KEYS) * KEYS
    start, end = part * length, tl.minimum((part + 1) * length, context)
    lane, key = tl.arange(0, LANES), tl.arange(0, KEYS)
    query = head * GROUP + lane
    q_rows = q_ptr + sequence.to(tl.int64) * q_stride + query[:, None] * HEAD
    low, high = _load_queries(q_rows, GROUP, LANES, HEAD, PAIRS)
    factor = tl.full([LANES], softmax_scale, tl.float32)
    if FP8 and not WIDE:
        size, shrunk = _power_below(tl.maximum(tl.max(tl.abs(low), axis=1), tl.max(tl.abs(high), axis=1)))
        factor *= size
        low, high = low * shrunk[:, None], high * shrunk[:, None]
    q_low, q_high = low.to(DTYPE), high.to(DTYPE)

    top = tl.full([LANES], -float("inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    mixed_low = tl.zeros([LANES, HEAD // 2 if PAIRS else HEAD], tl.float32)
    mixed_high = mixed_low
    unit = tl.full([], 2.0**-126, tl.float32)  # of ``mixed``: the largest scale of the values so far
    table = tables_ptr + sequence.to(tl.int64) * table_stride
    # Behind the end the last key is read again, and gets no weight. A tile's blocks are looked up one tile ahead.
    block = tl.load(table + tl.minimum(start + key, end - 1).to(tl.uint32) // BLOCK)
    for first in tl.range(start, end, KEYS):
        position = tl.minimum(first + key, end - 1).to(tl.uint32)
        row = block * BLOCK_STRIDE + (position % BLOCK).to(tl.int32) * TOKEN_STRIDE + head * HEAD_STRIDE
        block = tl.load(table + tl.minimum(first + KEYS + key, end - 1).to(tl.uint32) // BLOCK)
        k_low, k_high = _load_rows(keys_ptr, row, HEAD, PAIRS, DTYPE)
        scores = tl.dot(q_low, tl.trans(k_low), input_precision="ieee")
        if PAIRS:
            scores = tl.dot(q_high, tl.trans(k_high), scores, input_precision="ieee")
        if FP8:
            scores *= tl.load(key_scale_ptr + row)[None, :]
        scores = tl.where((first + key < end)[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores * factor[:, None] - (higher * factor)[:, None])
        shrink = tl.exp2((top - higher) * factor)
        top, total = higher, total * shrink + tl.sum(weights, axis=1)
        if FP8:
            v_scale = tl.load(value_scale_ptr + row)
            larger = tl.maximum(unit, tl.max(v_scale, axis=0))
            inverse = (0x7F000000 - larger.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
            shrink *= unit * inverse
            weights *= (v_scale * inverse)[None, :]
            unit = larger
        v_low, v_high = _load_rows(values_ptr, row, HEAD, PAIRS, DTYPE)
        rounded = weights.to(DTYPE)
        mixed_low = tl.dot(rounded, v_low, mixed_low * shrink[:, None], input_precision="ieee")
        if PAIRS:
            mixed_high = tl.dot(rounded, v_high, mixed_high * shrink[:, None], input_precision="ieee")

    mixed = mixed_low
    if PAIRS:
        mixed = tl.reshape(tl.join(mixed_low, mixed_high), [LANES, HEAD])
    if FP8:
        mixed *= unit
    found = total > 0  # a part may lie behind the context's end
    out = tl.where(found[:, None], mixed / tl.where(found, total, 1.0)[:, None], 0.0)
    row = (sequence.to(tl.int64) * KV_HEADS * GROUP + query) * PARTS + part
    out_rows = out_ptr + row[:, None] * HEAD + tl.arange(0, HEAD)[None, :]
    if QUANTIZE:
        out, scale = encode(out.to(q_ptr.dtype.element_ty).to(tl.float32))
        tl.store(extra_ptr + query * extra_stride + sequence, scale, mask=lane < GROUP)
    elif PARTS > 1:
        lse = tl.where(found, top * factor + tl.log2(total), -float("inf"))
        tl.store(extra_ptr + row, lse, mask=lane < GROUP)
    tl.store(out_rows, out.to(out_ptr.dtype.element_ty), mask=(lane < GROUP)[:, None])


@triton.jit
def _join_kernel(
    parts_ptr, lse_ptr, out_ptr, scale_ptr, scale_stride, HEADS: tl.constexpr, PARTS: tl.constexpr, HEAD: tl.constexpr,
    ROUNDED: tl.constexpr, QUANTIZE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One query head; ROUNDED is the dtype of q."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    part, d = tl.arange(0, PARTS), tl.arange(0, HEAD)
    lse = tl.load(lse_ptr + row * PARTS + part)
    weights = tl.exp2(lse - tl.max(lse, axis=0))
    parts = tl.load(parts_ptr + (row * PARTS + part)[:, None] * HEAD + d[None, :])
    out = tl.sum(parts * (weights / tl.sum(weights, axis=0))[:, None], axis=0)
    if QUANTIZE:
        codes, scale = encode(out.to(ROUNDED).to(tl.float32)[None, :])
        place = row % HEADS * scale_stride + row // HEADS + tl.arange(0, 1)
        tl.store(scale_ptr + place, scale)
        tl.store(out_ptr + row * HEAD + d[None, :], codes)
    else:
        tl.store(out_ptr + row * HEAD + d, out.to(out_ptr.dtype.element_ty))


def softmax_scale(head_dim: int) -> float:
    """Of scores, where softmax is made of powers of two: head_dim ** -0.5 * log2(e)."""
    return head_dim**-0.5 * math.log2(math.e)


def decode(q: Tensor, cache: PagedCache, layout: PagedLayout, out: Tensor, scale: Tensor | None = None) -> None:
    """Fill ``out`` [sequences, heads, head_dim] with the attention of q, of the same shape.

    With ``scale`` [sequences, heads], laid out as an operand's ``tile`` scales, the result is its row codes: out are
    the codes then, and the head size must be that of a tile, 128.
    """
    sequences, heads, head_dim = q.shape
    block_size, kv_heads = cache.keys.shape[1:3]
    group, quantize = heads // kv_heads, scale is not None
    assert not quantize or head_dim == BLOCK, "a head must be one tile of row codes"
    wide = q.dtype == torch.float32
    held = q.dtype if wide else cache.keys.dtype
    parts = min(32, triton.next_power_of_2(triton.cdiv(_PROGRAMS[held], sequences * kv_heads)))
    fp8, dependent = cache.key_scale is not None, has_dependent_launch(q.device)
    mixed = out
    extra = out if scale is None else scale
    if parts > 1:
        mixed = torch.empty(sequences, heads, parts, head_dim, dtype=torch.float32, device=q.device)
        extra = torch.empty(sequences, heads, parts, dtype=torch.float32, device=q.device)
    pairs = fp8 and head_dim >= 32  # a product has at least 16 terms
    _decode_kernel[(kv_heads, sequences, parts)](
        q, *cache.pools(in_pairs=pairs), layout.block_tables, layout.context_lengths, mixed, extra,
        q.stride(0), layout.block_tables.stride(0), extra.stride(-1), softmax_scale(head_dim),
        GROUP=group, LANES=max(16, triton.next_power_of_2(group)), KV_HEADS=kv_heads, HEAD=head_dim, BLOCK=block_size,
        **cache.strides, PARTS=parts, FP8=fp8, PAIRS=pairs, WIDE=wide, QUANTIZE=quantize and parts == 1,
        DEPENDENT=dependent, **_SHAPES[held], **launch_options(dependent),
    )  # fmt: skip
    if parts > 1:
        dtype = tl.float32 if wide else tl.bfloat16
        _join_kernel[(sequences * heads,)](
            mixed, extra, out, out if scale is None else scale, 0 if scale is None else scale.stride(1),
            HEADS=heads, PARTS=parts, HEAD=head_dim, ROUNDED=dtype, QUANTIZE=quantize, DEPENDENT=dependent, num_warps=1,
            **launch_options(dependent),
        )  # fmt: skip
