"""`infir2 compare`: paired differences, and the variants that are compared."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infir2 import cli
from infir2.config import CptConfig
from infir2.stages.compare import Difference, own_folder, paired_difference, summarise, to_json, variant
from infir2.train.metrics import MetricsWriter


def test_paired_difference_by_hand() -> None:
    result = paired_difference([2.0, 4.0, 5.0], [2.02, 4.04, 5.10])  # +1 %, +1 %, +2 %
    assert result.mean == pytest.approx(0.04 / 3)
    half = 4.303 * math.sqrt(((0.01 - 0.04 / 3) ** 2 * 2 + (0.02 - 0.04 / 3) ** 2) / 2) / math.sqrt(3)
    assert (result.low95, result.high95) == (pytest.approx(0.04 / 3 - half), pytest.approx(0.04 / 3 + half))
    one = paired_difference([2.0], [2.1])
    assert (one.low95, one.high95) == (None, None)


def test_no_pair_gives_no_difference() -> None:
    assert paired_difference([], []) == Difference(None, None, None, [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--precisions", "bf16", "fp9"), "argument --precisions: invalid choice: 'fp9' (choose from"),
        (("--precisions", "bf16"), "--precisions: bf16: nothing to compare it with; name the baseline first"),
        (("--seeds", "-1"), "--seeds"),
        (("--seeds", "1.5"), "argument --seeds: '1.5' is not a whole number from 0"),
        (("--seeds", "1", "2", "1"), "--seeds: 1 2 1: one is named twice"),
        (("--precisions", "bf16", "bf16"), "--precisions: bf16 bf16: one is named twice"),
        (("--seeds", str(2**63)), "is not a whole number from 0 to 2^63 - 1"),
        (("--precisions", "bf16+optim.moments"), "expected +section.key=value after bf16"),
        (("--precisions", "bf16", "bf16+train.seed=3"), "expected +section.key=value after bf16; seeds have an option"),
        (("--precisions", "bf16", "bf16+optim.momentum=1"), "command line: optim.momentum: unknown key."),
        (("--precisions", "bf16", "bf16+optim.moments=fp8"), "command line: optim.moments: input should be 'float32'"),
    ],
)
def test_mistakes_are_told(
    recipe: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    path, run = recipe()
    assert cli.main(["compare", str(path), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not run.exists()
    assert not run.with_name("run-compare").exists()


def test_a_result_file_that_cannot_be_written_is_told_before_the_first_run(
    recipe: Callable[..., tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = recipe()
    for name, why in ((tmp_path, "is a folder"), (tmp_path / "none" / "r.json", f"there is no folder {tmp_path}/none")):
        assert cli.main(["compare", str(path), "--seeds", "1", "--json", str(name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"infir2: error: --json {name}: {why}")
    assert list(run.with_name("run-compare").iterdir()) == []


def test_a_comparison_has_a_folder_of_its_own(
    recipe: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe's own run folder may hold the run of `infir2 cpt`."""
    settings = {"train.steps": 2, "train.eval_every": 2, "train.save_every": 2}
    path, run = recipe(**settings, **{"optim.warmup_steps": 0, "optim.decay_steps": 0})
    words = ["compare", str(path), "--precisions", "bf16", "bf16+optim.lr=1e-3", "--seeds", "1"]
    words += ["--json", str(run.with_name("run-compare") / "copy.json")]
    run.mkdir()
    (run / "metrics.jsonl").touch()
    assert cli.main(words) == 0
    assert [file.name for file in run.iterdir()] == ["metrics.jsonl"]
    made = {"bf16-seed1", "bf16+optim.lr=1e-3-seed1", "compare.json", "copy.json", "report.html"}
    assert {file.name for file in run.with_name("run-compare").iterdir()} == made
    result = run.with_name("run-compare") / "compare.json"
    assert result.read_text() == result.with_name("copy.json").read_text()
    capsys.readouterr()
    assert cli.main([*words, "--run", str(run)]) == 2
    assert "holds a training run; give a comparison a folder of its own" in capsys.readouterr().err


