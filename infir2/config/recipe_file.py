"""Recipe files: TOML plus dotted overrides to a checked configuration, and back to TOML."""

import copy
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from infir2.config.keys import may_be_unset, section_at, takes_text
from infir2.config.mistakes import explain
from infir2.config.recipe_kind import other_command
from infir2.config.section import Section
from infir2.errors import ConfigError

C = TypeVar("C", bound=Section)
_NOT_TOML = (ValueError, RecursionError)
"""TOMLDecodeError is a ValueError; a number of thousands of digits is another, and so deep a nesting the other."""


def load(kind: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """Read a recipe and apply dotted overrides such as ``["--optim.lr", "5e-5"]`` (values in TOML notation;
    a key that is text takes any word as it stands).

    Raises ConfigError with a line for every mistake, naming the file, the key and the nearest valid key.
    """
    table = _read_toml(Path(path))
    as_written = copy.deepcopy(table)
    written = _apply_overrides(kind, table, overrides)
    try:
        return kind.model_validate(table)
    except pydantic.ValidationError as error:
        if other := other_command(kind, as_written):
            article = "an" if other in ("sft", "rl") else "a"
            raise ConfigError(f"{path}: this looks like {article} {other} recipe: infir2 {other} {path}") from None

        def place(key: str) -> str:
            mine = any(word == key or word.startswith(f"{key}.") for word in written)
            return "command line" if mine else str(path)

        raise ConfigError(explain(kind, error, place)) from None


def changed(config: C, overrides: Sequence[str]) -> C:
    """The configuration with dotted overrides, as ``load`` takes them. Raises ConfigError."""
    kind, table = type(config), config.model_dump()
    _apply_overrides(kind, table, overrides)
    try:
        return kind.model_validate(table)
    except pydantic.ValidationError as error:
        raise ConfigError(explain(kind, error, lambda key: "command line")) from None


def parse(kind: type[C], text: str, name: str) -> C:
    """A configuration from TOML text; ``name`` is what error messages call it."""
    try:
        return kind.model_validate(tomllib.loads(text))
    except pydantic.ValidationError as error:
        raise ConfigError(explain(kind, error, lambda key: name)) from None
    except _NOT_TOML as error:
        raise ConfigError(f"{name}: not valid TOML: {error}") from None


def to_toml(config: Section) -> str:
    """The configuration as TOML text that ``parse`` reads back to an equal object. Unset (None) keys are left out."""
    lines: list[str] = []
    _write_table(config.model_dump(mode="json", exclude_none=True), "", lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except _NOT_TOML as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _apply_overrides(kind: type[Section], table: dict[str, Any], overrides: Sequence[str]) -> set[str]:
    """Write ``--section.key value`` (or ``--section.key=value``) pairs into the table; returns the keys written."""
    words, written = list(overrides), set()
    while words:
        flag, equals, text = words.pop(0).partition("=")
        if not flag.startswith("--") or len(flag) < 3:
            raise ConfigError(f"command line: expected --section.key value, got {flag!r}")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"command line: {flag} needs a value")
            text = words.pop(0)
        *sections, key = keys = flag[2:].replace("-", "_").split(".")
        place = table
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"command line: {flag}: {section} is a value, not a section")
        unset = text in ("null", "none") and may_be_unset(kind, keys)
        value = None if unset else _toml_value(text)
        # 12e4567 is a fine name, and neither infinity nor 1.10 what 1.1 is.
        plain = takes_text(kind, keys) and not (unset or isinstance(value, str))
        place[key] = text if plain else value
        written.add(".".join(keys))
    _unset_alternatives(kind, table, written)
    return written


def _unset_alternatives(kind: type[Section], table: dict[str, Any], written: set[str]) -> None:
    """Where the command line gives one of the keys that exclude each other, it takes back the file's other one."""
    for name, values in table.items():
        section = section_at(kind, [name])
        names = section.alternatives if section and isinstance(values, dict) else ()
        given = [key for key in names if f"{name}.{key}" in written and values[key] is not None]
        if len(given) == 1:
            values.update({key: None for key in names if key != given[0]})


def _toml_value(text: str) -> Any:
    """A value in TOML notation (1e-4, true, [1, 2], { a = 1 }); anything else is taken as a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except _NOT_TOML:
        return text


def _write_table(table: dict[str, Any], prefix: str, lines: list[str]) -> None:
    for key, value in table.items():
        if not isinstance(value, dict):
            lines.append(f"{_toml_key(key)} = {_toml_text(value)}")
    for key, value in table.items():
        if isinstance(value, dict):
            name = f"{prefix}{_toml_key(key)}"
            lines.extend(["", f"[{name}]"])
            _write_table(value, f"{name}.", lines)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_text(key)


def _toml_text(value: Any) -> str:
    """TOML is JSON here, but for characters beyond 16 bits, which JSON would spell as two, and DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
