"""Packing and order of fine-tuning rows: against trl's packing, one document at a time, over world sizes and epochs."""

from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from small_run import ARCHITECTURE
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from infir2.data.chat import Sample
from infir2.data.packing import best_fit_decreasing, pack_documents
from infir2.data.sft import MULTIPLE, SftLoader, TokenRows, deal
from infir2.errors import DataError
from infir2.kernels.cross_entropy import cross_entropy_sum
from infir2.model.attention import document_attention
from infir2.model.transformer import CausalLM
from infir2.types import IGNORE, Batch


def rows_of(lengths: list[int], seed: int = 0) -> TokenRows:
    rng = np.random.default_rng(seed)
    samples = [Sample(rng.integers(1, 256, n).astype(np.int32), rng.random(n) < 0.6) for n in lengths]
    for sample in samples:
        sample.trained[-1] = True
    return TokenRows.join(samples)


def long_tailed(count: int, seed: int = 1, longest: int = 32_768) -> list[int]:
    """Lengths such as reasoning data have: half below 6,000 tokens, a tail to the limit."""
    draws = np.random.default_rng(seed).lognormal(np.log(6_000), 0.9, count)
    return np.clip(draws, 200, longest).astype(int).tolist()


@pytest.mark.parametrize(("seed", "capacity"), [(0, 100), (1, 257), (2, 1000)])
def test_the_same_bins_as_trl(seed: int, capacity: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, capacity + 1, 400).tolist()
    ours = best_fit_decreasing(lengths, capacity)
    assert sorted(i for b in ours for i in b) == list(range(400))
    rows = Dataset.from_dict({"input_ids": [[i] * n for i, n in enumerate(lengths)]})
    packed = pack_dataset(rows, capacity, "bfd")
    theirs = [sorted(Counter(ids).values()) for ids in packed["input_ids"]]
    assert sorted(sorted(lengths[i] for i in b) for b in ours) == sorted(theirs)
    with pytest.raises(ValueError, match="does not fit"):
        best_fit_decreasing([capacity + 1], capacity)


def test_the_same_tokens_labels_and_positions_as_trl() -> None:
    """The same rows packed by trl and flattened by its collator, token by token.

    trl keeps a document's last token as an input without a label behind it, and its labels stand at their own token.
    """
    rng = np.random.default_rng(5)
    rows = rows_of(rng.integers(2, 90, 60).tolist())
    documents = [rows.row(i) for i in range(len(rows))]
    columns = {
        "input_ids": [ids.tolist() for ids, _ in documents],
        "labels": [np.where(trained, ids, IGNORE).tolist() for ids, trained in documents],
    }
    packed = pack_dataset(Dataset.from_dict(columns), 128, "bfd")
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    theirs: list[tuple[list[int], list[int], list[int]]] = []
    for row in packed:
        collated = collator([row])
        flat = {key: collated[key][0].tolist() for key in ("input_ids", "labels", "position_ids")}
        bounds = [*(i for i, place in enumerate(flat["position_ids"]) if place == 0), len(flat["input_ids"])]
        for start, end in pairwise(bounds):
            inputs, places = flat["input_ids"][start : end - 1], flat["position_ids"][start : end - 1]
            theirs.append((inputs, flat["labels"][start + 1 : end], places))
    ours: list[tuple[list[int], list[int], list[int]]] = []
    for chosen in best_fit_decreasing([len(ids) - 1 for ids, _ in documents], 128):
        batch = pack_documents([documents[i] for i in chosen], MULTIPLE)
        for start, end in pairwise(batch.cu_seqlens.tolist()[: len(chosen) + 1]):
            parts = (batch.input_ids, batch.labels, batch.position_ids)
            ours.append(tuple(part[0, start:end].tolist() for part in parts))
        assert (batch.labels[0, batch.cu_seqlens[len(chosen)] :] == IGNORE).all(), "what fills up has no labels"
    assert len(ours) == len(theirs) == 60
    assert sorted(ours) == sorted(theirs)


