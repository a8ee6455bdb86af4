"""Which command a recipe file is for, told by its keys: for the message about one that was given to another command."""

from collections.abc import Mapping
from typing import Any

from infir2.config.mistakes import shape_errors
from infir2.config.rl import RlConfig
from infir2.config.section import Section
from infir2.config.training import CptConfig, SftConfig

_KINDS: dict[str, type[Section]] = {"cpt": CptConfig, "sft": SftConfig, "rl": RlConfig}
_CLEARLY = 2
"""So many more keys must fit another kind: a typo or two do not make a recipe one of another kind."""


def other_command(kind: type[Section], table: Mapping[str, Any]) -> str | None:
    """The command whose recipe this clearly is, where it is not one of ``kind``."""
    if isinstance(table.get("stage"), list):
        return None if "stage" in kind.model_fields else "pipeline"
    errors = {name: shape_errors(other, table) for name, other in _KINDS.items()}
    best = min(errors, key=lambda name: errors[name])
    return best if errors[best] + _CLEARLY <= shape_errors(kind, table) else None
