"""The report of a whole pipeline: stages, evaluations, answers and every training run on one page."""

import json
from pathlib import Path

import pytest
from small_report import Page, synthetic_run

from infir2.cli import main
from infir2.evaluate.score import Sample, paired, summarise

COMMANDS = {
    "corpus": "infir2 prepare docs --out chain/corpus",
    "easy": "infir2 examples elsewhere/chain/mixed/easy.jsonl --stage 1",
    "harder": "infir2 examples elsewhere/chain/mixed/harder.jsonl --stage 2",
    "bf16": "infir2 cpt r.toml --run chain/bf16 --fp8.recipe bf16",
    "fp8": "infir2 cpt r.toml --run chain/fp8",
    "sft": "infir2 sft r.toml --run chain/sft",
    "eval": "infir2 eval chain/fp8 chain/sft --paired --tasks held_out_1 --out chain/eval",
}


def samples(wrong: set[int]) -> list[Sample]:
    return [
        Sample(
            f"p{i}",
            k,
            0.0 if i in wrong else 1.0,
            12,
            False,
            f"<b>it is {i}</b> \ud83d",
            str(i),
            "boxed",
            f"How much is {i}?",
        )
        for i in range(6)
        for k in range(2)
    ]


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    folder = tmp_path / "chain"
    for name in ("fp8", "bf16", "sft"):
        synthetic_run(folder / name, recipe="bf16" if name == "bf16" else "blockwise", steps=40)
    (folder / "corpus").mkdir()
    (folder / "corpus/tokens.bin").write_bytes(b"x" * 2_500_000)
    (folder / "mixed").mkdir()
    (folder / "mixed/easy.jsonl").write_bytes(b"x" * 4_200)
    (folder / "mixed/harder.jsonl").write_bytes(b"x" * 7_100)
    answers = {"fp8": samples({0, 1, 2, 3}), "sft": samples({0})}
    for name, rows in answers.items():
        path = folder / "eval" / name / "held_out_1.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row.__dict__) + "\n" for row in rows))
    models = [
        {"name": name, "model": name, "tasks": {"held_out_1": summarise(rows).to_json()}}
        for name, rows in answers.items()
    ]
    pair = {"held_out_1": paired(answers["fp8"], answers["sft"]).to_json()}
    facts = {"models": models, "paired": {"first": "fp8", "second": "sft", "tasks": pair}}
    (folder / "eval/eval.json").write_text(json.dumps(facts))
    state = {name: {"command": command, "finished": "f", "seconds": 61.0} for name, command in COMMANDS.items()}
    state["later"] = {"command": "infir2 rl r.toml --run chain/later", "started": "f"}
    (folder / "pipeline.json").write_text(json.dumps(state))
    return folder


def test_the_page_tells_the_whole_chain(chain: Path) -> None:
    assert main(["report", str(chain)]) == 0
    page = Page((chain / "report.html").read_text())
    assert not page.fetches
    assert not page.open
    assert len(page.ids) == len(set(page.ids)), "drawings of several groups share no id"
    text = " ".join(page.text.split())
    assert all(command in text for command in COMMANDS.values())
    assert "2.5 MB" in text
    assert "easyQuestions with worked solutions4.2 kB" in text
    assert "harderQuestions with worked solutions7.1 kB" in text
    assert "not finished" in text
    assert "held-out loss" in text
    assert "Pre-training" in text
    assert "Supervised fine-tuning" in text
    assert "83.3%" in text, "avg@2 of the better model: five of six"
    assert "sft minus fp8 +50.0 points" in text
    assert "<b>it is" in text, "a response is text, never markup"


def test_a_single_problem_has_no_interval(chain: Path) -> None:
    facts = json.loads((chain / "eval/eval.json").read_text())
    one, other = samples(set())[:2], samples({0})[:2]
    for model, rows in zip(facts["models"], (one, other)):
        model["tasks"]["held_out_1"] = summarise(rows).to_json()
    facts["paired"]["tasks"]["held_out_1"] = paired(one, other).to_json()
    (chain / "eval/eval.json").write_text(json.dumps(facts))
    assert main(["report", str(chain)]) == 0
    text = " ".join(Page((chain / "report.html").read_text()).text.split())
    assert "sft minus fp8 -100.0 points, 95 % interval –, p = 1" in text


def test_bf16_is_what_others_are_compared_with(chain: Path) -> None:
    main(["report", str(chain), "--out", str(chain / "page.html")])
    text = (chain / "page.html").read_text()
    assert "Difference to bf16" in text


def test_damage_is_named(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text, message in (
        ("eval/eval.json", "{", "cannot be read"),
        ("eval/eval.json", '{"models": [{"name": "another program\'s"}]}', "not written by `infir2 eval`"),
        ("pipeline.json", "[]", "cannot be read (not a table of stages"),
        (
            "pipeline.json",
            '{"sft": {"command": "infir2 sft \'r.toml"}}',
            "cannot be read (stage 'sft': command: No closing",
        ),
        (
            "pipeline.json",
            '{"sft": {"seconds": "a minute"}}',
            "cannot be read (stage 'sft': seconds: 'a minute' is no number",
        ),
        ("pipeline.json", '{"sft": {"seconds": 1' + 400 * "0" + "}}", "cannot be read (int too large"),
        ("pipeline.json", "[" * 100_000, "cannot be read (maximum recursion depth exceeded"),
        ("pipeline.json", '{"sft": {"seconds": NaN}}', "cannot be read (stage 'sft': seconds: nan is no number"),
    ):
        whole = (chain / name).read_text()
        (chain / name).write_text(text)
        assert main(["report", str(chain)]) == 2
        assert f"{name}: {message}" in capsys.readouterr().err
        (chain / name).write_text(whole)
