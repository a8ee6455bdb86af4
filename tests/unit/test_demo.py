"""`infir2 demo`: which chain it takes on which machine."""

from pathlib import Path
from typing import Any

import pytest

from infir2.cli import main
from infir2.stages import demo, doctor


def findings(backend: str, *memory_gib: float) -> dict[str, Any]:
    return {"fp8": {"backend": backend}, "gpus": [{"memory_gib": size} for size in memory_gib]}


def test_the_larger_chain_needs_a_gpu_that_multiplies_fp8_and_has_the_memory() -> None:
    assert demo.default_size(findings("reference")) == "tiny"
    assert demo.default_size(findings("cublas", 79.2)) == "small"
    assert demo.default_size(findings("cublas", 139.8, 139.8)) == "small"
    assert demo.default_size(findings("cublas", 19.5)) == "tiny", "a slice of a GPU"
    assert demo.default_size(findings("reference", 79.2)) == "tiny", "an older GPU: FP8 is emulated"


def test_it_asks_doctor() -> None:
    assert demo.this_machine()["fp8"] == doctor.examine()["fp8"]


def listed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["demo", "--list", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("machine", "size"), [(findings("reference"), "tiny"), (findings("cublas", 79.2), "small")])
def test_the_machine_decides_unless_the_user_does(
    machine: dict[str, Any],
    size: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "this_machine", lambda: machine)
    out = ["--out", str(tmp_path / "demo")]
    assert f"cpt_{size}.toml" in listed(out, capsys)
    other = {"tiny": "small", "small": "tiny"}[size]
    text = listed([*out, "--size", other], capsys)
    assert f"cpt_{other}.toml" in text
    assert f"cpt_{size}.toml" not in text


@pytest.mark.parametrize("size", demo.SIZES)
def test_the_corpus_is_text_of_this_machine(size: str) -> None:
    assert sum(path.stat().st_size for path in demo.corpus(size).rglob("*.py")) > {"tiny": 5e6, "small": 3e7}[size]
