"""One optimiser step: exact accumulation, clipping, what a non-finite number anywhere does, FP8 codes made once."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_run import ARCHITECTURE, SEQ_LEN, VOCAB
from torch import Tensor, nn

from infir2.config import LogSection, OptimSection, TrainSection
from infir2.data.packing import Window, pack
from infir2.errors import TrainingStopped, UserError
from infir2.fp8.convert import convert, refresh_weights
from infir2.fp8.linear import Fp8Linear
from infir2.fp8.recipe import recipe_named
from infir2.fp8.tensor import Operand
from infir2.model.attention import document_attention
from infir2.model.transformer import CausalLM
from infir2.parallel.runtime import World
from infir2.train import step as step_module
from infir2.train.loop import Callbacks, Progress, train
from infir2.train.metrics import MetricsWriter, read_metrics
from infir2.train.optimizer import build_optimizer
from infir2.train.peak import peak_tflops
from infir2.train.step import StepResult, evaluate, train_step
from infir2.types import IGNORE, Batch

WORLD = World(0, 1, torch.device("cpu"), None)
NO_CLIP = 0.0


def build(recipe: str = "bf16", dtype: torch.dtype = torch.float32) -> CausalLM:
    model = CausalLM(ARCHITECTURE, dtype)
    model.init_weights(3)
    convert(model, recipe_named(recipe))
    refresh_weights(model)
    return model


def windows(count: int, seed: int = 0) -> list[Window]:
    """Sequences with 0 to 40 documents each, so the numbers of trained-on tokens differ a lot."""
    rng = np.random.default_rng(seed)
    starts = [np.sort(rng.choice(np.arange(1, SEQ_LEN), 40 * i // count, replace=False)) for i in range(count)]
    return [Window(rng.integers(0, VOCAB, SEQ_LEN + 1), start) for start in starts]


def batches(seed: int = 0, micro_batch: int = 2) -> list[Batch]:
    made = windows(4, seed)
    return [pack(made[i : i + micro_batch], True) for i in range(0, 4, micro_batch)]


def attention_for(batch: Batch) -> Callable:
    return document_attention(batch, torch.float32)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, made: Sequence[Batch], clip: float = 1.0) -> StepResult:
    return train_step(model, optimizer, made, WORLD, attention_for, clip)


def adam(model: nn.Module) -> torch.optim.AdamW:
    return build_optimizer(model, OptimSection(lr=1e-3))


def gradients_of(
    model: nn.Module, made: Sequence[Batch], clip: float = NO_CLIP
) -> tuple[StepResult, dict[str, Tensor]]:
    """What a step gives the optimiser."""
    seen: dict[str, Tensor] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: seen.update({name: p.grad.clone() for name, p in model.named_parameters()})
    )
    return step(model, optimizer, made, clip), seen


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    for index, (_, values) in enumerate(optimizer.state.items()):
        state |= {f"{index}.{key}": value.clone() for key, value in values.items()}
    return state


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# Accumulation and clipping


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_accumulation_equals_one_large_batch(micro_batch: int) -> None:
    model = build()
    made = batches(micro_batch=micro_batch)
    counts = [batch.valid_tokens for batch in made]
    assert len(set(counts)) == len(counts), "the micro-batches must differ in their number of trained-on tokens"
    result, grads = gradients_of(model, made)

    whole = pack(windows(4), True)
    logits = model(whole.input_ids, whole.position_ids, attention_for(whole))
    loss = F.cross_entropy(logits.flatten(0, 1).float(), whole.labels.flatten(), ignore_index=IGNORE)
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert result.valid_tokens == sum(counts) == int((whole.labels != IGNORE).sum())
    for name, parameter in model.named_parameters():
        error = (grads[name].double() - parameter.grad.double()).norm() / parameter.grad.double().norm()
        # A constant added to every key changes the softmax only through the rotation: what is left is mostly rounding.
        assert error < (1e-5 if name.endswith("k_proj.bias") else 1e-6), name
    norm = torch.stack([p.grad.double().square().sum() for p in model.parameters()]).sum().sqrt()
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-6)


def test_clipping_scales_the_whole_gradient() -> None:
    model = build()
    free, grads = gradients_of(model, batches())
    limited, clipped = gradients_of(model, batches(), clip=free.grad_norm / 4)
    assert limited.grad_norm == free.grad_norm, "the norm before clipping is reported"
    for name, grad in grads.items():
        torch.testing.assert_close(clipped[name], grad / 4, rtol=1e-5, atol=0.0)
    above, untouched = gradients_of(model, batches(), clip=free.grad_norm * 1.01)
    assert above.grad_norm == free.grad_norm
    assert same(untouched, grads)


def test_a_batch_without_trained_on_tokens_changes_nothing_but_decay() -> None:
    model = build()
    silent = [Batch(b.input_ids, torch.full_like(b.labels, IGNORE), b.position_ids, b.cu_seqlens, b.max_seqlen)
              for b in batches()]  # fmt: skip
    result, grads = gradients_of(model, silent)
    assert (result.loss, result.grad_norm, result.valid_tokens, result.skipped) == (0.0, 0.0, 0, False)
    assert all(not grad.any() for grad in grads.values())


# Optimiser


def test_weight_decay_groups() -> None:
    model = build()
    optimizer = build_optimizer(model, OptimSection(lr=1e-3, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert decayed | free == set(names.values())
    assert free == {name for name in names.values() if name.endswith("bias") or "norm" in name}
    assert "model.embed_tokens.weight" in decayed
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all((group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6) for group in optimizer.param_groups)

    before = snapshot(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 1e-3 * 0.1) if name in decayed else before[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0.0)


# A number that is not finite


def nan_loss(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    true = step_module.cross_entropy_sum
    monkeypatch.setattr(step_module, "cross_entropy_sum", lambda *args: true(*args) * float("nan"))


def nan_gradient(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[0, 5, 7] = float("nan")
        return grad

    model.model.layers[1].register_forward_hook(lambda module, args, out: out.register_hook(poison) and None)


def inf_gradient(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.norm.weight.register_hook(lambda grad: grad * float("inf"))


def nan_activation(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[0, 3, 0] = float("nan")
        return out

    model.model.layers[0].register_forward_hook(poison)


def inf_fp8_input(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(module: nn.Module, args: Any) -> Any:
        x = args[0].clone()
        x[0, 3, 0] = float("inf")
        return (x,)

    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(poison)


def nan_fp8_gradient(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[0, 3, 0] = float("nan")
        return grad

    model.model.layers[0].self_attn.o_proj.register_forward_hook(
        lambda module, args, out: out.register_hook(poison) and None
    )


@pytest.mark.parametrize("recipe", ["blockwise", "bf16"])
@pytest.mark.parametrize(
    "poison", [nan_loss, nan_gradient, inf_gradient, nan_activation, inf_fp8_input, nan_fp8_gradient]
)
def test_a_non_finite_number_skips_the_step(poison: Callable, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(recipe)
    optimizer = adam(model)
    assert not step(model, optimizer, batches(1)).skipped
    before = snapshot(model, optimizer)
    codes = {name: m.weight_operand().codes.float() for name, m in model.named_modules() if isinstance(m, Fp8Linear)}
    with monkeypatch.context() as patch:
        poison(model, patch)
        result = step(model, optimizer, batches(2))
    assert result.skipped
    assert not (np.isfinite(result.loss) and np.isfinite(result.grad_norm))
    assert same(snapshot(model, optimizer), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, before_codes in codes.items():
        assert torch.equal(model.get_submodule(name).weight_operand().codes.float(), before_codes)


@pytest.mark.parametrize("poison", [nan_gradient, inf_gradient, nan_fp8_gradient])
def test_a_finite_loss_does_not_hide_a_bad_gradient(poison: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("blockwise")
    poison(model, monkeypatch)
    result = step(model, adam(model), batches())
    assert np.isfinite(result.loss)
    assert result.skipped


# FP8 codes


def test_weights_are_quantised_once_an_optimiser_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("blockwise")
    assert sum(isinstance(module, Fp8Linear) for module in model.modules()) == 14
    weights = 2 * 4  # q, k and v are one operand, gate and up another
    made = 0
    quantize = Operand.quantize

    def counted(x: Tensor, granularity: str, *rest: Any) -> Operand:
        nonlocal made
        made += granularity == "block"
        return quantize(x, granularity, *rest)

    monkeypatch.setattr(Operand, "quantize", counted)
    optimizer = adam(model)
    counts = []
    for n in range(3):
        step(model, optimizer, batches(n, micro_batch=1))  # four micro-batches
        counts.append(made)
    assert counts == [weights, 2 * weights, 3 * weights]
    evaluate(model, batches(), WORLD, attention_for)
    evaluate(model, batches(), WORLD, attention_for)
    step(model, optimizer, batches())
    assert made == 4 * weights, "an evaluation uses the codes that the next step uses"
    with monkeypatch.context() as patch:
        nan_loss(model, patch)
        assert step(model, optimizer, batches()).skipped
    assert made == 4 * weights, "a skipped step leaves the codes as they are"


# Evaluation


@pytest.mark.parametrize("recipe", ["blockwise", "bf16"])
def test_evaluation_only_looks(recipe: str) -> None:
    model = build(recipe)
    optimizer = adam(model)
    step(model, optimizer, batches())
    before, rng = snapshot(model, optimizer), torch.get_rng_state()
    loss = evaluate(model, batches(5), WORLD, attention_for)
    assert same(snapshot(model, optimizer), before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())

    total = count = 0
    with torch.no_grad():
        for batch in batches(5):
            logits = model(batch.input_ids, batch.position_ids, attention_for(batch)).flatten(0, 1)
            total += F.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE, reduction="sum").item()
            count += batch.valid_tokens
    assert loss == pytest.approx(total / count, rel=1e-6)


def test_an_error_in_evaluation_leaves_training_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()

    def broken() -> Iterator[Batch]:
        yield batches()[0]
        raise OSError("the disk has gone")

    with pytest.raises(OSError, match="gone"):
        evaluate(model, broken(), WORLD, attention_for)
    assert model.training


# The loop


class Run:
    """A loop over a real model with callbacks that note what was asked of them."""

    def __init__(
        self, folder: Path, at_step: Callable[[int, CausalLM], None] = lambda step, model: None, **changes: Any
    ):
        self.model = build("blockwise")
        self.optimizer = adam(self.model)
        self.progress = Progress()
        self.saved: list[dict[str, int]] = []
        self.finished: list[Any] = []
        self.folder, self.at_step = folder, at_step
        settings = {"steps": 6, "global_batch": 4, "eval_every": 0, "save_every": 0, "max_skipped_steps": 3} | changes
        self.config = TrainSection(**settings)

    def go(self, health_every: int = 0) -> signal.Signals | None:
        def made(first: int, last: int) -> Iterator[Sequence[Batch]]:
            for n in range(first, last + 1):
                self.at_step(n, self.model)
                yield batches(n)

        callbacks = Callbacks(
            batches=lambda first, last, _: made(first, last),
            learning_rate=lambda step: 1e-3 / step,
            evaluate=lambda _: {"eval_loss": evaluate(self.model, batches(99), WORLD, attention_for)},
            save=lambda progress: self.saved.append(progress.to_json()),
            poll=lambda: None,
            finish=lambda: self.finished.append(signal.getsignal(signal.SIGTERM)),
            attention_for=attention_for,
        )
        with MetricsWriter(self.folder, self.config.steps, tensorboard=False, live=False) as metrics:
            return train(
                self.model, self.optimizer, self.progress, self.config, WORLD, metrics, callbacks,
                clip=1.0, flops_per_token=float, log=LogSection(), health_every=health_every,
            )  # fmt: skip

    def lines(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in read_metrics(self.folder / "metrics.jsonl") if line["kind"] == kind]


def test_the_loop_saves_evaluates_and_counts(tmp_path: Path) -> None:
    run = Run(tmp_path, eval_every=4, save_every=2)
    assert run.go() is None
    assert [at["step"] for at in run.saved] == [2, 4, 6]
    assert [line["step"] for line in run.lines("eval")] == [4, 6]
    lines = run.lines("train")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["lr"] for line in lines] == [1e-3 / n for n in range(1, 7)]
    assert run.progress == Progress(6, sum(line["valid_tokens"] for line in lines), 0, 0)
    assert lines[-1]["tokens"] == run.progress.tokens


def test_skips_are_counted_and_forgiven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = step_module.cross_entropy_sum
    bad = {2, 3, 5, 6}
    now = 0

    def note(n: int, model: CausalLM) -> None:
        nonlocal now
        now = n

    monkeypatch.setattr(
        step_module, "cross_entropy_sum", lambda *args: true(*args) * (float("inf") if now in bad else 1.0)
    )
    run = Run(tmp_path, note, steps=7)
    assert run.go() is None
    assert (run.progress.step, run.progress.skipped, run.progress.skipped_in_a_row) == (7, 4, 0)
    events = run.lines("event")
    assert [(event["step"], event["event"]) for event in events] == [(n, "skip") for n in sorted(bad)]
    assert [line["skipped"] for line in run.lines("train")] == [0, 1, 2, 2, 3, 4, 4]


def test_too_many_skips_in_a_row_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before: dict[str, Tensor] = {}

    def poison(n: int, model: CausalLM) -> None:
        if n == 3:
            nan_activation(model, monkeypatch)
            before.update(snapshot(model, torch.optim.SGD(model.parameters())))

    run = Run(tmp_path, poison)
    with pytest.raises(TrainingStopped) as stopped:
        run.go()
    message = str(stopped.value)
    assert message.startswith("step 5: 3 steps in a row had a non-finite loss or gradient (loss nan")
    assert "\n" not in message
    assert stopped.value.exit_code == 3
    assert run.progress.skipped_in_a_row == 3
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())
    assert [event["event"] for event in run.lines("event")] == ["skip"] * 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run(tmp_path: Path, number: signal.Signals) -> None:
    run = Run(tmp_path, lambda n, model: os.kill(os.getpid(), number) if n == 3 else None)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert run.go() == number
    assert [at["step"] for at in run.saved] == [2], "the step that had not begun is not run"
    assert [(event["event"], event["signal"]) for event in run.lines("event")] == [("stopped", number.name)]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert len(run.finished) == 1
    assert run.finished[0] != signal.SIG_DFL, "a second SIGTERM must not cut the last save short"


def signal_at_micro_batch(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """SIGTERM arrives inside a micro-batch (counted from 1 over the run); returns the list of those that were run."""
    true, done = step_module.cross_entropy_sum, []

    def killing(*args: Any) -> Tensor:
        done.append(len(done) + 1)
        if len(done) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return true(*args)

    monkeypatch.setattr(step_module, "cross_entropy_sum", killing)
    return done


def test_a_signal_between_micro_batches_drops_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, save_every=2)
    kept: list[dict[str, Tensor]] = []
    run.optimizer.register_step_post_hook(lambda *_: kept.append(snapshot(run.model, run.optimizer)))
    done = signal_at_micro_batch(monkeypatch, 5)  # two a step: the first one of the third step
    assert run.go() == signal.SIGTERM
    assert len(done) == 5, "the other micro-batch is not run"
    assert [at["step"] for at in run.saved] == [2], "saved at its time, and not again"
    assert run.progress.step == len(kept) == 2
    assert same(snapshot(run.model, run.optimizer), kept[-1])
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert [line["step"] for line in run.lines("train")] == [1, 2]


def test_a_signal_in_the_first_step_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal_at_micro_batch(monkeypatch, 1)
    run = Run(tmp_path)
    assert run.go() == signal.SIGTERM
    assert run.saved == []


def test_a_signal_in_the_last_micro_batch_ends_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal_at_micro_batch(monkeypatch, 12)
    run = Run(tmp_path)
    assert run.go() is None
    assert [at["step"] for at in run.saved] == [6]


def test_a_run_that_skips_every_step_fails(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=2)
    with torch.no_grad():
        run.model.model.norm.weight[0] = float("nan")
    with pytest.raises(TrainingStopped, match=r"No step was good, so the weights .* may hold NaN"):
        run.go()
    assert run.saved == []


def test_a_failure_is_raised_where_no_process_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk under metrics.jsonl: told at the next meeting of the processes, before another step is done."""

    def full(self: MetricsWriter, step: int, *args: Any, **more: Any) -> None:
        if step == 2:
            raise UserError("metrics.jsonl: cannot be written: No space left on device")

    monkeypatch.setattr(MetricsWriter, "log", full)
    run = Run(tmp_path)
    with pytest.raises(UserError, match="No space left"):
        run.go()
    assert run.progress.step == 2


