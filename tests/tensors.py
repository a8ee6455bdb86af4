"""Tensors compared: how far apart they are, and whether all of a model's or a folder's are the same bits."""

from pathlib import Path

import torch
from torch import Tensor

from infir2.checkpoint.huggingface import HfFolder


def relative_error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm()).item()


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def assert_same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Names, dtypes and values; a failure names the tensor."""
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


def tensors_in(folder: Path) -> dict[str, Tensor]:
    source = HfFolder(folder)
    return {name: source.tensor(name) for name in source.names}
