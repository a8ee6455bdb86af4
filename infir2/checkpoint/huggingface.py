"""Hugging Face model folders, in and out: config.json and safetensors, every tensor accounted for.

Reading goes one tensor at a time, so a model larger than the free memory of a host can be loaded into shards. Writing
streams shards into a temporary folder that is renamed when it is complete. No code of the folder is ever run.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from infir2.checkpoint.safetensors_writer import INDEX, WEIGHTS, TensorSpec, write_planned
from infir2.data.replaced_folder import built_beside
from infir2.data.tokenizer import copy_tokenizer
from infir2.durable import replace_file, stays_inside
from infir2.errors import CheckpointError, how_to_fetch, some_of
from infir2.parallel.apply import fill

CONFIG = "config.json"
MAX_SHARD_BYTES = 5_000_000_000
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of the dtypes that plain weights have."""
_LEFTOVER = "rotary_emb.inv_freq"  # A constant that old Llama folders store; every loader recomputes it.


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json as a dictionary; nothing in it is executed or looked up. Raises CheckpointError."""
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder}: no such model folder. {how_to_fetch(str(folder))}")
    config = _read_json(folder / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{folder / CONFIG}: model_type is missing, so this is not a Hugging Face model")
    return config


class HfFolder:
    """The tensors of a folder, by name, from model.safetensors or from the shards that an index names.

    ``shapes``, ``dtypes`` (safetensors tags such as "BF16") and ``nbytes``, the size of all weight files, are read at
    construction; a tensor is read when asked for. Raises CheckpointError, naming file and key, for anything
    inconsistent.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such model folder. {how_to_fetch(str(folder))}")
        self._file_of: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.nbytes = 0
        single, index = self.folder / WEIGHTS, self.folder / INDEX
        listed = None if single.exists() or not index.exists() else _read_weight_map(index)
        if listed is None and not single.exists():
            raise CheckpointError(f"{self.folder}: holds neither {WEIGHTS} nor {INDEX}{_what_instead(self.folder)}")
        for file in [WEIGHTS] if listed is None else sorted(set(listed.values())):
            self._read_header(file)
        if listed is not None:
            self._compare_with_index(listed)

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def tensor(self, name: str) -> Tensor:
        """One tensor in host memory, in the dtype it is stored in."""
        file = self._file_of[name]
        with _opened(self.folder, file) as handle:
            try:
                return handle.get_tensor(name)
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{self.folder / file}: {name} cannot be read: {error}") from error

    def _read_header(self, file: str) -> None:
        with _opened(self.folder, file) as handle:
            self.nbytes += (self.folder / file).stat().st_size
            for name in handle.keys():  # noqa: SIM118  (a safe_open handle is not a mapping)
                if name in self._file_of:
                    raise CheckpointError(f"{self.folder / file}: {name} is also in {self._file_of[name]}")
                view = handle.get_slice(name)
                self._file_of[name] = file
                self.shapes[name], self.dtypes[name] = tuple(view.get_shape()), str(view.get_dtype())

    def _compare_with_index(self, listed: Mapping[str, str]) -> None:
        index = self.folder / INDEX
        for name, file in listed.items():
            if self._file_of.get(name) != file:
                raise CheckpointError(f"{index}: {name} is not in {file}, where the index says it is")
        if extra := sorted(self._file_of.keys() - listed.keys()):
            raise CheckpointError(f"{self.folder / self._file_of[extra[0]]}: {some_of(extra)} not in the index")


def load_into(model: nn.Module, folder: str | Path) -> None:
    """Copy a folder's tensors into the model's parameters, one at a time, converting to the parameters' dtype.

    Parameters may be plain tensors or FSDP2 DTensors (each rank reads the folder and keeps its part). Raises
    CheckpointError, before any parameter is changed, as ``stored_names`` does.
    """
    source = HfFolder(folder)
    names = stored_names(source, model)
    for (first, *_), parameter in _tied_groups(model):
        fill(parameter, source.tensor(names[first]))


class Tensors(Protocol):
    """Where a model's tensors can be read by name: an HfFolder, or a checkpoint's StoredModel."""

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    nbytes: int

    def tensor(self, name: str) -> Tensor: ...


def stored_names(source: Tensors, model: nn.Module) -> dict[str, str]:
    """Name of each of the model's tensors, tied ones once -> the name under which ``source`` holds it.

    A tied weight may be stored under any of its names; where it is stored under two, they must be equal. Raises
    CheckpointError naming every kind of key that is missing, unexpected, misshapen or not floating-point.
    """
    groups = _tied_groups(model)
    _account_for_keys(source, groups, model)
    result = {}
    for names, _ in groups:
        first, *others = [name for name in names if name in source.shapes]
        for other in others:
            if not torch.equal(source.tensor(other), source.tensor(first)):
                raise CheckpointError(
                    f"{source.folder}: {other} differs from {first}, but the model ties them (tie_word_embeddings)"
                )
        result[names[0]] = first
    return result


