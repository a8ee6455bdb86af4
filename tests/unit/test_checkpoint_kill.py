"""SIGKILL at random moments of repeated saves: what was acknowledged is never lost, nothing damaged looks valid."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from infir2.checkpoint.store import CheckpointStore

KILLS = 60
SAVES = 6


def state(step: int) -> dict[str, Any]:
    return {
        "model": {"w": torch.arange(600).view(20, 30) * 0.5 + step, "b": torch.full((7,), float(step))},
        "optim": {"w": {"exp_avg": torch.full((20, 30), step / 3), "step": torch.tensor(float(step))}},
    }


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return torch.equal(left, right)


def child(root: Path, async_save: bool, durable: int) -> None:
    """Resume, save SAVES more steps while 'training' overwrites the tensors; report each durable step on a pipe."""
    torch.set_num_threads(1)
    store = CheckpointStore(root, keep=2, async_save=async_save)
    path = store.latest()
    first = int(path.name[5:]) if path else 0
    tensors = state(first)
    for step in range(first + 1, first + 1 + SAVES):
        new = state(step)
        for section in ("w", "b"):
            tensors["model"][section].copy_(new["model"][section])
        tensors["optim"]["w"]["exp_avg"].copy_(new["optim"]["w"]["exp_avg"])
        tensors["optim"]["w"]["step"].fill_(step)
        store.save(step, tensors, {"tokens": step * 10})
        if step % 2 or not async_save:
            store.wait()
            os.write(durable, step.to_bytes(4, "big"))
    store.close()


def run_child(root: Path, async_save: bool, seconds: float | None) -> tuple[bool, int]:
    """Fork a child and kill it after ``seconds`` (None: never). Returns (finished, last step it knew to be on disk)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child(root, async_save, write)
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed by itself"
    with open(read, "rb") as pipe:
        known = pipe.read()
    return not os.WIFSIGNALED(status), int.from_bytes(known[-4:], "big")


@pytest.mark.parametrize("async_save", [False, True])
def test_sigkill_at_random_moments(tmp_path: Path, async_save: bool) -> None:
    root, dice = tmp_path / "checkpoints", random.Random(7)
    begin = time.perf_counter()
    assert run_child(root, async_save, None)[0]
    whole = time.perf_counter() - begin
    finished = unfinished_folders = 0
    newest = SAVES
    for _ in range(KILLS // 2):
        done, acknowledged = run_child(root, async_save, dice.uniform(0, 1.25 * whole))
        finished += done
        whole *= 0.9 if done else 1.05  # Keeps some runs finishing, however busy the machine is.
        unfinished_folders += any(path.name.startswith((".tmp-", ".trash-")) for path in root.iterdir())
        store = CheckpointStore(root)
        path = store.latest()
        assert path is not None
        assert store.problems == []
        step = int(path.name[5:])
        assert step >= max(newest, acknowledged), "a checkpoint that was on disk is gone"
        for folder in root.glob("step-*"):
            loaded = state(0)
            meta = store.load(folder, loaded)  # Every folder that is there is whole, not only the newest.
            number = int(folder.name[5:])
            assert meta == {"step": number, "tokens": number * 10}
            assert same(loaded, state(number))
        newest = step
    assert 2 <= finished < KILLS // 2, f"{finished} runs finished"
    assert unfinished_folders >= 3, "the kills must also hit the middle of a save"
    assert newest > SAVES * 3
