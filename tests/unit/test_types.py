"""A batch's beginning: what a health measurement looks at."""

import numpy as np
import pytest
import torch
from small_training import windows

from infir2.data.packing import pack
from infir2.model.attention import document_attention
from infir2.rl.batch import TrainingSample, pack_samples
from infir2.types import Batch


def boundaries(batch: Batch) -> list[int]:
    return batch.cu_seqlens.tolist()


@pytest.mark.parametrize(("tokens", "shape"), [(10, (1, 10)), (64, (1, 64)), (130, (2, 64)), (10**6, (4, 64))])
def test_the_beginning_of_a_batch(tokens: int, shape: tuple[int, int]) -> None:
    whole = pack(windows(4), True)
    part = whole.beginning(tokens)
    rows, cut = shape
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[:rows, :cut])
    end = rows * cut
    assert boundaries(part) == [at for at in boundaries(whole) if at < end] + [end]
    assert part.max_seqlen == max(np.diff(boundaries(part)))
    document_attention(part, torch.float32)  # which checks it


def test_the_beginning_of_a_batch_that_has_more() -> None:
    samples = [TrainingSample((1, 2, 3), (4,) * 50, (-0.5,) * 50, 1.0) for _ in range(3)]
    (whole,) = pack_samples(samples, 1000)
    part = whole.beginning(60)
    assert part.advantages.shape == part.behaviour.shape == part.labels.shape == (1, 60)
    assert (part.old, part.reference) == (None, None)
    assert boundaries(part) == [0, 52, 60]
