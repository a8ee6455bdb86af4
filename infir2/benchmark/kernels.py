"""`infir2 bench gemm`, `quantize` and `attention`: the kernels alone, on the shapes of a model."""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from infir2.benchmark.timing import median_kernel_ms
from infir2.fp8.tensor import Operand
from infir2.model import flash
from infir2.model.attention import document_attention
from infir2.model.config import ModelConfig
from infir2.model.presets import preset
from infir2.parallel.device import default_device
from infir2.types import Batch

_GEMM_PAIRS = {"blockwise": ("tile", "block"), "rowwise": ("channel", "channel"), "tensorwise": ("tensor", "tensor")}
_WGRAD_PAIRS = {"blockwise": ("tile", "tile"), "hybrid": ("channel", "channel"), "tensorwise": ("tensor", "tensor")}


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """name -> (out_features, in_features) of the linears of one layer."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "q": (queries, hidden),
        "kv": (keys, hidden),
        "o": (hidden, queries),
        "gate or up": (inner, hidden),
        "down": (hidden, inner),
    }


def gemm(args: argparse.Namespace, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """TFLOP/s of fprop (x W^T) and wgrad (g^T x) on pre-quantised operands; bf16 beside them.

    ``tell`` hears what is measured.
    """
    device, tokens = default_device(), args.batch * args.length
    rows = []
    for name, (out, inner) in linear_shapes(preset(args.model)).items():
        tell(f"measuring {name}: {out} x {inner}, {tokens} tokens")
        for kind, (m, n, k), pairs in (
            ("fprop", (tokens, out, inner), _GEMM_PAIRS),
            ("wgrad", (out, inner, tokens), _WGRAD_PAIRS),
        ):
            a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
            b = torch.randn(n, k, device=device, dtype=torch.bfloat16)
            row: dict[str, Any] = {"linear": name, "gemm": kind, "m": m, "n": n, "k": k}
            row["bf16"] = _tflops(m, n, k, median_kernel_ms(partial(torch.matmul, a, b.T), args.repeats, device))
            for recipe in ("blockwise", "hybrid", "rowwise", "tensorwise"):
                pair = pairs.get(recipe)
                if pair is None:
                    row[recipe] = None
                    continue
                x, y = Operand.quantize(a, pair[0], "ue8m0"), Operand.quantize(b, pair[1], "ue8m0")
                work = partial(x.matmul, y, torch.bfloat16)
                row[recipe] = _tflops(m, n, k, median_kernel_ms(work, args.repeats, device))
            rows.append(row)
    return rows


def quantize(args: argparse.Namespace, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """GB/s of the quantiser: bytes of the bfloat16 input and of all codes and scales, over time.

    ``tell`` hears what is measured.
    """
    device, tokens = default_device(), args.batch * args.length
    config = preset(args.model)
    rows = []
    for cols in (config.hidden_size, config.intermediate_size):
        tell(f"measuring {tokens} x {cols}")
        x = torch.randn(tokens, cols, device=device, dtype=torch.bfloat16)
        cases: dict[str, Callable[[Tensor], list[Operand]]] = {
            "tile": lambda x: [Operand.quantize(x, "tile", "ue8m0")],
            "tile, transposed": lambda x: [Operand.quantize(x, "tile", "ue8m0", transpose=True)],
            "tile, both": lambda x: list(Operand.quantize_both(x, "tile", "tile", "ue8m0")),
            "block": lambda x: [Operand.quantize(x, "block", "ue8m0")],
            "channel, transposed": lambda x: [Operand.quantize(x, "channel", "ue8m0", transpose=True)],
            "tensor": lambda x: [Operand.quantize(x, "tensor", "ue8m0")],
        }
        for name, work in cases.items():
            moved = x.nbytes + sum(op.codes.nbytes + op.scale.nbytes for op in work(x))
            ms = median_kernel_ms(partial(work, x), args.repeats, device)
            rows.append({"kernel": name, "rows": tokens, "cols": cols, "ms": ms, "GB/s": moved / ms / 1e6})
    return rows


def attention(args: argparse.Namespace, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Milliseconds and TFLOP/s of causal attention, forward and backward, over whole rows and over packed documents, by
    flash-attn-4, where it can be used, and by torch alone. In bfloat16; on a CPU in float32.

    ``tell`` hears what is measured.
    """
    device, config = default_device(), preset(args.model)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v, grad = (
        torch.randn(args.batch, args.length, count, config.head_dim, device=device, dtype=dtype, requires_grad=True)
        for count in (*heads, heads[0])
    )
    rows = []
    for name, lengths in (("whole rows", [args.length] * args.batch), ("documents", _documents(args))):
        batch = _batch_of(lengths, args, device)
        flops = 4.0 * config.head_dim * heads[0] * sum(n * (n + 1) // 2 for n in lengths)
        for kernels in ("flash-attn-4", "torch") if flash.takes(q) else ("torch",):
            tell(f"measuring {name}, {kernels}")
            with flash.left_out() if kernels == "torch" else nullcontext():
                attend = document_attention(batch, dtype)
                forward = median_kernel_ms(partial(attend, q, k, v, 0), args.repeats, device)
                out = attend(q, k, v, 0)
                work = partial(torch.autograd.grad, out, (q, k, v), grad, retain_graph=True)
                backward = median_kernel_ms(work, args.repeats, device)
            rows.append({
                "attention": name, "kernels": kernels, "documents": len(lengths), "longest": max(lengths),
                "forward ms": forward, "forward TFLOP/s": flops / forward / 1e9,
                "backward ms": backward, "backward TFLOP/s": 2.5 * flops / backward / 1e9,
            })  # fmt: skip
    return rows


def _documents(args: argparse.Namespace) -> list[int]:
    """Lengths as packed conversations have them, half of them below a sixteenth of a row, none across a row's end."""
    generator = torch.Generator().manual_seed(5)
    lengths: list[int] = []
    while (missing := args.batch * args.length - sum(lengths)) > 0:
        drawn = int((torch.randn((), generator=generator) * 0.7).exp() * args.length / 16)
        lengths.append(min(max(drawn, 1), (missing - 1) % args.length + 1))
    return lengths


def _batch_of(lengths: list[int], args: argparse.Namespace, device: torch.device) -> Batch:
    ids = torch.zeros(args.batch, args.length, dtype=torch.long, device=device)
    ends = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    return Batch(ids, ids, ids, ends, max(lengths))


def _tflops(m: int, n: int, k: int, ms: float) -> float:
    return 2.0 * m * n * k / ms / 1e9
