"""Two torchrun processes (gloo; shards of FSDP2, or replicas) against one: losses, resharded resume, skips, signals,
FP8 codes, mistakes."""

import json
import math
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import loss_bits, metrics_lines
from small_torchrun import ROOT, together, torchrun

from infir2 import cli
from infir2.checkpoint.state import model_state
from infir2.checkpoint.store import CheckpointStore
from infir2.config import CptConfig, load
from infir2.fp8.convert import refresh_weights
from infir2.fp8.linear import Fp8Linear
from infir2.launch.model import build_model
from infir2.parallel.runtime import World
from infir2.stages.cpt import architecture_of

Recipe = Callable[..., tuple[Path, Path]]
SETTINGS: dict[str, Any] = {"train.steps": 10, "train.eval_every": 5, "train.save_every": 5, "train.global_batch": 8}


def one_process(path: Path) -> None:
    assert cli.main(["cpt", str(path)]) == 0


def drift(left: Path, right: Path, first_step: int = 1) -> list[float]:
    """Relative differences of the losses (and held-out losses), step by step."""
    pairs = [pair for pair in zip(loss_bits(left), loss_bits(right), strict=True) if pair[0][0] >= first_step]
    assert all(one[0] == other[0] for one, other in pairs)
    return [abs((one[1] or one[3]) / (other[1] or other[3]) - 1) for one, other in pairs]


FLOAT32 = {"model.dtype": "float32"}
REPLICAS = {"parallel.replicate": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "settings", "more", "limit"),
    [
        # One micro-batch a process: both add the same two gradients, and every bit is the same.
        (2, FLOAT32 | {"train.global_batch": 4}, {}, 1e-12),
        (2, FLOAT32 | {"train.global_batch": 4, "optim.moments": "bfloat16"}, {}, 1e-12),
        # More: the sum of four gradients depends on the order by its last bit. (With FP8 and float32 activations that
        # bit moves a code to its neighbour sooner or later, and the losses are some 1e-5 apart.)
        (2, FLOAT32 | {"fp8.recipe": "bf16"}, REPLICAS, 1e-6),
        (4, FLOAT32 | {"fp8.recipe": "bf16"}, REPLICAS, 1e-6),  # two copies, each of two shards
        (2, {"model.dtype": "bfloat16"}, {"parallel.gather_dtype": "bfloat16"}, 5e-3),
    ],
)
def test_several_processes_train_like_one(
    recipe: Recipe, processes: int, settings: dict[str, Any], more: dict[str, Any], limit: float
) -> None:
    alone, expected = recipe("alone", **SETTINGS | settings)
    one_process(alone)
    path, run = recipe("together", **SETTINGS | settings | more)
    together("-m", "infir2", "cpt", str(path), processes=processes)
    differences = drift(run, expected)
    print(f"{processes} {settings} {more}: largest relative difference of a loss {max(differences):.1e}")
    assert len(differences) == 12
    assert max(differences) < limit
    norms = [abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in zip(metrics_lines(run), metrics_lines(expected))]
    assert max(norms) < 10 * limit
    assert metrics_lines(run)[-1]["tokens"] == metrics_lines(expected)[-1]["tokens"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_resume_with_another_number_of_processes(recipe: Recipe) -> None:
    """bfloat16 and FP8, two micro-batches: two shards and two replicas against one process; and each of them continued
    by another, or by its like, against the run that is continued.

    (With four, the order of their sum depends on the processes, and on some CPUs its last bit moves an FP8 code.)
    """
    settings = SETTINGS | {"model.dtype": "bfloat16", "train.global_batch": 4}

    def train(kind: str, path: Path) -> None:
        if kind == "one":
            one_process(path)
        else:
            together("-m", "infir2", "cpt", str(path), "--parallel.replicate", "2" if kind == "replicas" else "1")

    starts = {}
    for kind in ("one", "shards", "replicas"):
        path, starts[kind] = recipe(kind, **settings)
        train(kind, path)
        print(f"whole, {kind}: {max(drift(starts[kind], starts['one'])):.1e}")
        assert max(drift(starts[kind], starts["one"])) < 1e-12

    # Between shards and replicas: checkpoint_worker.py.
    for before, after in (("one", "shards"), ("shards", "one"), ("replicas", "one"), ("replicas", "replicas")):
        path, run = recipe(name := f"{before}_then_{after}", **settings)
        start = starts[before]
        shutil.copytree(start / "checkpoints/step-000005", run / "checkpoints/step-000005")
        shutil.copy(start / "metrics.jsonl", run)
        train(after, path)
        assert [line["event"] for line in metrics_lines(run, "event")].count("resume") == 1
        differences = drift(run, start)
        print(f"{name}: first resumed loss {differences[6]:.1e}, largest {max(differences):.1e}")
        assert differences[:6] == [0.0] * 6, "five steps and an evaluation that were not done again"
        assert differences[6] < 1e-12
        assert max(differences) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, REPLICAS | {"optim.moments": "bfloat16"}])
