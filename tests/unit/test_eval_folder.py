"""`infir2 eval` and the folder it writes: mistakes are told first, work goes on, tasks are added, others refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import small_chat
import torch

from infir2 import cli
from infir2.evaluate import local, results_folder
from infir2.evaluate.results_folder import problems_digest
from infir2.evaluate.tasks import Problem
from infir2.rollout.runner import Runner
from infir2.stages import eval as stage

ROWS = [{"prompt": f"What is {n} + 1?", "label": str(n + 1)} for n in range(3)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    one, two = (small_chat.write_chat_model(folder / name, seed) for name, seed in (("one", 1), ("two", 2)))
    one.rename(folder / "a")
    two.rename(folder / "b")
    return str(folder / "a"), str(folder / "b")


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.chdir(tmp_path)
    for name in ("x", "y"):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return "math:x.jsonl", "math:y.jsonl"


def evaluate(*words: str) -> int:
    return cli.main(["eval", *words, "--samples", "2", "--max-tokens", "5", "--dtype", "float32"])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1].removeprefix("infir2: error: ")


def times(out: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path(out).glob("*/*.jsonl")}


def figures(out: str) -> dict[str, Any]:
    return json.loads(Path(out, "eval.json").read_text())


@pytest.fixture
def nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: Any) -> None:
        raise AssertionError("something was asked before all mistakes were found")

    monkeypatch.setattr(local, "run_local_task", ask)


def test_every_mistake_is_told_before_anything_is_asked(
    models: tuple[str, str], tasks: tuple[str, str], nothing_is_asked: None, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tasks
    Path("bad.jsonl").write_text(json.dumps(ROWS[0] | {"label": [1]}) + "\n")
    Path("file").touch()
    for words, message in (
        ((models[0], "--tasks", f"{one},math:gone.jsonl"), "--tasks: gone.jsonl: "),
        ((models[0], "--tasks", f"{one},math:bad.jsonl"), "math:bad.jsonl: math: a label must be"),
        ((models[0], "gone", "--tasks", one), "gone: no such folder; a model is"),
        ((models[0], "--tasks", two, "--out", "/proc/out"), "/proc/out: cannot be written"),
        ((models[0], "--tasks", two, "--out", "file"), "file: is a file, but a folder is needed; give another --out"),
    ):
        assert evaluate(*words) == 2
        assert error_of(capsys).startswith(message)
    assert not Path("runs").exists()


def test_bad_command_lines_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    unreachable = "http://127.0.0.1:9/v1/models: no OpenAI-compatible server answers: [Errno "
    for words, message in (
        (["a", "--tasks", "held_out_1", "--paired"], "--paired compares two models, not 1"),
        (["a", "--tasks", "held_out_1", "--limit", "0"], "--limit: 0 is less than 1"),
        (["a", "--tasks", "held_out_1", "--data", str(tmp_path / "no")], f"--data {tmp_path / 'no'}: no such folder"),
        ([str(tmp_path / "gone"), "--tasks", "held_out_1"], f"{tmp_path / 'gone'}: no such folder; a model"),
        (["m", "--tasks", "held_out_1", "--api-url", "http://127.0.0.1:9/v1"], unreachable),
        *(
            (["m", "--tasks", "held_out_1", "--api-url", url], f"--api-url {url}: is not the address of a server")
            for url in ("notaurl", "ftp://a/v1", "http:///v1", "http://a:b/v1", "http://a b/v1", "http://a/\u00fc")
        ),
    ):
        assert cli.main(["eval", *words, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"infir2: error: {message}")
    assert not any(tmp_path.iterdir()), "nothing is written"


def test_a_tokenizer_without_a_chat_is_told_too(
    models: tuple[str, str], tasks: tuple[str, str], nothing_is_asked: None, capsys: pytest.CaptureFixture[str]
) -> None:
    from infir2.data.tokenizer import load_tokenizer

    plain = load_tokenizer(Path(models[0]))
    plain.chat_template = None
    plain.save_pretrained("plain")
    file = Path("plain/tokenizer.json")
    file.write_text(file.read_text().replace("<|im_start|>", "<|unknown|>"))
    for left in ("plain/chat_template.jinja", "plain/special_tokens_map.json", "plain/added_tokens.json"):
        Path(left).unlink(missing_ok=True)
    config = json.loads(Path("plain/tokenizer_config.json").read_text())
    Path("plain/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": config["tokenizer_class"]}))
    assert evaluate(models[0], "--tasks", tasks[0], "--tokenizer", "plain") == 2
    assert "no chat template and no token <|im_start|> for ChatML" in error_of(capsys)


def test_an_interrupted_evaluation_goes_on_after_the_finished_tasks(
    models: tuple[str, str],
    tasks: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = (*models, "--tasks", ",".join(tasks), "--paired", "--out")
    assert evaluate(*words, "whole") == 0
    real, asked = local.run_local_task, []

    def killed(task: Any, *rest: Any) -> Any:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(task.name)
        return real(task, *rest)

    monkeypatch.setattr(local, "run_local_task", killed)
    assert evaluate(*words, "out") == 130
    kept = times("out")
    assert sorted(kept) == ["out/a/math-x.jsonl.jsonl", "out/a/math-y.jsonl.jsonl", "out/b/math-x.jsonl.jsonl"]
    assert not Path("out/eval.json").exists()
    monkeypatch.setattr(local, "run_local_task", lambda task, *rest: asked.append(task.name) or real(task, *rest))
    assert evaluate(*words, "out") == 0
    assert len(asked) == 4
    assert kept.items() <= times("out").items()
    for key in ("models", "paired", "settings"):
        assert figures("out")[key] == figures("whole")[key], "as if nothing had happened"
    capsys.readouterr()
    monkeypatch.setattr(stage, "_engine_responder", None)  # no model is loaded for what is finished
    assert evaluate(*words, "out") == 0
    assert capsys.readouterr().out.count("is finished") == 4


def test_too_little_memory_is_one_line(
    models: tuple[str, str],
    tasks: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has. Including non-PyTorch")

    monkeypatch.setattr(Runner, "run", run)
    assert evaluate(models[0], "--tasks", tasks[0], "--max-batch-tokens", "512") == 2
    assert error_of(capsys) == (
        "the engine needs more memory than this device has: lower --cache-tokens (65536), --max-batch-tokens (512) or "
        "--max-sequences (256) (CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has)"
    )


def test_what_another_program_made_or_somebody_changed_is_asked_again(
    models: tuple[str, str], tasks: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (models[0], "--tasks", tasks[0], "--out", "out")
    assert evaluate(*words) == 0
    samples, before = Path("out/a/math-x.jsonl.jsonl"), times("out")
    content = samples.read_text()
    samples.write_text(content.replace('"score": 0.0', '"score": 1.0', 1))
    assert evaluate(*words) == 0
    assert samples.read_text() == content
    assert times("out") != before
    before = times("out")
    monkeypatch.setattr("infir2.launch.environment.commit", lambda: "another")
    assert evaluate(*words) == 0
    assert times("out") != before


def test_other_tasks_of_the_same_models_join_those_in_the_folder(
    models: tuple[str, str], tasks: tuple[str, str]
) -> None:
    one, two = tasks
    assert evaluate(*models, "--paired", "--tasks", one) == 0
    first = figures("runs/eval/a+b")
    assert evaluate(*models, "--tasks", two) == 0
    both = figures("runs/eval/a+b")
    assert [set(model["tasks"]) for model in both["models"]] == [{one, two}] * 2
    assert [model["tasks"][one] for model in both["models"]] == [model["tasks"][one] for model in first["models"]]
    assert both["paired"] == first["paired"]
    assert set(both["settings"]) == {one, two}
    assert evaluate(models[0], "--tasks", one) == 0
    assert figures("runs/eval/a")["models"][0]["name"] == "a", "a folder for each set of models"
    assert figures("runs/eval/a+b") == both


def test_another_evaluation_is_refused_before_it_replaces_anything(
    models: tuple[str, str], tasks: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tasks
    assert evaluate(models[0], "--tasks", one, "--out", "out") == 0
    before = {str(path): path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}

    def refused(*words: str) -> str:
        assert evaluate(*words, "--out", "out") == 2
        assert {str(path): path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before
        return error_of(capsys)

    record = "out/a/math-x.jsonl.json: was made with another"
    assert refused(models[1], "--tasks", one).startswith("out/eval.json: is about a, not b; give another --out")
    assert refused(models[0], "--tasks", one, "--limit", "2").startswith(f"{record} limit: None, now 2; give another")
    assert refused(models[0], "--tasks", two, "--seed", "3").startswith(f"{record} seed: 0, now 3; give another")
    assert refused(models[0], "--tasks", one, "--temperature", "1").startswith(f"{record} temperature: 0.65, now 1.0")
    Path("x.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert refused(models[0], "--tasks", one).startswith(f"{record} problems: ")
    Path("x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    other = tmp_path / "a"
    other.mkdir()
    for file in Path(models[1]).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert refused(str(other), "--tasks", two).startswith(f"{record} weights: ")
    os.remove("out/a/math-x.jsonl.json")
    before.pop("out/a/math-x.jsonl.json")
    assert "there is no record beside it of what it was made from" in refused(models[0], "--tasks", one)


def test_samples_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    folder = results_folder.ResultsFolder(tmp_path, {"commit": None, "versions": {"a": "1"}})
    origin = results_folder.Origin("m", "t", {"weights": "w"}, {"task": "t"})
    written = [
        results_folder.Sample("0", n, 0.5, 3, False, text)
        for n, text in enumerate(("a\u2028b\x85", "\r\n", "", "\ud83d é"))
    ]
    folder.write(origin, written)
    assert folder.finished(origin) == written
    samples = folder.samples_file(origin)
    samples.write_bytes(samples.read_bytes().replace(b"0.5", b"\xff.5"))
    assert folder.finished(origin) is None, "damaged: asked again"
    problem = Problem("0", [{"role": "user", "content": "?"}], {"entry": {"answer": 1, "at": object}})
    assert problems_digest([problem]) == problems_digest([problem])
    assert problems_digest([problem]) != problems_digest([Problem("0", problem.messages, {"entry": {"answer": 2}})])


def test_the_name_of_a_long_path_fits_a_file_system(tmp_path: Path) -> None:
    folder = results_folder.ResultsFolder(tmp_path, {})
    for task in (f"math:{'folder/' * 50}x.jsonl", "é" * 300, "../.."):
        origin = results_folder.Origin("m", results_folder.file_name(task), {}, {"task": task})
        folder.write(origin, [])
        assert folder.finished(origin) == []
    assert len(list(tmp_path.glob("m/*.jsonl"))) == 3


def test_responses_longer_than_the_model_are_told_of(
    models: tuple[str, str], tasks: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["eval", models[0], "--samples", "1", "--limit", "1", "--max-length", "40", "--max-tokens"]
    assert cli.main([*words, "100000", "--tasks", tasks[0]]) == 0
    room = "asks for responses of 100000 tokens, but with the prompt there is room for 40"
    assert f"note: {models[0]}: {tasks[0]} {room}" in capsys.readouterr().out
    assert cli.main([*words, "39", "--tasks", tasks[1]]) == 0
    assert "note:" not in capsys.readouterr().out
    monkeypatch.setattr("infir2.evaluate.harness.find_evalscope", lambda given: Path("python"))
    assert cli.main([*words, "40", "--tasks", "aime24"]) == 2
    assert error_of(capsys).endswith("but with the prompt there is room for 40; give a smaller --max-tokens")
