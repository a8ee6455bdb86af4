"""CheckpointStore in one process: round trips, damage, retention, key accounting, failures that must surface."""

import errno
import io
import json
import os
import random
import re
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from infir2.checkpoint import manifest
from infir2.checkpoint.folders import peek_meta
from infir2.checkpoint.state import model_state, optimizer_state
from infir2.checkpoint.store import CheckpointStore
from infir2.errors import CheckpointError


class Tied(nn.Module):
    def __init__(self, seed: int, hidden: int = 6) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(9, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, 9, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.arange(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(tokens)))


def trained(seed: int, steps: int = 3, hidden: int = 6) -> tuple[Tied, torch.optim.AdamW]:
    model = Tied(seed, hidden)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.arange(9)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model_state(model), "optim": optimizer_state(model, optimizer)}


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    state = everything(model, optimizer)
    flat = {**state["model"], **{f"{n}.{k}": t for n, part in state["optim"].items() for k, t in part.items()}}
    return {name: tensor.numpy().tobytes() for name, tensor in flat.items()}


def save_steps(root: Path, *steps: int, **options: Any) -> CheckpointStore:
    store = CheckpointStore(root, **options)
    for step in steps:
        store.save(
            step, {"model": {"w": torch.full((4, 5), float(step)), "b": torch.arange(3) + step}}, {"tokens": step}
        )
    store.wait()
    return store


def save_and_wait(store: CheckpointStore, step: int, tensors: dict[str, Any]) -> None:
    store.save(step, tensors, {})
    store.wait()


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("async_save", [False, True])
def test_round_trip_is_bit_equal_and_in_place(tmp_path: Path, async_save: bool) -> None:
    model, optimizer = trained(1)
    meta = {"tokens": 123, "skipped": 0, "config": {"optim": {"lr": 0.1}}, "loss": 2.5}
    with CheckpointStore(tmp_path / "checkpoints", async_save=async_save) as store:
        store.save(7, everything(model, optimizer), meta)
    other, fresh = trained(2, steps=0)
    assert bits(other, fresh) != bits(model, optimizer)
    store = CheckpointStore(tmp_path / "checkpoints")
    path = store.latest()
    assert path == tmp_path / "checkpoints" / "step-000007"
    assert store.load(path, everything(other, fresh)) == {"step": 7, **meta}
    assert bits(other, fresh) == bits(model, optimizer)
    assert other.head.weight is other.embed.weight
    for pair in ((model, optimizer), (other, fresh)):  # The optimiser goes on from the same place.
        pair[0](torch.arange(9)).sum().backward()
        pair[1].step()
    assert bits(other, fresh) == bits(model, optimizer)


def test_state_of_a_fresh_optimizer_is_neutral() -> None:
    plain, asked = trained(3, steps=0), trained(3, steps=0)
    optimizer_state(*asked)
    for model, optimizer in (plain, asked):
        model(torch.arange(9)).sum().backward()
        optimizer.step()
    assert bits(*plain) == bits(*asked)
    assert optimizer_state(*asked)["embed.weight"]["step"] == 1
    assert "head.weight" not in optimizer_state(*asked), "a tied weight is stored once"


def test_async_save_copies_before_it_returns(tmp_path: Path) -> None:
    weight = torch.randn(2_000_000)
    expected = weight.clone()
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"w": weight}, {})
        weight.zero_()
    store.load(tmp_path / "step-000001", {"w": weight})
    assert torch.equal(weight, expected)


