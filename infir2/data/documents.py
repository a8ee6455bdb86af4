"""Raw files to documents: .txt (one document a file), .jsonl and .parquet (one a row), folders walked in sorted order.

A row that cannot be used is never dropped in silence: ``RowLedger`` counts it by reason, keeps file:line of the first
few, and stops the run when there are more than the user allows.
"""

import codecs
import fnmatch
import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar, cast

from infir2.errors import DataError

FORMATS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
REASONS = {
    "bad_utf8": "not valid UTF-8",
    "bad_json": "not a JSON object",
    "missing_text": "no text under the key",
    "not_a_string": "the text is not a string",
    "empty": "nothing but white space",
    "empty_file": "nothing but white space",
    "nul": "contains NUL: binary data",
    "too_long": "longer than --max-doc-bytes",
    "no_messages": "neither messages nor prompt and completion",
    "bad_message": "a message that cannot be used",
    "no_assistant": "no assistant message to learn from",
    "bad_template": "the chat template does not take it",
    "no_prompt": "no prompt, neither text nor messages",
    "bad_label": "no label that the reward can use",
}
UNREADABLE = (OSError, EOFError, zlib.error)
"""What reading a file raises that is damaged or cannot be read, compressed or not."""
MAX_DOC_BYTES = 8 << 20
_LINE_FACTOR = 8  # a JSON line may hold escapes and other keys: read at most this many times max_doc_bytes of it
_ROWS_BEFORE_PERCENT = 1000
_EXAMPLES = 5
T = TypeVar("T")
_HARMLESS = "empty_file"  # a tree of sources is full of them: counted, but no reason to stop


@dataclass(frozen=True)
class RawFile:
    """One input file and the input (index into the user's list) it came from."""

    path: Path
    source: int
    format: str
    size: int


@dataclass(frozen=True)
class Document:
    """One document; ``source`` is the index of the input it came from."""

    text: str
    source: int
    size: int
    """Bytes of the text as UTF-8."""


