"""The on-disk token format: round trip, files written by others, and every way a file can be damaged."""

import random
import struct
from pathlib import Path

import numpy as np
import pytest

from infir2.data.dataset import Dataset, DatasetRecord, ShardWriter, write_record
from infir2.data.megatron import TokenFile, TokenWriter
from infir2.errors import DataError


def write_pair(prefix: Path, documents: list[np.ndarray], vocab_size: int) -> None:
    with TokenWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(document)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, "uint16"), (65500, "int32"), (151936, "int32")])
def test_round_trip(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, vocab_size, size) for size in (5, 1, 0, 300, 17)]
    documents.append(np.array([vocab_size - 1, 0]))
    write_pair(tmp_path / "a.b", documents, vocab_size)
    file = TokenFile(tmp_path / "a.b")
    assert file.dtype.name == dtype
    assert file.num_documents == 6
    assert file.num_tokens == sum(map(len, documents))
    assert file.document_offsets.tolist() == [0, 5, 6, 6, 306, 323, 325]
    assert np.array_equal(file.tokens(0, file.num_tokens), np.concatenate(documents))
    assert np.array_equal(file.tokens(4, 8), np.concatenate(documents)[4:8])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.b.bin", "a.b.idx"]


def test_file_with_no_documents(tmp_path: Path) -> None:
    write_pair(tmp_path / "none", [], 10)
    file = TokenFile(tmp_path / "none")
    assert (file.num_tokens, file.num_documents, file.document_offsets.tolist()) == (0, 0, [0])
    assert len(file.tokens(0, 0)) == 0


def test_reads_a_pair_laid_out_by_hand(tmp_path: Path) -> None:
    """Documents of several sequences, int64 ids and the trailing mode bytes of multimodal files."""
    tokens = [7, 8, 9, 1, 2, 3, 4, 70000]
    (tmp_path / "m.bin").write_bytes(struct.pack("<8q", *tokens))
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", 5) + struct.pack("<QQ", 3, 3)
    index += struct.pack("<3i", 3, 1, 4) + struct.pack("<3q", 0, 24, 32) + struct.pack("<3q", 0, 2, 3)
    for modes in (b"", b"\0\1\0"):
        (tmp_path / "m.idx").write_bytes(index + modes)
        file = TokenFile(tmp_path / "m")
        assert file.num_documents == 2
        assert file.document_offsets.tolist() == [0, 4, 8]
        assert file.tokens(0, 8).tolist() == tokens


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"token ids 3\.\.10, outside the vocabulary of 10"):
        write_pair(tmp_path / "x", [np.array([1]), np.array([3, 10])], 10)
    assert list(tmp_path.iterdir()) == []


def patch(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("ending", "damage", "message"),
    [
        ("idx", lambda p: p.unlink(), "cannot be read"),
        ("bin", lambda p: p.unlink(), "cannot be read"),
        ("bin", lambda p: p.write_bytes(p.read_bytes()[:-1]), "truncated"),
        ("bin", lambda p: p.write_bytes(p.read_bytes() + b"\0\0"), "longer than its index"),
        ("idx", lambda p: p.write_bytes(b""), "not a Megatron index"),
        ("idx", lambda p: p.write_bytes(p.read_bytes()[:20]), "truncated"),
        ("idx", lambda p: p.write_bytes(p.read_bytes()[:-1]), "truncated"),
        ("idx", lambda p: p.write_bytes(p.read_bytes() + b"12345678"), "too long"),
        ("idx", lambda p: patch(p, 0, b"X"), "not a Megatron index"),
        ("idx", lambda p: patch(p, 9, b"\2"), "version 2"),
        ("idx", lambda p: patch(p, 17, b"\7"), r"float32.*not an integer type"),
        ("idx", lambda p: patch(p, 17, b"\x63"), r"code 99 \(unknown\)"),
        ("idx", lambda p: patch(p, 18, b"\xff" * 8), "truncated"),
        ("idx", lambda p: patch(p, 34, struct.pack("<i", -1)), "sequence 0 has -1 tokens"),
        ("idx", lambda p: patch(p, 34 + 12, struct.pack("<q", 2)), "sequence 0 .* at byte 2"),
        ("idx", lambda p: patch(p, 34 + 36, struct.pack("<q", 9)), "broken document indices"),
    ],
)
def test_damage_is_a_data_error_naming_the_file(tmp_path: Path, ending: str, damage, message: str) -> None:
    write_pair(tmp_path / "d", [np.arange(4), np.arange(5), np.arange(6)], 100)
    path = tmp_path / f"d.{ending}"
    damage(path)
    with pytest.raises(DataError, match=message) as caught:
        TokenFile(tmp_path / "d")
    assert str(path) in str(caught.value)


def make_dataset(folder: Path) -> Dataset:
    folder.mkdir()
    with ShardWriter(folder, 1000, shard_tokens=50) as writer:
        for i in range(20):
            writer.add("validation" if i % 5 == 0 else "train", np.arange(i, i + 10))
        splits = writer.finish()
    record = {"format_version": 1, "tokenizer": "none", "tokenizer_fingerprint": "", "vocab_size": 1000, "eos_id": 0}
    record |= {"dtype": "uint16", "seed": 1, "validation_fraction": 0.2, "sources": []}
    bad = {"rows": 20, "counts": {}, "examples": {}}
    write_record(folder, DatasetRecord(**record, splits=splits, bad_rows=bad))
    return Dataset(folder, verify=True)


def test_shards_are_cut_at_documents(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set")
    assert [file.num_tokens for file in dataset.files("train")] == [50, 50, 50, 10]
    assert dataset.num_documents("train") == 16
    assert dataset.num_tokens("validation") == 40


def test_every_bit_flip_in_a_prepared_folder_is_found(tmp_path: Path) -> None:
    """200 single-bit flips and 100 truncations spread over all files: none passes verify=True."""
    make_dataset(tmp_path / "set")
    files = sorted((tmp_path / "set").iterdir())
    rng = random.Random(0)
    missed = []
    for trial in range(300):
        path = rng.choice(files)
        good = path.read_bytes()
        if trial < 200:
            place, bit = rng.randrange(len(good)), rng.randrange(8)
            patch(path, place, bytes([good[place] ^ (1 << bit)]))
        else:
            place, bit = rng.randrange(len(good)), -1
            path.write_bytes(good[:place])
        try:
            Dataset(tmp_path / "set", verify=True)
            missed.append((path.name, place, bit))
        except DataError as error:
            if str(path) not in str(error):
                missed.append((path.name, str(error), bit))
        path.write_bytes(good)
    # Changed or cut white space in dataset.json changes nothing that it says.
    text = (tmp_path / "set" / "dataset.json").read_bytes()
    assert [m for m in missed if m[0] != "dataset.json" or not text[m[1] : m[1] + 1].isspace()] == []
    Dataset(tmp_path / "set", verify=True)


def test_truncated_shard_is_found_without_verify(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set")
    path = tmp_path / "set" / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"train-00001\.bin: truncated: 98 bytes, dataset\.json says 100"):
        Dataset(tmp_path / "set")


def test_shard_names_are_not_paths(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set")
    content = dataset.record.model_dump()
    content["splits"]["train"][0]["name"] = "../outside"
    with pytest.raises(ValueError, match="pattern"):
        DatasetRecord.model_validate(content)
