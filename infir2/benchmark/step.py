"""`infir2 bench step`: time and memory of one training step of a model with random weights."""

import argparse
import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from infir2.benchmark.peers import apply_torchao, transformers_model
from infir2.benchmark.timing import median_ms
from infir2.config import OptimSection
from infir2.fp8.convert import convert, refresh_weights
from infir2.fp8.fused import MlpActivations
from infir2.fp8.recipe import recipe_named
from infir2.kernels.cross_entropy import cross_entropy_sum
from infir2.model.attention import causal_attention
from infir2.model.config import ModelConfig
from infir2.model.presets import preset
from infir2.model.transformer import CausalLM
from infir2.parallel.apply import parallelize
from infir2.parallel.device import free_memory, fresh_memory, peak_memory, reset_peak
from infir2.parallel.runtime import World, world
from infir2.train.collection import collecting_between_steps
from infir2.train.optimizer import build_optimizer

# Kernel families of --profile: the first pattern that a kernel's name matches.
_FAMILIES = (
    ("attention", r"cudnn|flash|fmha|sdpa|attention|_(decode|join|prompt|write|into_cache)_kernel"),
    ("quantise", r"_(tile|cast|amax|rows|fidelity)_kernel|_transpose"),
    ("norm, rotary, SwiGLU (and quantise)", r"_norm_(quantize_|backward_)?kernel|_swiglu|_silu_mul|_rotate_"),
    ("sampling", r"_sums_kernel|_draw_kernel|_filter_kernel"),
    ("cross-entropy", r"_softmax_gradient|_token_(statistics|gradient)_kernel"),
    ("gemm fp8", r"nvjet_sm\d+_q|e4m3|fp8|f8|_parts_kernel"),
    ("gemm bf16", r"gemm|nvjet|cutlass|sm90_xmma|matmul"),
    ("optimiser", r"adam"),
    ("elementwise", r""),
)


