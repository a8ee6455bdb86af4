"""`infir2 bench` on a tiny shape: every kind runs, prints a table and writes what it measured."""

import json
from pathlib import Path

import pytest

from infir2.cli import main

SMALL = ["--model", "tiny", "--repeats", "1"]


def rows(tmp_path: Path, *words: str) -> list[dict]:
    assert main(["bench", *words, *SMALL, "--json", str(tmp_path / "out.json")]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert {"command", "device", "versions"} <= record.keys()
    return record["rows"]


def test_a_step_of_each_precision_and_of_a_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--batch", "1", "--length", "64", "--layers", "1", "--no-compile", "--optimizer", "--peers", "hf"]
    found = rows(tmp_path, "step", *words, "--precisions", "bf16", "hybrid/recompute")
    assert [row["what"] for row in found] == ["infir2 bf16", "infir2 hybrid/recompute", "hf"]
    assert all(row["step ms"] > row["inference ms"] > 0 and row["with AdamW ms"] > 0 for row in found)
    assert found[1]["speed-up"] == pytest.approx(found[0]["step ms"] / found[1]["step ms"])
    assert "hybrid/recompute" in capsys.readouterr().out


def test_decoding(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, "decode", "--batch", "2", "--length", "8", "--new", "6", "--precisions", "blockwise")
    assert row["decode tokens/s"] == pytest.approx(2e3 / row["step ms"])
    assert row["prefill tokens/s"] > 0


@pytest.mark.parametrize("what", ["gemm", "quantize"])
def test_kernels(tmp_path: Path, what: str) -> None:
    assert len(rows(tmp_path, what, "--batch", "1", "--length", "128")) > 4


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decode", "--precisions", "hybrid/fp16"]) == 2
    assert main(["bench", "decode", "--precisions", "hybrid/bf16", *SMALL]) == 2
    assert "give hybrid" in capsys.readouterr().err
