"""`infir2 prepare` from files to a folder that trains, and everything that must stop it."""

import argparse
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from infir2.data.dataset import SPLITS, Dataset
from infir2.data.loader import TokenLoader
from infir2.data.megatron import TokenWriter
from infir2.data.order import in_validation
from infir2.data.prepare import prepare
from infir2.errors import DataError
from infir2.stages.demo import corpus
from infir2.stages.prepare import add_arguments, run

SMALL = {"vocab_size": 500, "max_bad_rows": "100%"}


def texts_of(dataset: Dataset) -> dict[str, list[str]]:
    """Every document of every split, decoded; checks the end-of-document token on the way."""
    tokenizer = AutoTokenizer.from_pretrained(dataset.folder / "tokenizer")
    found: dict[str, list[str]] = {}
    for split in SPLITS:
        found[split] = []
        for file in dataset.files(split):
            for start, stop in zip(file.document_offsets, file.document_offsets[1:]):
                ids = file.tokens(start, stop)
                assert ids[-1] == dataset.record.eos_id == tokenizer.eos_token_id
                found[split].append(tokenizer.decode(ids[:-1].tolist()))
    return found


def write_rows(path: Path, count: int) -> list[str]:
    texts = [f"Row {i}: the square of {i} is {i * i}.\n" + "def f(x):\n    return x\n" * (i % 7) for i in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_documents_come_out_as_they_went_in(tmp_path: Path) -> None:
    texts = write_rows(tmp_path / "a.jsonl", 300)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.txt").write_text("a text file\r\n")
    texts.append("a text file\r\n")
    inputs = [tmp_path / "a.jsonl", tmp_path / "more"]
    dataset = prepare(inputs, tmp_path / "out", seed=5, validation_fraction=0.1, shard_tokens=2000, **SMALL)
    found = texts_of(dataset)
    for split in SPLITS:
        assert found[split] == [t for i, t in enumerate(texts) if in_validation(i, 5, 0.1) == (split == "validation")]
    assert 15 <= len(found["validation"]) <= 50
    assert len(dataset.files("train")) > 3
    record = dataset.record
    assert (record.dtype, record.bad_rows.rows) == ("uint16", 301)
    assert 261 < record.vocab_size < 500  # so little text has no more pairs to merge
    assert [(s.path, s.files, s.documents) for s in record.sources] == [
        (str(inputs[0]), 1, 300),
        (str(inputs[1]), 1, 1),
    ]
    assert record.sources[0].text_bytes == sum(len(t.encode()) for t in texts[:-1])
    batch = TokenLoader({str(tmp_path / "out"): 1.0}, 64, 0, 4, 4).step(0)[0]
    assert batch.input_ids.shape == (4, 64)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "more", "out"]


def test_bad_rows_leave_the_tokens_of_the_others_unchanged(tmp_path: Path) -> None:
    write_rows(tmp_path / "clean.jsonl", 400)
    lines = (tmp_path / "clean.jsonl").read_bytes().splitlines(keepends=True)
    bad = [b'{"text": "caf\xe9"}\n', b"{\n", b'{"t": 1}\n', b'{"text": ""}\n', b'{"text": "\0"}\n', b'{"text": 1}\n']
    bad.append(b'{"text": "' + b"x" * (10 << 20) + b'"}\n')
    places = sorted(np.random.default_rng(0).choice(400, 4 * len(bad), replace=False))[::-1]
    for i, place in enumerate(places):
        lines.insert(place, bad[i % len(bad)])
    (tmp_path / "dirty.jsonl").write_bytes(b"".join(lines))
    clean = prepare([tmp_path / "clean.jsonl"], tmp_path / "a", **SMALL)
    dirty = prepare([tmp_path / "dirty.jsonl"], tmp_path / "b", tokenizer=tmp_path / "a" / "tokenizer", **SMALL)
    reasons = ("bad_json", "bad_utf8", "empty", "missing_text", "not_a_string", "nul", "too_long")
    assert dirty.record.bad_rows.counts == dict.fromkeys(reasons, 4)
    assert dirty.record.bad_rows.rows == 428
    assert dirty.record.splits == clean.record.splits  # hashes included
    assert dirty.record.tokenizer_fingerprint == clean.record.tokenizer_fingerprint
    with pytest.raises(DataError, match=r"dirty\.jsonl:\d+: .* rows are bad .* --max-bad-rows 1%"):
        prepare([tmp_path / "dirty.jsonl"], tmp_path / "c", vocab_size=500)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "clean.jsonl", "dirty.jsonl"]