def run(args: argparse.Namespace, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row a precision, then one a peer; ratios are to the first row. ``tell`` hears what is measured."""
    config = preset(args.model)
    config = dataclasses.replace(config, num_hidden_layers=args.layers or config.num_hidden_layers)
    rows: list[dict[str, Any]] = []
    with world() as here, collecting_between_steps():
        for name in args.precisions:
            tell(f"measuring infir2 {name}: {_phases(args)}")
            with fresh_memory():
                rows.append(_measure(f"infir2 {name}", _ours(config, name, here, args), config, here, args))
        for name in args.peers:
            tell(f"measuring {name}: {_phases(args)}")
            with fresh_memory():
                recipe = name.partition(":")[2]
                peer = _ours(config, "bf16", here, args, recipe) if recipe else _transformers(config, here, args)
                rows.append(_measure(name, peer, config, here, args))
    for row in rows:
        row["speed-up"] = rows[0]["step ms"] / row["step ms"]
        row["forward speed-up"] = rows[0]["inference ms"] / row["inference ms"]
    return rows


def _phases(args: argparse.Namespace) -> str:
    return f"{'two' if args.no_compile else 'compiling in two'} steps to warm up, then 3 x {args.repeats}"


def _ours(
    config: ModelConfig, precision: str, here: World, args: argparse.Namespace, torchao: str | None = None
) -> tuple[nn.Module, Callable]:
    name, _, kept = precision.partition("/")
    with torch.device("meta"):
        model = CausalLM(config)
    fp8_head = kept == "head"
    convert(model, recipe_named(name), mlp_activations=cast(MlpActivations, "fp8" if kept in ("", "head") else kept))
    if torchao is not None:
        model.to(torch.bfloat16)  # its layers cast nothing themselves
        apply_torchao(model, torchao)
    parallelize(
        model,
        model.model.layers,
        here,
        activation_checkpointing=args.checkpointing,
        compile_layers=not args.no_compile,
    )
    model.to_empty(device=here.device)
    randomise(model)
    refresh_weights(model)

    def forward(ids: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        head = partial(_no_head, labels=labels) if args.layers_only else partial(_head, labels=labels, fp8=fp8_head)
        return model(ids, positions, causal_attention, head=head) / labels.numel()

    return model, forward


def _no_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The decoder layers alone: a gradient that is not zero, at next to no cost."""
    return hidden.sum(dtype=torch.float32)


def _head(hidden: Tensor, weight: Tensor, labels: Tensor, fp8: bool) -> Tensor:
    return cross_entropy_sum(hidden.flatten(0, 1), weight, labels.flatten(), fp8=fp8)


def _transformers(config: ModelConfig, here: World, args: argparse.Namespace) -> tuple[nn.Module, Callable]:
    model = transformers_model(config, here.device, args.checkpointing != "none")

    def forward(ids: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False).loss

    return model, forward


def _measure(
    name: str, built: tuple[nn.Module, Callable], config: ModelConfig, here: World, args: argparse.Namespace
) -> dict[str, Any]:
    model, forward = built
    shape = (args.batch, args.length)
    ids = torch.randint(0, config.vocab_size, shape, device=here.device)
    labels = torch.randint(0, config.vocab_size, shape, device=here.device)
    inputs = (ids, labels, torch.arange(args.length, device=here.device).expand(shape))

    def add_gradients() -> None:
        forward(*inputs).backward()

    def step() -> None:
        add_gradients()
        model.zero_grad(set_to_none=True)

    for _ in range(2):  # compile, warm up; the second time tells the memory
        reset_peak(here.device)
        step()
    peak = peak_memory(here.device)
    graphs = here.device.type == "cuda" and not args.eager and name != "hf"
    record = _recorded if graphs else _as_it_is
    fwd = median_ms(record(lambda: forward(*inputs)), args.repeats, here.device)
    with torch.no_grad():
        forward(*inputs)
        inference = median_ms(record(lambda: forward(*inputs)), args.repeats, here.device)
    whole = record(add_gradients) if graphs else step
    both = median_ms(whole, args.repeats, here.device)
    tokens = args.batch * args.length
    row: dict[str, Any] = {
        "what": name,
        "inference ms": inference,
        "forward ms": fwd,
        "backward ms": both - fwd,
        "step ms": both,
        "tokens/s": tokens / both * 1e3,
        "model TFLOP/s": config.flops_per_token(args.length) * tokens / both / 1e9,
        "peak GiB": peak,
        "CUDA graph": graphs,
    }
    if args.profile and here.device.type == "cuda":
        row["profile ms"] = kernel_profile(whole)
    if args.optimizer:
        row |= _with_optimizer(model, whole if graphs else add_gradients, graphs, here, args)
    return row


def _with_optimizer(
    model: nn.Module, add_gradients: Callable[[], Any], graphs: bool, here: World, args: argparse.Namespace
) -> dict[str, Any]:
    """Forward, backward and update."""
    optimizer = build_optimizer(model, OptimSection(lr=1e-5, moments=args.moments))

    def full() -> None:
        add_gradients()
        optimizer.step()
        if not graphs:
            optimizer.zero_grad(set_to_none=True)

    free_memory()
    reset_peak(here.device)
    full()
    both = median_ms(full, args.repeats, here.device)
    return {"with AdamW ms": both, "with AdamW GiB": peak_memory(here.device, reserved=True)}


def _as_it_is(work: Callable[[], Any]) -> Callable[[], Any]:
    return work


def _recorded(work: Callable[[], Any]) -> Callable[[], Any]:
    """The same as a CUDA graph, as training does with ``train.cuda_graphs``; its kernels have been run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def kernel_family(kernel: str) -> str:
    return next(name for name, pattern in _FAMILIES if re.search(pattern, kernel, re.IGNORECASE))


def kernel_profile(work: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds on the GPU by kernel family, of the longest kernels, and the share of the time in which one ran."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    families: dict[str, float] = dict.fromkeys((name for name, _ in _FAMILIES), 0.0)
    kernels: Counter[str] = Counter()
    for event in events:
        family = kernel_family(event.name)
        families[family] += event.time_range.elapsed_us() / 1e3
        kernels[event.name[:100]] += event.time_range.elapsed_us() / 1e3
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return {**families, "busy share": busy / (reached - spans[0][0]), "kernels": dict(kernels.most_common(40))}


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02)
