"""AdamW with both moments in bfloat16: one pass reads parameter, gradient and moments, and writes all but the gradient.

    m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
    p = p (1 - lr decay) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

That is AdamW (Loshchilov, Hutter: Decoupled weight decay regularization, 2019) as torch computes it.
All arithmetic is float32 and starts from the stored numbers. The update of the parameter, which stays float32, uses the
new moments before they are rounded. They are rounded stochastically (see ``rounding``), because to nearest a change of
less than half a bfloat16 step, 0.2 to 0.4 %, is always lost, and a moment may move by little more than that.

The noise is a function of (step, number of the parameter, index of the element in the whole parameter): a resumed run,
another device and another sharding round alike. The kernel gives the twin's bits.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from infir2.kernels.rounding import random_bits, round_to_bfloat16, scramble


@dataclass(frozen=True)
class Update:
    """The constants of one step of one parameter, float64 until they meet a tensor."""

    decay: float
    """What the parameter keeps: 1 - lr * weight decay."""
    beta1: float
    beta2: float
    step_size: float
    """lr, corrected for the zeros that the first moment started from."""
    root_scale: float
    """The same correction of the second moment's root."""
    eps: float
    key: int
    """Says which noise."""

    @staticmethod
    def of(lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int, number: int) -> "Update":
        """``step`` counts from 1; ``number`` is the parameter's among those of the optimiser."""
        beta1, beta2 = betas
        step_size, root_scale = lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
        key = scramble(scramble(step) ^ number)
        return Update(1 - lr * weight_decay, beta1, beta2, step_size, root_scale, eps, key)


def adamw_(parameter: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, update: Update, first: int) -> None:
    """One AdamW step in place: parameter and grad float32, moments bfloat16, all contiguous and of one shape.

    first: index in the whole parameter of the first element, where the tensors are a shard of it.
    """
    if parameter.is_cuda:
        from infir2.kernels import adamw_triton

        adamw_triton.adamw_(parameter, grad, exp_avg, exp_avg_sq, update, first)
        return
    mean = exp_avg.float().mul_(update.beta1).add_(grad * (1 - update.beta1))
    square = exp_avg_sq.float().mul_(update.beta2).add_((grad * grad).mul_(1 - update.beta2))
    root = square.double().sqrt().float()  # rounded correctly, which a CPU's float32 roots are not
    change = mean / root.mul_(update.root_scale).add_(update.eps)
    parameter.mul_(update.decay).sub_(change.mul_(update.step_size))
    noise = random_bits(parameter, update.key, first)
    exp_avg.copy_(round_to_bfloat16(mean, noise >> 16))
    exp_avg_sq.copy_(round_to_bfloat16(square, noise & 0xFFFF))