def test_threads_do_not_change_a_byte(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 500)
    for workers in (1, 2, 0):
        prepare([tmp_path / "a.jsonl"], tmp_path / f"out{workers}", workers=workers, **SMALL)
    assert content(tmp_path / "out1") == content(tmp_path / "out2") == content(tmp_path / "out0")


def test_shuffle_keeps_documents_and_split(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 200)
    plain = texts_of(prepare([tmp_path / "a.jsonl"], tmp_path / "p", **SMALL))
    mixed = texts_of(prepare([tmp_path / "a.jsonl"], tmp_path / "s", shuffle=True, **SMALL))
    again = texts_of(prepare([tmp_path / "a.jsonl"], tmp_path / "t", shuffle=True, **SMALL))
    assert mixed == again != plain
    for split in SPLITS:
        assert sorted(mixed[split]) == sorted(plain[split])


def test_max_bytes_and_no_validation(tmp_path: Path) -> None:
    texts = write_rows(tmp_path / "a.jsonl", 200)
    options = {"max_bytes": 3000, "validation_fraction": 0.0, **SMALL}
    found = texts_of(prepare([tmp_path / "a.jsonl"], tmp_path / "out", **options))
    sizes = np.cumsum([len(text) for text in texts])
    assert found == {"train": texts[: int((sizes < 3000).sum()) + 1], "validation": []}


def test_an_existing_folder(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 50)
    out = tmp_path / "out"
    out.mkdir()
    prepare([tmp_path / "a.jsonl"], out, **SMALL)  # empty: taken
    first = content(out)
    write_rows(tmp_path / "a.jsonl", 60)
    assert prepare([tmp_path / "a.jsonl"], out, **SMALL).record.bad_rows.rows == 60  # prepared: replaced
    (out / "notes.md").write_text("mine")
    with pytest.raises(DataError, match=r"holds 'notes\.md', which prepare did not write"):
        prepare([tmp_path / "a.jsonl"], out, **SMALL)
    assert (out / "notes.md").read_text() == "mine"
    (out / "notes.md").unlink()
    with pytest.raises(DataError, match="lies inside --out"):
        prepare([tmp_path / "a.jsonl"], tmp_path, **SMALL)
    other = tmp_path / "other"
    other.mkdir()
    (other / "x").write_text("x")
    with pytest.raises(DataError, match="exists and is not a prepared data set"):
        prepare([tmp_path / "a.jsonl"], other, **SMALL)
    second = content(out)
    (tmp_path / "a.jsonl").write_text("broken\n")
    with pytest.raises(DataError, match=r"a\.jsonl:1: bad_json"):
        prepare([tmp_path / "a.jsonl"], out, vocab_size=500)
    with pytest.raises(DataError, match="no usable document"):
        prepare([tmp_path / "a.jsonl"], out, **SMALL)
    assert content(out) == second != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "other", "out"]


def test_a_full_disk_keeps_the_earlier_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "a.jsonl", 50)
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", **SMALL)
    before = content(tmp_path / "out")

    def full(self: TokenWriter, tokens: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TokenWriter, "add_document", full)
    with pytest.raises(DataError, match="out: cannot be written: No space left on device"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", **SMALL)
    assert content(tmp_path / "out") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_a_failed_replacement_keeps_the_earlier_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "a.jsonl", 50)
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", **SMALL)
    before = content(tmp_path / "out")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if "preparing" in self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(DataError, match="out: cannot be written"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", seed=2, **SMALL)
    assert content(tmp_path / "out") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]


