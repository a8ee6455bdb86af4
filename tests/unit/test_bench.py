"""`infir2 bench` on a tiny shape: every kind runs, prints a table and writes what it measured."""

import argparse
import ast
import json
from pathlib import Path

import pytest
import torch

from infir2 import kernels
from infir2.benchmark.step import kernel_family
from infir2.cli import main
from infir2.stages import bench

KERNELS = Path(kernels.__file__).parent
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
    # One repetition on a busy machine says nothing of which takes longer.
    assert all(row[name] > 0 for row in found for name in ("inference ms", "forward ms", "step ms", "with AdamW ms"))
    assert found[1]["speed-up"] == pytest.approx(found[0]["step ms"] / found[1]["step ms"])
    shown = capsys.readouterr()
    assert "hybrid/recompute" in shown.out
    told = [line.partition(":")[0] for line in shown.err.splitlines() if line.startswith("measuring")]
    assert told == ["measuring infir2 bf16", "measuring infir2 hybrid/recompute", "measuring hf"]


def test_a_narrow_terminal_breaks_no_word_and_no_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    (row,) = rows(tmp_path, "decode", "--batch", "2", "--length", "8", "--new", "6", "--precisions", "bf16")
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for key, value in row.items():
        assert all(word in shown for word in key.split())
        assert bench._text(value) in shown


def test_decoding(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, "decode", "--batch", "2", "--length", "8", "--new", "6", "--precisions", "blockwise")
    assert row["decode tokens/s"] == pytest.approx(2e3 / row["step ms"])
    assert row["prefill tokens/s"] > 0


@pytest.mark.parametrize("what", ["gemm", "quantize"])
def test_kernels(tmp_path: Path, what: str) -> None:
    assert len(rows(tmp_path, what, "--batch", "1", "--length", "128")) > 4


def test_attention(tmp_path: Path) -> None:
    whole, packed = rows(tmp_path, "attention", "--batch", "2", "--length", "96")
    assert [whole["documents"], whole["longest"]] == [2, 96]
    assert packed["documents"] > 4
    assert packed["longest"] <= 96
    assert whole["kernels"] == packed["kernels"] == "torch"
    for row in (whole, packed):
        assert row["backward TFLOP/s"] == pytest.approx(
            2.5 * row["forward TFLOP/s"] * row["forward ms"] / row["backward ms"]
        )


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decode", "--precisions", "hybrid/fp16"]) == 2
    assert "argument --precisions: invalid choice: 'hybrid/fp16'" in capsys.readouterr().err
    assert main(["bench", "decode", "--precisions", "hybrid/bf16", *SMALL]) == 2
    assert "give hybrid" in capsys.readouterr().err
    for words, message in (
        (["--new", "1"], "--new 1: give at least 2"),
        (["--batch", "0"], "--batch 0: give at least 1"),
        (["--layers", "-1"], "--layers -1: give at least 0"),
    ):
        assert main(["bench", "decode", *SMALL, *words]) == 2
        assert capsys.readouterr().err == f"infir2: error: {message}\n"
    assert main(["bench", "decode", "--model", "tinny"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("infir2: error: --model tinny: no such preset; there are micro, tiny, ")
    assert line.endswith("Did you mean 'tiny'?")
    assert main(["bench", "gemm", *SMALL, "--json", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"infir2: error: --json {tmp_path}: is a folder; name a file"


def test_the_size_follows_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    def chosen(on_gpu: bool, *words: str) -> tuple[str, int, int, int]:
        parser = argparse.ArgumentParser()
        bench.add_arguments(parser)
        args = parser.parse_args(["step", *words])
        bench.choose_size(args, on_gpu)
        return args.model, args.length, args.new, args.repeats

    assert chosen(True) == ("qwen2.5-1.5b", 8192, 1024, 10)
    assert chosen(True, "--model", "qwen2.5-7b", "--repeats", "2") == ("qwen2.5-7b", 8192, 1024, 2)
    assert capsys.readouterr().err == ""
    assert chosen(False) == ("tiny", 512, 64, 3)
    assert "no GPU here: FP8 is emulated; tiny, 2 x 512 tokens, 3 repetitions" in capsys.readouterr().err
    assert chosen(False, "--model", "small-150m", "--length", "64") == ("small-150m", 64, 64, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU gets through it")
def test_a_large_model_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--model", "qwen2.5-1.5b"]) == 2
    message = "--model qwen2.5-1.5b: no GPU here, and a CPU would take hours; give one of micro, tiny, small-150m"
    assert capsys.readouterr().err == f"infir2: error: {message}\n"


FAMILIES = {
    "attention": "paged_attention paged_decode rotary_qkv_cache",
    "quantise": "quantize row_codes transpose fidelity",
    "norm, rotary, SwiGLU (and quantise)": "norm add_norm rotary rotary_qkv swiglu",
    "sampling": "sample sample_filter",
    "cross-entropy": "cross_entropy logprob",
    "gemm fp8": "split_k",
    "optimiser": "adamw",
}
"""Family of --profile -> the files, without their ending, whose kernels it holds."""


def test_every_kernel_of_ours_is_profiled_under_its_family() -> None:
    found: dict[str, set[str]] = {}
    for path in KERNELS.glob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        for launched in (func.value for func in calls if isinstance(func, ast.Subscript)):  # kernel[grid](...)
            assert isinstance(launched, ast.Name), f"{path.name}: {ast.unparse(launched)}"
            found.setdefault(kernel_family(launched.id), set()).add(path.stem.removesuffix("_triton"))
    assert found == {family: set(files.split()) for family, files in FAMILIES.items()}
