"""The data order: the same at every world size, every window once an epoch, exact mixtures, right boundaries."""

import hashlib
import logging
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from infir2.data.dataset import DatasetRecord, ShardWriter, write_record
from infir2.data.loader import TokenLoader
from infir2.data.megatron import TokenWriter
from infir2.data.order import BLOCK, EpochOrder, Mixture, apportion, in_validation, permutation
from infir2.errors import DataError
from infir2.types import IGNORE, Batch

T = 16
VOCAB = 30_000


def random_documents(seed: int, count: int, longest: int = 60) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, rng.integers(1, longest)) for _ in range(count)]


def make_pair(prefix: Path, documents: list[np.ndarray], vocab_size: int = VOCAB) -> str:
    with TokenWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix)


def make_prepared(
    folder: Path, train: list[np.ndarray], validation: list[np.ndarray], vocab_size: int = VOCAB, tokenizer: str = "f"
) -> str:
    folder.mkdir()
    with ShardWriter(folder, vocab_size, shard_tokens=700) as writer:
        for split, documents in (("train", train), ("validation", validation)):
            for document in documents:
                writer.add(split, document)
        splits = writer.finish()
    content = {"format_version": 1, "tokenizer": "", "tokenizer_fingerprint": tokenizer, "vocab_size": vocab_size}
    content |= {"eos_id": 3, "dtype": "uint16", "seed": 1, "validation_fraction": 0.2, "sources": []}
    bad_rows = {"rows": 0, "counts": {}, "examples": {}}
    write_record(folder, DatasetRecord(**content, splits=splits, bad_rows=bad_rows))
    return str(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        make_prepared(folder / "text", random_documents(1, 200), random_documents(2, 30)): 3.0,
        make_pair(folder / "code_text_document", random_documents(3, 150)): 1.5,
    }


def loader(sources: dict[str, float], **changes) -> TokenLoader:
    options = {"seq_len": T, "seed": 7, "global_batch": 8, "micro_batch": 2, **changes}
    return TokenLoader(sources, **options)


def equal(a: list[Batch], b: list[Batch]) -> bool:
    names = ("input_ids", "labels", "position_ids", "cu_seqlens")
    return len(a) == len(b) and all(
        x.max_seqlen == y.max_seqlen and all(torch.equal(getattr(x, n), getattr(y, n)) for n in names)
        for x, y in zip(a, b)
    )


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_global_order_is_the_same_for_every_world_size(sources: dict[str, float], world: int, prefetch: int) -> None:
    """The hash of all rows of 60 steps, in the order of their sample numbers."""
    streams = [
        loader(sources, rank=rank, world=world, prefetch=prefetch).stream(0, 60, offset=5) for rank in range(world)
    ]
    digest = hashlib.sha256()
    for ranks in zip(*streams, strict=True):
        for batches in zip(*ranks, strict=True):  # micro-batch m of every rank
            for batch in batches:
                for part in (batch.input_ids, batch.labels, batch.position_ids):
                    digest.update(part.numpy().tobytes())
    assert digest.hexdigest() == _reference_hash(sources)


def _reference_hash(sources: dict[str, float]) -> str:
    digest = hashlib.sha256()
    whole = loader(sources)
    for n in range(60):
        for batch in whole.step(n, offset=5):
            for part in (batch.input_ids, batch.labels, batch.position_ids):
                digest.update(part.numpy().tobytes())
    return digest.hexdigest()


def test_the_order_never_changes_between_releases() -> None:
    """Frozen values: a run must resume on the same samples after numpy or this package was upgraded."""
    assert permutation(8, 7, 2, 0, 3).tolist() == [5, 7, 1, 3, 2, 6, 4, 0]
    mixture = Mixture(["a", "b"], [3.0, 1.5], 7)
    assert [mixture.place(n) for n in range(1022, 1026)] == [(1, 339), (1, 340), (1, 341), (1, 342)]
    assert [n for n in range(100) if in_validation(n, 1236, 0.05)] == [6, 11, 15, 35, 41, 48, 56, 57]