def config(**changes: Any) -> CptConfig:
    """Of a run that is not begun."""
    table = {
        "run": "runs/x",
        "model": {"preset": "tiny"},
        "data": {"seq_len": 8, "sources": {"a": 1}},
        "optim": {"lr": 1e-3},
        "train": {"steps": 2, "global_batch": 1},
    }
    return CptConfig.model_validate(table | changes)


def test_the_command_line_can_name_the_folder() -> None:
    assert own_folder(config(), []).run == "runs/x-compare"
    for words in (["--run", "runs/x"], ["--optim.lr", "1", "--run=runs/x"]):
        assert own_folder(config(), words).run == "runs/x"


def test_variants_differ_in_precision_seed_and_folder_alone() -> None:
    one, other = variant(config(), "bf16", 3), variant(config(), "hybrid", 3)
    assert (one.run, other.run) == ("runs/x/bf16-seed3", "runs/x/hybrid-seed3")
    assert (one.fp8.recipe, other.fp8.recipe, one.train.seed) == ("bf16", "hybrid", 3)
    assert one.data == other.data
    assert one.optim == other.optim


def test_other_keys_can_differ_as_well() -> None:
    base = config(data={"seq_len": 8, "sources": {"a/b": 1}})
    plain, other = variant(base, "hybrid", 3), variant(base, "hybrid+optim.moments=bfloat16+optim.lr=1e+0", 3)
    assert (other.fp8.recipe, other.optim.moments, other.optim.lr) == ("hybrid", "bfloat16", 1.0)
    assert other.run == "runs/x/hybrid+optim.moments=bfloat16+optim.lr=1e+0-seed3"
    assert other.train == plain.train
    assert other.data == base.data
    assert variant(base, "bf16+init.checkpoint=runs/base", 3).run == "runs/x/bf16+init.checkpoint=runs_base-seed3"


def test_an_fp8_head_is_compared_with_a_bf16_one() -> None:
    base = config(fp8={"recipe": "hybrid", "head": True})
    assert not variant(base, "bf16", 3).fp8.head
    assert variant(base, "blockwise", 3).fp8.head


def test_an_unfinished_run_leaves_its_pair_out(tmp_path: Path) -> None:
    for name, seed, last, loss in (("bf16", 1, 4, 2.0), ("fp8", 1, 4, 2.2), ("bf16", 2, 4, 2.0), ("fp8", 2, 3, 9.0)):
        run = tmp_path / f"{name}-seed{seed}"
        run.mkdir()
        lines = [{"kind": "train", "step": step, "loss": 3.0} for step in range(1, last + 1)]
        lines.append({"kind": "eval", "step": last, "eval_loss": loss})
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = summarise(tmp_path, ["bf16", "fp8"], [1, 2])
    assert result["difference"]["fp8"]["seeds"] == [1]
    assert result["difference"]["fp8"]["mean"] == pytest.approx(0.1)
    assert result["curves"]["fp8"][2]["step"] == [1, 2, 3]


def test_a_skipped_step_is_told_in_plain_json(tmp_path: Path) -> None:
    for name, losses in (("bf16-seed1", [3.0, 2.0]), ("fp8-seed1", [math.nan, 2.0])):
        with MetricsWriter(tmp_path / name, 2, tensorboard=False, live=False) as writer:
            for step, loss in enumerate(losses, 1):
                writer.log(step, {"loss": loss})
            writer.log(2, {"eval_loss": 2.0}, kind="eval")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    result = json.loads(to_json(summarise(tmp_path, ["bf16", "fp8"], [1])), parse_constant=refuse)
    assert result["curves"]["fp8"]["1"]["loss"] == [None, 2.0]
    assert result["difference"]["fp8"]["mean"] == 0.0