class BadRow(Exception):
    """Internal: a row that cannot be used, for one of REASONS."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


@dataclass
class RowLedger:
    """Counts rows, good and bad. ``limit`` = bad rows allowed: a count (``"20"``) or a share of the rows (``"1%"``).

    A share is enforced at the end (``check_share``), and as soon as 1,000 rows were read. Empty .txt files are counted
    but do not stop the run.
    """

    limit: str = "1%"
    option: str = "--max-bad-rows"
    """What the user calls the limit."""
    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    _first: dict[str, str] = field(default_factory=dict)
    """Reason -> its first row, in words."""

    def __post_init__(self) -> None:
        self._percent = self.limit.endswith("%")
        try:
            self._allowed = float(self.limit[:-1]) / 100 if self._percent else int(self.limit)
        except ValueError:
            self._allowed = -1
        if not self._allowed >= 0 or (self._percent and self._allowed > 1):
            raise DataError(f"{self.option}: {self.limit!r} is neither a count such as 20 nor a share such as 1%")

    @property
    def bad(self) -> int:
        """Bad rows that count towards the limit."""
        return sum(self.counts.values()) - self.counts[_HARMLESS]

    def count_bad(self, path: Path, line: int, error: BadRow) -> None:
        """Record a bad row. Raises DataError when there are now too many."""
        self.counts[error.reason] += 1
        where = f"{printable(path)}:{line}"
        examples = self.examples.setdefault(error.reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(where)
        if error.reason == _HARMLESS:
            return
        detail = f" ({error.detail})" if error.detail else ""
        self._first.setdefault(error.reason, f"{where}: {error.reason}: {REASONS[error.reason]}{detail}")
        if not self._percent:
            self._stop_above(self._allowed)
        elif self.rows >= _ROWS_BEFORE_PERCENT:
            self.check_share()

    def check_share(self) -> None:
        """Raises DataError when the share of bad rows is above the limit."""
        if self._percent:
            self._stop_above(self._allowed * self.rows)

    def _stop_above(self, allowed: float) -> None:
        if self.bad > allowed:
            raise DataError(
                f"{next(iter(self._first.values()))}; {self.bad} of {self.rows} rows are bad ({self._places()}), more "
                f"than {self.option} {self.limit} allows. Mend them, or allow more."
            )

    def _places(self) -> str:
        """The first rows of each reason."""
        found = []
        for reason in self._first:
            examples = self.examples[reason]
            more = ", ..." if self.counts[reason] > len(examples) else ""
            found.append(f"{reason} {self.counts[reason]}: {', '.join(examples)}{more}")
        return "; ".join(found)

    def summary(self) -> str:
        return ", ".join(f"{reason} {self.counts[reason]}" for reason in REASONS if self.counts[reason])


class DocumentReader:
    """Iterates over the documents of files, in order; bad rows go to the ledger.

    ``position`` is how many bytes of the files have been passed, for a progress bar.
    """

    def __init__(
        self,
        files: Sequence[RawFile],
        ledger: RowLedger,
        text_key: str = "text",
        max_doc_bytes: int = MAX_DOC_BYTES,
    ) -> None:
        self.position = 0
        self._files = files
        self._ledger = ledger
        self._text_key = text_key
        self._max_bytes = max_doc_bytes

    def __iter__(self) -> Iterator[Document]:
        done = 0
        for file in self._files:
            rows = {".parquet": _parquet_rows, ".jsonl": _json_rows}.get(file.format, _whole_file)
            try:
                for line, parse, passed in rows(file, self._text_key, self._max_bytes):
                    self.position = done + passed
                    self._ledger.rows += 1
                    try:
                        text = parse()
                        yield Document(text, file.source, check_text(text, self._max_bytes))
                    except BadRow as error:
                        self._ledger.count_bad(file.path, line, error)
            except UNREADABLE as error:
                raise DataError(f"{printable(file.path)}: cannot be read: {error}") from None
            done += file.size
            self.position = done


def find_files(
    inputs: Sequence[str | Path],
    extensions: Sequence[str] = (),
    exclude: Sequence[str] = (),
    formats: Sequence[str] = FORMATS,
    named_by: str = "",
) -> list[RawFile]:
    """The files to read: inputs in the given order, each folder walked recursively in sorted order.

    ``extensions`` (such as ``.py``) are read like .txt; ``exclude`` are patterns for file or folder names inside the
    folders. Hidden names and links to folders are skipped. ``formats`` are the endings that are read, some of FORMATS,
    and ``named_by`` the key of a recipe that names the inputs; else they stand on prepare's command line.

    Raises DataError for an input that is missing, of an unknown kind, without a readable file, or with a file that
    another input has already given.
    """
    plain = {f".{ext.lstrip('.')}" for ext in extensions}
    found: list[RawFile] = []
    first: dict[str, int] = {}  # real path -> the input that gave it
    for source, given in enumerate(inputs):
        path = Path(given)
        if not str(given) or not os.path.exists(path):  # false for a name that is too long, too
            raise DataError(f"{str(given) or repr(given)}: no such file or folder")
        if not path.is_file() and not path.is_dir():
            raise DataError(f"{path}: is neither a file nor a folder; write what comes from it into a file first")
        names = [path] if path.is_file() else list(_walk(path, exclude))
        chosen = [(name, form) for name in names if (form := _format_of(name, formats, plain))]
        if not chosen:
            known = ", ".join([*formats, *sorted(plain)])
            what = "is not a kind of file that is read" if path.is_file() else "holds no file that is read"
            key, cure = (f"{named_by}: ", "") if named_by else ("", "; --extensions names more")
            raise DataError(f"{key}{path}: {what} ({known}){cure}")
        for name, _ in chosen if len(inputs) > 1 else []:
            if (earlier := first.setdefault(os.path.realpath(name), source)) != source:
                raise DataError(f"{printable(name)}: named twice: by {inputs[earlier]} and {path}")
        found.extend(RawFile(name, source, form, name.stat().st_size) for name, form in chosen)
    return found


def check_text(text: str, max_bytes: int) -> int:
    """Size of a document's text in bytes. Raises BadRow when it cannot be trained on."""
    if not text or text.isspace():
        raise BadRow("empty")
    if "\0" in text:
        raise BadRow("nul")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise BadRow("bad_utf8", "half of a surrogate pair") from None
    if size > max_bytes:
        raise BadRow("too_long", f"{size} bytes")
    return size


