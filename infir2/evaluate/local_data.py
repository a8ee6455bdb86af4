"""Local copies of the benchmarks' rows: found in --data, checked, and laid out as evalscope reads them.

evalscope gets copies, because it deletes a file in a data folder now and then, wants exact types, and would unpickle
LiveCodeBench's test cases.
"""

import datetime
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infir2.errors import DataError
from infir2.evaluate.stored_cases import stored_cases


@dataclass(frozen=True)
class Layout:
    """Where a benchmark's rows lie under the folder of ``--data``, and what they hold."""

    stem: str
    """Of the file in the folder that is named after evalscope's benchmark: STEM.jsonl or STEM.parquet."""
    fields: str
    source: str
    check: Callable[[dict[str, Any]], dict[str, Any]]
    """The row as evalscope wants it. Raises KeyError for a missing field, ValueError for a bad one."""
    parquet: bool = False
    """What evalscope has to be given: in JSON it would take a date for a time stamp."""


@dataclass(frozen=True)
class Staged:
    """Rows that are ready for evalscope."""

    folder: Path
    rows: int
    digest: str
    """Of what they hold."""


def stage(name: str, data: Path, out: Path, limit: int | None, dates: tuple[str, str] | None) -> Staged:
    """Copy the rows of evalscope's benchmark ``name`` from ``data`` to the folder ``out``: at most ``limit`` of them,
    and only contests between the ``dates``. Raises DataError that says what to put where."""
    layout = LAYOUTS[name]
    rows: list[dict[str, Any]] = []
    for where, row in _rows(_find(name, data, layout)):
        if len(rows) == limit:
            break
        try:
            checked = layout.check(row)
        except KeyError as error:
            raise DataError(f"{where}: the field {error} is missing; a row has {layout.fields}") from None
        except (ValueError, TypeError) as error:
            raise DataError(f"{where}: {error}; a row has {layout.fields}") from None
        if dates is None or dates[0] <= checked["contest_date"][:10] <= dates[1]:
            rows.append(checked)
    if not rows:
        within = f" between {dates[0]} and {dates[1]}" if dates else ""
        raise DataError(f"{data / name}: holds no row{within}")
    _write(rows, out, layout)
    return Staged(out, len(rows), hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest())


def what_to_put(name: str, data: Path | str) -> str:
    """One line that says which file is wanted, what is in it and where it is published."""
    layout = LAYOUTS[name]
    file = Path(data) / name / f"{layout.stem}.jsonl"
    return f"make {file} (or .parquet) of rows with {layout.fields}, published as {layout.source}"


def _find(name: str, data: Path, layout: Layout) -> Path:
    for suffix in (".jsonl", ".parquet"):
        if (found := data / name / f"{layout.stem}{suffix}").is_file():
            return found
    raise DataError(f"--data {data}: no copy of {name}: {what_to_put(name, data)}")


def _rows(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    try:
        if path.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            try:
                number = 0
                for batch in pq.ParquetFile(path).iter_batches(batch_size=16):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{path}, row {number}", row
            except pa.ArrowException as error:
                raise DataError(f"{path}: damaged or not parquet: {str(error).splitlines()[0]}") from None
            return
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _object(line, f"{path}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: not a JSON object")
    return row


def _write(rows: list[dict[str, Any]], folder: Path, layout: Layout) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if layout.parquet:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), folder / f"{layout.stem}.parquet")
        return
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{layout.stem}.jsonl").write_text(text, encoding="utf-8")


def _text(row: dict[str, Any], *names: str) -> dict[str, str]:
    for name in names:
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"{name} is no text, or empty")
    return {name: row[name] for name in names}


def _aime(row: dict[str, Any]) -> dict[str, Any]:
    answer = str(row["answer"]).strip()
    if not answer.isdigit():
        raise ValueError(f"answer is {row['answer']!r}, not a whole number")
    return {**_text(row, "problem"), "answer": answer}


def _gpqa(row: dict[str, Any]) -> dict[str, Any]:
    return _text(row, "Question", "Correct Answer", *(f"Incorrect Answer {number}" for number in (1, 2, 3)))


def _live_code_bench(row: dict[str, Any]) -> dict[str, Any]:
    """Test cases become plain JSON, whatever they are stored as."""
    date = row["contest_date"]
    date = date if isinstance(date, datetime.datetime) else datetime.datetime.fromisoformat(date)
    metadata = row.get("metadata") or "{}"
    if not isinstance(json.loads(metadata), dict):
        raise ValueError("metadata is no JSON object")
    cases = {}
    for name in ("public_test_cases", "private_test_cases"):
        try:
            cases[name] = json.dumps(stored_cases(row[name]))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    starter = {
        "starter_code": row.get("starter_code") or "",
        "metadata": metadata,
        "contest_date": date.replace(tzinfo=None).isoformat(),
    }
    return {**_text(row, "question_content"), **starter, **cases}


_AIME_FIELDS = '"problem" (text) and "answer" (a whole number)'
LAYOUTS = {
    "aime24": Layout("test", _AIME_FIELDS, "math-ai/aime24 on Hugging Face", _aime),
    "aime25": Layout("test", _AIME_FIELDS, "math-ai/aime25 on Hugging Face", _aime),
    "gpqa_diamond": Layout(
        "train", '"Question", "Correct Answer", "Incorrect Answer 1", "... 2", "... 3" (texts)',
        "Idavidrein/gpqa (gpqa_diamond) on Hugging Face", _gpqa,
    ),
    "live_code_bench": Layout(
        "test",
        '"question_content", "starter_code", "public_test_cases", "private_test_cases", "metadata" (texts of JSON) and '
        '"contest_date" (ISO)',
        "livecodebench/code_generation_lite on Hugging Face", _live_code_bench, parquet=True,
    ),
}  # fmt: skip
