"""Micro-batches as CUDA graphs: recorded once a shape, then replayed without the host.

Launching the kernels of a small or fast layer from Python can take longer than the kernels run. A graph launches all
of a micro-batch's at once, forward and backward. The kernels, their order and so the bits are those of the eager pass.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from infir2.parallel.runtime import World
from infir2.types import Batch

Work = Callable[[Batch, Tensor], Mapping[str, Tensor]]
"""(micro-batch on the device, float32 scalar there) -> scalars; may add to the parameters' gradients. Everything that
it reads beside its arguments must stay where it is in memory."""

_MOST_GRAPHS = 8  # a graph of a large model holds tens of megabytes beside the shared memory pool
_DOCUMENTS = 64  # packed batches are filled up to a multiple of so many documents, with empty ones


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    batch: Batch
    divisor: Tensor
    results: Mapping[str, Tensor]

    def replay(self, batch: Batch, divisor: Tensor) -> Mapping[str, Tensor]:
        for name, place in self.batch.tensors().items():
            place.copy_(getattr(batch, name), non_blocking=True)
        self.divisor.copy_(divisor)
        self.graph.replay()
        return self.results


class Graphs:
    """Runs work on micro-batches of one model that lies whole on one GPU.

    The first micro-batch of a shape runs eagerly, because what is compiled or chosen at a first call must not be
    recorded; the second is recorded. All graphs share one memory pool, from which an eager micro-batch takes what it
    keeps for its backward pass as well: there is no room for it twice. The gradients are the same tensors in all
    graphs: they stay allocated between steps, also where ``optimizer.zero_grad`` has let go of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._gradients: list[Tensor | None] | None = None
        self._recorded: dict[Any, _Recorded] = {}
        self._seen: set[Any] = set()
        self._pool = torch.cuda.MemPool()
        self._stream = torch.cuda.Stream()  # of all recordings: memory in a pool belongs to a stream

    def train(self, work: Work, batch: Batch, divisor: Tensor) -> Mapping[str, Tensor]:
        """``work(batch, divisor)``, which adds gradients. The results hold until the next call."""
        batch = evened(batch)
        begins = all(p.grad is None for p in self._parameters)
        if begins and ("begins", *_shape(batch)) in self._recorded:
            self._attach()
        elif begins and self._gradients is not None:  # one graph alone writes gradients that it did not find
            self.attach_zeros()
            begins = False
        elif not begins and not self._attached():
            return self._eagerly(work, batch, divisor)
        results = self._run("begins" if begins else "adds", work, batch, divisor)
        if begins and ("begins", *_shape(batch)) in self._recorded:
            self._gradients = [p.grad for p in self._parameters]
        return results

    def evaluate(self, work: Work, batch: Batch, divisor: Tensor) -> Mapping[str, Tensor]:
        """The same for work that leaves the gradients alone."""
        return self._run("evaluates", work, evened(batch), divisor)

    def attach_zeros(self) -> None:
        """Give the parameters their gradients back, filled with zeros, for a pass outside; nothing before there are
        any."""
        if self._gradients is not None:
            self._attach()
            torch._foreach_zero_([g for g in self._gradients if g is not None])

    def _run(self, kind: str, work: Work, batch: Batch, divisor: Tensor) -> Mapping[str, Tensor]:
        key = (kind, *_shape(batch))
        if key not in self._recorded:
            if key not in self._seen or len(self._recorded) == _MOST_GRAPHS:
                self._seen.add(key)
                return self._eagerly(work, batch, divisor)
            self._recorded[key] = self._record(work, batch, divisor)
        return self._recorded[key].replay(batch, divisor)

    def _eagerly(self, work: Work, batch: Batch, divisor: Tensor) -> Mapping[str, Tensor]:
        """In the memory of the graphs, of which none is being replayed."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.use_mem_pool(self._pool), torch.cuda.stream(self._stream):
            results = work(batch, divisor)
        here.wait_stream(self._stream)
        return results

    def _record(self, work: Work, batch: Batch, divisor: Tensor) -> _Recorded:
        copies: dict[str, Any] = {name: value.clone() for name, value in batch.tensors().items()}
        places = replace(batch, **copies)
        divisor = divisor.clone()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that writes a checkpoint, may use the GPU meanwhile.
        pool: Any = self._pool.id  # the handle that torch.cuda.graph asks for, under another type's name
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            results = work(places, divisor)
        return _Recorded(graph, places, divisor, results)

    def _attach(self) -> None:
        assert self._gradients is not None
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def _attached(self) -> bool:
        return self._gradients is not None and all(
            p.grad is gradient for p, gradient in zip(self._parameters, self._gradients, strict=True)
        )


def can_record(world: World) -> bool:
    """Whether this process can use graphs: it has a GPU and the whole model. FSDP2's collectives are not for recording;
    replicas add up their gradients behind the last micro-batch."""
    return world.device.type == "cuda" and world.mesh is None


def evened(batch: Batch) -> Batch:
    """A batch whose shapes many batches share: packed documents followed by empty ones, up to a multiple of 64, and the
    longest of them said to be as long as a row. Rows of one document each stay as they are."""
    rows, length = batch.input_ids.shape
    documents = batch.cu_seqlens.numel() - 1
    if documents == rows and batch.max_seqlen == length:
        return batch
    missing = -documents % _DOCUMENTS
    if documents + missing == rows:  # not to be taken for a batch of whole rows
        missing += _DOCUMENTS
    return replace(batch, cu_seqlens=pad(batch.cu_seqlens, (0, missing), value=rows * length), max_seqlen=length)


def _shape(batch: Batch) -> tuple[Any, ...]:
    """What two micro-batches must share to be the same graph's."""
    return (batch.max_seqlen, *((name, tuple(value.shape), value.dtype) for name, value in batch.tensors().items()))
