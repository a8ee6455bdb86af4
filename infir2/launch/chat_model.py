"""The model and the chat tokenizer that fine-tuning and reinforcement learning start from."""

from pathlib import Path

from infir2.config import RlConfig, SftConfig
from infir2.data.chat import ChatTokenizer, choose_template
from infir2.data.tokenizer import load_tokenizer, vocabulary_size
from infir2.errors import ConfigError, DataError
from infir2.launch.data_check import check_same_ids
from infir2.launch.model import model_config, model_folder, starting_meta, starting_tokenizer
from infir2.model.config import ModelConfig


def open_model(config: SftConfig | RlConfig) -> tuple[ChatTokenizer, Path, ModelConfig]:
    """The recipe's chat tokenizer, its folder, and the architecture; checks that they fit each other."""
    folder = _tokenizer_folder(config)
    if (known := starting_tokenizer(config)) is not None:
        check_same_ids(known, folder)
    tokenizer = load_tokenizer(folder)
    size = vocabulary_size(tokenizer)
    architecture = model_config(config, size)
    architecture.check_sequence_length(*config.longest)
    if size > architecture.vocab_size:
        raise DataError(f"{folder}: the tokenizer has {size} tokens, but the model has {architecture.vocab_size}")
    return ChatTokenizer(tokenizer, choose_template(tokenizer, config.data.chat_template)), folder, architecture


def _tokenizer_folder(config: SftConfig | RlConfig) -> Path:
    """The recipe's tokenizer: the one it names, else that of the model that training starts from."""
    if config.data.tokenizer is not None:
        return Path(config.data.tokenizer)
    if config.init.checkpoint is not None:
        meta = starting_meta(config)
        if meta and meta.get("tokenizer") and Path(meta["tokenizer"]).exists():
            return Path(meta["tokenizer"])
    if config.model.path is not None:
        return model_folder(config.model.path)
    raise ConfigError("data.tokenizer: required, because the model that training starts from does not bring one")
