"""A model to convert, whatever it lies in: a Hugging Face folder, an FP8 one, a training checkpoint or a run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from infir2.checkpoint.folders import META, TOKENIZER, read_meta, tokenizer_of
from infir2.checkpoint.fp8_format import Fp8Folder, ScaleFormat, check_quantization
from infir2.checkpoint.huggingface import CONFIG, HfFolder, Tensors, read_config, stored_names
from infir2.checkpoint.store import CheckpointStore
from infir2.checkpoint.stored_model import StoredModel
from infir2.data.tokenizer import has_tokenizer
from infir2.durable import stays_inside
from infir2.errors import CheckpointError, how_to_fetch
from infir2.fp8.convert import keep_outer_layers
from infir2.model.config import ModelConfig, from_hf
from infir2.model.transformer import CausalLM

CARRIED = ("generation_config.json", "LICENSE", "README.md")
"""Text files that go with a model from folder to folder, besides the tokenizer's."""
Kind = Literal["hf", "fp8", "dcp"]


@dataclass(frozen=True)
class ModelSource:
    """An opened source, every tensor of it accounted for."""

    kind: Kind
    path: Path
    """The model folder or the checkpoint folder."""
    architecture: ModelConfig
    config: dict[str, Any]
    """config.json without quantisation."""
    tensors: Tensors
    names: dict[str, str]
    """The model's parameter names, tied ones once -> the names in ``tensors``."""
    tokenizer: Path | None
    texts: dict[str, str]
    """File name -> content of what is carried along."""
    meta: dict[str, Any] = field(default_factory=dict)
    """meta.json of a checkpoint."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By parameter name."""
        return {name: self.tensors.shapes[stored] for name, stored in self.names.items()}

    def trained_fp8(self) -> tuple[str, ScaleFormat, dict[str, str]]:
        """(recipe, scale format, layers to keep in high precision -> why) of the run that made the checkpoint; those of
        a bf16 run for any other source."""
        trained = (self.meta.get("config") or {}).get("fp8") or {}
        first, last = trained.get("bf16_first_layers", 0), trained.get("bf16_last_layers", 0)
        keep = keep_outer_layers(self.architecture.num_hidden_layers, first, last)
        return trained.get("recipe", "bf16"), trained.get("scale_format", "ue8m0"), keep


def open_model_source(text: str, dtype: torch.dtype = torch.bfloat16) -> ModelSource:
    """The model that a user means: a Hugging Face folder, a checkpoint folder, or a run for its newest checkpoint.

    ``dtype`` is that of weights that are stored in FP8. Raises CheckpointError for anything that is not whole: no
    config, a damaged checkpoint, tensors that are missing, left over, misshapen or of an unreadable dtype.
    """
    path = Path(text).expanduser()
    if not path.is_dir():
        what, cure = ("is a file", "") if path.exists() else ("no such folder", f". {how_to_fetch(text)}")
        raise CheckpointError(f"{text}: {what}; a model is a Hugging Face folder, a run or a checkpoint folder{cure}")
    if (path / CONFIG).exists() or any(path.glob("*.safetensors")):
        return _from_folder(path, dtype)
    found = CheckpointStore(path).find(text)
    return _from_checkpoint(found)


def _from_folder(path: Path, dtype: torch.dtype) -> ModelSource:
    config, name = read_config(path), str(path / CONFIG)
    quantised = bool(config.get("quantization_config"))
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if quantised:
        check_quantization(config, name)
    architecture = from_hf(plain, name)
    tensors = Fp8Folder(path, dtype) if quantised else HfFolder(path)
    names = stored_names(tensors, _meta_model(architecture))
    tokenizer = path if has_tokenizer(path) else None
    return ModelSource(
        "fp8" if quantised else "hf", path, architecture, plain, tensors, names, tokenizer, _carried(path)
    )


def _from_checkpoint(path: Path) -> ModelSource:
    meta = read_meta(path)
    if not isinstance(meta.get("architecture"), dict):
        raise CheckpointError(f"{path / META}: names no architecture, so this is no checkpoint of a model")
    architecture = from_hf(meta["architecture"], f"{path / META}: architecture")
    tensors = StoredModel(path)
    names = stored_names(tensors, _meta_model(architecture))
    beside = path.absolute().parent.parent / TOKENIZER
    recorded = Path(meta["tokenizer"]) if meta.get("tokenizer") else None
    tokenizer = tokenizer_of(path, meta)
    # A trained model inherits from the one it started from, but is not described by that one's card.
    parent = ((meta.get("config") or {}).get("model") or {}).get("path")
    heirlooms = [_carried(Path(place), CARRIED[:2]) for place in (parent, recorded) if place]
    texts = {name: text for found in [*heirlooms, _carried(beside)] for name, text in found.items()}
    return ModelSource("dcp", path, architecture, architecture.to_hf(), tensors, names, tokenizer, texts, meta)


def _meta_model(architecture: ModelConfig) -> CausalLM:
    with torch.device("meta"):
        return CausalLM(architecture)


def _carried(folder: Path, names: tuple[str, ...] = CARRIED) -> dict[str, str]:
    found = {}
    for name in names:
        if not stays_inside(folder / name, folder):
            raise CheckpointError(f"{folder / name}: refused: a link that leaves the model folder")
        try:
            found[name] = (folder / name).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{folder / name}: cannot be read: {error}") from None
    return found