def printable(path: Path) -> str:
    """A path as text that can be printed and stored, even where its name is not valid UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")


def _format_of(path: Path, formats: Sequence[str], plain: set[str]) -> str:
    name = path.name.lower()
    for form in formats:
        if name.endswith(form):
            return ".jsonl" if form.startswith(".jsonl") else form
    return ".txt" if any(name.endswith(ext.lower()) for ext in plain) else ""


def _walk(folder: Path, exclude: Sequence[str]) -> Iterator[Path]:
    def wanted(name: str) -> bool:
        return not name.startswith(".") and not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}")

    for place, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(filter(wanted, folders))
        try:
            yield from [path for name in sorted(filter(wanted, files)) if (path := Path(place, name)).is_file()]
        except OSError as error:
            fail(error)


# Each reader yields (line number from 1, a function that gives the text or raises BadRow, bytes of the file passed).
_Row = tuple[int, Callable[[], str], int]


def _whole_file(file: RawFile, text_key: str, max_bytes: int) -> Iterator[_Row]:
    if file.size > max_bytes:
        yield 1, partial(_refuse, "too_long", f"{file.size} bytes"), file.size
        return
    data = file.path.read_bytes()
    line = 1
    try:
        data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
    yield line, partial(_refuse, "empty_file") if not data.strip() else partial(_decode, data), file.size


def _json_rows(file: RawFile, text_key: str, max_bytes: int) -> Iterator[_Row]:
    return json_lines(file, _LINE_FACTOR * max_bytes, lambda line: text_of(object_of_json(line), text_key))


def json_lines(file: RawFile, limit: int, parse: Callable[[bytes], T]) -> Iterator[tuple[int, Callable[[], T], int]]:
    """(line number from 1, a function that gives the row or raises BadRow, bytes of the file passed) of every line.

    A line of more than ``limit`` bytes is passed over without being held in memory.
    """
    with open(file.path, "rb") as raw:
        stream = _decompressed(raw, file.path.name.lower())
        number = 0
        while line := stream.readline(limit + 1):
            number += 1
            if len(line) > limit:
                while line and not line.endswith(b"\n"):  # pass over the rest without keeping it
                    line = stream.readline(1 << 20)
                yield number, partial(_refuse, "too_long", f"a line of more than {limit} bytes"), raw.tell()
            elif stripped := line.strip(b" \t\r\n").removeprefix(codecs.BOM_UTF8):
                yield number, partial(parse, stripped), raw.tell()
            else:
                yield number, partial(_refuse, "empty"), raw.tell()


def _parquet_rows(file: RawFile, text_key: str, max_bytes: int) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file.path)
        schema, rows = table.schema_arrow, max(1, table.metadata.num_rows)
        if text_key not in schema.names:
            raise DataError(
                f"{printable(file.path)}: no column {text_key!r} (there are {', '.join(schema.names)}); "
                "--text-key names it"
            )
        kind = schema.field(text_key).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)):
            raise DataError(f"{printable(file.path)}: column {text_key!r} holds {kind}, not strings")
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=[text_key]):
            for value in batch.column(0).cast(pa.large_binary()):  # bytes: arrow does not check that strings are UTF-8
                number += 1
                passed = file.size * number // rows
                yield number, partial(_decode, value.as_py()), passed
    except pa.ArrowException as error:
        raise DataError(f"{printable(file.path)}: damaged or not parquet: {str(error).splitlines()[0]}") from None


def _decompressed(raw: BinaryIO, name: str) -> BinaryIO:
    if name.endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if name.endswith(".zst"):
        import io

        import pyarrow as pa

        return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), 1 << 20))
    return raw


def object_of_json(line: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises BadRow."""
    if b"\0" in line:
        raise BadRow("nul")
    try:
        row: Any = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadRow("bad_utf8", f"byte {error.start + 1} of the line") from None
    except (ValueError, RecursionError) as error:
        raise BadRow("bad_json", str(error)) from None
    if not isinstance(row, dict):
        raise BadRow("bad_json", f"a {type(row).__name__}")
    return row


def text_of(row: dict[str, Any], key: str) -> str:
    """The text under a key. Raises BadRow."""
    text = row.get(key)
    if text is None:
        raise BadRow("missing_text", repr(key))
    if not isinstance(text, str):
        raise BadRow("not_a_string", f"a {type(text).__name__}")
    return text


def _decode(data: bytes | None) -> str:
    if data is None:
        raise BadRow("missing_text", "null")
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise BadRow("nul" if b"\0" in data else "bad_utf8", f"byte {error.start + 1}") from None


def _refuse(reason: str, detail: str = "") -> NoReturn:
    raise BadRow(reason, detail)
