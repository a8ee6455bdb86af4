"""infir2 doctor on this machine, and its judgement of machines that are not here."""

import argparse
import json
import subprocess
from pathlib import Path

import pytest

import infir2
from infir2.launch import environment
from infir2.stages import doctor


def test_json_is_one_object_and_agrees_with_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    assert doctor.run(argparse.Namespace(json=True)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert found["cpu_cores"] >= 1
    assert found["memory_gib"] > 0
    assert found["distributed"]["torchrun"] is True
    assert found["fp8"]["backend"] in ("cublas", "reference")
    assert found["advice"]


def test_the_table_names_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(argparse.Namespace(json=False)) == 0
    shown = capsys.readouterr().out
    words = ("python", "torch", "triton", "cores", "free here", "FP8 path", "torchrun yes", "flash-attn-4", "wandb")
    for word in words:
        assert word in shown


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(None, "emulated"), ("8.0", "emulated"), ("8.9", "native-rowwise"), ("9.0", "native-blockwise"),
     ("10.0", "native-rowwise"), ("12.0", "native-rowwise")],
)  # fmt: skip
def test_fp8_hardware_by_compute_capability(capability: str | None, expected: str) -> None:
    gpus = [] if capability is None else [{"compute_capability": capability}]
    assert doctor.fp8_hardware(gpus) == expected


def test_a_commit_is_that_of_our_own_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package inside somebody else's repository has none, unless the variable says."""
    package = tmp_path / "theirs" / ".venv" / "infir2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    git = ["git", "-C", str(tmp_path / "theirs"), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(infir2, "__file__", str(package / "__init__.py"))
    monkeypatch.delenv("INFIR2_COMMIT", raising=False)
    assert environment.commit() is None
    monkeypatch.setenv("INFIR2_COMMIT", "abc")
    assert environment.commit() == "abc"
    subprocess.run([*git, "add", "-f", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours now"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert environment.commit() == head


def test_advice_depends_on_what_is_there() -> None:
    def advice(gpus: int, backend: str, hardware: str, disk: float = 500.0) -> str:
        fp8 = {"backend": backend, "hardware": hardware}
        return doctor.advise({"gpus": [{}] * gpus, "disk_free_gib": disk, "fp8": fp8})

    assert "infir2 demo" in advice(0, "reference", "emulated")
    assert "--fp8.recipe bf16" in advice(1, "reference", "native-rowwise")
    assert "infir2 cpt RECIPE" in advice(1, "cublas", "native-blockwise")
    assert "--nproc-per-node 8" in advice(8, "cublas", "native-blockwise")
    assert "disk" in advice(8, "cublas", "native-blockwise", disk=3.0)