def limited(*words: object, size: int = 4096) -> subprocess.CompletedProcess[str]:
    """`infir2 prepare` where no file may grow beyond ``size`` bytes, which stands for a full disk."""
    return subprocess.run(
        [sys.executable, "-m", "infir2", "prepare", *map(str, words)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )


def test_a_full_disk_under_the_tokenizer_or_a_shard(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 50)
    done = limited(tmp_path / "a.jsonl", "--out", tmp_path / "out", "--vocab-size", 400)
    assert done.returncode == 2
    full = (
        f"infir2: error: {tmp_path}/out: cannot be written: File too large ({{}}); nothing of it was kept. Make room "
    )
    full += "or mend it, and run the same command again\n"
    assert done.stderr == full.format("tokenizer.json")
    prepare([tmp_path / "a.jsonl"], tmp_path / "whole", **SMALL)
    bare = tmp_path / "whole" / "tokenizer" / "tokenizer.json"
    done = limited(tmp_path / "a.jsonl", "--out", tmp_path / "out", "--tokenizer", bare)
    assert done.returncode == 2
    assert done.stderr == full.format("tokenizer.json")
    write_rows(tmp_path / "a.jsonl", 3000)
    done = limited(tmp_path / "a.jsonl", "--out", tmp_path / "out", "--tokenizer", bare, size=60_000)
    assert done.stderr == full.format("train-00000.bin")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "whole"]


def test_killed_processes_leave_nothing_for_long(tmp_path: Path) -> None:
    """SIGTERM cleans up; what SIGKILL leaves is cleared by the next start, but not what is being built."""
    rows = tmp_path / "a.jsonl"
    write_rows(rows, 20_000)
    words = [sys.executable, "-m", "infir2", "prepare", str(rows), "--out", str(tmp_path / "out")]

    def started() -> subprocess.Popen[str]:
        before = set(tmp_path.glob(".out.preparing-*"))
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while set(tmp_path.glob(".out.preparing-*")) <= before:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        return process

    process = started()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (143, "")
    assert not list(tmp_path.glob(".out*"))

    killed = started()
    killed.kill()
    killed.wait()
    (left,) = tmp_path.glob(".out.preparing-*")
    earlier = tmp_path / ".out.old-1"  # killed between the two renames
    prepare([rows], earlier, max_bytes=10_000, **SMALL)
    alive = started()
    assert not left.exists()
    assert (tmp_path / "out" / "dataset.json").exists(), "the earlier data set is back"
    prepare([rows], tmp_path / "out", max_bytes=10_000, **SMALL)
    assert len(list(tmp_path.glob(".out.preparing-*"))) == 1, "what another process builds is left alone"
    alive.terminate()
    alive.communicate(timeout=60)


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs another file system")
def test_a_place_that_is_a_link(tmp_path: Path) -> None:
    """It stays a link, even to another file system, and what it leads to is replaced."""
    write_rows(tmp_path / "a.jsonl", 50)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        place = Path(elsewhere) / "place"
        (tmp_path / "out").symlink_to(place)
        for seed in (1, 2):  # a link to nothing, and to a data set
            prepare([tmp_path / "a.jsonl"], tmp_path / "out", seed=seed, **SMALL)
            assert (tmp_path / "out").is_symlink()
            assert Dataset(place).record.seed == seed
        assert list(Path(elsewhere).iterdir()) == [place]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("A", "--max-bytes", -5), "--max-bytes -5: must be at least 1"),
        (("A", "--vocab-size", 10**20), "a byte-level tokenizer has 261 to 10,000,000 tokens"),
        (("",), "'': no such file or folder"),
        (("x" * 300,), "xxx: no such file or folder"),
        (("A", "--out", "x" * 300), "xxx: cannot be written: File name too long"),
        (("LOOP",), "LOOP: no such file or folder"),
        (("A", "--out", "LOOP"), "--out LOOP: is a link that leads in a circle"),
        (("/dev/null",), "/dev/null: is neither a file nor a folder"),
        (("A", "--max-doc-bytes", 2**70), f"--max-doc-bytes {2**70}: must be at least 1 and below 2**62"),
        (("A", "--max-bad-rows", "few"), "--max-bad-rows: 'few' is neither a count such as 20 nor a share"),
        (("A", "A"), "named twice: by"),
        (("A", "FOLDER"), "named twice: by"),
        (("FOLDER", "--out", "FOLDER/data/out"), "lies inside FOLDER, whose text would hold it the next time"),
        (("A", "--out", ""), "--out: an empty name"),
        (("--extensions", ".md", "FOLDER"), "--extensions took FOLDER for one of its values. Put FOLDER first: "),
        (("--exclude", "x", "A"), "--exclude took A for one of its values. Put A first: infir2 prepare A --exclude"),
        ((), "name at least one file or folder of text"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, words: tuple[object, ...], said: str) -> None:
    write_rows(tmp_path / "a.jsonl", 50)

    loop = tmp_path.with_name(f"{tmp_path.name}-links") / "loop"
    loop.parent.mkdir()
    loop.symlink_to(loop)

    def filled(word: object) -> str:
        named = str(word).replace("LOOP", str(loop)).replace("FOLDER", str(tmp_path))
        return named.replace("A", str(tmp_path / "a.jsonl"))

    out = () if "--out" in words else ("--out", tmp_path.parent / f"{tmp_path.name}-new")
    with pytest.raises(DataError) as raised:
        command(*map(filled, words), *out)
    assert filled(said) in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("mode", [0, 0o444])
