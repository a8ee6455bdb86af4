"""AdamW with bfloat16 moments on the GPU: the kernel against its plain-torch twin, and the optimiser around it."""

import pytest
import torch
from torch import Tensor, nn

from infir2.kernels.adamw import Update, adamw_
from infir2.train.bfloat16_moments import Bfloat16MomentsAdamW

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def state(size: int, generator: torch.Generator) -> list[Tensor]:
    """Parameter and moments; numbers of very different magnitude."""
    scale = torch.exp2(torch.randint(-40, 3, (size,), generator=generator).float())
    mean = torch.randn(size, generator=generator) * scale
    return [torch.randn(size, generator=generator), mean.bfloat16(), (scale * scale).bfloat16()]


@pytest.mark.parametrize("first", [0, 7, 2**31 - 5, 2**32 - 100])
@pytest.mark.parametrize("size", [1, 127, 2048, 100_003])
def test_the_kernel_gives_the_twins_bits(size: int, first: int) -> None:
    generator = torch.Generator().manual_seed(size)
    ours = state(size, generator)
    theirs = [tensor.cuda() for tensor in ours]
    for step in range(1, 6):
        grad = torch.randn(size, generator=generator) * torch.exp2(
            torch.randint(-60, 20, (size,), generator=generator).float()
        )
        grad[0] = (0.0, 1e-30, torch.inf, 1e30, torch.nan)[step - 1]
        update = Update.of(1e-3, (0.9, 0.95), 1e-8, 0.1, step, 3)
        adamw_(ours[0], grad, *ours[1:], update, first)
        adamw_(theirs[0], grad.cuda(), *theirs[1:], update, first)
        for expected, got in zip(ours, theirs, strict=True):
            assert torch.equal(got.cpu().nan_to_num(7.0), expected.nan_to_num(7.0))


def test_parts_of_a_tensor_that_start_anywhere() -> None:
    """Views whose addresses are no multiples of 16 bytes, as rows of a joined gradient are."""
    generator = torch.Generator().manual_seed(0)
    update = Update.of(1e-3, (0.9, 0.95), 1e-8, 0.1, 1, 0)
    whole, grad = state(5000, generator), torch.randn(5000, generator=generator)
    there, there_grad = [tensor.cuda() for tensor in whole], grad.cuda()
    adamw_(*(tensor[3:4001] for tensor in (whole[0], grad, *whole[1:])), update, 3)
    adamw_(*(tensor[3:4001] for tensor in (there[0], there_grad, *there[1:])), update, 3)
    assert all(torch.equal(got.cpu(), expected) for got, expected in zip(there, whole, strict=True))


def test_the_optimizer_is_the_same_on_both_devices_and_near_torchs() -> None:
    torch.manual_seed(0)
    start = [torch.randn(300, 200), torch.randn(200)]
    ends = []
    for kind, device in ((Bfloat16MomentsAdamW, "cpu"), (Bfloat16MomentsAdamW, "cuda"), (torch.optim.AdamW, "cuda")):
        generator = torch.Generator().manual_seed(1)
        parameters = [nn.Parameter(value.to(device, copy=True)) for value in start]
        optimizer = kind(parameters, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
        for _ in range(20):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
            optimizer.step()
        ends.append([parameter.detach().cpu() for parameter in parameters])
    for ours, theirs, torchs in zip(*ends, strict=True):
        assert torch.equal(ours, theirs)
        assert (theirs - torchs).norm() < 0.02 * (torchs - torchs.mean()).norm()