def test_resume_at_any_step_gives_the_same_batches(sources: dict[str, float]) -> None:
    uninterrupted = list(loader(sources).stream(0, 120))
    for first in np.random.default_rng(0).integers(0, 118, 20):
        fresh = loader(sources).stream(int(first), int(first) + 2)
        assert all(equal(batches, uninterrupted[first + i]) for i, batches in enumerate(fresh))
    # Starting from an offset of whole steps is the same as starting at a later step.
    assert equal(loader(sources).step(3, offset=8 * 4), uninterrupted[7])


def test_another_seed_is_another_order(sources: dict[str, float]) -> None:
    assert not equal(loader(sources).step(0), loader(sources, seed=8).step(0))


def test_every_window_once_an_epoch(tmp_path: Path) -> None:
    """Three epochs of a source whose tokens number themselves: each window exactly once in each."""
    tokens = np.arange(T * 40 + 9)  # 40 windows, 8 tokens left over
    source = make_pair(tmp_path / "count", np.split(tokens, [100, 130, 131, 400]))
    one = loader({source: 1.0}, global_batch=8, micro_batch=8, validation_fraction=0.0)
    assert one.windows == {source: 40}
    rows = torch.cat([one.step(n)[0].input_ids for n in range(15)]).numpy()
    epochs = rows[:, 0].reshape(3, 40) // T
    assert np.array_equal(rows, rows[:, :1] + np.arange(T))
    for epoch in epochs:
        assert sorted(epoch) == list(range(40))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_every_source_has_its_own_order() -> None:
    first, second = EpochOrder(50, 1, 0), EpochOrder(50, 1, 1)
    assert [first.window(n) for n in range(50)] != [second.window(n) for n in range(50)]


def test_mixture_is_exact_in_every_block() -> None:
    weights = [0.5, 0.3, 0.2003, 0.001]
    mixture = Mixture("abcd", weights, seed=11)
    assert mixture.counts == [511, 307, 205, 1]
    seen: list[list[int]] = [[], [], [], []]
    for block in range(3):
        placed = [mixture.place(n) for n in range(block * BLOCK, (block + 1) * BLOCK)]
        assert [Counter(s for s, _ in placed)[i] for i in range(4)] == mixture.counts
        for source, ordinal in placed:
            seen[source].append(ordinal)
    for source in range(4):  # ordinals count up without a gap
        assert seen[source] == list(range(3 * mixture.counts[source]))
    with pytest.raises(DataError, match="b: its weight is too small"):
        Mixture("ab", [1.0, 1e-5], seed=0)


def test_apportion() -> None:
    assert apportion([1, 1, 1], 10) == [4, 3, 3]
    assert apportion([2.0], 1024) == [1024]
    assert apportion([0.7, 0.3], 1) == [1, 0]
    assert sum(apportion(np.random.default_rng(0).random(13).tolist(), 1024)) == 1024


def test_epoch_order_is_random_access() -> None:
    order, again = EpochOrder(50, 1, 0), EpochOrder(50, 1, 0)
    forward = [order.window(n) for n in range(500)]
    assert [again.window(n) for n in reversed(range(500))] == forward[::-1]


