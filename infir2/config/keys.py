"""The keys of a recipe: listed for help, and looked up for messages about those that do not exist."""

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from infir2.config.section import Section


def describe(kind: type[Section]) -> list[tuple[str, str, str]]:
    """Every key of a configuration as (dotted key, values and default, meaning): what ``--help`` prints."""
    return [(key, _values(field), field.description or "") for key, field in _fields(kind, "")]


def all_keys(kind: type[Section]) -> list[str]:
    """Every key of a configuration, dotted."""
    return [key for key, _ in _fields(kind, "")]


def section_at(kind: type[Section], keys: Sequence[str]) -> type[Section] | None:
    """The section that dotted keys lead to; None where they lead to a value, or nowhere."""
    section: Any = kind
    for key in keys:
        field = section.model_fields.get(key) if _is_section(section) else None
        section = field.annotation if field else None
    return section if _is_section(section) else None


def takes_text(kind: type[Section], keys: Sequence[str]) -> bool:
    """Whether the values of this key, or of the entries of the table that it is one of, are text and nothing else."""
    *place, key = keys
    section, table = section_at(kind, place), section_at(kind, place[:-1])
    annotation: Any = None
    if section is not None and key in section.model_fields:
        annotation = section.model_fields[key].annotation
    elif table is not None and place and place[-1] in table.model_fields:
        annotation = (*get_args(table.model_fields[place[-1]].annotation), None, None)[1]
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation is str or annotation == str | None


def may_be_unset(kind: type[Section], keys: Sequence[str]) -> bool:
    """Whether None is a value of this key."""
    section = section_at(kind, keys[:-1])
    field = section.model_fields.get(keys[-1]) if section else None
    return field is not None and type(None) in get_args(field.annotation)


def _values(field: Any) -> str:
    """``{a, b}`` where only these are taken, then the default in brackets."""
    choices = f"{{{', '.join(get_args(field.annotation))}}}  " if get_origin(field.annotation) is Literal else ""
    return f"{choices}[{'required' if field.is_required() else json.dumps(field.default)}]"


def _fields(kind: type[Section], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in kind.model_fields.items():
        annotation: Any = field.annotation
        if _is_section(annotation):
            yield from _fields(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)
