"""Fine-tuning with two torchrun processes (gloo; shards of FSDP2, or replicas) against one: the same rows and losses,
one set of row files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import loss_bits, metrics_lines, write_model

from infir2 import cli
from infir2.data import tokenizer as tok

ROOT = Path(__file__).parents[2]


def write_recipe(folder: Path, name: str, rows: Path, model: Path) -> tuple[Path, Path]:
    path = folder / f"{name}.toml"
    path.write_text(
        f"""run = "{folder / name}"
model = {{ path = "{model}", dtype = "float32" }}
fp8 = {{ recipe = "bf16" }}
data = {{ train = "{rows}", max_length = 64, max_tokens_per_gpu = 128 }}
optim = {{ lr = 2e-3, schedule = "cosine", warmup_fraction = 0.2 }}
train = {{ epochs = 1, global_batch = 5, eval_every = 3, save_every = 0 }}
log = {{ tensorboard = false }}
"""
    )
    return path, folder / name


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", vocab_size=384)
    tok.train_tokenizer(["user assistant 1+2 3."] * 3, 300, model)
    rows = tmp_path / "rows.jsonl"
    # The second step of an epoch has one row, so one of the processes has nothing but filling.
    rows.write_text("".join(json.dumps({"prompt": "1" * n, "completion": "2" * n}) + "\n" for n in range(1, 8)))
    alone, expected = write_recipe(tmp_path, "alone", rows, model)
    assert cli.main(["sft", str(alone)]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "infir2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name, copies in (("shards", "1"), ("replicas", "2")):
        path, run = write_recipe(tmp_path, name, rows, model)
        words = [*command, "sft", str(path), "--parallel.replicate", copies]
        done = subprocess.run(words, capture_output=True, text=True, timeout=200, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert [line["valid_tokens"] for line in metrics_lines(run)] == [
            line["valid_tokens"] for line in metrics_lines(expected)
        ]
        pairs = list(zip(loss_bits(run), loss_bits(expected), strict=True))
        worst = max(abs((ours[1] or ours[3]) / (theirs[1] or theirs[3]) - 1) for ours, theirs in pairs)
        print(f"{name}: largest relative difference of a loss {worst:.1e}")
        assert worst < 1e-5
        assert (run / "rows/rows.json").exists()

    rows.write_text('{"messages": []}\n')
    done = subprocess.run([*command, "sft", str(path)], capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode != 0
    assert done.stderr.count("infir2: error:") == 1, done.stderr
    assert f"{rows}:1: no_messages" in done.stderr


@pytest.mark.slow
def test_the_others_wait_for_a_long_tokenisation(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    worker = Path(__file__).with_name("slow_lead_worker.py")
    done = subprocess.run([*command, worker, tmp_path], capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
