"""One optimiser step: accumulate gradients over micro-batches, check, clip, update. And one held-out evaluation."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from infir2.kernels.logprob import cross_entropy_sum
from infir2.parallel.apply import set_gradient_sync
from infir2.parallel.runtime import World
from infir2.types import Batch

AttentionFor = Callable[[Batch], Callable]
"""Makes the attention back end of one micro-batch."""


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did; the same on every rank."""

    loss: float
    """Mean negative log-likelihood over all trained-on tokens of the global batch."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    valid_tokens: int
    """Trained-on tokens of the global batch."""
    skipped: bool
    """True where loss or gradient was not finite: the weights were left as they were."""
    stop_requested: bool
    """True where any rank was asked to stop."""


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    world: World,
    attention_for: AttentionFor,
    clip: float,
    stop_requested: bool = False,
) -> StepResult:
    """Forward and backward over this rank's micro-batches, then one update.

    Every micro-batch's loss is divided by the number of trained-on tokens of the whole global batch before its
    backward pass, so accumulation over micro-batches and ranks equals one large batch. A non-finite loss or gradient
    norm is seen by all ranks alike, because both are sums over all ranks.
    """
    counts = torch.tensor([sum(b.valid_tokens for b in batches), int(stop_requested)], dtype=torch.int64)
    valid_tokens, stops = world.all_sum(counts.to(world.device)).tolist() if world.size > 1 else counts.tolist()
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for index, batch in enumerate(batches):
        set_gradient_sync(model, index == len(batches) - 1)
        nll = _nll_sum(model, batch.to(world.device), attention_for)
        (nll / max(valid_tokens, 1)).backward()
        total += nll.detach().double()
    nll_sum, square = world.all_sum(torch.stack([total, local_gradient_square(model)]))
    # Every shard of the gradient is held by as many processes as there are replicas.
    norm = (square / world.replicas).sqrt().float()
    loss, grad_norm = torch.stack([nll_sum / max(valid_tokens, 1), norm.double()]).tolist()
    skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
    if not skipped:
        if clip > 0:
            scale_gradients(model, min(1.0, clip / (grad_norm + 1e-6)))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, grad_norm, valid_tokens, skipped, stops > 0)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], world: World, attention_for: AttentionFor) -> float:
    """Mean negative log-likelihood over the held-out batches of all ranks."""
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    model.eval()
    try:
        for batch in batches:
            sums[0] += _nll_sum(model, batch.to(world.device), attention_for).double()
            sums[1] += batch.valid_tokens
    finally:
        model.train()
    total, count = world.all_sum(sums).tolist()
    return total / max(count, 1.0)


def local_gradient_square(model: nn.Module) -> Tensor:
    """Sum of the squares of this process's part of the gradient: float64 scalar.

    In float64 the order of the additions does not show in the float32 norm made of it: however many processes share
    the gradient, they clip by the same factor.
    """
    parts = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    norms = torch._foreach_norm([part for part in parts if part is not None], 2, dtype=torch.float64)
    return torch.stack(norms).square().sum()


@torch.no_grad()
def scale_gradients(model: nn.Module, factor: float) -> None:
    """Multiply all gradients in place; a factor of 1 touches nothing."""
    if factor < 1.0:
        torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], factor)


def _nll_sum(model: nn.Module, batch: Batch, attention_for: AttentionFor) -> Tensor:
    head = partial(_head, labels=batch.labels)
    return model(batch.input_ids, batch.position_ids, attention_for(batch), head=head)


def _head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy_sum(hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1))
