"""Chunked cross-entropy against torch's own on whole logits."""

import pytest
import torch

from infir2.kernels import logprob


@pytest.mark.parametrize("chunk_logits", [1 << 27, 7 * 1000])
def test_loss_and_gradients_equal_torch(chunk_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob, "_CHUNK_LOGITS", chunk_logits)
    torch.manual_seed(0)
    hidden = torch.randn(50, 64).requires_grad_()
    weight = torch.randn(1000, 64, requires_grad=True)
    labels = torch.randint(0, 1000, (50,))
    labels[::7] = -100
    loss = logprob.cross_entropy_sum(hidden, weight, labels)
    (loss / 3).backward()
    got = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    (expected / 3).backward()
    assert torch.allclose(loss, expected, rtol=1e-6)
    for grad, reference in zip(got, (hidden.grad, weight.grad)):
        assert ((grad - reference).norm() / reference.norm()).item() < 1e-6


def test_nothing_trained_on_is_zero_loss_and_zero_gradient() -> None:
    hidden = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(16, 8, requires_grad=True)
    loss = logprob.cross_entropy_sum(hidden, weight, torch.full((5,), -100))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_no_gradient_work_without_gradients() -> None:
    with torch.no_grad():
        loss = logprob.cross_entropy_sum(torch.randn(5, 8), torch.randn(16, 8), torch.arange(5))
    assert loss.isfinite()