def write_folder(
    out: str | Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    specs: Mapping[str, TensorSpec],
    tokenizer: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_files: Mapping[str, str] | None = None,
) -> None:
    """Write a model folder that transformers loads. ``specs`` announces every tensor, so that none has to be kept.

    ``tokenizer`` is a folder whose tokenizer files are copied, or one tokenizer.json. ``extra_files`` maps file names
    to text and wins over the generated files. Raises CheckpointError if ``out`` is there and not empty or cannot be
    written, DataError for a ``tokenizer`` that is none, and leaves nothing.
    """
    with new_folder(out) as temporary:
        texts = {CONFIG: _to_json(config), "generation_config.json": _generation(config)}
        if tokenizer is not None:
            copy_tokenizer(tokenizer, temporary, complete=False)
        for name, text in {**texts, **(extra_files or {})}.items():
            if Path(name).name != name:
                raise CheckpointError(f"{out}: {name!r} is not a plain file name")
            replace_file(temporary / name, text.encode())
        require_space(temporary, sum(spec.nbytes for spec in specs.values()))
        write_planned(temporary, specs, tensors, max_shard_bytes)


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` that becomes ``out`` when the block ends, and vanishes when it fails.

    Raises CheckpointError if ``out`` is there and not empty, and for whatever the operating system refuses.
    """
    out = Path(out)
    try:
        require_new(out)
        with built_beside(out) as temporary:
            yield temporary
            require_new(out)  # it has taken a while
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def require_new(out: Path) -> None:
    """Raise CheckpointError where ``out`` is there and not an empty folder, or can never be."""
    try:
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {error.strerror}") from None
    if taken:
        raise CheckpointError(f"{out}: exists and is not empty; choose another folder or remove it")


def require_space(folder: Path, needed: int) -> None:
    """Raise CheckpointError where the file system of ``folder`` has less than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"{folder.parent}: no space: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor Inf."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all())  # a NaN anywhere makes both of them NaN


def rounded(tensor: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """``tensor`` in ``dtype``. Raises CheckpointError, naming ``where``, if that makes a number infinite."""
    result = tensor.to(dtype)
    if result is not tensor and is_finite(tensor) and not is_finite(result):
        largest = f"{torch.finfo(dtype).max:.3g}"
        raise CheckpointError(f"{where}: holds a value above {largest}, the largest that {_name(dtype)} can store")
    return result


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _generation(config: Mapping[str, Any]) -> str:
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    return _to_json({"_from_model_config": True, **{key: config[key] for key in tokens if config.get(key) is not None}})


def _to_json(table: Mapping[str, Any]) -> str:
    return json.dumps(table, indent=2) + "\n"


def _tied_groups(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Every distinct tensor of the model with all its names, in the model's order."""
    groups: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(groups.values())


def _account_for_keys(source: Tensors, groups: list[tuple[list[str], Tensor]], model: nn.Module) -> None:
    shapes = {name: tuple(tensor.shape) for names, tensor in groups for name in names}
    lines = []
    if missing := [names[0] for names, _ in groups if not any(name in source.shapes for name in names)]:
        hint = ""
        if missing == ["lm_head.weight"]:
            hint = " (a tied model's folder: set tie_word_embeddings in the model's config)"
        lines.append(f"missing: {some_of(missing)}{hint}")
    extra = sorted(name for name in source.shapes if name not in shapes and not name.endswith(_LEFTOVER))
    if extra:
        lines.append(f"unexpected: {some_of(extra)}")
    both = sorted(shapes.keys() & source.shapes.keys())
    if misshapen := [name for name in both if shapes[name] != source.shapes[name]]:
        described = [f"{name} {list(source.shapes[name])} (expected {list(shapes[name])})" for name in misshapen]
        lines.append(f"different shape: {some_of(described)}")
    if coded := [f"{name} {source.dtypes[name]}" for name in both if source.dtypes[name] not in DTYPES]:
        lines.append(f"not a plain floating-point tensor (a quantised model?): {some_of(coded)}")
    if lines:
        raise CheckpointError(f"{source.folder}: does not fit {type(model).__name__}: {'; '.join(lines)}")


def _what_instead(folder: Path) -> str:
    """What a folder without readable weights holds in their place, and how to mend it."""
    if any(folder.glob("*.safetensors")):
        return f"; its files are parts of a model that only an index tells together: copy {INDEX} too"
    pickled = next((path.name for kind in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(kind))), None)
    if pickled is None:
        return ""
    return f"; {pickled} is a pickle, which infir2 never opens: save the model as safetensors with transformers"


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", "..") or "\\" in file:
            raise CheckpointError(f"{index}: refused: {name} points to {file!r}, which is not a plain file name")
        if not (index.parent / file).exists():
            raise CheckpointError(f"{index}: {name} is said to be in {file}, which is missing")
    return weight_map


@contextlib.contextmanager
def _opened(folder: Path, file: str) -> Iterator[Any]:
    path = folder / file
    if not stays_inside(path, folder):
        raise CheckpointError(f"{path}: refused: a link that leaves the model folder")
    try:
        open(path, "rb").close()  # safetensors says of a file that may not be read that there is none
        handle = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}; copy or fetch it again") from error
    with handle:
        yield handle


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return table