def slow_row(documents: list[np.ndarray], k: int, length: int, separate: bool) -> tuple[list[int], ...]:
    """Window k from the definition, one token at a time."""
    flat = [(int(token), d) for d, document in enumerate(documents) for token in document]
    window = flat[k * length : k * length + length + 1]
    inputs = [token for token, _ in window[:-1]]
    labels = [b if not separate or d == e else IGNORE for (_, d), (b, e) in pairwise(window)]
    positions = [0]
    for (_, d), (_, e) in pairwise(window[:-1]):
        positions.append(positions[-1] + 1 if not separate or d == e else 0)
    return inputs, labels, positions


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize(("length", "longest"), [(T, 60), (T, 4), (64, 9), (7, 300)])
def test_boundaries_against_a_slow_computation(tmp_path: Path, separate: bool, length: int, longest: int) -> None:
    documents = random_documents(5, 120, longest)
    documents[10] = documents[10][:0]  # an empty document leaves no trace
    source = make_prepared(tmp_path / "p", documents, documents[:1])  # several shards: windows cross their borders
    one = loader({source: 1.0}, seq_len=length, document_attention=separate, global_batch=3, micro_batch=3)
    order = EpochOrder(one.windows[source], 7, 0)
    for n in range(min(40, one.windows[source] // 3)):
        (batch,) = one.step(n)
        bounds, longest_seen = [], 0
        for row in range(3):
            inputs, labels, positions = slow_row(documents, order.window(n * 3 + row), length, separate)
            assert batch.input_ids[row].tolist() == inputs
            assert batch.labels[row].tolist() == labels
            assert batch.position_ids[row].tolist() == positions
            bounds += [row * length + i for i, position in enumerate(positions) if position == 0]
            longest_seen = max(longest_seen, max(positions) + 1)
        assert batch.cu_seqlens.tolist() == [*bounds, 3 * length]
        assert batch.max_seqlen == longest_seen
        assert (batch.input_ids.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int32)


def test_validation_is_fixed_and_split_over_ranks(sources: dict[str, float]) -> None:
    whole = loader(sources, micro_batch=1, global_batch=8).validation_batches(21)
    rows = [tuple(batch.labels[0].tolist()) for batch in whole]
    assert len(rows) == 21
    for world, micro in ((1, 2), (2, 2), (4, 2), (2, 4)):
        ranks = [loader(sources, rank=r, world=world, micro_batch=micro).validation_batches(21) for r in range(world)]
        assert {len(batches) for batches in ranks} == {-(-21 // (world * micro))}
        assert all(batch.input_ids.shape == (micro, T) for batches in ranks for batch in batches)
        seen = [tuple(row.tolist()) for batches in ranks for batch in batches for row in batch.labels]
        real = [row for row in seen if set(row) != {IGNORE}]
        assert Counter(real) == Counter(rows)
        assert len(seen) == len(ranks[0]) * world * micro


def test_validation_takes_what_there_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_prepared(tmp_path / "a", random_documents(1, 50), [np.arange(2 * T + 1)])
    with caplog.at_level(logging.WARNING):
        batches = loader({source: 1.0}, global_batch=1, micro_batch=1).validation_batches(10)
    assert [batch.input_ids[0, 0].item() for batch in batches] == [0, T]
    assert "10 held-out sequences wanted, all 2 are used" in caplog.text
    none = make_prepared(tmp_path / "b", random_documents(1, 50), [np.arange(T)])
    with pytest.raises(DataError, match="b: its validation split has 16 tokens"):
        loader({none: 1.0}).validation_batches(10)


def test_megatron_pair_holds_out_its_last_documents(tmp_path: Path) -> None:
    documents = random_documents(9, 41)
    source = make_pair(tmp_path / "m", documents)
    one = loader({source + ".bin": 1.0}, global_batch=1, micro_batch=1, validation_fraction=0.1)
    held_out = np.concatenate(documents[-5:])  # 4.1 documents, rounded up
    assert one.windows == {source + ".bin": (sum(map(len, documents[:-5])) - 1) // T}
    batches = one.validation_batches(100)
    assert torch.cat([b.input_ids[0] for b in batches]).tolist() == held_out[: len(batches) * T].tolist()


def test_fingerprint_follows_the_data(tmp_path: Path, sources: dict[str, float]) -> None:
    same = loader(sources).fingerprint()
    assert loader(sources, world=2, rank=1, prefetch=0).fingerprint() == same
    changed = [{"seed": 8}, {"seq_len": 8}, {"document_attention": False}, {"validation_fraction": 0.1}]
    hashes = {loader(sources, **change).fingerprint()["sha256"] for change in changed}
    names = list(sources)
    hashes.add(loader({names[0]: 1.0, names[1]: 1.0}).fingerprint()["sha256"])
    documents = random_documents(3, 150)
    moved = make_pair(tmp_path / "elsewhere", documents)
    assert loader({names[0]: 3.0, moved: 1.5}).fingerprint() == same
    documents[70][0] ^= 1
    edited = make_pair(tmp_path / "edited", documents)
    hashes.add(loader({names[0]: 3.0, edited: 1.5}).fingerprint()["sha256"])
    assert len(hashes | {same["sha256"]}) == 7


def test_errors_say_what_to_mend(tmp_path: Path, sources: dict[str, float]) -> None:
    with pytest.raises(DataError, match=r"train\.global_batch \(8\) is not a multiple .* \(3 x 2 = 6\)"):
        loader(sources, micro_batch=3, world=2)
    with pytest.raises(DataError, match=r"nothing: there is neither a folder made by .*nothing\.bin"):
        loader({str(tmp_path / "nothing"): 1.0})
    with pytest.raises(DataError, match=r"no dataset\.json: not a prepared data set"):
        loader({str(tmp_path): 1.0})
    with pytest.raises(DataError, match=r"its train split has \d+ tokens, fewer than one sequence"):
        loader(sources, seq_len=100_000)
    with pytest.raises(DataError, match="made with a tokenizer of 30000 tokens, but the model has 29999"):
        loader(sources, vocab_size=29_999)
    other = make_prepared(tmp_path / "other", random_documents(1, 50), [], tokenizer="g")
    with pytest.raises(
        DataError, match=r"other: made with another tokenizer than .*text\. Prepare it with --tokenizer"
    ):
        loader({**sources, other: 1.0})
    (tmp_path / "half.bin").write_bytes(b"12")
    with pytest.raises(DataError, match=r"half\.idx: cannot be read"):
        loader({str(tmp_path / "half"): 1.0})


def test_ids_outside_the_vocabulary_stop_the_run_in_the_consumer(tmp_path: Path) -> None:
    documents = random_documents(1, 50)
    documents[20][0] = VOCAB - 1
    source = make_pair(tmp_path / "p", documents)
    one = loader({source: 1.0}, vocab_size=VOCAB - 1)
    with pytest.raises(DataError, match=r"p\.bin: token ids \d+\.\.29999 .* the vocabulary has 29999"):
        list(one.stream(0, 50))
    assert not prefetch_threads()


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "data-prefetch"]


def test_closing_the_stream_ends_its_thread(sources: dict[str, float]) -> None:
    for taken in (0, 1, 5):
        stream = loader(sources, prefetch=1).stream(0, 10**6)
        for _ in range(taken):
            next(stream)
        stream.close()
        assert not prefetch_threads()


def test_the_same_text_under_two_names_is_refused(tmp_path: Path) -> None:
    """Also where another seed of `prepare` holds out other documents, and as a pair that was made elsewhere."""
    documents = random_documents(4, 80)
    first = make_prepared(tmp_path / "first", documents[:60], documents[60:])
    seed = make_prepared(tmp_path / "seed", documents[:5:-1], documents[5::-1])
    pair = make_pair(tmp_path / "pair", documents)
    for other in (seed, pair):
        with pytest.raises(DataError, match=rf"{other}: holds the same tokens as {first}. Name one of them."):
            TokenLoader({first: 1.0, other: 1.0}, seq_len=T, global_batch=2, micro_batch=2, seed=1)
    changed = [*documents[:-1], documents[-1] ^ 1]
    other = make_prepared(tmp_path / "other", changed[:60], changed[60:])
    TokenLoader({first: 1.0, other: 1.0}, seq_len=T, global_batch=2, micro_batch=2, seed=1)
