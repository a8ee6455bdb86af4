"""Recipe files: TOML plus dotted overrides to a checked configuration, and back to TOML; mistakes worded for people."""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from infir2.config.section import Section
from infir2.errors import ConfigError, did_you_mean

C = TypeVar("C", bound=Section)


def load(kind: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """Read a recipe and apply dotted overrides such as ``["--optim.lr", "5e-5"]`` (values in TOML notation).

    Raises ConfigError, naming the file, the key and the nearest valid key.
    """
    table = _read_toml(Path(path))
    written = _apply_overrides(table, overrides)
    try:
        return kind.model_validate(table)
    except pydantic.ValidationError as error:
        key = ".".join(str(part) for part in error.errors(include_url=False)[0]["loc"])
        where = "command line" if any(word == key or word.startswith(f"{key}.") for word in written) else str(path)
        raise ConfigError(f"{where}: {_explain(kind, error)}") from None


def changed(config: C, overrides: Sequence[str]) -> C:
    """The configuration with dotted overrides, as ``load`` takes them. Raises ConfigError."""
    table = config.model_dump()
    _apply_overrides(table, overrides)
    try:
        return type(config).model_validate(table)
    except pydantic.ValidationError as error:
        raise ConfigError(f"command line: {_explain(type(config), error)}") from None


def parse(kind: type[C], text: str, name: str) -> C:
    """A configuration from TOML text; ``name`` is what error messages call it."""
    try:
        return kind.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not valid TOML: {error}") from None
    except pydantic.ValidationError as error:
        raise ConfigError(f"{name}: {_explain(kind, error)}") from None


def to_toml(config: Section) -> str:
    """The configuration as TOML text that ``parse`` reads back to an equal object. Unset (None) keys are left out."""
    lines: list[str] = []
    _write_table(config.model_dump(mode="json", exclude_none=True), "", lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def describe(kind: type[Section], prefix: str = "") -> list[tuple[str, str, str]]:
    """Every key of a configuration as (dotted key, default, meaning): what ``--help`` prints."""
    rows: list[tuple[str, str, str]] = []
    for name, field in kind.model_fields.items():
        annotation: Any = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            rows.extend(describe(annotation, f"{prefix}{name}."))
        else:
            default = "required" if field.is_required() else json.dumps(field.default)
            rows.append((f"{prefix}{name}", default, field.description or ""))
    return rows


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _apply_overrides(table: dict[str, Any], overrides: Sequence[str]) -> set[str]:
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
        *sections, key = flag[2:].replace("-", "_").split(".")
        place = table
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"command line: {flag}: {section} is a value, not a section")
        place[key] = _toml_value(text)
        written.add(".".join([*sections, key]))
    return written


def _toml_value(text: str) -> Any:
    """A value in TOML notation (1e-4, true, [1, 2], { a = 1 }); anything else is taken as a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(kind: type[Section], error: pydantic.ValidationError) -> str:
    """The first problem of a validation error in one line: key, what is wrong, nearest valid key."""
    problem = error.errors(include_url=False)[0]
    keys = [str(part) for part in problem["loc"]]
    where = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key.{did_you_mean(keys[-1], _keys_beside(kind, keys))}"
    if problem["type"] == "missing":
        return f"{where}: this key is required"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}".removeprefix(": ")
    return f"{where}: {message[0].lower()}{message[1:]} (got {problem['input']!r})"


def _keys_beside(kind: type[Section], keys: Sequence[str]) -> list[str]:
    """The valid keys of the section in which an unknown key was found."""
    section: Any = kind
    for key in keys[:-1]:
        field = section.model_fields.get(key) if hasattr(section, "model_fields") else None
        section = field.annotation if field else None
    return list(section.model_fields) if section is not None and hasattr(section, "model_fields") else []


def _write_table(table: dict[str, Any], prefix: str, lines: list[str]) -> None:
    for key, value in table.items():
        if not isinstance(value, dict):
            lines.append(f"{_toml_key(key)} = {json.dumps(value)}")
    for key, value in table.items():
        if isinstance(value, dict):
            name = f"{prefix}{_toml_key(key)}"
            lines.extend(["", f"[{name}]"])
            _write_table(value, f"{name}.", lines)


def _toml_key(key: str) -> str:
    return key if key.isidentifier() else json.dumps(key)
