"""What both ranks of test_checkpoint_reshard.py run under torchrun: load at two ranks what one rank saved, and back; as
shards and as replicas."""

import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from infir2.checkpoint import store as store_module
from infir2.checkpoint.huggingface import load_into
from infir2.checkpoint.state import cpu_copy, flatten, model_state, optimizer_state
from infir2.checkpoint.store import CheckpointStore
from infir2.errors import CheckpointError


class Toy(nn.Module):
    """Uneven shards (7 rows, 1 row), a tied weight, a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 5)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.gate = nn.Linear(5, 1)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x * self.gate(x))


def build(seed: int, shard: bool) -> tuple[Toy, torch.optim.AdamW]:
    model = Toy(seed)
    if shard:
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.05)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        model(torch.arange(7)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model_state(model), "optim": optimizer_state(model, optimizer)}


def full(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Whole tensors of a state dict (collective)."""
    flat = flatten(tensors)
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in flat.items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def error_of(work: Any) -> str:
    try:
        work()
    except CheckpointError as error:
        return str(error)
    raise AssertionError("no CheckpointError")


def agreed(value: object) -> None:
    """Every rank has come to the same answer."""
    answers: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, value)
    assert answers == [value] * len(answers), answers


def reshard(work: Path) -> None:
    model, optimizer = build(2, shard=True)
    with CheckpointStore(work / "one") as store:
        path = store.latest()
        assert path is not None
        assert store.load(path, everything(model, optimizer)) == {"step": 5, "tokens": 50}
    assert same(full(everything(model, optimizer)), load_file(work / "one.safetensors")), "1 -> 2"

    train(model, optimizer, 2)
    with torch.no_grad():
        model(torch.arange(7))  # Leaves FSDP2's root parameters gathered.
    with CheckpointStore(work / "two") as store:
        store.save(7, everything(model, optimizer), {"tokens": 70})
        expected = full(everything(model, optimizer))
        train(model, optimizer, 1)  # Overwrites what is being saved.
    if dist.get_rank() == 0:
        save_file(expected, work / "two.safetensors")
    other, fresh = build(3, shard=True)
    store = CheckpointStore(work / "two")
    store.load(work / "two" / "step-000007", everything(other, fresh))
    assert same(full(everything(other, fresh)), expected), "2 -> 2"


def replicas(work: Path) -> None:
    """Both ranks hold the whole model: from one process, to shards, and from shards; each tensor is copied once."""
    model, optimizer = build(2, shard=False)
    store = CheckpointStore(work / "copies")
    store.load(work / "one" / "step-000005", everything(model, optimizer))
    assert same(full(everything(model, optimizer)), load_file(work / "one.safetensors")), "1 -> replicas"

    train(model, optimizer, 2)
    copied: list[Tensor] = []
    store_module.cpu_copy = lambda tensor: copied.append(tensor) or cpu_copy(tensor)
    store.save(7, everything(model, optimizer), {})
    store_module.cpu_copy = cpu_copy
    expected = full(everything(model, optimizer))
    train(model, optimizer, 1)  # Overwrites what is being saved.
    store.wait()
    counts: list[int] = [0, 0]
    dist.all_gather_object(counts, len(copied))
    assert sum(counts) == len(expected)
    assert max(counts) - min(counts) <= 1
    assert {f"__{rank}_0.distcp" for rank in (0, 1)} <= {item.name for item in store.folder(7).iterdir()}
    sharded, fresh = build(3, shard=True)
    store.load(store.folder(7), everything(sharded, fresh))
    assert same(full(everything(sharded, fresh)), expected), "replicas -> shards"

    store.load(work / "two" / "step-000007", everything(model, optimizer))
    assert same(full(everything(model, optimizer)), load_file(work / "two.safetensors")), "shards -> replicas"


def faults(work: Path) -> None:
    model, optimizer = build(4, shard=True)
    root = work / "faults"
    store = CheckpointStore(root, keep=2)
    for step in (1, 2, 3):
        store.save(step, everything(model, optimizer), {})
    store.wait()
    agreed(sorted(path.name for path in root.iterdir()))
    assert not (root / "step-000001").exists()
    dist.barrier()
    if dist.get_rank() == 0:
        file = root / "step-000003" / "__1_0.distcp"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    dist.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agreed(str(store.latest()))
    assert store.latest() == root / "step-000002"
    assert "__1_0.distcp" in store.problems[0]
    agreed(store.problems)
    agreed(error_of(lambda: store.load(root / "step-000003", everything(model, optimizer))))
    message = error_of(lambda: store.load(root / "step-000002", {"model": model_state(model)}))
    assert "optim.embed.weight.exp_avg" in message
    agreed(message)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(root)
        root.write_text("")
    dist.barrier()
    store.save(4, everything(model, optimizer), {})
    message = error_of(store.wait)
    assert "step 4 could not be saved" in message
    agreed(message)


def huggingface(work: Path) -> None:
    model, _ = build(5, shard=True)
    load_into(model, work / "hf")
    expected = load_file(work / "hf" / "model.safetensors")
    assert same(full(model_state(model)), expected)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    for part in (reshard, replicas, faults, huggingface):
        part(folder)
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"{part.__name__} ok", flush=True)
    dist.destroy_process_group()
