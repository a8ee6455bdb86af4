"""Where conversations are read from: files, folders and their formats, names of data sets, mistyped paths."""

import gzip
import json
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infir2.data import named_set
from infir2.data.conversations import ConversationSource, shared_rows
from infir2.data.documents import BadRow
from infir2.errors import DataError

GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def test_files_folders_and_formats(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "b.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD) + "\n")
    with gzip.open(folder / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps(GOOD) + "\n")
    pq.write_table(pa.Table.from_pylist([GOOD, {"messages": None}]), folder / "c.parquet")
    (folder / "readme.txt").write_text("not rows")
    source = ConversationSource(str(folder))
    places = [(row.path.name, row.line) for row in source]
    assert places == [("a.jsonl.gz", 1), ("b.jsonl", 1), ("b.jsonl", 2), ("c.parquet", 1), ("c.parquet", 2)]
    rows = list(source)
    assert all(row.parse().messages == GOOD["messages"] for row in rows[:4])
    with pytest.raises(BadRow, match="no_messages"):
        rows[4].parse()
    assert rows[-1].passed == 1.0
    before = source.identity()
    (folder / "b.jsonl").write_text(json.dumps(GOOD) + "\n")
    assert ConversationSource(str(folder)).identity() != before


def test_names_of_data_sets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    monkeypatch.setattr(named_set, "_announced", set())
    monkeypatch.setattr(named_set, "_answers", lambda url: True)
    asked = []

    def load(name: str, split: str) -> Any:
        asked.append((name, split))
        if name == "no/network":
            raise ConnectionError("Couldn't reach the Hub")
        return datasets.Dataset.from_list([GOOD, {"messages": []}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(ConversationSource("some/set:test"))
    assert asked == [("some/set", "test")]
    assert rows[0].parse().messages == GOOD["messages"]
    assert (str(rows[1].path), rows[1].line) == ("some/set:test", 2)
    told = capsys.readouterr().err.splitlines()
    start = "data.train: some/set:test: no file or folder here; loading the data set of that name"
    assert [line.startswith(start) for line in told] == [True], "what may be downloaded is announced"
    with pytest.raises(DataError, match=r"data.train: no/network: there is no such file or folder, .*Couldn't reach"):
        ConversationSource("no/network")
    (tmp_path / "stage1.jsonl").write_text("x")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    gone = (str(tmp_path / "gone.jsonl"), "gone.jsonl", "./gone", "gone", "sub/gone", "a/b/gone", "sub/gone:train")
    for missing in gone:
        with pytest.raises(DataError, match=r"no such file or folder$"):
            ConversationSource(missing)
    with pytest.raises(DataError, match=rf"no such file or folder in {tmp_path}\. Did you mean 'stage1.jsonl'\?$"):
        ConversationSource(str(tmp_path / "stage_1.jsonl"))
    with pytest.raises(DataError, match=r"no such file or folder\. Did you mean 'stage1.jsonl'\?$"):
        ConversationSource("stage_1.jsonl")
    assert asked == [("some/set", "test"), ("no/network", "train")], "a mistyped path is never looked for elsewhere"


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("some/set", "some/set:train", True),
        ("some/set:train", "some/set:test", False),
        ("some/set", "other/set", False),
        ("some/set:train[:90%]", "some/set", True),
        ("some/set:train[:90%]", "some/set:train[:90%]", True),
        ("some/set:train[:90%]", "some/set:train[90%:]", False),
    ],
)
def test_rows_that_two_names_of_data_sets_share(one: str, other: str, shared: bool) -> None:
    assert [bool(shared_rows(*names)) for names in ((one, other), (other, one))] == [shared, shared]


def test_without_a_network_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants

    def load(name: str, split: str) -> Any:
        seen.append((constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE))
        raise ConnectionError("x")

    seen: list[tuple[bool, bool]] = []
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(named_set.urllib.request, "getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        with pytest.raises(DataError, match=r"\(x\)"):
            ConversationSource("owner/name")
    with pytest.raises(DataError, match=r"\(the Hub cannot be reached, and it is not in the cache\)"):
        ConversationSource("owner/name")
    assert seen == [(False, False), (True, True)]
    assert (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == (False, False)


def test_a_folder_without_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    read = r"holds no file that is read \(.jsonl, .jsonl.gz, .jsonl.zst, .parquet\)$"
    with pytest.raises(DataError, match=rf"^data.train: {tmp_path}: {read}"):
        ConversationSource(str(tmp_path))
    with pytest.raises(DataError, match=r"a.txt: is not a kind of file that is read \(.jsonl, [^;]*\)$"):
        ConversationSource(str(tmp_path / "a.txt"))
