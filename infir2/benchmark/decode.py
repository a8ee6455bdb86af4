"""`infir2 bench decode`: how fast the rollout engine reads prompts and makes tokens, with random weights."""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any, cast

import torch

from infir2.benchmark.step import kernel_profile, randomise
from infir2.benchmark.timing import timed
from infir2.errors import UserError
from infir2.fp8.convert import convert, refresh_weights
from infir2.fp8.linear import Fp8Linear
from infir2.fp8.recipe import recipe_named
from infir2.model.presets import preset
from infir2.model.transformer import CausalLM
from infir2.parallel.device import default_device, fresh_memory, peak_memory
from infir2.rollout.engine import Engine
from infir2.rollout.options import EngineOptions
from infir2.rollout.records import Request, SamplingParams

WARM_UP = 24  # new tokens of a first, untimed generation: kernels are compiled and graphs recorded


def run(args: argparse.Namespace, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row a precision; ``--batch`` sequences of ``--length`` prompt tokens, ``--new`` tokens each.

    ``roofline share``: the time in which a copy on this device would move what a decoding step has to read, over the
    time of a step. Read are the weights that are multiplied, once, and the keys and values of all sequences at half of
    their growth. Nothing else is counted: no activations, no arithmetic.
    """
    device = default_device()
    copied = _copy_bytes_a_second(device)
    rows = []
    for name in args.precisions:
        tell(f"measuring infir2 {name}: {args.batch} prompts of {args.length} tokens, {args.new} new tokens each")
        with fresh_memory():
            rows.append(_measure(name, device, copied, args))
    return rows


def _measure(name: str, device: torch.device, copied: float, args: argparse.Namespace) -> dict[str, Any]:
    model = _model(name, device, args)
    tokens = args.batch * (args.length + args.new + 64)
    options = EngineOptions(
        cache_tokens=-(-tokens // 16) * 16,
        max_sequences=args.batch,
        max_batch_tokens=max(16_384, args.batch),
        max_length=args.length + args.new,
        prefix_cache=False,
        cache_dtype=args.cache,
    )
    engine = Engine(model, options=options)
    engine.generate(_requests(args, model.config.vocab_size, min(WARM_UP, args.new)))
    before, began, filled = engine.stats(), time.perf_counter(), [0.0, 0.0]

    def watch(finished: int, total: int) -> None:
        now = engine.stats()
        if not filled[0] and now.computed_tokens - before.computed_tokens >= args.batch * args.length:
            filled[:] = time.perf_counter() - began, now.generated_tokens - before.generated_tokens

    engine.generate(_requests(args, model.config.vocab_size, args.new), watch)
    seconds, made = time.perf_counter() - began, engine.stats().generated_tokens - before.generated_tokens
    decoding, decoded = seconds - filled[0], made - filled[1]
    step_s = decoding / (decoded / args.batch)
    moved = _weight_bytes(model) + _cache_bytes_a_token(engine) * args.batch * (args.length + args.new / 2)
    row: dict[str, Any] = {
        "what": f"infir2 {name}" + (" fp8 cache" if args.cache == "fp8" else ""),
        "prefill tokens/s": args.batch * args.length / filled[0],
        "decode tokens/s": decoded / decoding,
        "step ms": step_s * 1e3,
        "read GB/s": moved / step_s / 1e9,
        "roofline share": moved / step_s / copied,
        "new tokens/s over all": made / seconds,
        "peak GiB": peak_memory(device),
    }
    if args.profile and device.type == "cuda":
        row |= _profiles(engine, _requests(args, model.config.vocab_size, args.new))
    return row


def _profiles(engine: Engine, requests: list[Request]) -> dict[str, Any]:
    """Where the time of the prompts goes, and that of the decoding rounds which the engine makes at a time."""
    prompt_tokens = sum(len(request.prompt_ids) for request in requests)

    def read_prompts() -> None:
        goal = engine.stats().computed_tokens + prompt_tokens
        while engine.stats().computed_tokens < goal:
            engine.step()

    for request in requests:
        engine.add_request(request)
    prompts = kernel_profile(read_prompts)
    engine.step()  # the last prompts' first tokens
    steps = engine.stats().steps
    rounds = kernel_profile(engine.step)
    rounds = {"rounds": engine.stats().steps - steps, **rounds}
    engine.pause("abort")
    engine.resume()
    return {"prefill profile ms": prompts, "decode profile ms": rounds}


def _copy_bytes_a_second(device: torch.device) -> float:
    """Bytes that a long copy on the device reads and writes a second, at best."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(4):
            target.copy_(source)

    return 8 * source.nbytes / min(timed(copy, device)[0] for _ in range(5))


def _model(name: str, device: torch.device, args: argparse.Namespace) -> CausalLM:
    if "/" in name:
        raise UserError(f"--precisions {name}: generating keeps nothing for a backward pass; give {name.split('/')[0]}")
    config = preset(args.model)
    with torch.device("meta"):
        model = CausalLM(dataclasses.replace(config, num_hidden_layers=args.layers or config.num_hidden_layers))
    model.to(torch.bfloat16)
    convert(model, recipe_named(name))
    model.to_empty(device=device)
    randomise(model)
    refresh_weights(model)
    return model.eval().requires_grad_(False)


def _requests(args: argparse.Namespace, vocabulary: int, new: int) -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (args.batch, args.length), generator=generator).tolist()
    return [
        Request(tuple(row), SamplingParams(max_new_tokens=new, seed=i, ignore_eos=True)) for i, row in enumerate(ids)
    ]


def _weight_bytes(model: CausalLM) -> int:
    """What a pass over few tokens reads: FP8 codes where a layer has them, the head, and no embedding."""
    total = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight_operand().codes if isinstance(module, Fp8Linear) else module.weight
            total += cast(torch.Tensor, weight).nbytes
    return total


def _cache_bytes_a_token(engine: Engine) -> float:
    stats = engine.stats()
    return stats.cache_bytes / (stats.num_blocks + 1) / engine.options.block_size
