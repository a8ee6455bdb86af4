"""Chunked cross-entropy against torch's own on whole logits."""

import pytest
import torch
from tensors import relative_error
from torch import Tensor

from infir2.kernels import cross_entropy, logit_chunks, logprob
from infir2.kernels import reference as fp8_reference


@pytest.mark.parametrize("chunk_logits", [1 << 27, 7 * 1000])
def test_loss_and_gradients_equal_torch(chunk_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_chunks, "CHUNK_LOGITS", chunk_logits)
    torch.manual_seed(0)
    hidden = torch.randn(50, 64).requires_grad_()
    weight = torch.randn(1000, 64, requires_grad=True)
    labels = torch.randint(0, 1000, (50,))
    labels[::7] = -100
    loss = cross_entropy.cross_entropy_sum(hidden, weight, labels)
    (loss / 3).backward()
    got = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    (expected / 3).backward()
    assert torch.allclose(loss, expected, rtol=1e-6)
    for grad, reference in zip(got, (hidden.grad, weight.grad)):
        assert relative_error(grad, reference) < 1e-6


def test_nothing_trained_on_is_zero_loss_and_zero_gradient() -> None:
    hidden = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(16, 8, requires_grad=True)
    loss = cross_entropy.cross_entropy_sum(hidden, weight, torch.full((5,), -100))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("fp8", [False, True])
def test_no_gradient_work_without_gradients(fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an evaluation: the weight is one that is trained, but nothing is recorded."""
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(5, 8), torch.randn(16, 8, requires_grad=True), torch.arange(5)
    expected = cross_entropy.cross_entropy_sum(hidden, weight, labels, fp8=fp8)
    for head in (cross_entropy._Head, cross_entropy._Fp8Head):
        for work in ("input_gradient", "add_weight_gradient"):
            monkeypatch.setattr(head, work, lambda *_: pytest.fail("a gradient that nobody asked for"))
    with torch.no_grad():
        loss = cross_entropy.cross_entropy_sum(hidden, weight, labels, fp8=fp8)
    assert torch.equal(loss, expected)
    assert not loss.requires_grad


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Whole logits, torch's own differentiation."""
    everything = (hidden @ weight.T / temperature).log_softmax(-1)
    trained = labels != -100
    chosen = everything.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    entropy = torch.distributions.Categorical(logits=everything).entropy()
    return torch.where(trained, chosen, 0.0), torch.where(trained, entropy, 0.0)


@pytest.mark.parametrize("temperature", [1.0, 1.1, 0.3])
@pytest.mark.parametrize("chunk_logits", [1 << 27, 7 * 300])
def test_token_logprobs_and_their_gradients_in_float64(
    chunk_logits: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logit_chunks, "CHUNK_LOGITS", chunk_logits)
    torch.manual_seed(1)
    hidden = torch.randn(40, 24, dtype=torch.float64).requires_grad_()
    weight = torch.randn(300, 24, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 300, (40,))
    labels[::3] = -100
    cotangents = torch.randn(2, 40, dtype=torch.float64)
    results = []
    for function in (logprob.token_logprobs, reference):
        values = function(hidden, weight, labels, temperature)
        gradients = torch.autograd.grad((torch.stack(values) * cotangents).sum(), (hidden, weight))
        results.append((*values, *gradients))
    for got, expected in zip(*results):
        assert torch.allclose(got, expected, rtol=1e-11, atol=1e-13)
    assert not results[0][2][::3].any(), "an ignored token has no gradient"


@pytest.mark.parametrize("output", [0, 1], ids=["logprobs", "entropy"])
def test_token_logprobs_pass_gradcheck_in_each_output(output: int) -> None:
    torch.manual_seed(2)
    hidden = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([3, -100, 0, 6])

    def one(h: Tensor, w: Tensor) -> Tensor:
        return logprob.token_logprobs(h, w, labels, 1.3)[output]

    assert torch.autograd.gradcheck(one, (hidden, weight))


def test_token_logprobs_in_bfloat16_are_those_of_the_rounded_logits() -> None:
    torch.manual_seed(3)
    hidden = torch.randn(9, 16).bfloat16().requires_grad_()
    weight = torch.randn(50, 16, requires_grad=True)
    labels = torch.randint(0, 50, (9,))
    logprobs, entropy = logprob.token_logprobs(hidden, weight, labels, 0.7)
    logits = (hidden @ weight.bfloat16().T).float() / 0.7
    assert torch.equal(logprobs, logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1))
    assert logprobs.dtype == entropy.dtype == torch.float32
    logprobs.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    assert weight.grad.any()


