"""Checkpoints between one process, two shards (torchrun, gloo, FSDP2) and two replicas: values bit-equal, AdamW's state
included."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file, save_file
from small_folder import write_tensors

from infir2.checkpoint.state import model_state
from infir2.checkpoint.store import CheckpointStore

WORKER = Path(__file__).parent / "checkpoint_worker.py"


def worker_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("checkpoint_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_checkpoints_reshard_between_one_and_two_ranks(tmp_path: Path) -> None:
    toy = worker_module()
    model, optimizer = toy.build(1, shard=False)
    toy.train(model, optimizer, 5)
    with CheckpointStore(tmp_path / "one") as store:
        store.save(5, toy.everything(model, optimizer), {"tokens": 50})
    save_file(toy.full(toy.everything(model, optimizer)), tmp_path / "one.safetensors")
    write_tensors(tmp_path / "hf", {"model_type": "toy"}, model_state(model).items(), dtype=None)

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    result = subprocess.run([*command, str(WORKER), str(tmp_path)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == ["reshard", "ok", "replicas", "ok", "faults", "ok", "huggingface", "ok"]

    other, fresh = toy.build(9, shard=False)
    store = CheckpointStore(tmp_path / "two")
    path = store.latest()
    assert path is not None
    assert {"__0_0.distcp", "__1_0.distcp"} <= {item.name for item in path.iterdir()}, "both ranks wrote"
    assert store.load(path, toy.everything(other, fresh)) == {"step": 7, "tokens": 70}
    assert toy.same(toy.full(toy.everything(other, fresh)), load_file(tmp_path / "two.safetensors")), "2 -> 1"
    assert other.head.weight is other.embed.weight