def test_a_bad_number_on_one_rank_skips_the_step_on_all(recipe: Recipe, tmp_path: Path, more: dict[str, Any]) -> None:
    settings = SETTINGS | {"train.steps": 6, "train.eval_every": 6, "optim.min_lr": 1e-3}
    path, run = recipe("poisoned", **settings | more)
    together(str(Path(__file__).parent / "train_worker.py"), str(path), str(tmp_path))
    notes = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1)]
    for note in notes:
        assert [step["skipped"] for step in note["steps"]] == [False, False, True, False, True, False]
        assert [step["changed"] for step in note["steps"]] == [True, True, False, True, False, True]
        assert math.isnan(note["steps"][2]["loss"])
        assert math.isfinite(note["steps"][4]["loss"])
        assert math.isnan(note["steps"][4]["grad_norm"])
        # Once before the first step and once for each of the four updates, for two micro-batches and an evaluation.
        assert note["quantised"] == 8 * 5  # two layers of qkv, o, gate and up, down
        assert not any(note["stale"])
    numbers = [[(step["loss"], step["grad_norm"]) for step in note["steps"] if not step["skipped"]] for note in notes]
    assert numbers[0] == numbers[1]
    assert [note["sharded"] for note in notes] == [not more] * 2
    if more:
        ours, theirs = (note["tensors"] for note in notes)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), "replicas hold the same bits"
        assert ours["optim.model.norm.weight.exp_avg"].dtype == torch.bfloat16
    assert [line["skipped"] for line in metrics_lines(run)] == [0, 0, 1, 1, 2, 2]
    assert [line["step"] for line in metrics_lines(run, "event") if line["event"] == "skip"] == [3, 5]

    config = load(CptConfig, path)
    model, _ = build_model(config, architecture_of(config), World(0, 1, torch.device("cpu"), None))
    CheckpointStore(run / "checkpoints").load(
        run / "checkpoints/step-000006", {"model": model_state(model)}, ("optim",)
    )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    refresh_weights(model)
    for name, layer in layers.items():
        expected = layer.weight_operand().codes.view(torch.uint8)
        assert all(torch.equal(note["codes"][name], expected) for note in notes), name
    assert layers.keys() == notes[0]["codes"].keys()


@pytest.mark.slow
def test_sigterm_to_torchrun_saves(recipe: Recipe) -> None:
    """Both ranks drop the same unfinished step, and what they save is the run that was not stopped, bit for bit."""
    settings = SETTINGS | {
        "train.steps": 200,
        "train.global_batch": 16,  # four micro-batches a process: most signals come in the middle of a step
        "optim.schedule": "constant",
        "train.eval_every": 0,
        "train.save_every": 0,
    }
    path, run = recipe("stopped", **settings)
    process = torchrun("-m", "infir2", "cpt", str(path))
    try:
        began = time.monotonic()
        while not (run / "metrics.jsonl").exists() or len(metrics_lines_so_far(run)) < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() - began < 60
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=40)
    finally:
        process.kill()
    assert process.returncode != 0
    last = metrics_lines(run)[-1]["step"]
    assert metrics_lines(run, "event")[-1]["event"] == "stopped"
    store = CheckpointStore(run / "checkpoints")
    assert store.latest() == run / f"checkpoints/step-{last:06d}"
    assert last < 200
    whole, expected = recipe("whole", **settings | {"train.steps": last + 2})
    together("-m", "infir2", "cpt", str(whole))
    together("-m", "infir2", "cpt", str(path), "--train.steps", str(last + 2))
    assert loss_bits(run) == loss_bits(expected)


@pytest.mark.slow
def test_a_full_disk_on_rank_0_ends_all_ranks(recipe: Recipe) -> None:
    """A limit on the size of files stands for the disk: metrics.jsonl, which rank 0 alone writes, cannot grow."""
    settings = {"train.steps": 200, "optim.schedule": "constant", "train.eval_every": 0, "train.save_every": 0}
    path, run = recipe("full", **SETTINGS | settings)
    process = torchrun(
        *("-m", "infir2", "cpt", str(path)), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    )
    _, err = process.communicate(timeout=90)
    assert process.returncode != 0
    assert err.count(f"infir2: error: {run}/metrics.jsonl: cannot be written: File too large") == 1, err
    assert "another process of this run failed; its message says why" in err, "torchrun's summary tells of rank 1"
    assert 'File "' + str(ROOT / "infir2") not in err, "no traceback of ours"


@pytest.mark.slow
def test_compare_is_written_once(recipe: Recipe, tmp_path: Path) -> None:
    path, run = recipe("pair", **SETTINGS | {"train.steps": 5, "train.save_every": 0})
    out = tmp_path / "result.json"
    process = torchrun(*("-m", "infir2", "compare", str(path), "--precisions", "bf16", "blockwise"),
                       *("--seeds", "1", "--json", str(out)))  # fmt: skip
    said, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert said.count("written to") == 1
    assert json.loads(out.read_text())["difference"]["blockwise"]["seeds"] == [1]
    assert (run.with_name("pair-compare") / "report.html").exists()


def metrics_lines_so_far(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


def test_run_can_be_overridden_under_torchrun(recipe: Recipe, tmp_path: Path) -> None:
    """torchrun takes --run for an abbreviation of its own --run-path, unless `--` stands before infir2."""
    path, _ = recipe("elsewhere")
    words = ("infir2", "cpt", str(path), "--run", str(tmp_path / "here"), "--dry-run")
    process = torchrun("-m", *words)
    assert "ambiguous option: --run" in process.communicate(timeout=60)[1], "then the docs can drop their `--`"
    process = torchrun("-m", "--", *words)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f'run = "{tmp_path}/here"' in out


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"parallel.replicate": 3}, "parallel.replicate (3) does not divide the 2 process(es) of this run; give"),
        ({"train.global_batch": 2}, "train.global_batch (2) is not a multiple of train.micro_batch x processes (2 x 2"),
    ],
)
def test_a_mistake_is_told_once(recipe: Recipe, settings: dict[str, Any], said: str) -> None:
    path, run = recipe("wrong", **settings)
    process = torchrun("-m", "infir2", "cpt", str(path))
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert err.count(f"infir2: error: {said}") == 1, err
    assert 'File "' + str(ROOT / "infir2") not in err, "no traceback of ours"
    assert not run.exists()
