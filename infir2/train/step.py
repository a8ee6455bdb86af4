"""One optimiser step: accumulate gradients over micro-batches, check, clip, update. And one held-out evaluation."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from infir2.kernels.cross_entropy import cross_entropy_sum
from infir2.parallel.apply import set_gradient_sync, sum_gradients
from infir2.parallel.runtime import World
from infir2.train.graphs import Graphs
from infir2.types import Batch

AttentionFor = Callable[[Batch], Callable]
"""Makes the attention back end of one micro-batch."""
Objective = Callable[[Tensor, Tensor, Batch], tuple[Tensor, Mapping[str, Tensor]]]
"""``objective(hidden [batch, length, features], head weight [vocabulary, features], micro-batch)`` -> the loss summed
over the micro-batch's trained-on tokens (scalar), and sums over them of what else is to be known (scalars without
gradient; the same names for every micro-batch of a step). The step divides all of them by the number of trained-on
tokens of the global batch."""


def cross_entropy(hidden: Tensor, weight: Tensor, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The objective of pre-training and fine-tuning: negative log-likelihood of the labels."""
    return cross_entropy_sum(hidden.reshape(-1, hidden.shape[-1]), weight, batch.labels.reshape(-1)), {}


def cross_entropy_of_fp8_head(hidden: Tensor, weight: Tensor, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The same with an output head in FP8."""
    return cross_entropy_sum(hidden.reshape(-1, hidden.shape[-1]), weight, batch.labels.reshape(-1), fp8=True), {}


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did; the same on every rank."""

    loss: float
    """Mean loss (negative log-likelihood, but for RL) over all trained-on tokens of the global batch."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    valid_tokens: int
    """Trained-on tokens of the global batch."""
    skipped: bool
    """True where loss or gradient was not finite: the weights were left as they were."""
    tokens: int
    """Tokens of the global batch, trained on or not; what fills micro-batches up is none of it, here and below."""
    attended: int
    """Pairs of tokens in its causal attention, documents apart: the sum of n(n + 1)/2."""
    means: Mapping[str, float] = field(default_factory=dict)
    """What else the objective gave, averaged like the loss."""


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    world: World,
    attention_for: AttentionFor,
    clip: float,
    interrupted: Callable[[], object] = lambda: None,
    objective: Objective = cross_entropy,
    graphs: Graphs | None = None,
) -> StepResult | None:
    """Forward and backward over this rank's micro-batches, then one update.

    Every micro-batch's loss is divided by the number of trained-on tokens of the whole global batch before its
    backward pass, so accumulation over micro-batches and ranks equals one large batch. A non-finite loss or gradient
    norm is seen by all ranks alike, because both are sums over all ranks.

    ``interrupted`` is asked before every micro-batch and must answer alike on all ranks: on the first true answer the
    step is dropped and None returned. Weights and optimiser are then those of the step before, ready to be saved; a
    sharded model is good for nothing else, because FSDP2 keeps the dropped gradients.

    ``graphs``: run the micro-batches as CUDA graphs, with the same result.
    """
    counts = torch.tensor([(b.valid_tokens, b.read_tokens, b.attended) for b in batches], dtype=torch.int64)
    valid_tokens, tokens, attended = world.all_sum(counts.sum(0)).tolist()
    divisor = torch.tensor(max(valid_tokens, 1), dtype=torch.float32, device=world.device)
    work = partial(forward_backward, model, attention_for, objective)
    totals: dict[str, Tensor] = {}
    for index, batch in enumerate(batches):
        if interrupted():
            optimizer.zero_grad(set_to_none=True)
            return None
        set_gradient_sync(model, index == len(batches) - 1)
        here = batch.to(world.device)
        found = work(here, divisor) if graphs is None else graphs.train(work, here, divisor)
        for name, value in found.items():
            totals[name] = totals.get(name, 0.0) + value.double()
    sum_gradients(model, world)
    square, *sums = world.all_sum(torch.stack([local_gradient_square(model), *totals.values()]))
    # Every part of the gradient is held by as many processes as there are replicas.
    norm = (square / world.replicas).sqrt().float()
    grad_norm, *values = torch.stack([norm.double(), *(value / max(valid_tokens, 1) for value in sums)]).tolist()
    means = dict(zip(totals, values))
    loss = means.pop("loss")
    skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
    if not skipped:
        if clip > 0:
            scale_gradients(model, min(1.0, clip / (grad_norm + 1e-6)))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, grad_norm, valid_tokens, skipped, tokens, attended, means)


def forward_backward(
    model: nn.Module, attention_for: AttentionFor, objective: Objective, batch: Batch, divisor: Tensor
) -> dict[str, Tensor]:
    """Add the gradient of a micro-batch's summed loss over ``divisor``; the sums that the objective gave, the loss's
    by the name loss. Batch and divisor lie on the model's device."""
    loss_sum, others = _loss_sum(model, batch, attention_for, objective)
    (loss_sum / divisor).backward()
    return {name: value.detach() for name, value in {"loss": loss_sum, **others}.items()}


def trial_pass(
    model: nn.Module, batch: Batch, world: World, attention_for: AttentionFor, objective: Objective = cross_entropy
) -> None:
    """Forward and backward over one micro-batch for those who watch (FP8 health); its gradient is dropped."""
    set_gradient_sync(model, True)
    divisor = torch.tensor(max(batch.valid_tokens, 1), dtype=torch.float32, device=world.device)
    forward_backward(model, attention_for, objective, batch.to(world.device), divisor)
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    world: World,
    attention_for: AttentionFor,
    graphs: Graphs | None = None,
) -> float:
    """Mean negative log-likelihood over the held-out batches of all ranks."""

    def work(batch: Batch, divisor: Tensor) -> dict[str, Tensor]:
        return {"loss": _loss_sum(model, batch, attention_for, cross_entropy)[0] / divisor}

    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    one = torch.ones((), device=world.device)
    model.eval()
    try:
        for batch in batches:
            here = batch.to(world.device)
            found = work(here, one) if graphs is None else graphs.evaluate(work, here, one)
            sums[0] += found["loss"].double()
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


def _loss_sum(
    model: nn.Module, batch: Batch, attention_for: AttentionFor, objective: Objective
) -> tuple[Tensor, Mapping[str, Tensor]]:
    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        return objective(hidden, weight, batch)

    return model(batch.input_ids, batch.position_ids, attention_for(batch), head=head)
