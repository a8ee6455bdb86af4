"""The sums of FP8 health on the GPU against their plain-torch twin."""

import pytest
import torch

from infir2.kernels import reference
from infir2.kernels.fidelity import fidelity
from infir2.kernels.quantize import quantize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("granularity", reference.GRANULARITIES)
@pytest.mark.parametrize("shape", [(512, 768), (130, 257), (1, 1), (1000, 384)])
def test_the_sums_are_the_twins(shape: tuple[int, int], granularity: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator)
    x *= torch.exp2(torch.randint(-30, 12, (shape[0], 1), generator=generator).float())
    x[: shape[0] // 3, : shape[1] // 2] = 0.0
    x = x.to(dtype)
    codes, scale = quantize(x, granularity, "ue8m0")
    parts = [slice(None)]
    if shape[1] == 768 and granularity in ("tile", "block"):
        parts.append(slice(1, 4))  # the columns of one of several layers that share an operand
    there = [tensor.cuda() for tensor in (x, codes)], scale.cuda()
    for blocks in parts:
        columns = slice(None) if blocks.stop is None else slice(128 * blocks.start, 128 * blocks.stop)
        expected = fidelity(x[:, columns], codes[:, columns], scale[:, blocks], granularity)
        got = fidelity(*(tensor[:, columns] for tensor in there[0]), there[1][:, blocks], granularity).cpu()
        assert torch.equal(got[:3], expected[:3])
        torch.testing.assert_close(got[3:], expected[3:], rtol=1e-5, atol=0.0)
