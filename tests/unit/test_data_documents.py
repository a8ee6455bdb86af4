"""Raw files: what is read, in which order, and exact accounts of rows that cannot be used."""

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infir2.data.conversations import RowSource
from infir2.data.documents import DocumentReader, RowLedger, find_files
from infir2.errors import DataError

MB = 1 << 20


def read(path: Path, limit: str = "100%", **options) -> tuple[list[str], RowLedger]:
    ledger = RowLedger(limit)
    texts = [document.text for document in DocumentReader(find_files([path]), ledger, **options)]
    ledger.check_share()
    return texts, ledger


def write_damaged_jsonl(path: Path, rows: int) -> tuple[list[str], dict[str, list[int]]]:
    """A file with 1 % of each kind of bad row; returns the good texts and the bad line numbers by reason."""
    bad = {
        "bad_utf8": b'{"text": "caf\xe9"}',
        "bad_json": b'{"text": "cut off',
        "missing_text": b'{"content": "x"}',
        "not_a_string": b'{"text": ["x"]}',
        "empty": b'{"text": "  \\n"}',
        "too_long": b'{"text": "' + b"y" * (10 * MB) + b'"}',
        "nul": b'{"text": "a\\u0000b"}',
    }
    each = rows // 100
    rng = random.Random(3)
    lines = sorted(rng.sample(range(1, rows + 1), each * len(bad)))
    reasons = [reason for reason in bad for _ in range(each)]
    rng.shuffle(reasons)
    where = dict(zip(lines, reasons))
    texts = []
    with open(path, "wb") as file:
        for number in range(1, rows + 1):
            if number in where:
                file.write(bad[where[number]] + b"\n")
            else:
                texts.append(f'row {number}: naïve, 数学 "quoted"\n\ttabs')
                file.write(json.dumps({"id": number, "text": texts[-1]}).encode() + b"\n")
    return texts, {reason: [line for line in lines if where[line] == reason] for reason in bad}


def test_bad_rows_are_counted_exactly(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    texts, bad = write_damaged_jsonl(path, 300)
    read_texts, ledger = read(path)
    assert read_texts == texts
    assert ledger.rows == 300
    assert ledger.counts == dict.fromkeys(bad, 3)
    assert ledger.examples == {reason: [f"{path}:{line}" for line in lines] for reason, lines in bad.items()}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'["text"]', "bad_json"),
        (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "bad_json"),  # Python refuses so long a number
        (b"[" * 100_000, "bad_json"),  # too deep
        (b'{"text": null}', "missing_text"),
        (b'{"text": "\\ud800"}', "bad_utf8"),
        (b"\0" * 50, "nul"),
        (b"", "empty"),
        (b'{"text": "x"} trailing', "bad_json"),
    ],
)
def test_odd_json_rows(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "two"}')
    texts, ledger = read(path)
    assert texts == ["one", "two"]
    assert ledger.counts == {reason: 1}
    assert ledger.examples[reason] == [f"{path}:2"]


def test_a_line_far_over_the_limit_is_passed_over_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "' + b"x" * 900 + b'"}\n{"text": "two"}\n' + b"y" * 900)
    texts, ledger = read(path, max_doc_bytes=100)
    assert texts == ["one", "two"]
    assert ledger.examples == {"too_long": [f"{path}:2", f"{path}:4"]}


