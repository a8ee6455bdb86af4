"""Test cases as LiveCodeBench stores them: JSON, or base64 of zlib of a pickled string of JSON. No pickle is executed.

Needs the standard library alone: it also runs where evalscope does.
"""

import base64
import binascii
import json
import pickletools
import zlib
from typing import Any

MAX_BYTES = 1 << 30
"""Of one problem's cases, decompressed."""
# All that a pickled string needs. Every other operation of a pickle builds or calls something.
_HARMLESS = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}
_STRINGS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}


def stored_cases(text: str) -> list[dict[str, Any]]:
    """The cases, objects with ``input`` and ``output``. Raises ValueError for anything else."""
    try:
        cases = json.loads(text)
    except ValueError:
        cases = json.loads(pickled_string(_inflated(text)))
    if isinstance(cases, str):
        cases = json.loads(cases)
    if not isinstance(cases, list) or not all(
        isinstance(case, dict) and {"input", "output"} <= set(case) for case in cases
    ):
        raise ValueError("not a list of test cases with input and output")
    return cases


def pickled_string(data: bytes) -> str:
    """The string that a pickle holds, read without running it. Raises ValueError where it holds more than a string."""
    found = None
    for operation, argument, _ in pickletools.genops(data):
        if operation.name in _STRINGS and found is None and isinstance(argument, str):
            found = argument
        elif operation.name not in _HARMLESS:
            raise ValueError(f"a pickle that is more than a string ({operation.name})")
    if found is None:
        raise ValueError("a pickle without a string")
    return found


def _inflated(text: str) -> bytes:
    try:
        engine = zlib.decompressobj()
        data = engine.decompress(base64.b64decode(text, validate=True), MAX_BYTES)
    except (binascii.Error, zlib.error, ValueError):
        raise ValueError("neither JSON nor base64 of zlib") from None
    if not engine.eof:
        raise ValueError(f"cut off, or more than {MAX_BYTES} bytes")
    return data