def test_folders_that_may_not_be_read(tmp_path: Path, mode: int) -> None:
    write_rows(tmp_path / "a.jsonl", 5)
    (tmp_path / "more/inner").mkdir(parents=True)
    write_rows(tmp_path / "more/inner/b.jsonl", 5)
    (tmp_path / "more/inner").chmod(mode)
    try:
        with pytest.raises(DataError, match=r"more/inner.*: cannot be read: Permission denied"):
            prepare([tmp_path / "more"], tmp_path / "out")
        if not mode:
            with pytest.raises(DataError, match=r"more/inner: cannot be read: Permission denied"):
                prepare([tmp_path / "a.jsonl"], tmp_path / "more/inner")
    finally:
        (tmp_path / "more/inner").chmod(0o755)


def command(*words: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(word) for word in words]))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "a.jsonl", 80)
    (tmp_path / "a.jsonl").open("a").write("broken\n")
    out = tmp_path / "out"
    assert command(tmp_path / "a.jsonl", "--out", out, "--vocab-size", 400, "--max-bad-rows", 1) == 0
    assert f"left out: 1 rows: bad_json ({tmp_path}/a.jsonl:81)" in capsys.readouterr().out
    assert command("--out", out, "--verify") == 0
    assert "every file matches its hash" in capsys.readouterr().out
    path = out / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\1\1")
    with pytest.raises(DataError, match=r"train-00000\.bin: damaged"):
        command("--out", out, "--verify")
    with pytest.raises(DataError, match="name at least one file"):
        command("--out", out)
    for option, value, said in (
        ("--validation-fraction", 1, "--validation-fraction 1"),
        ("--shard-tokens", 0, "--shard-tokens 0"),
        ("--workers", -1, "--workers and --seed must not be negative"),
        ("--vocab-size", 10, "a byte-level tokenizer has 261 to"),
    ):
        with pytest.raises(DataError, match=said):
            command(tmp_path / "a.jsonl", "--out", tmp_path / "new", "--max-bad-rows", 1, option, value)
    assert not (tmp_path / "new").exists()


def test_standard_library_is_a_corpus(tmp_path: Path) -> None:
    chosen = {"extensions": (".py",), "exclude": ("*-packages", "test", "tests")}
    dataset = prepare([corpus("tiny")], tmp_path / "out", **chosen, vocab_size=512, max_bytes=300_000)
    assert dataset.num_documents("train") > 5
    assert 300_000 <= dataset.record.sources[0].text_bytes < 800_000


def test_importing_the_stage_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, infir2.stages.prepare; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
