"""Attention of training on the GPU against float64: whole rows and packed documents, by flash-attn-4 and by torch."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from infir2.model import attention, flash
from infir2.model.attention import document_attention
from infir2.types import Batch

pytestmark = pytest.mark.gpu

LENGTHS = {
    "whole rows": [256, 256],
    "documents": [1, 129, 126, 200, 56],
    "and empty ones": [100, 156, 0, 256, 0, 0],
}


def batch_of(lengths: list[int]) -> Batch:
    ids = torch.zeros(2, 256, dtype=torch.long, device="cuda")
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    return Batch(ids, ids, ids, ends, max(lengths))


def heads(count: int, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(2, 256, count, 64, generator=generator, device="cuda", dtype=torch.bfloat16)


def passed(attend: attention.Attend, inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves, 0)
    gradient = heads(6, 9).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


@pytest.fixture(params=["flash-attn-4", "torch"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "flash-attn-4" and not flash.takes(heads(6, 1)):
        pytest.skip("flash-attn-4 is not installed, or the GPU is older than Hopper")
    with flash.left_out() if request.param == "torch" else nullcontext():
        yield request.param


@pytest.mark.parametrize("lengths", LENGTHS)
def test_attention_equals_float64(lengths: str, kernels: str) -> None:
    batch, inputs = batch_of(LENGTHS[lengths]), [heads(6, 1), heads(2, 2), heads(2, 3)]
    mask = document_attention(batch, torch.float64, "mask")
    exact = passed(mask, [x.double() for x in inputs])
    for name, got, expected in zip(("out", "dq", "dk", "dv"), passed(document_attention(batch), inputs), exact):
        assert got.dtype == torch.bfloat16
        assert (got.double() - expected).norm() <= 4e-3 * expected.norm(), name


@pytest.mark.parametrize("lengths", LENGTHS)
def test_deterministic_attention_repeats_its_bits(lengths: str, kernels: str) -> None:
    batch, inputs = batch_of(LENGTHS[lengths]), [heads(6, 1), heads(2, 2), heads(2, 3)]
    torch.use_deterministic_algorithms(True)
    try:
        first = passed(document_attention(batch), inputs)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, passed(document_attention(batch), inputs)))
    finally:
        torch.use_deterministic_algorithms(False)


def test_flash_attn_is_asked_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(flash, "takes", lambda q: True)
    monkeypatch.setattr(flash, "whole_rows", lambda q, k, v: asked.append("whole") or q)
    monkeypatch.setattr(flash, "packed", lambda q, k, v, cu, longest: asked.append(f"packed {longest}") or q)
    for lengths in ("whole rows", "documents"):
        document_attention(batch_of(LENGTHS[lengths]))(heads(6, 1), heads(2, 2), heads(2, 3), 0)
    assert asked == ["whole", "packed 200"]
