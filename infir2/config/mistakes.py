"""What is wrong with a recipe, in one line a mistake: where, what, and the key that was probably meant."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pydantic

from infir2.config.keys import all_keys, section_at
from infir2.config.section import Section

_ORDER = {"extra_forbidden": 0, "missing": 2}  # other mistakes in between
_LONGEST = 200
"""Characters of a value that a message repeats."""
_LIKE_A_SIBLING, _LIKE_ANY = 0.5, 0.75
"""How much a word must resemble a key of the same section, and one of another section."""


def explain(kind: type[Section], error: pydantic.ValidationError, place: Callable[[str], str]) -> str:
    """Every mistake on a line of its own. ``place`` says for a dotted key who wrote it: the file or the command line.

    An unknown key is blamed before one that is missing, and in its stead where it was probably meant to be that one.
    """
    problems = error.errors(include_url=False)
    guesses = {_dotted(p["loc"]): _meant(kind, _words(p["loc"])) for p in problems if p["type"] == "extra_forbidden"}
    meant = {guess for found in guesses.values() for guess in found}
    lines = []
    for problem in sorted(problems, key=lambda problem: _ORDER.get(problem["type"], 1)):
        key = _dotted(problem["loc"])
        if problem["type"] == "missing" and any(guess == key or guess.startswith(f"{key}.") for guess in meant):
            continue
        text = _unknown(key, guesses[key]) if key in guesses else _sentence(kind, key, problem)
        lines.append(f"{place(key)}: {text}")
    return "\n".join(lines)


def shape_errors(kind: type[Section], table: Mapping[str, Any]) -> int:
    """How many keys of a recipe are unknown to this kind of recipe, or missing for it."""
    try:
        kind.model_validate(table)
    except pydantic.ValidationError as error:
        return sum(problem["type"] in _ORDER for problem in error.errors(include_url=False))
    return 0


def _unknown(key: str, guesses: Sequence[str]) -> str:
    section = key.rpartition(".")[0]
    # A key of the same section is named without it.
    names = [repr(guess.rpartition(".")[2] if guess.rpartition(".")[0] == section else guess) for guess in guesses]
    return f"{key}: unknown key." + (f" Did you mean {' or '.join(names)}?" if names else "")


def _meant(kind: type[Section], words: Sequence[str]) -> list[str]:
    """The dotted keys that an unknown one may stand for: of the same name elsewhere, else similar ones."""
    *place, word = words
    by_name: dict[str, list[str]] = {}
    for key in all_keys(kind):
        by_name.setdefault(key.rpartition(".")[2], []).append(key)
    if word in by_name:
        return by_name[word]
    section = section_at(kind, place)
    siblings = difflib.get_close_matches(word, section.model_fields if section else (), 1, _LIKE_A_SIBLING)
    if siblings:
        return [".".join([*place, siblings[0]])]
    return [key for name in difflib.get_close_matches(word, by_name, 1, _LIKE_ANY) for key in by_name[name]]


def _sentence(kind: type[Section], key: str, problem: Any) -> str:
    """What is wrong with a key that exists, or with a whole section."""
    given, message = problem["input"], problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{key}: this key is required"
    if problem["type"] == "value_error":
        return f"{key}: {message}".removeprefix(": ")
    if problem["type"] == "model_type" and (section := section_at(kind, key.split("."))):
        return f"{key}: is a section, with the keys {', '.join(section.model_fields)} (got {given!r})"
    if problem["type"] == "dict_type" and isinstance(given, str):
        table = f'{{ "{given}" = 1.0 }}'
        return f"{key}: needs a weight for {given!r}: {table}; on the command line in quotes: --{key} '{table}'"
    shown = repr(given) if len(repr(given)) <= _LONGEST else f"{repr(given)[:_LONGEST]}..."
    return f"{key}: {message[0].lower()}{message[1:]} (got {shown})"


def _words(loc: Sequence[Any]) -> list[str]:
    return [str(part) for part in loc]


def _dotted(loc: Sequence[Any]) -> str:
    return ".".join(_words(loc))
