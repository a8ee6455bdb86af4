"""Tokenizers: load any Hugging Face tokenizer folder, train a byte-level BPE, turn documents into ids.

transformers is imported only where a tokenizer is loaded. Nothing is downloaded and no code of a tokenizer's folder is
ever run.
"""

import filecmp
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from infir2.durable import replace_file, stays_inside
from infir2.errors import DataError, how_to_fetch

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
THINK_TOKENS = ("<think>", "</think>")
"""Ordinary added tokens: they survive ``skip_special_tokens``, because rewards read the text between them."""
MIN_VOCAB = 256 + len(SPECIAL_TOKENS) + len(THINK_TOKENS)
MAX_VOCAB = 10_000_000
"""Of a trained tokenizer; the trainer asks for memory by the size that is wanted, and aborts where there is none."""

CHAT_TEMPLATE = (Path(__file__).parent / "chatml.jinja").read_text(encoding="utf-8")
"""ChatML, for tokenizers that have no template of their own."""

_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END_OF_TEXT,
    "pad_token": END_OF_TEXT,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1 << 20,
    "chat_template": CHAT_TEMPLATE,
}
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json"),
)
"""All that a tokenizer may consist of."""
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_BATCH_BYTES = 4 << 20
T = TypeVar("T")


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a Hugging Face folder (model folders too), or of a bare tokenizer.json.

    Raises DataError, naming the path, when there is none or it cannot be used.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(path)
    if not os.path.exists(path):
        raise DataError(f"{path}: no such folder, so no tokenizer. {how_to_fetch(str(path))}")
    bare = path if path.is_file() else path / "tokenizer.json"
    try:
        configured = any((path / name).is_file() for name in ("tokenizer_config.json", "config.json"))
        # Without this check transformers makes an empty tokenizer for a model folder that has none.
        if configured and has_tokenizer(path):
            tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
        elif bare.is_file():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(bare))
            if END_OF_TEXT in tokenizer.get_vocab():
                tokenizer.eos_token = END_OF_TEXT
        else:
            raise DataError(f"{path}: no tokenizer: neither tokenizer.json nor another vocabulary file is there")
    except DataError:
        raise
    except Exception as error:  # transformers and tokenizers raise many kinds, plain Exception included
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: the tokenizer cannot be loaded: {reason}") from None
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise DataError(f"{path}: this tokenizer has no fast (tokenizer.json) form")
    return tokenizer


def has_tokenizer(path: Path) -> bool:
    """Whether a path is a bare tokenizer.json or a folder that holds a tokenizer."""
    # Path.is_file raises for names that are too long and folders that cannot be read.
    return os.path.isfile(path) or any(os.path.isfile(path / name) for name in _VOCABULARY_FILES)


class Clash(NamedTuple):
    """A token that has another id in the right tokenizer than in the left one, or None: it has no such token."""

    token: str
    left: int
    right: int | None


def clash(left: Path, right: Path) -> Clash | None:
    """A token to which two tokenizer folders give different ids, the lowest in ``left``; None where all ids of
    ``left`` mean the same in ``right``, which may know more tokens."""
    mine, theirs = left / "tokenizer.json", right / "tokenizer.json"
    if mine.is_file() and theirs.is_file() and filecmp.cmp(mine, theirs, shallow=False):
        return None  # the usual case, told without loading anything
    one, other = (load_tokenizer(folder).get_vocab() for folder in (left, right))
    found = ((number, token) for token, number in one.items() if other.get(token) != number)
    number, token = min(found, default=(0, None))
    return None if token is None else Clash(token, number, other.get(token))


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """One more than the highest id the tokenizer can give."""
    return max(tokenizer.get_vocab().values()) + 1


def end_of_document(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Id of the token put behind every document: the tokenizer's eos, else <|endoftext|>. DataError without both."""
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id)
    if (fallback := tokenizer.get_vocab().get(END_OF_TEXT)) is not None:
        return int(fallback)
    raise DataError(f"{tokenizer.name_or_path}: the tokenizer has neither an eos token nor {END_OF_TEXT}")


def fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 of the vocabulary (token, id): equal where ids mean the same, whatever the files look like."""
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0]))
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def copy_tokenizer(path: str | Path, folder: Path, complete: bool = True) -> None:
    """Copy the files of a tokenizer folder (and nothing else of a model folder), or a bare tokenizer.json.

    complete: write the configuration that AutoTokenizer needs, where the source has none. Raises DataError where there
    is no tokenizer, and OSError for whatever cannot be written.
    """
    path = Path(path)
    files = {"tokenizer.json": path} if path.is_file() else {name: path / name for name in TOKENIZER_FILES}
    found = {name: file for name, file in files.items() if file.is_file()}
    if not found:
        raise DataError(f"{path}: no tokenizer files in it")
    if outside := next((file for file in found.values() if path.is_dir() and not stays_inside(file, path)), None):
        raise DataError(f"{outside}: refused: a link that leaves the tokenizer's folder; put the file itself there")
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in found.items():
        replace_file(folder / name, file.read_bytes())
    if complete and not (folder / "tokenizer_config.json").is_file():
        _write_configured(path, folder)


def _write_configured(path: Path, folder: Path) -> None:
    """The tokenizer as transformers writes it, configuration included."""
    tokenizer = load_tokenizer(path)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tokenizer-") as made:
        try:
            tokenizer.save_pretrained(made)
        except OSError:
            raise
        except Exception as error:  # how the tokenizers library words a full disk
            raise OSError(str(error)) from None
        for file in Path(made).iterdir():
            replace_file(folder / file.name, file.read_bytes())


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE and write it as a Hugging Face folder.

    Digits stand alone and there is no normalisation: decoding gives back the exact text. ``vocab_size`` counts
    everything; a small corpus may give fewer. Raises DataError below MIN_VOCAB and above MAX_VOCAB.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    if not MIN_VOCAB <= vocab_size <= MAX_VOCAB:
        raise DataError(f"vocab_size {vocab_size}: a byte-level tokenizer has {MIN_VOCAB} to {MAX_VOCAB:,} tokens")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    added = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    added += [AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens(added)
    folder.mkdir(parents=True, exist_ok=True)
    # Not backend.save: it raises a bare Exception for what the operating system refuses.
    replace_file(folder / "tokenizer.json", backend.to_str(pretty=True).encode())
    replace_file(folder / "tokenizer_config.json", (json.dumps(_CONFIG, indent=2) + "\n").encode())


def encode_documents(
    backend: "Tokenizer", documents: Iterable[tuple[str, T]], eos_id: int, workers: int = 0
) -> Iterator[tuple[NDArray[np.int32], T]]:
    """(text, anything) -> (ids with eos_id behind them, int32; the same anything), in order.

    Batches are spread over threads by the tokenizers library; ids do not depend on ``workers`` (0 = all cores).
    Special tokens that stand in the text become their ids, as in every Hugging Face tokenizer.
    """
    backend.no_truncation()  # a tokenizer.json may ask for either; both would change the text
    backend.no_padding()
    with _threads(workers):
        for batch in _batches(documents):
            encodings = backend.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
            for encoding, (_, extra) in zip(encodings, batch):
                yield np.array([*encoding.ids, eos_id], np.int32), extra


def _batches(documents: Iterable[tuple[str, T]]) -> Iterator[list[tuple[str, T]]]:
    batch: list[tuple[str, T]] = []
    size = 0
    for text, extra in documents:
        batch.append((text, extra))
        size += len(text)
        if size >= _BATCH_BYTES or len(batch) >= 4096:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def _threads(workers: int) -> Iterator[None]:
    """The library takes its thread count from the environment: on/off at every call, the number only once."""
    names = ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if workers == 1 else "true"
    if workers > 1:
        os.environ["RAYON_NUM_THREADS"] = str(workers)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