def nll_sum(model: CausalLM, batch: Batch) -> torch.Tensor:
    attend = document_attention(batch, torch.float32)

    def head(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return cross_entropy_sum(hidden.flatten(0, 1), weight, batch.labels.flatten())

    return model(batch.input_ids, batch.position_ids, attend, head=head)


def gradients(model: CausalLM) -> dict[str, torch.Tensor]:
    made = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return made


def test_a_packed_batch_is_its_documents_one_by_one() -> None:
    model = CausalLM(ARCHITECTURE, torch.float32)
    model.init_weights(0)
    rows = rows_of([50, 3, 97, 20])
    documents = [rows.row(i) for i in range(4)]
    batch = pack_documents(documents, MULTIPLE)
    assert batch.input_ids.shape == (1, 256)
    assert batch.cu_seqlens.tolist() == [0, 49, 51, 147, 166, 256]
    packed = nll_sum(model, batch)
    packed.backward()
    together = gradients(model)
    total = 0.0
    for ids, trained in documents:
        # By hand and unpacked: everything but the last token in, everything but the first out.
        tokens = torch.from_numpy(ids.astype(np.int64))
        labels = torch.where(torch.from_numpy(trained[1:]), tokens[1:], IGNORE)
        n = len(ids) - 1
        alone = Batch(tokens[None, :-1], labels[None], torch.arange(n)[None], torch.tensor([0, n]).int(), n)
        nll = nll_sum(model, alone)
        nll.backward()
        total += nll.item()
    apart = gradients(model)
    assert packed.item() == pytest.approx(total, rel=1e-6)
    assert batch.valid_tokens == sum(int(trained[1:].sum()) for _, trained in documents)
    assert together.keys() == apart.keys()
    worst = max(float((grad - apart[name]).abs().max() / apart[name].abs().max()) for name, grad in together.items())
    print(f"largest difference of a gradient, in units of its tensor's largest: {worst:.1e}")
    assert worst <= 1e-6


def test_a_micro_batch_of_nothing() -> None:
    batch = pack_documents([], MULTIPLE)
    assert (batch.valid_tokens, batch.input_ids.shape, batch.cu_seqlens.tolist()) == (0, (1, 128), [0, 128])
    full = pack_documents([rows_of([129]).row(0)], MULTIPLE)
    assert full.cu_seqlens.tolist() == [0, 128], "no filling where none is needed"


@pytest.mark.parametrize("world", [1, 8])
def test_packing_efficiency_on_a_long_tailed_set(world: int) -> None:
    lengths = long_tailed(2000)
    rows = TokenRows(np.zeros(0, np.int32), np.zeros(0, np.bool_), np.concatenate([[0], np.cumsum(lengths)]))
    loader = SftLoader(rows, 1, 64, 5, 32_768, 0, world)
    steps = [[lengths[i] - 1 for i in loader.rows_of(step)] for step in range(1, loader.steps_per_epoch + 1)]
    batches = [deal(places, 32_768, world) for places in steps]
    each = [len(dealt) // world for dealt in batches]
    lower = [-(-sum(places) // (32_768 * world)) for places in steps]
    print(f"world {world}: efficiency {loader.efficiency():.4%}, micro-batches {sum(each)}, at the least {sum(lower)}")
    assert loader.efficiency() >= 0.98
    assert sum(each) <= 1.1 * sum(lower)
    for places, dealt in zip(steps, batches):
        assert len(dealt) % world == 0
        totals = [sum(places[i] for i in documents) for documents in dealt]
        assert max(totals) <= 32_768
        assert totals == sorted(totals, reverse=True), "what the ranks do at the same time is alike"


def documents_in(batches: list[Batch]) -> Counter[tuple[bytes, bytes]]:
    """Every document with a label, as bytes of its inputs and labels."""
    found: Counter[tuple[bytes, bytes]] = Counter()
    for batch in batches:
        bounds = batch.cu_seqlens.tolist()
        assert bounds[-1] == batch.input_ids.numel()
        assert bounds[-1] % MULTIPLE == 0
        for start, end in pairwise(bounds):
            labels = batch.labels[0, start:end]
            assert batch.position_ids[0, start:end].tolist() == list(range(end - start))
            if (labels != IGNORE).any():
                found[batch.input_ids[0, start:end].numpy().tobytes(), labels.numpy().tobytes()] += 1
    return found


def test_every_world_sees_the_same_rows() -> None:
    rows = rows_of(np.random.default_rng(0).integers(20, 200, 21).tolist())
    seen: Counter[tuple[bytes, bytes]] = Counter()
    for step in range(1, 4):
        made = {}
        for world in (1, 2, 4):
            loaders = [SftLoader(rows, 3, 8, 2, 300, rank, world) for rank in range(world)]
            batches = [loader.step(step) for loader in loaders]
            assert len({len(mine) for mine in batches}) == 1, "as many micro-batches on every rank"
            made[world] = documents_in([batch for mine in batches for batch in mine])
            assert all(batch.input_ids.numel() <= 384 for mine in batches for batch in mine)
        assert made[1] == made[2] == made[4]
        assert made[1].total() == (8 if step < 3 else 5), "the last batch of an epoch is what is left"
        seen += made[1]
    assert seen.total() == 21
    for index in range(21):
        ids, trained = rows.row(index)
        labels = np.where(trained[1:], ids[1:], IGNORE).astype(np.int64)
        assert seen[ids[:-1].astype(np.int64).tobytes(), labels.tobytes()] == 1


def test_fewer_documents_than_ranks() -> None:
    rows = rows_of([40, 50, 60])
    batches = [SftLoader(rows, 3, 8, 1, 300, rank, 4).step(1) for rank in range(4)]
    assert [len(mine) for mine in batches] == [1] * 4
    assert sorted(mine[0].valid_tokens > 0 for mine in batches) == [False, True, True, True]


def test_order_and_resume() -> None:
    rows = rows_of([30] * 50)
    loader = SftLoader(rows, 7, 16, 3, 512)
    assert (loader.steps_per_epoch, loader.steps) == (4, 12)
    order = [loader.rows_of(step).tolist() for step in range(1, 13)]
    epochs = [list(chain(*order[e * 4 : e * 4 + 4])) for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [len(step) for step in order[:4]] == [16, 16, 16, 2]
    again = SftLoader(rows, 7, 16, 3, 512)
    assert again.rows_of(7).tolist() == order[6], "a step is made from its number alone"
    for ours, theirs in zip(again.stream(6, 12), [loader.step(n) for n in range(6, 13)], strict=True):
        assert documents_in(ours) == documents_in(theirs)
    assert SftLoader(rows, 8, 16, 3, 512).rows_of(1).tolist() != order[0]
    values = loader.values(6)
    assert values == {"epoch": 1.5, "processed_tokens": 16 * 29, "packing_efficiency": 16 * 29 / 512}
    with pytest.raises(DataError, match="no row is left"):
        SftLoader(rows_of([]), 7, 16, 3, 512)


def test_whole_micro_batches_have_one_shape() -> None:
    rows, other = rows_of(list(range(20, 120))), rows_of([60] * 7, seed=9)
    loader = SftLoader(rows, 7, 16, 1, 500, whole=True)
    batches = [batch for step in range(1, loader.steps + 1) for batch in loader.step(step)] + loader.held_out(other, 5)
    assert {tuple(batch.input_ids.shape) for batch in batches} == {(1, 512)}
    assert sum(batch.valid_tokens for batch in batches[:-1]) == sum(
        batch.valid_tokens for step in range(1, loader.steps + 1) for batch in SftLoader(rows, 7, 16, 1, 500).step(step)
    )
    read, padded = loader._filling(loader.rows_of(1))
    assert (padded % 512, loader.values(1)["packing_efficiency"]) == (0, read / padded)


def test_held_out_rows_are_shared_between_ranks() -> None:
    rows, other = rows_of([30] * 5), rows_of([60] * 7, seed=9)
    batches = [SftLoader(rows, 7, 4, 1, 128, rank, 2).held_out(other, 5) for rank in (0, 1)]
    assert len(batches[0]) == len(batches[1])
    assert documents_in(batches[0] + batches[1]).total() == 5
