"""The world a run lives in: one process, or the processes that torchrun started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from infir2.errors import ConfigError

_TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others."""


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None
    """What FSDP2 shards the model over: 1-D (shard) or 2-D (replicate, shard). None where every process holds the whole
    model: a single process, or replicas."""

    @property
    def replicas(self) -> int:
        """Processes that hold the same part of the model: its copies."""
        if self.mesh is None:
            return self.size
        return self.mesh.size(0) if self.mesh.ndim == 2 else 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, in place; a no-op in a single process."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


@contextmanager
def world(replicate: int | None = 1) -> Iterator[World]:
    """Join torchrun's process group if there is one; leave it at the end. ``replicate``: copies of the model that the
    processes hold together; None: one each.

    Raises ConfigError where ``replicate`` does not divide the number of processes.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    replicate = size if replicate is None else replicate
    if size % replicate:
        raise ConfigError(
            f"parallel.replicate ({replicate}) does not divide the {size} process(es) of this run; give a divisor, "
            "such as --parallel.replicate 1"
        )
    if size == 1:
        yield World(0, 1, device, None)
        return
    _join(device)
    try:
        yield World(rank, size, device, _mesh(device, replicate, size // replicate))
    finally:
        dist.destroy_process_group()


def _mesh(device: torch.device, replicate: int, shards: int) -> DeviceMesh | None:
    if shards == 1:
        return None
    if replicate == 1:
        return init_device_mesh(device.type, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicate, shards), mesh_dim_names=("replicate", "shard"))


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Memory that grows in place: else a CUDA graph's pool of a long sequence takes a third more than is used at once.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _join(device: torch.device) -> None:
    """Every attempt gets its own key space: after an in-job restart torchrun's store still holds dead addresses."""
    store, rank, size = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"attempt_{attempt}", store),
        rank=rank,
        world_size=size,
        timeout=_TIMEOUT,
    )
