"""Turn a model's linear layers into FP8 layers by rule, and say what was converted, what was kept and why."""

from dataclasses import dataclass, field

from torch import nn

from infir2.fp8.fused import MlpActivations, fuse
from infir2.fp8.linear import Fp8Linear
from infir2.fp8.recipe import Recipe
from infir2.kernels.matmul import unsupported_reason


@dataclass(frozen=True)
class SwapReport:
    """What ``convert`` did."""

    recipe: str
    converted: list[str] = field(default_factory=list)
    """Names of the layers that are FP8 now."""
    kept: dict[str, str] = field(default_factory=dict)
    """Names of the linear layers that stay in high precision -> why."""
    fused: list[str] = field(default_factory=list)
    """Names of the attentions and MLPs whose norms, projections and SwiGLU write FP8 directly."""

    def __str__(self) -> str:
        total = len(self.converted) + len(self.kept)
        lines = [f"fp8 recipe {self.recipe}: {len(self.converted)} of {total} linear layers converted"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"  kept {len(names)}: {reason} ({shown})")
        return "\n".join(lines)


def convert(
    model: nn.Module,
    recipe: Recipe | None,
    keep: dict[str, str] | None = None,
    mlp_activations: MlpActivations = "fp8",
) -> SwapReport:
    """Replace, in place, every nn.Linear of ``model`` by an Fp8Linear with the same parameters, and fuse what can be.

    keep: name prefix -> reason, for layers that stay in high precision (``model.layers.0.`` for a whole layer). The
    output head and layers whose dimensions the hardware GEMM and the FP8 checkpoint format cannot take are kept too.
    mlp_activations: how gate and up are kept for the backward pass of a fused MLP. recipe None (bf16) converts nothing.
    """
    report = SwapReport(recipe.name if recipe else "bf16")
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or isinstance(module, Fp8Linear):
            continue
        reason = _reason_to_keep(name, module, recipe, keep or {})
        if reason is not None or recipe is None:
            report.kept[name] = reason or ""
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], Fp8Linear.from_linear(module, recipe))
        report.converted.append(name)
    report.fused.extend(fuse(model, mlp_activations))
    return report


def keep_outer_layers(num_layers: int, first: int, last: int) -> dict[str, str]:
    """The ``keep`` rule for the first and last decoder layers."""
    outer = [*range(min(first, num_layers)), *range(max(num_layers - last, 0), num_layers)]
    return {f"model.layers.{index}.": "first or last layer kept in bf16 by the recipe" for index in outer}


def refresh_weights(model: nn.Module) -> None:
    """Quantise every FP8 layer's weight anew: call it when weights have changed (an optimiser step, a load)."""
    for module in model.modules():
        if isinstance(module, Fp8Linear):
            module.stale = True
    refresh_stale(model)  # all are marked before: layers of one group are quantised together


def refresh_stale(module: nn.Module) -> None:
    """Quantise weights that have changed, as far as they are whole: those of shards when they have been gathered."""
    for layer in module.modules():
        if isinstance(layer, Fp8Linear):
            layer.refresh_if_whole()


def _reason_to_keep(name: str, linear: nn.Linear, recipe: Recipe | None, keep: dict[str, str]) -> str | None:
    if recipe is None:
        return "the bf16 recipe converts nothing"
    for prefix, reason in keep.items():
        if f"{name}.".startswith(prefix):
            return reason
    if name.rpartition(".")[2] == "lm_head":
        return "the output head stays in bf16"
    shape = unsupported_reason(linear.out_features, linear.in_features)
    return f"shape: {shape}" if shape else None