def test_a_failure_in_the_last_step_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: MetricsWriter, step: int, *args: Any, **more: Any) -> None:
        if step == 6:
            raise UserError("metrics.jsonl: cannot be written: No space left on device")

    monkeypatch.setattr(MetricsWriter, "log", full)
    with pytest.raises(UserError, match="No space left"):
        Run(tmp_path).go()


# What is measured


def test_a_step_counts_its_tokens_and_attended_pairs() -> None:
    made = batches()
    model = build()
    result = step(model, adam(model), made)
    bounds = [batch.cu_seqlens.tolist() for batch in made]
    lengths = [b - a for cuts in bounds for a, b in pairwise(cuts)]
    assert sum(lengths) == result.tokens == 4 * SEQ_LEN
    assert result.attended == sum(n * (n + 1) // 2 for n in lengths)
    assert 4 * SEQ_LEN < result.attended < 4 * SEQ_LEN * (SEQ_LEN + 1) / 2
    whole = pack(windows(4), False)
    assert whole.attended == 4 * SEQ_LEN * (SEQ_LEN + 1) // 2


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H1000", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_follows_the_form_factor(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_health_does_not_change_training(tmp_path: Path) -> None:
    losses = []
    for health_every in (0, 2):
        run = Run(tmp_path / str(health_every))
        assert run.go(health_every=health_every) is None
        losses.append([(line["loss"], line["grad_norm"]) for line in run.lines("train")])
    assert losses[0] == losses[1]
    assert [line["step"] for line in run.lines("health")] == [1, 2, 4, 6]
    row = run.lines("health")[0]["layers"]["model.layers.0.mlp.up_proj"]
    assert {"x_underflow", "w_sqnr_db", "g_saturated"} <= row.keys()


def test_a_trace_is_written(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with MetricsWriter(tmp_path, 6, tensorboard=False, live=False) as metrics:
        callbacks = Callbacks(
            batches=lambda first, last, _: (batches(n) for n in range(first, last + 1)),
            learning_rate=lambda step: 1e-3,
            evaluate=lambda _: {"eval_loss": 0.0},
            save=lambda progress: None,
            poll=lambda: None,
            finish=lambda: None,
            attention_for=attention_for,
        )
        train(
            run.model, run.optimizer, run.progress, run.config, WORLD, metrics, callbacks, clip=1.0,
            flops_per_token=float, log=LogSection(profile_steps=1), trace_folder=tmp_path / "profile",
        )  # fmt: skip
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "trace-from-step-000004-rank-0.json"
    assert "infir2::scaled_mm" in trace.read_text()
