"""Training with CUDA graphs gives the bits of training without."""

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
import torch.distributed as dist

from infir2.config import OptimSection
from infir2.data.packing import Window, pack
from infir2.fp8.convert import convert, refresh_weights
from infir2.fp8.recipe import recipe_named
from infir2.model.attention import document_attention
from infir2.model.presets import preset
from infir2.model.transformer import CausalLM
from infir2.parallel import apply
from infir2.parallel.apply import Checkpointing, parallelize
from infir2.parallel.runtime import World
from infir2.train.graphs import Graphs
from infir2.train.optimizer import build_optimizer
from infir2.train.step import StepResult, evaluate, train_step, trial_pass
from infir2.types import Batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
LENGTH, VOCABULARY, STEPS = 256, 512, 5


def world(processes: int = 1) -> World:
    return World(0, processes, torch.device("cuda"), None)


def build(recipe: str, checkpointing: Checkpointing, compiled: bool) -> CausalLM:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = CausalLM(preset("tiny", VOCABULARY))
    convert(model, recipe_named(recipe))
    parallelize(model, model.model.layers, world(), activation_checkpointing=checkpointing, compile_layers=compiled)
    model.to_empty(device="cuda")
    model.init_weights(1)
    refresh_weights(model)
    return model


def made(seed: int, documents: bool, rows: int = 2) -> list[Batch]:
    """Three micro-batches, every sequence with documents of other lengths or one whole document."""
    rng = np.random.default_rng(seed)
    windows = [
        Window(
            rng.integers(0, VOCABULARY, LENGTH + 1),
            np.sort(rng.choice(np.arange(1, LENGTH), rng.integers(0, 9), replace=False)),
        )
        for _ in range(3 * rows)
    ]
    return [pack(windows[i : i + rows], documents) for i in range(0, 3 * rows, rows)]


def course(
    model: CausalLM, graphs: Graphs | None, documents: bool, processes: int = 1
) -> tuple[list[StepResult], list[float], dict[str, torch.Tensor]]:
    """Some steps with evaluations and a watched pass between; losses, held-out losses and the weights at the end."""
    optimizer = build_optimizer(model, OptimSection(lr=1e-3))
    results, held_out, here = [], [], world(processes)
    for number in range(STEPS):
        batches: Sequence[Batch] = made(number, documents)
        if number == 3:  # a step that begins with a shape of its own
            batches = [*made(77, documents, rows=1)[:1], *batches]
        if number == 2:
            if graphs is not None:
                graphs.attach_zeros()
            trial_pass(model, batches[0], here, document_attention)
        result = train_step(model, optimizer, batches, here, document_attention, 1.0, graphs=graphs)
        assert result is not None
        results.append(result)
        held_out.append(evaluate(model, made(99, documents), here, document_attention, graphs))
    return results, held_out, copy.deepcopy(model.state_dict())


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("recipe", "checkpointing", "compiled"),
    [("bf16", "none", True), ("hybrid", "none", True), ("blockwise", "full", False), ("hybrid", "attention", False)],
)
def test_graphs_give_the_same_bits(recipe: str, checkpointing: Checkpointing, compiled: bool, documents: bool) -> None:
    plain = course(build(recipe, checkpointing, compiled), None, documents)
    model = build(recipe, checkpointing, compiled)
    graphs = Graphs(model)
    recorded = course(model, graphs, documents)
    kinds = {key[0] for key in graphs._recorded}
    assert kinds == {"begins", "adds", "evaluates"}
    assert [(r.loss, r.grad_norm) for r in recorded[0]] == [(r.loss, r.grad_norm) for r in plain[0]]
    assert recorded[1] == plain[1]
    assert all(torch.equal(recorded[2][name], plain[2][name]) for name in plain[2])


@pytest.mark.usefixtures("deterministic")
def test_gradients_of_graphs_are_summed_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in one of two replicas that happen to have the same data."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2))
    monkeypatch.setattr(apply, "_BUCKET", 2**14)  # some alone, some together
    plain = course(build("hybrid", "none", False), None, True, processes=2)
    model = build("hybrid", "none", False)
    graphs = Graphs(model)
    recorded = course(model, graphs, True, processes=2)
    assert {key[0] for key in graphs._recorded} == {"begins", "adds", "evaluates"}
    assert [(r.loss, r.grad_norm) for r in recorded[0]] == [(r.loss, r.grad_norm) for r in plain[0]]
    assert all(torch.equal(recorded[2][name], plain[2][name]) for name in plain[2])


def test_an_eager_micro_batch_lives_in_the_memory_of_the_graphs() -> None:
    """What it keeps for its backward pass would need as much room again anywhere else."""
    graphs = Graphs(build("bf16", "none", False))
    places: list[int] = []

    def work(batch: Batch, divisor: torch.Tensor) -> dict[str, torch.Tensor]:
        kept = torch.ones(2**24, device="cuda")
        places.append(kept.data_ptr())
        return {"loss": kept.sum() / divisor}

    batch, divisor = made(0, False)[0].to(torch.device("cuda")), torch.ones((), device="cuda")
    for _ in range(3):
        assert graphs.evaluate(work, batch, divisor)["loss"].item() == 2**24
    assert len(places) == 2, "once eagerly, once recorded"
    segments = torch.cuda.memory_snapshot()
    for place in places:
        [pool] = [s["segment_pool_id"] for s in segments if s["address"] <= place < s["address"] + s["total_size"]]
        assert pool == graphs._pool.id
