"""RUN/pipeline.json, the table of a chain's stages: `infir2 pipeline` keeps it, and the chain's report shows it."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

from infir2.errors import UserError

STAGE_TABLE = "pipeline.json"


def read_stage_table(run: Path) -> dict[str, dict[str, Any]]:
    """stage -> what is known of it; nothing where there is no table yet. Raises UserError for a damaged one."""
    path = run / STAGE_TABLE
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict) or not all(isinstance(facts, dict) for facts in table.values()):
            raise ValueError("not a table of stages")
        for name, facts in table.items():
            _check(name, facts)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); mend it, or delete it: `infir2 pipeline` then runs every stage anew"
        ) from None
    return table


def command_of(facts: dict[str, Any]) -> list[str]:
    """The words of a stage's command, without "infir2"."""
    return shlex.split(str(facts.get("command", "")))[1:]


def _check(name: str, facts: dict[str, Any]) -> None:
    try:
        command_of(facts)
    except ValueError as error:
        raise ValueError(f"stage {name!r}: command: {error}") from None
    seconds = facts.get("seconds", 0.0)
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        raise ValueError(f"stage {name!r}: seconds: {seconds!r} is no number")
