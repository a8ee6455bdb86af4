"""Text files to a folder of token shards, with a tokenizer brought along or trained on the text."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infir2.data import tokenizer as tok
from infir2.data.dataset import (
    FORMAT_VERSION,
    RECORD,
    SPLITS,
    BadRows,
    Dataset,
    DatasetRecord,
    ShardWriter,
    SourceCount,
    names_in,
    write_record,
)
from infir2.data.documents import (
    MAX_DOC_BYTES,
    Document,
    DocumentReader,
    RawFile,
    RowLedger,
    find_files,
    printable,
)
from infir2.data.megatron import token_dtype
from infir2.data.order import in_validation, permutation, shuffled_documents
from infir2.data.replaced_folder import built_beside
from infir2.errors import DataError

Progress = Callable[[int, int, str], object]
"""(bytes done, bytes in all or 0, what is done)."""
SHUFFLE_LIMIT = 8 << 30
"""Bytes of text that --shuffle takes into memory."""


@dataclass(frozen=True)
class Options:
    """How to prepare; the command line has the same names and defaults."""

    tokenizer: str | Path | None = None
    """Hugging Face tokenizer folder or tokenizer.json; None trains a byte-level BPE on the text."""
    vocab_size: int = 8192
    """Size of a trained tokenizer."""
    tokenizer_sample_bytes: int = 64 << 20
    """Text that a tokenizer is trained on, spread over the files."""
    text_key: str = "text"
    extensions: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    validation_fraction: float = 0.05
    shard_tokens: int = 500_000_000
    seed: int = 1236
    max_bad_rows: str = "1%"
    max_doc_bytes: int = MAX_DOC_BYTES
    max_bytes: int | None = None
    workers: int = 0
    shuffle: bool = False


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    progress: Progress = lambda done, total, what: None,
    **options: Any,
) -> Dataset:
    """Tokenise ``inputs`` into the folder ``out``, replacing a data set that was prepared there before.

    The keywords are the fields of ``Options``: ``prepare(["a.txt"], "data", vocab_size=4096, seed=1)``.
    ``progress`` is told how far it is, in bytes of the inputs.
    Raises DataError for inputs that cannot be read, too many bad rows, a full disk, and an ``out`` that holds anything
    else; then nothing is left behind and an earlier data set is untouched.
    """
    chosen = Options(**options)
    if not str(out):
        raise DataError("--out: an empty name")
    out = Path(out)
    _check_options(chosen)
    _check_replaceable(out, [given for given in inputs if str(given)])
    files = find_files(inputs, chosen.extensions, chosen.exclude)
    try:
        with built_beside(out) as folder:
            _build(files, inputs, folder, chosen, progress)
    except OSError as error:
        file = f" ({Path(error.filename).name})" if error.filename else ""
        raise DataError(
            f"{out}: cannot be written: {error.strerror or error}{file}; nothing of it was kept. Make room or mend it, "
            "and run the same command again"
        ) from error
    return Dataset(out)


def _check_options(options: Options) -> None:
    if not 0 <= options.validation_fraction < 1:
        raise DataError(f"--validation-fraction {options.validation_fraction}: must be at least 0 and below 1")
    for name in ("shard_tokens", "max_doc_bytes", "tokenizer_sample_bytes", "max_bytes"):
        if (value := getattr(options, name)) is not None and not 1 <= value < 2**62:
            raise DataError(f"--{name.replace('_', '-')} {value}: must be at least 1 and below 2**62")
    if options.workers < 0 or options.seed < 0:
        raise DataError("--workers and --seed must not be negative")


def _check_replaceable(out: Path, inputs: Sequence[str | Path] = ()) -> None:
    """Raises DataError unless ``out`` is missing, empty, or a prepared folder without anything added, no input lies
    inside it, and it lies inside no input."""
    place = Path(os.path.realpath(out))  # Path.resolve refuses links in a circle, and Path.exists names of any length
    for given in inputs:
        where = Path(os.path.realpath(given))
        if where.is_relative_to(place):
            raise DataError(f"{given}: lies inside --out {out}, which would be replaced. Choose another --out.")
        if place.is_relative_to(where):
            raise DataError(
                f"--out {out}: lies inside {given}, whose text would hold it the next time. Choose another --out."
            )
    if os.path.islink(place):
        raise DataError(f"--out {out}: is a link that leads in a circle. Choose another --out.")
    if not os.path.exists(out):
        return
    if not out.is_dir():
        raise DataError(f"{out}: is a file. Choose another --out.")
    names = names_in(out)
    if names and RECORD not in names:
        raise DataError(f"{out}: exists and is not a prepared data set. Choose another --out, or empty it yourself.")
    ours = (RECORD, "tokenizer", *(f"{split}-" for split in SPLITS))
    if strange := [name for name in names if not name.startswith(ours)]:
        raise DataError(
            f"{out}: holds {strange[0]!r}, which prepare did not write and would delete. Move it, or choose another "
            "--out."
        )


def _build(
    files: Sequence[RawFile], inputs: Sequence[str | Path], folder: Path, options: Options, progress: Progress
) -> None:
    """Everything that is inside a prepared folder."""
    ledger = RowLedger(options.max_bad_rows)
    name = _place_tokenizer(files, folder / "tokenizer", options, progress)
    tokenizer = tok.load_tokenizer(folder / "tokenizer")
    eos_id, vocab_size = tok.end_of_document(tokenizer), tok.vocabulary_size(tokenizer)
    reader = DocumentReader(files, ledger, options.text_key, options.max_doc_bytes)
    documents, text_bytes = [0] * len(inputs), [0] * len(inputs)
    total = sum(file.size for file in files)
    with ShardWriter(folder, vocab_size, options.shard_tokens) as writer:
        numbered: Iterator[tuple[int, Document]] = enumerate(_bounded(reader, options.max_bytes))
        if options.shuffle:
            numbered = _shuffled(numbered, options.seed)
        rows = ((document.text, (number, document.source, document.size)) for number, document in numbered)
        encoded = tok.encode_documents(tokenizer.backend_tokenizer, rows, eos_id, options.workers)
        for ids, (number, source, size) in encoded:
            held_out = in_validation(number, options.seed, options.validation_fraction)
            writer.add("validation" if held_out else "train", ids)
            documents[source] += 1
            text_bytes[source] += size
            progress(reader.position, total, "tokenising")
        ledger.check_share()
        splits = writer.finish()
    if not sum(documents):
        raise DataError(
            f"{printable(Path(inputs[0]))}: no usable document in the input ({ledger.summary() or 'empty'})"
        )
    counted = zip(inputs, documents, text_bytes)
    record = DatasetRecord(
        format_version=FORMAT_VERSION,
        tokenizer=name,
        tokenizer_fingerprint=tok.fingerprint(tokenizer),
        vocab_size=vocab_size,
        eos_id=eos_id,
        dtype=token_dtype(vocab_size).name,
        seed=options.seed,
        validation_fraction=options.validation_fraction,
        splits=splits,
        sources=[
            SourceCount(
                path=printable(Path(path)), files=sum(f.source == i for f in files), documents=n, text_bytes=size
            )
            for i, (path, n, size) in enumerate(counted)
        ],
        bad_rows=BadRows(rows=ledger.rows, counts=dict(sorted(ledger.counts.items())), examples=ledger.examples),
    )
    write_record(folder, record)


def _place_tokenizer(files: Sequence[RawFile], folder: Path, options: Options, progress: Progress) -> str:
    """Copy or train the tokenizer; returns how the record names it."""
    if options.tokenizer is not None:
        tok.load_tokenizer(options.tokenizer)  # an unusable one is reported under the name the user gave
        tok.copy_tokenizer(options.tokenizer, folder)
        return printable(Path(options.tokenizer))
    progress(0, 0, f"training a byte-level BPE of {options.vocab_size} tokens")
    tok.train_tokenizer(_sample(files, options), options.vocab_size, folder)
    return f"byte-level BPE trained on this text (vocab_size {options.vocab_size})"


def _sample(files: Sequence[RawFile], options: Options) -> Iterator[str]:
    """Text to train a tokenizer on: an equal share of every file, files in random order."""
    budget = min(options.tokenizer_sample_bytes, options.max_bytes or options.tokenizer_sample_bytes)
    share = max(1, budget // len(files))
    for i in permutation(len(files), options.seed):
        ledger = RowLedger("100%")  # the second reading counts bad rows
        taken = 0
        for document in DocumentReader([files[i]], ledger, options.text_key, options.max_doc_bytes):
            yield document.text
            taken += document.size
            budget -= document.size
            if taken >= share or budget <= 0:
                break
        if budget <= 0:
            return


def _bounded(documents: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    """Whole documents until there are ``max_bytes`` of text."""
    taken = 0
    for document in documents:
        yield document
        taken += document.size
        if max_bytes is not None and taken >= max_bytes:
            return


def _shuffled(documents: Iterable[tuple[int, Document]], seed: int) -> Iterator[tuple[int, Document]]:
    held: list[tuple[int, Document]] = []
    size = 0
    for number, document in documents:
        held.append((number, document))
        size += document.size
        if size > SHUFFLE_LIMIT:
            raise DataError(
                f"--shuffle holds the text in memory, up to {SHUFFLE_LIMIT >> 30} GiB; this is more. Leave it out: "
                "training visits the sequences in random order anyway."
            )
    yield from (held[i] for i in shuffled_documents(len(held), seed))
