"""Packed documents against the same documents one by one, and the choice of the attention back end."""

import sys
import types

import pytest
import torch

from infir2.model import attention, flash
from infir2.model.attention import causal_attention, document_attention, document_mask
from infir2.model.presets import preset
from infir2.model.transformer import CausalLM
from infir2.types import Batch

PACKINGS = {
    "one row": [[5, 20, 1, 38]],
    "two rows": [[16, 48], [1, 31, 32]],
    "single tokens": [[1] * 6 + [58]],
    "an empty document": [[20, 0, 44]],
    "full rows": [[64], [64]],
}


def pack(rows: list[list[int]], vocab_size: int = 128) -> tuple[Batch, list[torch.Tensor]]:
    """A batch of documents of the given lengths, and the documents."""
    generator = torch.Generator().manual_seed(8)
    documents = [torch.randint(0, vocab_size, (n,), generator=generator) for row in rows for n in row]
    ids = torch.cat(documents).view(len(rows), -1)
    positions = torch.cat([torch.arange(len(d)) for d in documents]).view(len(rows), -1)
    ends = torch.tensor([0] + [len(d) for d in documents]).cumsum(0).int()
    return Batch(ids, ids, positions, ends, max(len(d) for d in documents)), documents


def small_model() -> CausalLM:
    model = CausalLM(preset("tiny", 128), torch.float32)
    model.init_weights(0)
    return model


def loop_kernel(q, k, v, cu_q, cu_k, *, max_q, max_k):
    """What torch's variable-length kernel computes, one document at a time."""
    assert q.dim() == k.dim() == v.dim() == 3
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q == max_k == int(cu_q.diff().max())
    pieces = []
    for start, end in zip(cu_q.tolist(), cu_q.tolist()[1:]):
        part = [t[start:end].unsqueeze(0) for t in (q, k, v)]
        pieces.append(causal_attention(*part, 0)[0])
    return torch.cat(pieces)


@pytest.mark.parametrize("implementation", ["auto", "varlen", "mask"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_documents_equal_documents_alone(packing, implementation, monkeypatch):
    monkeypatch.setattr(attention, "varlen_kernel", lambda: loop_kernel)
    model = small_model()
    batch, documents = pack(PACKINGS[packing])
    weight = torch.randn(batch.input_ids.numel(), 128, generator=torch.Generator().manual_seed(4))
    packed = model(batch.input_ids, batch.position_ids, document_attention(batch, torch.float32, implementation))
    packed = packed.flatten(0, 1)
    (packed * weight).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    alone = torch.cat(
        [model(d.unsqueeze(0), torch.arange(len(d)).unsqueeze(0), causal_attention)[0] for d in documents]
    )
    (alone * weight).sum().backward()
    assert (packed - alone).abs().max() <= 1e-6
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max().clamp(min=1e-3)
        assert (gradients[name] - parameter.grad).abs().max() <= 1e-5 * scale, name


def test_a_token_does_not_see_other_documents_or_the_future():
    model = small_model()
    batch, _ = pack([[30, 34]])
    attend = document_attention(batch)
    changed = batch.input_ids.clone()
    changed[0, 40] = (changed[0, 40] + 1) % 128
    with torch.no_grad():
        before = model(batch.input_ids, batch.position_ids, attend)
        after = model(changed, batch.position_ids, attend)
    moved = (before != after).any(-1)[0]
    assert not moved[:40].any()
    assert moved[40:].all()


def test_mask_by_hand():
    batch, _ = pack([[2, 1], [3]])
    expected = [[[1, 0, 0], [1, 1, 0], [0, 0, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]]
    assert document_mask(batch)[:, 0].int().tolist() == expected


def test_choice_on_the_cpu():
    whole, _ = pack([[64], [64]])
    packed, _ = pack([[16, 48], [64]])
    assert document_attention(whole) is causal_attention
    assert document_attention(packed) is not causal_attention
    with pytest.raises(ValueError, match="one document in every row"):
        document_attention(packed, implementation="causal")


def test_documents_that_cross_rows_are_refused():
    ids = torch.zeros(2, 8, dtype=torch.long)
    for ends, longest in (([0, 4, 12, 16], 8), ([0, 16], 16)):
        batch = Batch(ids, ids, ids, torch.tensor(ends, dtype=torch.int32), longest)
        for implementation in ("auto", "mask"):
            with pytest.raises(ValueError, match="cross"):
                document_attention(batch, implementation=implementation)


def test_masked_and_causal_agree_in_bfloat16():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 64, 4, 16, generator=generator).bfloat16()
    k, v = (torch.randn(2, 64, 2, 16, generator=generator).bfloat16() for _ in range(2))
    batch, _ = pack([[64], [64]])
    masked = document_attention(batch, implementation="mask")(q, k, v, 0)
    torch.testing.assert_close(masked, causal_attention(q, k, v, 0), rtol=2e-2, atol=2e-2)


def test_the_installed_varlen_kernel_takes_our_arguments():
    """On the meta device: argument binding, shapes and the backward pass of the real operator, without a GPU."""
    attention.varlen_kernel.cache_clear()
    batch, _ = pack([[16, 48], [1, 63]])
    attend = document_attention(batch.to("meta"), implementation="varlen")
    q = torch.empty(2, 64, 4, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.empty(2, 64, 2, 64, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    out = attend(q, k, v, 0)
    out.sum().backward()
    assert out.shape == q.shape
    assert k.grad.shape == v.grad.shape == k.shape


def test_adapter_for_each_signature(monkeypatch):
    calls = []

    def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        calls.append({"is_causal": is_causal})

    def torch_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        calls.append({"window_size": window_size})

    def torch_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        calls.append({"window_size": window_size, "enable_gqa": enable_gqa})

    for function in (torch_2_10, torch_2_11, torch_2_13):
        module = types.ModuleType("torch.nn.attention.varlen")
        module.varlen_attn = function
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
        attention.varlen_kernel.cache_clear()
        attention.varlen_kernel()(None, None, None, None, None, max_q=1, max_k=1)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    attention.varlen_kernel.cache_clear()
    assert attention.varlen_kernel() is None
    attention.varlen_kernel.cache_clear()
    assert calls == [{"is_causal": True}, {"window_size": (-1, 0)}, {"window_size": (-1, 0), "enable_gqa": True}]


@pytest.mark.parametrize(
    ("capability", "taken"), [((8, 9), False), ((9, 0), True), ((10, 0), True), ((11, 0), True), ((12, 0), False)]
)
def test_flash_attn_4_is_for_gpus_whose_gradients_can_repeat(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], taken: bool
) -> None:
    """Its backward pass refuses deterministic algorithms on consumer Blackwells, and has none before Hopper."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(flash, "_kernels", lambda: flash._Kernels(print, print))
    query = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 64, 4, 64), device="cuda")
    assert flash.takes(query) == taken  # type: ignore[arg-type]
