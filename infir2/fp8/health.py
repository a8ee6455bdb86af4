"""Per-layer FP8 health: saturation, underflow and signal-to-noise of activations, weights and gradients.

``measure(model)`` is a context in which every FP8 layer reports the operands of its forward and backward GEMMs; it is
entered at a chosen interval, and costs nothing outside. Inside, every operand is read once, and nothing waits for a
device until the figures are asked for.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from infir2.fp8.linear import Fp8Linear
from infir2.fp8.tensor import Operand
from infir2.kernels.fidelity import fidelity


class Health:
    """What was measured: for each layer and operand (x, w, g), sums over the elements seen."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._last: tuple[Operand, Tensor] | None = None

    def record(self, layer: str, operand: str, values: Tensor, quantized: Operand) -> None:
        """Add one operand: its high-precision values and its FP8 form, both [rows, cols]."""
        if self._last is None or self._last[0] is not quantized:  # layers that read the same input report it in turn
            sums = fidelity(values.detach(), quantized.codes, quantized.scale, quantized.granularity)
            self._last = (quantized, sums)
        sums, key = self._last[1], (layer, operand)
        self._sums[key] = self._sums[key] + sums if key in self._sums else sums

    def layers(self) -> dict[str, dict[str, float]]:
        """layer -> {x_underflow, x_saturated, x_sqnr_db, w_..., g_...}.

        Of the elements that are not zero, underflow: share whose code is zero. saturated: share whose code is +-448,
        which with scales from the current amax only says how many sit at their block's maximum. sqnr_db: power of the
        values over power of the rounding error, in decibel.
        """
        out: dict[str, dict[str, float]] = {}
        rows = torch.stack(list(self._sums.values())).tolist() if self._sums else []
        for (layer, operand), (nonzero, lost, top, signal, noise) in zip(self._sums, rows, strict=True):
            row = out.setdefault(layer, {})
            row[f"{operand}_underflow"] = lost / max(nonzero, 1.0)
            row[f"{operand}_saturated"] = top / max(nonzero, 1.0)
            row[f"{operand}_sqnr_db"] = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else float("inf")
        return out


@contextmanager
def measure(model: nn.Module) -> Iterator[Health]:
    """Measure every FP8 layer of ``model`` in the forward and backward passes run inside the context."""
    health = Health()
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Fp8Linear)]

    def recorder(layer: str) -> Callable[[str, Tensor, Operand], None]:
        def record(operand: str, values: Tensor, quantized: Operand) -> None:
            with torch.no_grad():
                health.record(layer, operand, values, quantized)

        return record

    try:
        for name, module in layers:
            module.health = recorder(name)
        yield health
    finally:
        for _, module in layers:
            module.health = None
