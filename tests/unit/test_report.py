"""The report over synthetic runs that were written by the real MetricsWriter."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from small_report import Page, synthetic_run

from infir2.errors import UserError
from infir2.report import plots, write_report
from infir2.report.runs import labels_for, read_run
from infir2.train.metrics import MetricsWriter


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [
        synthetic_run(root / "bf16"),
        synthetic_run(root / "blockwise", recipe="blockwise", seed=1),
        synthetic_run(root / "hybrid", recipe="hybrid", seed=2, resume_at=40),
    ]


@pytest.fixture(scope="module")
def report_of_three(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report(runs, out)
    return out


def test_report_of_three_runs_is_one_sound_self_contained_page(report_of_three: Path) -> None:
    html = report_of_three.read_text()
    page = Page(html)
    assert page.open == []
    assert page.fetches == []
    assert "script" not in page.tags
    assert "url(http" not in html
    assert "@import" not in html
    assert len(page.ids) == len(set(page.ids)), "an id used twice lets one drawing break another"
    for words in ("Held-out loss", "Difference to bf16", "Learning rate", "Gradient norm", "FP8 health by layer"):
        assert words in page.text
    assert "infir2 cpt recipes/cpt_1.5b.toml --fp8.recipe hybrid" in page.text
    assert "0123abcd" in page.text
    assert 'fp8.recipe"bf16""blockwise""hybrid"' in page.text, "the table of what differs"
    assert list(report_of_three.parent.iterdir()) == [report_of_three], "nothing but the page is left behind"


def test_drawings_take_every_colour_from_the_page(report_of_three: Path) -> None:
    drawings = re.findall(r"<svg.*?</svg>", report_of_three.read_text(), re.DOTALL)
    assert len(drawings) >= 20
    for drawing in drawings:
        assert re.findall(r"(?:fill|stroke): *(#[0-9a-f]{3,8}|black|white)", drawing) == []
        assert 'width="' not in drawing.split(">")[0]
    assert any("var(--heat-0)" in drawing for drawing in drawings)


def test_summary_numbers_are_those_of_the_metrics(runs: list[Path]) -> None:
    run = read_run(runs[2], "hybrid")
    steps, losses = run.series("loss")
    assert steps.tolist() == list(range(1, 61)), "a resumed run has every step once"
    assert run.final_loss() == pytest.approx(float(np.mean(losses[-3:])))
    assert math.isnan(losses[30])
    assert run.last("skipped") == 1
    run.lines[-1 - [line["kind"] for line in run.lines[::-1]].index("train")]["loss"] = math.nan
    assert run.final_loss() == pytest.approx(float(np.mean(losses[-3:-1]))), "a skipped step has no loss"
    assert run.steps_of("resume") == [39]
    assert run.last("tokens") == 60 * 2_097_152
    assert (run.model, run.precision) == ("qwen2.5-1.5b", "FP8 hybrid")


def test_the_time_of_a_run_counts_steps_that_were_not_written_down(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "sparse", 24, tensorboard=False, live=False) as writer:
        for step, seconds in ((10, 2.0), (20, 3.0), (24, 1.0)):  # log.every = 10; the last step always has a line
            writer.log(step, {"loss": 2.5, "step_time_s": seconds})
    assert read_run(tmp_path / "sparse", "sparse").time_in_steps() == 10 * 2.0 + 10 * 3.0 + 4 * 1.0


def test_one_run_without_config_health_or_evaluation(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "bare", 1, tensorboard=False, live=False) as writer:
        writer.log(1, {"loss": 2.5})
    write_report([tmp_path / "bare"], tmp_path / "bare.html")
    text = Page((tmp_path / "bare.html").read_text()).text
    assert "2.5000" in text
    assert "Difference" not in text
    assert "health" not in text


def test_names_are_escaped_in_page_and_drawing(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>$x_"
    folder = synthetic_run(tmp_path / "run", recipe="blockwise", steps=20)
    with MetricsWriter(folder, 21, tensorboard=False, live=False, first_step=20) as writer:
        writer.health(21, {hostile: {"x_underflow": 0.1, "x_sqnr_db": 20.0}})
    (folder / "run.json").write_text(json.dumps({"command": hostile, "device": hostile}))
    write_report([folder], tmp_path / "out.html", labels=[hostile])
    html = (tmp_path / "out.html").read_text()
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 4


def test_a_run_of_nothing_but_nan_still_gets_a_report(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "nan", 9, tensorboard=False, live=False) as writer:
        for step in range(1, 9):
            writer.log(step, {"loss": math.nan, "grad_norm": math.inf, "peak_memory_gb": math.nan})
    write_report([tmp_path / "nan"], tmp_path / "out.html")
    assert "nan" in Page((tmp_path / "out.html").read_text()).text


def test_broken_folders_are_named(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    with pytest.raises(UserError, match=r"blockwis: no such run folder. Did you mean 'blockwise'"):
        write_report([runs[0].parent / "blockwis"], out)
    with pytest.raises(UserError, match=r"not a run folder: .* these folders in it have one: bf16, blockwise"):
        write_report([runs[0].parent], out)
    broken = synthetic_run(tmp_path / "broken", steps=20)
    lines = (broken / "metrics.jsonl").read_text().splitlines(keepends=True)
    (broken / "metrics.jsonl").write_text("".join([*lines[:4], "{oops\n", *lines[4:]]))
    with pytest.raises(UserError, match=r"metrics.jsonl: line 5: not a metrics line"):
        write_report([broken], out)
    (broken / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no training step"):
        write_report([broken], out)
    (broken / "metrics.jsonl").write_text("".join(lines))
    (broken / "config.toml").write_text("a = = 1")
    with pytest.raises(UserError, match=r"config.toml: not valid TOML.*line 1"):
        write_report([broken], out)
    (broken / "config.toml").write_text("model = 1")
    write_report([broken], tmp_path / "foreign.html")
    (broken / "config.toml").unlink()
    for line in ("{", "[]", '{"step": 1, "kind": "train"}'):
        (broken / "samples.jsonl").write_text(f"{line}\n{line}\n")
        with pytest.raises(UserError, match=r"samples.jsonl: line 1 is no sample in JSON"):
            write_report([broken], out)
    (broken / "samples.jsonl").unlink()
    (broken / "run.json").write_text("[")
    with pytest.raises(UserError, match=r"run.json: not valid JSON"):
        write_report([broken], out)
    with pytest.raises(UserError, match="cannot be written"):
        write_report(runs[:1], tmp_path / "no" / "such" / "folder.html")
    assert not out.exists()


def test_labels_grow_until_they_differ(tmp_path: Path) -> None:
    assert labels_for([tmp_path / "a" / "run", tmp_path / "b" / "run"], None) == ["a/run", "b/run"]
    with pytest.raises(UserError, match="1 labels for 2 runs"):
        labels_for([tmp_path, tmp_path], ["one"])
    with pytest.raises(UserError, match="named twice"):
        labels_for([tmp_path, tmp_path], None)


def test_rolling_mean_leaves_out_what_is_not_finite() -> None:
    values = np.array([1.0, math.nan, 3.0, math.inf, 5.0])
    assert plots.rolling_mean(values, 3).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
