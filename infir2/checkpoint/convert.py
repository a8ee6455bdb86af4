"""One model folder into another, tensor by tensor: Hugging Face, FP8 Hugging Face, training checkpoint.

Every conversion needs the memory of a few tensors, and its output appears in one rename when it is whole.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infir2.checkpoint.cause import reason
from infir2.checkpoint.export_fp8 import Fp8Export
from infir2.checkpoint.folders import TOKENIZER
from infir2.checkpoint.huggingface import (
    DTYPES,
    MAX_SHARD_BYTES,
    new_folder,
    require_space,
    rounded,
    write_folder,
)
from infir2.checkpoint.model_source import ModelSource
from infir2.checkpoint.safetensors_writer import TensorSpec
from infir2.checkpoint.store import CheckpointStore
from infir2.data.tokenizer import copy_tokenizer
from infir2.durable import write_file
from infir2.errors import CheckpointError

Report = Callable[[int, int], None]
"""Called after every tensor with the bytes written so far and in all."""


@dataclass(frozen=True)
class Written:
    """What a conversion wrote."""

    tensors: int
    nbytes: int


def to_hf(
    source: ModelSource,
    out: Path,
    dtype: torch.dtype | None = None,
    extra_files: Mapping[str, str] | None = None,
    report: Report = lambda done, total: None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Written:
    """A plain Hugging Face folder. dtype None keeps what a Hugging Face folder stores and rounds a checkpoint's float32
    weights to bfloat16; an FP8 folder's weights have the dtype that it was opened with."""
    if dtype is None and source.kind == "dcp":
        dtype = torch.bfloat16
    stored = {name: dtype or DTYPES[source.tensors.dtypes[place]] for name, place in source.names.items()}
    specs = {name: TensorSpec(stored[name], shape) for name, shape in source.shapes.items()}
    config = dict(source.config)
    if dtype is not None or source.kind == "fp8":
        config |= _dtype_keys(dtype or next(spec.dtype for spec in specs.values()))
    tensors = (
        (name, rounded(source.tensors.tensor(place), stored[name], f"{source.path}: {name}"))
        for name, place in source.names.items()
    )
    return _write(source, out, config, specs, tensors, extra_files, report, max_shard_bytes)


def to_fp8(
    source: ModelSource,
    out: Path,
    export: Fp8Export,
    extra_files: Mapping[str, str] | None = None,
    report: Report = lambda done, total: None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Written:
    """An FP8 Hugging Face folder of the layers that ``export`` chose."""
    config = {**source.config, **_dtype_keys(torch.bfloat16), "quantization_config": export.config()}
    specs = export.specs(source.shapes)
    tensors = export.tensors(source.tensors, source.names)
    return _write(source, out, config, specs, tensors, extra_files, report, max_shard_bytes)


def to_checkpoint(
    source: ModelSource, out: Path, meta: Mapping[str, Any], report: Report = lambda done, total: None
) -> Written:
    """A folder that ``init.checkpoint`` accepts: float32 weights without optimiser state as checkpoint 0, and the
    tokenizer. ``meta`` goes into meta.json, together with the architecture."""
    specs = {name: TensorSpec(torch.float32, shape) for name, shape in source.shapes.items()}

    total, done = sum(spec.nbytes for spec in specs.values()), 0

    def read(key: str) -> Tensor:
        nonlocal done
        name = key.removeprefix("model.")
        value = source.tensors.tensor(source.names[name]).float()
        done += value.nbytes
        report(done, total)
        return value

    with new_folder(out) as temporary:
        require_space(temporary, total)
        carried = temporary / TOKENIZER
        if source.tokenizer is not None or source.texts:
            carried.mkdir()
            for file, text in source.texts.items():
                write_file(carried / file, text.encode())
        if source.tokenizer is not None:
            copy_tokenizer(source.tokenizer, carried, complete=False)
        facts = {
            "architecture": source.architecture.to_hf(),
            "tokenizer": str((out / TOKENIZER).resolve()) if source.tokenizer is not None else None,
            **meta,
        }
        shapes = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
        try:
            CheckpointStore(temporary / "checkpoints").save_streamed(0, {"model": shapes}, read, facts)
        except CheckpointError as error:  # It names the temporary folder.
            raise CheckpointError(f"{out}: cannot be written: {reason(error.__cause__ or error)}") from error
    return Written(len(specs), total)


def _write(
    source: ModelSource,
    out: Path,
    config: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    tensors: Iterator[tuple[str, Tensor]],
    extra_files: Mapping[str, str] | None,
    report: Report,
    max_shard_bytes: int,
) -> Written:
    total = sum(spec.nbytes for spec in specs.values())

    def counted() -> Iterator[tuple[str, Tensor]]:
        done = 0
        for name, tensor in tensors:
            yield name, tensor
            done += tensor.nbytes
            report(done, total)

    write_folder(
        out,
        config,
        counted(),
        specs,
        tokenizer=source.tokenizer,
        max_shard_bytes=max_shard_bytes,
        extra_files={**source.texts, **(extra_files or {})},
    )
    return Written(len(specs), total)


def _dtype_keys(dtype: torch.dtype) -> dict[str, str]:
    name = str(dtype).removeprefix("torch.")
    return {"dtype": name, "torch_dtype": name}  # Each of the two is the only one that some loaders read.