def test_only_tensors_and_json_are_accepted(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with pytest.raises(TypeError, match=r"optim\.lr"):
        store.save(1, {"optim": {"lr": 0.1}}, {})
    with pytest.raises(TypeError, match="JSON"):
        store.save(1, {"w": torch.zeros(2)}, {"rng": torch.zeros(2)})
    assert store.latest() is None
    assert names(tmp_path) == []


def test_100_bit_flips_are_found_and_the_previous_checkpoint_is_used(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    store = save_steps(root, 1, 2)
    files = sorted(path for path in (root / "step-000002").iterdir())
    assert {".metadata", "MANIFEST.json", "meta.json", "__0_0.distcp"} == {path.name for path in files}
    dice = random.Random(0)
    target = {"model": {"w": torch.zeros(4, 5), "b": torch.zeros(3, dtype=torch.int64)}}
    for trial in range(100):
        path = files[trial % len(files)]
        bit = dice.randrange(path.stat().st_size * 8)
        flip_bit(path, bit)
        assert store.latest() == root / "step-000001", f"{path.name} bit {bit}"
        assert path.name in store.problems[0]
        with pytest.raises(CheckpointError, match=path.name.replace(".", r"\.")):
            store.load(root / "step-000002", target)
        assert not target["model"]["w"].any(), "nothing may be loaded from a damaged checkpoint"
        flip_bit(path, bit)
    assert store.latest() == root / "step-000002"
    assert store.problems == []


def test_damage_after_latest_is_found_by_load(tmp_path: Path) -> None:
    store = save_steps(tmp_path, 1)
    path = store.latest()
    flip_bit(path / "__0_0.distcp", 4000)
    with pytest.raises(CheckpointError, match="SHA-256"):
        store.load(path, {"model": {"w": torch.zeros(4, 5), "b": torch.zeros(3, dtype=torch.int64)}})


def test_50_truncated_or_missing_files_are_found(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    store = save_steps(root, 1, 2)
    files = sorted((root / "step-000002").iterdir())
    dice = random.Random(1)
    for trial in range(50):
        path = files[trial % len(files)]
        data = path.read_bytes()
        path.unlink()
        if trial % 5:
            path.write_bytes(data[: dice.randrange(len(data))])
        assert store.latest() == root / "step-000001", path.name
        assert path.name in store.problems[0]
        path.write_bytes(data)
    assert store.latest() == root / "step-000002"


@pytest.mark.parametrize("name", ["MANIFEST.json", "meta.json", "__0_0.distcp"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_what_cannot_be_read_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """Neither passed over for an older one nor replaced: it may be the network's or the administrator's fault."""
    store = save_steps(tmp_path, 1, 2)
    closed, before = tmp_path / "step-000002" / name, names(tmp_path / "step-000002")
    with monkeypatch.context() as patch:
        for module, function in ((os, "open"), (io, "open")):
            patch.setattr(module, function, refusing(closed, number, getattr(module, function)))
        for act in (
            store.latest,
            lambda: store.find(str(tmp_path)),
            lambda: store.find(str(tmp_path / "step-000002")),
        ):
            with pytest.raises(CheckpointError, match=re.escape(f"{closed}: cannot be read: {os.strerror(number)}")):
                act()
        if name == "meta.json":
            with pytest.raises(CheckpointError, match="cannot be read"):
                peek_meta(tmp_path)
        with pytest.raises(CheckpointError, match=re.escape(f"{os.strerror(number)} ({closed})")):
            CheckpointStore(tmp_path, async_save=False).save(2, everything(*trained(9)), {})
    assert store.latest() == tmp_path / "step-000002"
    assert (store.problems, names(tmp_path / "step-000002")) == ([], before)


def refusing(closed: Path, number: int, true: Callable[..., Any]) -> Callable[..., Any]:
    def opened(path: Any, *args: Any, **more: Any) -> Any:
        if path == closed:
            raise OSError(number, os.strerror(number), str(path))
        return true(path, *args, **more)

    return opened


def test_no_intact_checkpoint_is_an_error_and_none_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert CheckpointStore(tmp_path / "absent").latest() is None
    store = save_steps(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / f"step-00000{step}" / "meta.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"none of 2 .*meta\.json"):
        store.latest()
    assert len(store.problems) == 2
    told = [record.getMessage() for record in caplog.records if record.name == "infir2.checkpoint.store"]
    assert told == [f"damaged checkpoint passed over: {problem}" for problem in store.problems]


def test_a_damaged_checkpoint_is_told_in_one_plain_line(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    flip_bit(tmp_path / "step-000002" / "meta.json", 1)
    look = f"from infir2.checkpoint.store import *; CheckpointStore(Path({str(tmp_path)!r})).latest()"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"damaged checkpoint passed over: {tmp_path}/step-000002/meta.json: ")


def test_retention(tmp_path: Path) -> None:
    save_steps(tmp_path, *range(1, 13), keep=2, keep_every=5)
    assert names(tmp_path) == ["step-000005", "step-000010", "step-000011", "step-000012"]
    save_steps(tmp_path, 13, keep=0)
    assert len(names(tmp_path)) == 5


def test_damaged_checkpoints_do_not_push_good_ones_out(tmp_path: Path) -> None:
    store = save_steps(tmp_path, 10, 20, 30, 40, keep=3)
    assert names(tmp_path) == ["step-000020", "step-000030", "step-000040"]
    flip_bit(tmp_path / "step-000040" / "__0_0.distcp", 99)
    assert store.latest() == tmp_path / "step-000030"
    store.keep = 2
    save_and_wait(store, 35, {"w": torch.zeros(2)})
    assert names(tmp_path) == ["step-000030", "step-000035", "step-000040"], "two good ones, and the evidence"
    assert store.latest() == tmp_path / "step-000035"
    for step in (45, 55):
        save_and_wait(store, step, {"w": torch.zeros(2)})
    assert names(tmp_path) == ["step-000045", "step-000055"]


def test_saving_a_step_again(tmp_path: Path) -> None:
    store = save_steps(tmp_path, 1, 2)
    before = (tmp_path / "step-000002").stat().st_ino
    store.save(2, {"w": torch.ones(1)}, {})
    store.wait()
    assert (tmp_path / "step-000002").stat().st_ino == before, "an intact checkpoint is left alone"
    flip_bit(tmp_path / "step-000002" / "meta.json", 5)
    store.save(2, {"w": torch.ones(1)}, {})
    store.wait()
    assert store.latest() == tmp_path / "step-000002"
    assert names(tmp_path) == ["step-000001", "step-000002"]
    loaded = {"w": torch.zeros(1)}
    store.load(tmp_path / "step-000002", loaded)
    assert loaded["w"] == 1


def test_a_checkpoint_moved_to_another_disk_and_linked(tmp_path: Path) -> None:
    """Retention takes the link away and nothing else; what is left of it keeps no later save from being made."""
    root = tmp_path / "checkpoints"
    save_steps(root, 1, 2)
    (root / "step-000001").rename(tmp_path / "moved")
    (root / "step-000001").symlink_to(tmp_path / "moved")
    before = names(tmp_path / "moved")
    assert CheckpointStore(root).find(str(root / "step-000001")) == root / "step-000001"
    save_steps(root, 3, 4, keep=2)
    assert names(root) == ["step-000003", "step-000004"]
    assert names(tmp_path / "moved") == before
    (root / ".trash-step-000002-0a1b2c3d").symlink_to(tmp_path / "moved")  # a kill came between the two steps
    save_steps(root, 5, keep=2)
    assert names(root) == ["step-000004", "step-000005"]


def test_leftovers_that_cannot_be_deleted_keep_no_checkpoint_from_being_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that another machine holds open, say."""
    true = manifest.shutil.rmtree

    def rmtree(path: Path, **options: Any) -> None:
        if path.name == ".trash-a":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        true(path, **options)

    for name in (".trash-a", ".trash-b", ".tmp-step-000009"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(manifest.shutil, "rmtree", rmtree)
    save_steps(tmp_path, 1)
    assert names(tmp_path) == [".trash-a", "step-000001"]
    assert f"an old checkpoint could not be deleted: {os.strerror(errno.EBUSY)}" in caplog.text


def test_leftovers_are_removed_by_the_first_save(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    for name in (".tmp-step-000002", ".trash-step-000001-ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_text("half")
    with CheckpointStore(tmp_path) as store:
        store.latest()
        assert len(names(tmp_path)) == 3, "reading must not touch another process's folder"
        store.save(3, {"w": torch.ones(1)}, {})
    assert names(tmp_path) == ["step-000001", "step-000003"]


def test_every_key_is_accounted_for(tmp_path: Path) -> None:
    store = save_steps(tmp_path, 1)
    path = tmp_path / "step-000001"
    w, b = torch.zeros(4, 5), torch.zeros(3, dtype=torch.int64)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": {"w": w, "b": b, "extra": b}}, r"missing from the checkpoint: model\.extra"),
        ({"model": {"w": w}}, r"not expected: model\.b"),
        ({"model": {"w": w.T, "b": b}}, r"model\.w \[4, 5\] torch\.float32 \(expected \[5, 4\]"),
        ({"model": {"w": w.half(), "b": b}}, r"expected \[4, 5\] torch\.float16"),
        ({"optim": {"w": w}}, r"missing .*optim\.w; .*not expected: model\.b, model\.w"),
    ]
    for tensors, message in cases:
        with pytest.raises(CheckpointError, match=message):
            store.load(path, tensors)
    many = {"model": {"w": w, "b": b}, "more": {f"x{i:02}": w for i in range(20)}}
    with pytest.raises(CheckpointError, match=r"more\.x03, \.\.\. \(20 in all\)"):
        store.load(path, many)
    assert not w.any(), "nothing may be loaded when the keys do not fit"


def test_sections_can_be_left_unread(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    with CheckpointStore(tmp_path) as store:
        store.save(1, everything(model, optimizer), {})
    other, _ = trained(2)
    with pytest.raises(CheckpointError, match="not expected"):
        store.load(tmp_path / "step-000001", {"model": model_state(other)})
    store.load(tmp_path / "step-000001", {"model": model_state(other)}, ignore=["optim"])
    assert torch.equal(other.embed.weight, model.embed.weight)


def test_find(tmp_path: Path) -> None:
    run = tmp_path / "run"
    store = save_steps(run / "checkpoints", 1, 2)
    newest = run / "checkpoints" / "step-000002"
    for text in (run, run / "checkpoints", newest):
        assert store.find(str(text)) == newest
    assert store.find(str(run / "checkpoints" / "step-000001")).name == "step-000001"
    flip_bit(newest / "meta.json", 1)
    assert store.find(str(run)).name == "step-000001"
    with pytest.raises(CheckpointError, match=r"step-000002/meta\.json: damaged"):
        store.find(str(newest))
    with pytest.raises(CheckpointError, match="no such"):
        store.find(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="no checkpoint in it"):
        store.find(str(tmp_path))


def test_async_failure_surfaces_at_poll(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    root.write_text("a file where the folder should be")
    store = CheckpointStore(root)
    store.save(1, {"w": torch.zeros(3)}, {})
    store._thread.join(20)  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match=r"checkpoints: step 1 could not be saved: .*exists"):
        store.poll()
    store.poll()  # Told once.
    root.unlink()
    store.save(2, {"w": torch.zeros(3)}, {})
    store.close()
    assert store.latest() == root / "step-000002"


@contextmanager
def limited_file_size(folder: Path) -> Iterator[Path]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A 1.5 MiB tmpfs; where mounting is not allowed, a limit on file size, which fails in the same place."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        with limited_file_size(folder):
            yield folder
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("disk", [small_disk, limited_file_size])
@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_surfaces_and_loses_nothing(tmp_path: Path, disk: Callable[[Path], Any], async_save: bool) -> None:
    (tmp_path / "disk").mkdir()
    with disk(tmp_path / "disk") as folder:
        store = save_steps(folder / "checkpoints", 1, async_save=async_save)
        with pytest.raises(
            CheckpointError, match=rf"{folder}/checkpoints: step 2 .*(No space left|File too large).*; make room"
        ):
            save_and_wait(store, 2, {"w": torch.zeros(1_000_000)})
        assert names(folder / "checkpoints") == ["step-000001"], "the temporary folder is removed"
        target = {"model": {"w": torch.zeros(4, 5), "b": torch.zeros(3, dtype=torch.int64)}}
        assert store.load(store.latest(), target) == {"step": 1, "tokens": 1}
        assert (target["model"]["w"] == 1).all()
        save_steps(folder / "checkpoints", 3)  # And there is still room for one that fits.
        assert store.latest().name == "step-000003"


def test_the_manifest_is_canonical(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    path = tmp_path / "step-000001" / manifest.MANIFEST
    table = json.loads(path.read_text())
    path.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="digest"):
        manifest.read(path.parent)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        path.write_bytes(manifest.encode({k: manifest.Entry(**v) for k, v in table["files"].items()}))
        assert CheckpointStore(tmp_path).latest() == path.parent