def test_token_logprobs_of_nothing() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    logprobs, entropy = logprob.token_logprobs(hidden, weight, torch.full((3,), -100))
    (logprobs + entropy).sum().backward()
    assert not logprobs.any()
    assert not hidden.grad.any()
    assert not weight.grad.any()
    with pytest.raises(ValueError, match="temperature"):
        logprob.token_logprobs(hidden, weight, torch.zeros(3, dtype=torch.int64), 0.0)


def test_an_fp8_head_changes_the_loss_by_the_rounding_of_its_operands() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(200, 256).bfloat16().requires_grad_()
    weight = (torch.randn(1024, 256) * 0.05).requires_grad_()
    labels = torch.randint(0, 1024, (200,))
    labels[:20] = -100
    results = []
    for fp8 in (False, True):
        hidden.grad = weight.grad = None
        loss = cross_entropy.cross_entropy_sum(hidden, weight, labels, fp8=fp8)
        loss.backward()
        results.append((loss.item(), hidden.grad.float(), weight.grad.clone()))
    plain, quantised = results
    assert 0 < abs(quantised[0] - plain[0]) < 2e-3 * plain[0]
    for before, after in zip(plain[1:], quantised[1:]):
        assert 0 < relative_error(after, before) < 0.05
    assert not quantised[1][:20].any()


def test_an_fp8_head_multiplies_the_codes_that_the_quantiser_gives() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(200, 256).bfloat16().requires_grad_(), torch.randn(512, 256).requires_grad_()
    labels = torch.randint(0, 512, (200,))
    loss = cross_entropy.cross_entropy_sum(hidden, weight, labels, fp8=True)
    loss.backward()

    def exact(x: Tensor, granularity: str) -> Tensor:
        return fp8_reference.dequantize(*fp8_reference.quantize(x, granularity, "ue8m0"), granularity)

    head = exact(weight.detach().bfloat16(), "block")
    logits = (exact(hidden.detach(), "tile") @ head.T).bfloat16()
    expected = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradient = torch.softmax(logits.float(), -1) - torch.nn.functional.one_hot(labels, 512)
    wanted = exact(gradient, "tile") @ head
    assert relative_error(hidden.grad, wanted) < 3e-3
    # Along the tokens the same codes are moved to other scales: exactly, but for what becomes subnormal there.
    left, right = exact(exact(gradient, "tile").T, "tile"), exact(exact(hidden.detach(), "tile").T, "tile")
    wanted = left @ right.T
    assert relative_error(weight.grad, wanted) < 1e-6


@pytest.mark.parametrize("tokens", [128, 500, 1024, 1100])
def test_an_fp8_head_holds_codes_of_some_chunks_at_a_time(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 128 tokens, three of them held: the gradients are those of one chunk, but for the order of sums."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 128).bfloat16().requires_grad_(), torch.randn(256, 128).requires_grad_()
    labels = torch.randint(0, 256, (tokens,))
    results = []
    for logits in (1 << 28, 128 * 256):
        monkeypatch.setattr(logit_chunks, "CHUNK_LOGITS", logits)
        monkeypatch.setattr(cross_entropy, "HELD_CHUNKS", 3)
        hidden.grad = weight.grad = None
        loss = cross_entropy.cross_entropy_sum(hidden, weight, labels, fp8=True)
        loss.backward()
        results.append((loss.item(), hidden.grad.clone(), weight.grad.clone()))
    (loss, *whole), (other, *pieces) = results
    assert other == pytest.approx(loss, rel=1e-6)
    assert torch.equal(whole[0], pieces[0])
    assert torch.allclose(whole[1], pieces[1], rtol=1e-4, atol=1e-4)
