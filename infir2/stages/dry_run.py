"""What `--dry-run` prints: the resolved recipe, the model's size and an estimate of the memory of one process."""

from dataclasses import dataclass

import torch

from infir2.config import TrainingConfig, to_toml
from infir2.model.config import ModelConfig
from infir2.model.transformer import CausalLM
from infir2.stages.training import convert_as

GIB = 2.0**30


@dataclass(frozen=True)
class Workload:
    """How much a recipe computes."""

    steps: int
    tokens: int
    """Tokens read in all steps, over all processes."""
    micro_batch_tokens: int
    """Most tokens in one forward pass of one process."""


def describe_run(config: TrainingConfig, architecture: ModelConfig, world_size: int, work: Workload) -> str:
    """Text for people."""
    with torch.device("meta"):
        model = CausalLM(architecture)
    report = convert_as(model, config.fp8)
    parts = memory_estimate(config, architecture, world_size, work.micro_batch_tokens)
    lines = [
        to_toml(config),
        f"parameters: {architecture.num_parameters():,}",
        f"tokens: {work.tokens:,} in {work.steps:,} steps of {config.train.global_batch} sequences",
        str(report),
        f"memory of one of {world_size} process(es), estimated:",
        *(f"  {name:<42} {size / GIB:8.2f} GiB" for name, size in parts.items()),
        f"  {'together':<42} {sum(parts.values()) / GIB:8.2f} GiB",
    ]
    return "\n".join(lines)


def memory_estimate(
    config: TrainingConfig, architecture: ModelConfig, world_size: int, tokens: int
) -> dict[str, float]:
    """Bytes on one device by what they hold, with ``tokens`` in a forward pass.

    States are exact; activations are counted a token and a layer.
    """
    parameters = architecture.num_parameters()
    shards = world_size // config.parallel.replicate
    is_fp8 = config.fp8.recipe != "bf16"
    hidden, inner, layers = architecture.hidden_size, architecture.intermediate_size, architecture.num_hidden_layers
    projected = (architecture.num_attention_heads + 2 * architecture.num_key_value_heads) * architecture.head_dim
    # Saved for the backward pass by one layer, in bytes a token: the inputs of the linears (one byte each in FP8) and
    # what norms, rotary positions, attention and SwiGLU keep in the compute dtype.
    width = torch.finfo(getattr(torch, config.model.dtype)).bits // 8
    linear_inputs = (1 if is_fp8 else width) * (3 * hidden + 2 * hidden + inner + hidden)
    others = width * (6 * hidden + 2 * projected + 2 * hidden + 4 * inner)
    one_layer = tokens * (linear_inputs + others)
    kept = layers * tokens * hidden * width if config.train.activation_checkpointing == "full" else layers * one_layer
    working = one_layer if config.train.activation_checkpointing == "full" else 0
    return {
        "master weights (float32)": 4.0 * parameters / shards,
        "gradients (float32)": 4.0 * parameters / shards,
        "AdamW moments (float32)": 8.0 * parameters / shards,
        "FP8 weights": float(parameters - architecture.vocab_size * hidden) if is_fp8 else 0.0,
        "activations": float(kept + working),
        "logits of one chunk and the head's gradient": 2.0**30 + 6.0 * architecture.vocab_size * hidden,
    }
