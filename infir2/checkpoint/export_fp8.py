"""FP8 model folders, out: which layers are quantised, what is stored of them, and their codes and scales.

Layers are chosen by the rule that converts a model for training, and codes and scales are made by the quantiser of
training, from weights rounded to bfloat16 as training rounds them. So the folder holds what the trainer's next forward
pass would use, and what loads it runs the model that was evaluated.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from infir2.checkpoint.fp8_format import (
    LARGEST_POWER,
    SCALE_SUFFIX,
    ScaleFormat,
    quantization_config,
    quantize_weight,
)
from infir2.checkpoint.huggingface import Tensors, is_finite, rounded
from infir2.checkpoint.safetensors_writer import TensorSpec
from infir2.errors import CheckpointError, ConfigError
from infir2.fp8.convert import convert
from infir2.fp8.recipe import recipe_named
from infir2.kernels.reference import FP8, scale_shape
from infir2.model.config import ModelConfig
from infir2.model.transformer import CausalLM

ScaleDtype = Literal["fp32", "e8m0"]
SCALE_DTYPES = {"fp32": torch.float32, "e8m0": torch.float8_e8m0fnu}
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that inference engines merge into one, which is quantised whole or not at all."""


@dataclass(frozen=True)
class Fp8Export:
    """What is made of a model; see ``plan_export``."""

    converted: tuple[str, ...]
    """Full names of the linear layers that are quantised."""
    skipped: dict[str, str]
    """Full names of the linear layers that stay in bfloat16 -> why."""
    scale_format: ScaleFormat
    scale_dtype: ScaleDtype

    def config(self) -> dict[str, Any]:
        """The quantization_config of config.json."""
        return quantization_config(self.scale_format, list(self.skipped))

    def specs(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorSpec]:
        """Everything that is stored, from the shapes of the model's tensors (tied ones once)."""
        layers, specs = set(self.converted), {}
        for name, shape in shapes.items():
            if name.removesuffix(".weight") in layers:
                specs[name] = TensorSpec(FP8, shape)
                grid = scale_shape("block", *shape)
                specs[name + SCALE_SUFFIX] = TensorSpec(SCALE_DTYPES[self.scale_dtype], grid)
            else:
                specs[name] = TensorSpec(torch.bfloat16, shape)
        return specs

    def tensors(self, source: Tensors, stored: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) as ``specs`` announces them. ``stored`` maps the model's names to those of ``source``.

        Raises CheckpointError for a weight that is not finite, or that FP8 cannot hold: one near bfloat16's largest.
        """
        layers = set(self.converted)
        for name, place in stored.items():
            tensor = source.tensor(place)
            if name.removesuffix(".weight") not in layers:
                if not is_finite(tensor):
                    raise CheckpointError(f"{source.folder}: {name}: holds NaN or Inf")
                yield name, rounded(tensor, torch.bfloat16, f"{source.folder}: {name}")
                continue
            operand = quantize_weight(tensor, self.scale_format)
            del tensor
            largest = LARGEST_POWER if self.scale_format == "ue8m0" else torch.finfo(torch.float32).max
            if not (operand.scale <= largest).all():  # False for NaN, the scale of a block that is not finite.
                raise CheckpointError(
                    f"{source.folder}: {name}: holds a value that FP8 cannot store (NaN, Inf or above 2.9e38)"
                )
            yield name, operand.codes
            yield name + SCALE_SUFFIX, operand.scale.to(SCALE_DTYPES[self.scale_dtype])


def plan_export(
    architecture: ModelConfig,
    scale_format: ScaleFormat = "ue8m0",
    scale_dtype: ScaleDtype = "fp32",
    keep: Mapping[str, str] | None = None,
) -> Fp8Export:
    """Choose the layers. ``keep``: name prefix -> reason, for layers that training kept in bfloat16.

    Layers with a dimension that is not a multiple of 128 stay in bfloat16, because loaders disagree on partial blocks;
    and so do the others of their fused group, because loaders refuse half a group. Raises ConfigError for scales that
    are not powers of two in a dtype that holds nothing else.
    """
    if scale_dtype == "e8m0" and scale_format != "ue8m0":
        raise ConfigError(
            f"--scale-dtype e8m0 stores powers of two only, but --scale-format {scale_format} makes other scales; "
            "take --scale-format ue8m0 or --scale-dtype fp32"
        )
    with torch.device("meta"):
        model = CausalLM(architecture)
    report = convert(model, recipe_named("blockwise", scale_format), dict(keep or {}))
    skipped = dict(report.kept)
    for name in report.converted:
        parent, _, leaf = name.rpartition(".")
        group = next((group for group in FUSED if leaf in group), ())
        if partner := next((f"{parent}.{other}" for other in group if f"{parent}.{other}" in report.kept), None):
            skipped[name] = f"fused with {partner.rpartition('.')[2]}, which is not quantised"
    order = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return Fp8Export(
        converted=tuple(name for name in order if name not in skipped),
        skipped={name: skipped[name] for name in order if name in skipped},
        scale_format=scale_format,
        scale_dtype=scale_dtype,
    )