def test_limits(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' * 97 + "broken\n" * 3)
    assert read(path, "3%")[1].counts["bad_json"] == 3
    assert read(path, "3")[1].counts["bad_json"] == 3
    with pytest.raises(DataError, match=r"a\.jsonl:98: bad_json: .*3 of 100 rows are bad \(bad_json 3: .*2\.9%"):
        read(path, "2.9%")
    with pytest.raises(DataError, match=r"a\.jsonl:98: bad_json: .*--max-bad-rows 0 allows"):
        read(path, "0")
    for wrong in ("-1", "many", "1.5", "101%", "nan%"):
        with pytest.raises(DataError, match="neither a count"):
            RowLedger(wrong)


def test_a_share_stops_early_in_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' * 995 + "broken\n" * 5000)
    with pytest.raises(DataError, match=r"a\.jsonl:996: bad_json: .*; 11 of 1006 rows are bad"):
        read(path, "1%")


def test_the_first_five_of_each_reason_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('broken\n{"body": 1}\n' * 3 + "broken\n" * 4 + '{"text": "x"}\n')
    with pytest.raises(DataError) as caught:
        read(path, "1%")
    message = str(caught.value)
    assert message.startswith(f"{path}:1: bad_json: not a JSON object (Expecting value: line 1 column 1 (char 0)); ")
    broken, textless = (", ".join(f"{path}:{line}" for line in lines) for lines in ((1, 3, 5, 7, 8), (2, 4, 6)))
    assert f"10 of 11 rows are bad (bad_json 7: {broken}, ...; missing_text 3: {textless}), more than" in message


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    raw = pa.array([b"good", b"caf\xe9", None, b"", b"\xe6\x95\xb0"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": raw, "n": [1, 2, 3, 4, 5]}), path)
    texts, ledger = read(path)
    assert texts == ["good", "数"]
    assert ledger.examples == {"bad_utf8": [f"{path}:2"], "missing_text": [f"{path}:3"], "empty": [f"{path}:4"]}
    with pytest.raises(DataError, match=r"a\.parquet: no column 'body' \(there are text, n\)"):
        read(path, text_key="body")
    with pytest.raises(DataError, match=r"a\.parquet: column 'n' holds int64, not strings"):
        read(path, text_key="n")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet: damaged"):
        read(path)


def test_compressed_jsonl(tmp_path: Path) -> None:
    rows = b"".join(json.dumps({"text": f"row {i}"}).encode() + b"\n" for i in range(5000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows))
    with pa.CompressedOutputStream(str(tmp_path / "b.jsonl.zst"), "zstd") as stream:
        stream.write(rows)
    for name in ("a.jsonl.gz", "b.jsonl.zst"):
        assert read(tmp_path / name)[0] == [f"row {i}" for i in range(5000)]
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-30])
        with pytest.raises(DataError, match=name):
            read(tmp_path / name)


def test_a_gz_file_that_is_damaged_in_its_middle(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(b"".join(b'{"text": "row %d"}\n' % i for i in range(5000))))
    data[2000:2030] = bytes(byte ^ 0xFF for byte in data[2000:2030])
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read"):
        read(tmp_path / "a.jsonl.gz")
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read"):
        list(RowSource(str(tmp_path / "a.jsonl.gz"), "data.train", dict))


def test_json_lines_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}')
    texts, ledger = read(tmp_path / "a.jsonl")
    assert (texts, ledger.bad) == (["one", "two"], 0)


def test_folders_are_walked_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/z.txt", "b/a.txt", "a.txt", "c.py", "skip/d.txt", ".git/e.txt", "f.bin", "b/.hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "g.txt").write_bytes(b"two\nlines\xff")
    (tmp_path / "h.txt").write_bytes(b"\0\xff")
    (tmp_path / "i.txt").write_bytes(b" \n")
    (tmp_path / "j.txt").write_bytes(b"\xef\xbb\xbfkept\r\n")
    ledger = RowLedger("2")
    files = find_files([tmp_path], extensions=["py"], exclude=["sk*"])
    assert [d.text for d in DocumentReader(files, ledger)] == ["a.txt", "c.py", "kept\r\n", "b/a.txt", "b/z.txt"]
    assert ledger.examples == {
        "bad_utf8": [f"{tmp_path}/g.txt:2"],
        "nul": [f"{tmp_path}/h.txt:1"],
        "empty_file": [f"{tmp_path}/i.txt:1"],
    }


def test_inputs_that_give_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(DataError, match=r"missing: no such file"):
        find_files([tmp_path / "missing"])
    with pytest.raises(DataError, match=r"a\.doc: is not a kind of file that is read"):
        find_files([tmp_path / "a.doc"])
    with pytest.raises(DataError, match="holds no file that is read"):
        find_files([tmp_path])
    assert len(find_files([tmp_path / "a.doc"], extensions=[".doc"])) == 1
