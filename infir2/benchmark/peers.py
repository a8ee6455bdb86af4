"""Other implementations that `infir2 bench step` measures beside ours, on the same shapes and with random weights.

hf                  Hugging Face Transformers in bfloat16 as people run it: eager, SDPA
torchao:tensorwise  torchao's float8 training recipes, applied to our own bfloat16 model before it is compiled:
torchao:rowwise     the same attention, cross-entropy and compiled layers as ours
torchao:rowwise_with_gw_hp
"""

from typing import Any

import torch
from torch import nn

from infir2.errors import UserError
from infir2.model.config import ModelConfig


def transformers_model(config: ModelConfig, device: torch.device, checkpointing: bool) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    table = config.to_hf()
    hf_config = AutoConfig.for_model(table.pop("model_type"), **table)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def apply_torchao(model: nn.Module, recipe: str) -> None:
    """Swap the linears of every decoder layer, in place. Raises UserError where torchao is not installed."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UserError(f"--peers torchao:{recipe}: torchao is not installed (pip install torchao)") from None

    def inside_a_layer(module: nn.Module, name: str) -> bool:
        return ".layers." in name

    config: Any = Float8LinearConfig.from_recipe_name(recipe)
    convert_to_float8_training(model, config=config, module_filter_fn=inside_a_layer)
