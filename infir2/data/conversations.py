"""Rows to conversations: .jsonl and .parquet files, folders of them, or a data set of the package `datasets`.

A row is {"messages": [{"role": ..., "content": ...}, ...]}, with "tools" if it has any, or {"prompt": ...,
"completion": ...} (strings or lists of messages). What cannot be used is a BadRow, which says why.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from infir2.data.documents import UNREADABLE, BadRow, RawFile, find_files, json_lines, object_of_json, printable
from infir2.data.named_set import load_named, same_named
from infir2.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_ROW_BYTES = 64 << 20
ROW_FORMATS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages whose contents are strings, and the tools that were offered."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


class Row(NamedTuple):
    """Where a row stands, and what reads it (raising BadRow)."""

    path: Path
    line: int
    parse: Callable[[], Any]
    passed: float
    """Share of the source that has been read, 0 to 1."""


class RowSource:
    """What a recipe names under data.train or data.validation; ``parse`` makes of a row what is wanted, or raises
    BadRow.

    Raises DataError where there is neither such a file or folder nor such a data set.
    """

    def __init__(self, name: str, key: str, parse: Callable[[dict[str, Any]], Any]) -> None:
        self.name, self._parse_row = name, parse
        self._files: list[RawFile] = []
        self._table: Any = None
        if os.path.exists(name):
            self._files = find_files([name], formats=ROW_FORMATS, named_by=key)
        else:
            self._table = load_named(name, key)

    def identity(self) -> list[Any]:
        """Changes when the source does: names, sizes and times of files, or the data set's own fingerprint."""
        if self._table is not None:
            return [self.name, self._table._fingerprint, len(self._table)]
        stats = [(file.path, file.path.stat()) for file in self._files]
        return [[printable(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]

    def __iter__(self) -> Iterator[Row]:
        """Every row, in order. Raises DataError for a file that cannot be read."""
        if self._table is not None:
            rows = len(self._table)
            for index, row in enumerate(self._table):
                yield Row(Path(self.name), index + 1, partial(self._parse_row, row), (index + 1) / rows)
            return
        total = max(1, sum(file.size for file in self._files))
        done = 0
        for file in self._files:
            read = _parquet if file.format == ".parquet" else _jsonl
            try:
                for line, parse, passed in read(file, self._parse_row):
                    yield Row(file.path, line, parse, min(1.0, (done + passed) / total))
            except UNREADABLE as error:
                raise DataError(f"{printable(file.path)}: cannot be read: {error}") from None
            done += file.size


def shared_rows(one: str, other: str) -> list[str]:
    """What two names of rows, as RowSource takes them, both lead to: files, or a data set."""
    there = os.path.exists(one), os.path.exists(other)
    if not any(there):
        return [one] if same_named(one, other) else []
    if not all(there):
        return []
    mine, theirs = (find_files([name], formats=ROW_FORMATS) for name in (one, other))
    known = {file.path.resolve() for file in theirs}
    return [printable(file.path) for file in mine if file.path.resolve() in known]


class ConversationSource(RowSource):
    """Rows that hold conversations."""

    def __init__(self, name: str, key: str = "data.train") -> None:
        super().__init__(name, key, conversation_of)


def conversation_of(row: dict[str, Any]) -> Conversation:
    """The conversation of a row. Raises BadRow: no_messages, bad_message, no_assistant."""
    messages = row.get("messages")
    if messages is None and row.get("prompt") is not None and row.get("completion") is not None:
        messages = [*_as_messages(row, "prompt", "user"), *_as_messages(row, "completion", "assistant")]
    if not isinstance(messages, list) or not messages:
        raise BadRow("no_messages")
    checked = checked_messages(messages)
    if not any(message["role"] == "assistant" for message in checked):
        raise BadRow("no_assistant")
    return Conversation(checked, _tools(row.get("tools")))


def checked_messages(messages: Sequence[Any]) -> list[Message]:
    """Messages whose contents are strings and whose roles are known. Raises BadRow, naming the message's number."""
    return [_checked(message, number) for number, message in enumerate(messages, 1)]


def _as_messages(row: dict[str, Any], key: str, role: str) -> list[Any]:
    value = row[key]
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise BadRow("bad_message", f"{key} is neither text nor messages")
    return value


def _checked(message: Any, number: int) -> Message:
    """The message with a string as content and without null values."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise BadRow("bad_message", f"message {number}: role {str(role)[:40]!r} is none of {', '.join(ROLES)}")
    clean = {key: value for key, value in message.items() if value is not None}
    content = clean.get("content", "" if clean.get("tool_calls") else None)
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise BadRow("bad_message", f"message {number}: its content is not text")
    if "tool_calls" in clean:
        clean["tool_calls"] = [_checked_call(call, number) for call in _list(clean["tool_calls"], number)]
    clean["content"] = content
    _check_characters(clean, number)
    return clean


def _list(value: Any, number: int) -> list[Any]:
    if not isinstance(value, list):
        raise BadRow("bad_message", f"message {number}: tool_calls is not a list")
    return value


def _checked_call(call: Any, number: int) -> dict[str, Any]:
    """A tool call whose arguments are an object: some APIs give JSON text, which templates would quote twice."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("bad_message", f"message {number}: a tool call without a function name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise BadRow("bad_message", f"message {number}: a tool call's arguments are not JSON") from None
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _check_characters(message: Message, number: int) -> None:
    """Refuse what no tokenizer takes: NUL, and half of a surrogate pair, which JSON can spell."""
    text = json.dumps(message, ensure_ascii=False, default=str)
    if "\0" in text or "\\u0000" in text:
        raise BadRow("nul")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("bad_utf8", f"message {number}: half of a surrogate pair") from None


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRow("bad_message", "tools are not JSON") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow("bad_message", "tools are not a list of objects")
    return value


_ParseRow = Callable[[dict[str, Any]], Any]


def _jsonl(file: RawFile, parse: _ParseRow) -> Iterator[tuple[int, Callable[[], Any], int]]:
    return json_lines(file, MAX_ROW_BYTES, lambda line: parse(object_of_json(line)))


def _parquet(file: RawFile, parse: _ParseRow) -> Iterator[tuple[int, Callable[[], Any], int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file.path)
        rows, number = max(1, table.metadata.num_rows), 0
        for batch in table.iter_batches(batch_size=64):
            for row in batch.to_pylist():
                number += 1
                yield number, partial(parse, row), file.size * number // rows
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{printable(file.path)}: damaged or not parquet: {str(error).splitlines()[0]}") from None
