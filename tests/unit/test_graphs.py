"""What of CUDA graphs does not need a GPU: shapes that many batches share."""

import torch
from small_training import batches

from infir2.model.attention import document_attention, document_mask
from infir2.train.graphs import evened
from infir2.types import Batch


def packed(rows: int, ends: list[int], longest: int, length: int = 8) -> Batch:
    ids = torch.arange(rows * length).view(rows, length)
    return Batch(ids, ids, ids, torch.tensor([0, *ends], dtype=torch.int32), longest)


def test_batches_of_other_documents_get_one_shape() -> None:
    shapes = {
        (evened(batch).cu_seqlens.numel(), evened(batch).max_seqlen) for seed in range(4) for batch in batches(seed)
    }
    assert len(shapes) == 1


def test_empty_documents_change_nothing() -> None:
    batch = packed(2, [3, 8, 16], 8)
    assert torch.equal(document_mask(evened(batch)), document_mask(batch))
    q, k, v = torch.randn(3, 2, 8, 1, 16).unbind()
    assert torch.equal(document_attention(evened(batch))(q, k, v, 0), document_attention(batch)(q, k, v, 0))


def test_whole_rows_stay_whole_rows() -> None:
    batch = packed(2, [8, 16], 8)
    assert evened(batch) is batch


def test_packed_rows_are_not_taken_for_whole_ones() -> None:
    rows = 64
    batch = packed(rows, [4, *range(8, rows * 8 + 1, 8)], 8)  # 65 documents
    assert evened(batch).cu_seqlens.numel() == 129
    batch = packed(rows, [4, 8, 12, 16, *range(32, rows * 8 + 1, 8)], 8)
    assert evened(batch).cu_seqlens.numel() - 1 != rows
