"""What a dry run does about inputs that are not there: it tells what can be known without them, then all of them."""

from collections.abc import Callable
from pathlib import PurePath
from typing import Any, TypeVar

from infir2.config import ChatDataSection, RlDataSection, TrainingConfig
from infir2.data.conversations import RowSource
from infir2.errors import UserError
from infir2.launch.model import model_config
from infir2.model.config import ModelConfig
from infir2.model.presets import PRESETS

T = TypeVar("T")


class Missing:
    """Collects the user's mistakes that an attempt meets, each once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def attempt(self, make: Callable[..., T], *arguments: Any) -> T | None:
        """What ``make`` returns; None where it raises a UserError, which is kept."""
        try:
            return make(*arguments)
        except UserError as error:
            self.lines += [line for line in str(error).split("\n") if line not in self.lines]
            return None

    def has_rows(self, data: ChatDataSection | RlDataSection) -> bool:
        """Whether all that the section names is there."""
        names = {"data.train": data.train} | ({"data.validation": data.validation} if data.validation else {})
        return None not in [self.attempt(RowSource, name, key, dict) for key, name in names.items()]

    def tell(self) -> None:
        """Raise UserError with a line for everything that was met."""
        if self.lines:
            raise UserError("\n".join(self.lines))


def likely_architecture(config: TrainingConfig) -> tuple[ModelConfig | None, str]:
    """The recipe's architecture as far as it can be told without tokenizer, data and model folder; and a note that
    says what was assumed, for people."""
    try:
        architecture = model_config(config, 0)
    except UserError:
        name = PurePath(config.model.path or "").name.lower()
        named = max((preset for preset in PRESETS if preset in name), key=len, default=None)
        note = f"note: {config.model.path} is not there: these are the sizes of the preset {named}"
        return (PRESETS[named], note) if named else (None, "")
    unknown = config.model.preset and not config.model.vocab_size
    return architecture, "note: the size of the vocabulary is the preset's own, not that of the data" if unknown else ""
