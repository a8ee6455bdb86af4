"""`infir2 bench gemm` and `infir2 bench quantize`: the kernels alone, on the shapes of a model."""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from infir2.fp8.tensor import Operand
from infir2.model.config import ModelConfig
from infir2.model.presets import preset

_GEMM_PAIRS = {"blockwise": ("tile", "block"), "rowwise": ("channel", "channel"), "tensorwise": ("tensor", "tensor")}
_WGRAD_PAIRS = {"blockwise": ("tile", "tile"), "hybrid": ("channel", "channel"), "tensorwise": ("tensor", "tensor")}
_FLUSH_BYTES = 256 << 20  # larger than any L2 cache, written between repetitions


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
    device, tokens = _device(), args.batch * args.length
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
            row["bf16"] = _tflops(m, n, k, _median_s(partial(torch.matmul, a, b.T), args.repeats, device))
            for recipe in ("blockwise", "hybrid", "rowwise", "tensorwise"):
                pair = pairs.get(recipe)
                if pair is None:
                    row[recipe] = None
                    continue
                x, y = Operand.quantize(a, pair[0], "ue8m0"), Operand.quantize(b, pair[1], "ue8m0")
                row[recipe] = _tflops(m, n, k, _median_s(partial(x.matmul, y, torch.bfloat16), args.repeats, device))
            rows.append(row)
    return rows


def quantize(args: argparse.Namespace, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """GB/s of the quantiser: bytes of the bfloat16 input and of all codes and scales, over time.

    ``tell`` hears what is measured.
    """
    device, tokens = _device(), args.batch * args.length
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
            seconds = _median_s(partial(work, x), args.repeats, device)
            rows.append(
                {"kernel": name, "rows": tokens, "cols": cols, "ms": seconds * 1e3, "GB/s": moved / seconds / 1e9}
            )
    return rows


def _median_s(work: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Median seconds; on a GPU by events, with the L2 cache overwritten before each repetition."""
    work()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return statistics.median(times)
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    pairs = []
    for _ in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


def _tflops(m: int, n: int, k: int, seconds: float) -> float:
    return 2.0 * m * n * k / seconds / 1e12


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
