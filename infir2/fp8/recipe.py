"""FP8 recipes: the granularity of every operand of the three GEMMs of a linear layer.

With x [tokens, in], W [out, in] and the output's gradient g [tokens, out]:

    fprop   y  = x W^T      contraction over in       operands x,   W
    dgrad   dx = g W        contraction over out      operands g,   W^T
    wgrad   dW = g^T x      contraction over tokens   operands g^T, x^T

Every operand is E4M3. x and g each take part in two GEMMs: with 1x128 tiles and power-of-two scales they are quantised
once, and x^T and g^T are derived from those codes (``infir2.kernels.row_codes``).

``blockwise`` is the recipe of the InfiR2 paper (arXiv 2509.22536, after DeepSeek-V3); ``hybrid`` replaces its weight
gradient's 1x128 tiles by one scale a channel, which runs faster on Hopper.
"""

from dataclasses import dataclass, replace

from infir2.kernels.reference import SCALE_FORMATS


@dataclass(frozen=True)
class Recipe:
    """Granularities as in ``infir2.kernels.reference``."""

    name: str
    x: str
    """x in the forward GEMM."""
    weight: str
    """W in the forward GEMM and W^T in the input gradient."""
    grad: str
    """g in the input gradient."""
    x_wgrad: str
    """x^T in the weight gradient."""
    grad_wgrad: str
    """g^T in the weight gradient."""
    scale_format: str = "ue8m0"

    @property
    def weight_transposes(self) -> bool:
        """Whether W^T is the same codes transposed; else it is quantised on its own."""
        return self.weight in ("block", "tensor")

    @property
    def row_codes(self) -> bool:
        """Whether x and g are quantised once, the operands of the weight gradient being derived from their codes."""
        return self.x == self.grad == "tile" and self.weight == "block" and self.scale_format == "ue8m0"

    @property
    def channel_wgrad(self) -> bool:
        """Whether the weight gradient needs the largest value of every channel."""
        return self.x_wgrad == "channel"


_RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("blockwise", x="tile", weight="block", grad="tile", x_wgrad="tile", grad_wgrad="tile"),
        Recipe("hybrid", x="tile", weight="block", grad="tile", x_wgrad="channel", grad_wgrad="channel"),
        Recipe("rowwise", x="channel", weight="channel", grad="channel", x_wgrad="channel", grad_wgrad="channel"),
        Recipe("tensorwise", x="tensor", weight="tensor", grad="tensor", x_wgrad="tensor", grad_wgrad="tensor"),
    )
}
RECIPE_NAMES = (*_RECIPES, "bf16")


def recipe_named(name: str, scale_format: str = "ue8m0") -> Recipe | None:
    """The recipe of that name; None for ``bf16``, which converts nothing. Raises ValueError for an unknown name."""
    if scale_format not in SCALE_FORMATS:
        raise ValueError(f"unknown scale format {scale_format!r}; expected one of {SCALE_FORMATS}")
    if name == "bf16":
        return None
    if name not in _RECIPES:
        raise ValueError(f"unknown FP8 recipe {name!r}; expected one of {RECIPE_NAMES}")
    return replace(_RECIPES[name], scale_format=scale_format)
