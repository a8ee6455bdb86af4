"""FP8 model folders: what their config.json says, and reading them back as plain weights.

A quantised linear layer P is ``P.weight``, float8_e4m3fn [out, in], and ``P.weight_scale_inv`` [out / 128, in / 128]
(rounded up), which in spite of its name is the multiplier: weight = code * scale. The trainer's quantiser makes both,
so the folder holds the numbers that training computed with.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from infir2.checkpoint.huggingface import HfFolder, is_finite
from infir2.errors import CheckpointError
from infir2.fp8.tensor import Operand
from infir2.kernels.reference import BLOCK, FP8, scale_shape

ScaleFormat = Literal["ue8m0", "fp32"]
SCALE_SUFFIX = "_scale_inv"
LARGEST_POWER = 2.0**119
"""Largest power of two that is a scale in these folders: 448 times the next one is beyond bfloat16 and float32."""
_CODES = "F8_E4M3"
_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
_TILE_BLOCKS = 16
Place = tuple[slice, slice]


def quantization_config(scale_format: str, skipped: Sequence[str]) -> dict[str, Any]:
    """The entry of config.json that transformers, vLLM and SGLang read.

    ``skipped`` are the full names of the linear layers that are not quantised. lm_head is always listed: transformers
    would otherwise take it for a quantised layer.
    """
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "scale_fmt": {"ue8m0": "ue8m0", "fp32": "float"}[scale_format],
        "modules_to_not_convert": ["lm_head", *(name for name in skipped if name != "lm_head")],
    }


def check_quantization(config: Mapping[str, Any], name: str) -> None:
    """Raise CheckpointError where config.json, called ``name``, describes another quantisation than this one."""
    found = config.get("quantization_config")
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{name}: quantization_config: expected a table, got {found!r}")
    expected = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    for key, value in expected.items():
        if (given := found.get(key, "e4m3" if key == "fmt" else None)) != value:
            raise CheckpointError(f"{name}: quantization_config.{key}: {given!r} cannot be read, only {value!r}")


def quantize_weight(weight: Tensor, scale_format: str) -> Operand:
    """Codes and scales of a weight [out, in]: what Fp8Linear makes of it, in tiles and so in little memory."""
    rows, cols = weight.shape
    codes = torch.empty(rows, cols, dtype=FP8)
    scale = torch.empty(scale_shape("block", rows, cols), dtype=torch.float32)

    def work(part: Place, blocks: Place) -> None:
        tile = Operand.quantize(weight[part].to(torch.bfloat16), "block", scale_format)
        codes[part], scale[blocks] = tile.codes, tile.scale

    _for_each_tile(rows, cols, work)
    return Operand(codes, scale, "block")


def dequantize_weight(operand: Operand, dtype: torch.dtype) -> Tensor:
    """code * scale, in tiles."""
    rows, cols = operand.codes.shape
    values = torch.empty(rows, cols, dtype=dtype)

    def work(part: Place, blocks: Place) -> None:
        values[part] = Operand(operand.codes[part], operand.scale[blocks], "block").dequantize(dtype)

    _for_each_tile(rows, cols, work)
    return values


class Fp8Folder(HfFolder):
    """An FP8 folder seen as a plain one: scales are hidden, quantised weights are read as code * scale.

    ``dtype`` is that of the values: with power-of-two scales both bfloat16 and float32 hold them exactly, with other
    scales bfloat16 rounds. Raises CheckpointError for codes without scales, scales without codes, grids that do not fit
    128 x 128 blocks, and values that are not numbers.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(folder)
        self.dtype = dtype
        self._coded = frozenset(name for name, tag in self.dtypes.items() if tag == _CODES)
        if not self._coded:
            raise CheckpointError(f"{self.folder}: config.json says fp8, but no tensor is {_CODES}")
        for name in sorted(self._coded):
            self._check_scale(name)
            del self.shapes[name + SCALE_SUFFIX], self.dtypes[name + SCALE_SUFFIX]
            self.dtypes[name] = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]

    @property
    def names(self) -> list[str]:
        return list(self.shapes)

    def tensor(self, name: str) -> Tensor:
        if name not in self._coded:
            return super().tensor(name)
        codes, scale = super().tensor(name), super().tensor(name + SCALE_SUFFIX).float()
        if not (torch.isfinite(scale) & (scale >= 0)).all():
            raise CheckpointError(f"{self.folder}: {name}{SCALE_SUFFIX}: a scale is not a number, or is negative")
        values = dequantize_weight(Operand(codes, scale, "block"), self.dtype)
        if not is_finite(values):
            raise CheckpointError(f"{self.folder}: {name}: code times scale is not a finite number somewhere")
        return values

    def _check_scale(self, name: str) -> None:
        scale = name + SCALE_SUFFIX
        if len(self.shapes[name]) != 2:
            raise CheckpointError(f"{self.folder}: {name}: FP8 codes of shape {list(self.shapes[name])}, expected two")
        if scale not in self.shapes:
            raise CheckpointError(f"{self.folder}: {name} holds FP8 codes, but {scale} is missing")
        if self.dtypes[scale] not in _SCALES:
            raise CheckpointError(
                f"{self.folder}: {scale}: {self.dtypes[scale]} scales cannot be read, only {', '.join(_SCALES)}"
            )
        expected = scale_shape("block", *self.shapes[name])
        if self.shapes[scale] != expected:
            raise CheckpointError(
                f"{self.folder}: {scale}: shape {list(self.shapes[scale])}, but {name} {list(self.shapes[name])} "
                f"has {list(expected)} blocks of {BLOCK} x {BLOCK}"
            )


def _for_each_tile(rows: int, cols: int, work: Callable[[Place, Place], None]) -> None:
    """Call work(rows and columns, block rows and block columns) for tiles of whole blocks, on all threads.

    One thread a tile: a tile fits the cache, and threads that share each small operation mostly wait for each other.
    """
    height, width = -(-rows // BLOCK), -(-cols // BLOCK)
    step = max(_TILE_BLOCKS // width, 1)
    tiles = [
        (slice(top, top + step), slice(left, left + _TILE_BLOCKS))
        for top in range(0, height, step)
        for left in range(0, width, _TILE_BLOCKS)
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda tile: work((_elements(tile[0]), _elements(tile[1])), tile), tiles))
    finally:
        torch.set_num_threads(threads)


def _elements(blocks: slice) -> slice:
    return slice(blocks.start * BLOCK, blocks.stop * BLOCK)
