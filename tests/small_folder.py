"""Hugging Face folders of tensors that are in memory, for tests."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infir2.checkpoint.huggingface import write_folder
from infir2.checkpoint.safetensors_writer import TensorSpec


def write_tensors(
    out: Path,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None = torch.bfloat16,
    **options: Any,
) -> None:
    """Write them in ``dtype`` (None: as they are), which the config then names."""
    cast = {name: tensor.detach().to(dtype or tensor.dtype) for name, tensor in tensors}
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in cast.items()}
    named = {} if dtype is None else dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    write_folder(out, {**config, **named}, cast.items(), specs, **options)
