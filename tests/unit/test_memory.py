"""Too little memory in the middle of a run: one line that names the keys that help, and nothing lost."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import small_chat
import torch
from rich.console import Console
from small_cpt import Recipe, cpt
from small_rl import rl
from small_run import loss_bits

from infir2 import cli
from infir2.config import CptConfig, SftConfig, load
from infir2.errors import UserError
from infir2.launch.inference import InferenceOptions, load_engine
from infir2.launch.memory import enough_for_training
from infir2.parallel.device import enough_memory
from infir2.stages.bench import _smaller
from infir2.train import step as step_module

KEPT = (
    "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.02 GiB is free"
)
# torch's own words on a GPU.
WORDS = (
    f"{KEPT}. Including non-PyTorch memory, this process has 78.09 GiB memory in use. If reserved but unallocated "
    "memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)


def out_of_memory_in_step_3(monkeypatch: pytest.MonkeyPatch, micro_batches: int) -> None:
    true, calls = step_module.forward_backward, iter(range(1, 10**6))

    def failing(*args: Any) -> dict[str, torch.Tensor]:
        if next(calls) > 2 * micro_batches:
            raise torch.OutOfMemoryError(WORDS)
        return true(*args)

    monkeypatch.setattr(step_module, "forward_backward", failing)


def test_pretraining(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"train.steps": 4, "train.save_every": 2}
    whole, expected = recipe("whole", **settings)
    assert cpt(whole) == 0
    path, run = recipe("short", **settings)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        out_of_memory_in_step_3(patch, micro_batches=2)
        assert cpt(path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "infir2: error: training needs more memory than this device has: lower train.micro_batch (2) or set "
        'train.activation_checkpointing = "full" ("none") or train with more processes; --dry-run estimates what each '
        f"part takes, and the same command goes on from the last checkpoint ({KEPT})"
    )
    assert cpt(path, "--train.activation_checkpointing", "full") == 0
    assert loss_bits(run) == loss_bits(expected)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error in: c10d/NCCLUtils.cpp:77, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
    ],
)
def test_memory_that_others_than_torchs_allocator_lack(words: str) -> None:
    with (
        pytest.raises(UserError, match=r"^training needs more memory than this device has: lower it"),
        enough_memory("training", "lower it"),
    ):
        raise RuntimeError(words)
    with pytest.raises(RuntimeError, match="illegal"), enough_memory("training", "lower it"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_reinforcement_learning(
    rl_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = rl_recipe(**{"train.eval_every": 0, "train.activation_checkpointing": "full"})
    out_of_memory_in_step_3(monkeypatch, micro_batches=0)
    assert rl(path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has: lower data.max_tokens_per_gpu (256) or lower rollout.cache_tokens (4096); --dry-run" in line


def test_a_bench(capsys: pytest.CaptureFixture[str]) -> None:
    """More than any address: this is the allocator's own error."""
    assert cli.main(["bench", "gemm", "--model", "tiny", "--batch", "1", "--length", str(10**15)]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("infir2: error: bench gemm needs more memory than this device has: lower --length (10000000")
    assert "or take another --model (tiny) (" in line
    assert _smaller(argparse.Namespace(batch=1, length=1, model="tiny")) == "take another --model (tiny)"


def test_an_engine(tmp_path: Path) -> None:
    model, options = small_chat.write_chat_model(tmp_path), InferenceOptions(cache_tokens=10**14)
    with pytest.raises(UserError, match=r"the engine needs more memory .*: lower --cache-tokens \(100000000000000\), "):
        load_engine(str(model), options, Console(quiet=True))


def test_the_failure_behind_another_one() -> None:
    """While a CUDA graph is captured: what is raised then says nothing of memory."""
    train, data = {"epochs": 1, "global_batch": 2}, {"train": "x.jsonl"}
    table = {"run": "x", "model": {"path": "hf"}, "data": data, "train": train, "optim": {"lr": 1e-3}}
    config = SftConfig.model_validate(table)

    def capture() -> None:
        try:
            raise torch.OutOfMemoryError(WORDS)
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    with (
        pytest.raises(UserError, match=r"lower data.max_tokens_per_gpu \(32768\) or .*Tried to allocate 2.25 GiB"),
        enough_for_training(config),
    ):
        capture()
    with pytest.raises(RuntimeError, match="shapes differ"), enough_for_training(config):
        raise RuntimeError("shapes differ")


def test_replicas_are_told_to_share(recipe: Recipe) -> None:
    path, _ = recipe("copies", **{"parallel.replicate": 4})
    told = r'"full" \("none"\) or lower parallel.replicate \(4\);'
    with pytest.raises(UserError, match=told), enough_for_training(load(CptConfig, path)):
        raise torch.OutOfMemoryError(WORDS)
