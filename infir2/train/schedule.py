"""Learning-rate schedules as pure functions of the step."""

import math

from infir2.config import OptimSection


def learning_rate(step: int, total_steps: int, optim: OptimSection) -> float:
    """Learning rate of optimiser step ``step`` (1-based) out of ``total_steps``.

    Every schedule starts with ``optim.warmup(total_steps)`` steps of linear warm-up; the last of them has ``lr``.
    wsd: then ``lr`` until the last ``decay_steps``, which go down to ``min_lr`` at the last step
    (warmup-stable-decay, arXiv 2404.06395). cosine: then a half cosine down to ``min_lr``. constant: then ``lr``.
    """
    warmup = optim.warmup(total_steps)
    if step <= warmup:
        return optim.lr * step / warmup
    if optim.schedule == "constant":
        return optim.lr
    start = total_steps - optim.decay_steps if optim.schedule == "wsd" else warmup
    if step <= start:
        return optim.lr
    progress = min(1.0, (step - start) / (total_steps - start))
    linear = optim.schedule == "wsd" and optim.decay == "linear"
    remaining = 1.0 - progress if linear else 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.min_lr + (optim.lr - optim.min_lr) * remaining
