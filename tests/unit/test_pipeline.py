"""`infir2 pipeline`: places, fingerprints, skipping, going on; with real commands as stages."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infir2.cli import main
from infir2.config import load
from infir2.errors import ConfigError
from infir2.launch import pipeline_run
from infir2.launch.held_folder import held, wait_until_free
from infir2.launch.pipeline_plan import PipelineConfig, Plan, make_plan

CHAIN = """
run = "chain"
[vars]
count = 12
[[stage]]
name = "easy"
command = "examples {out}.jsonl --form prompts --stage 1 --count {count}"
[[stage]]
name = "shards"
command = "prepare {easy}.jsonl --out {out} --text-key prompt --validation-fraction 0.2 --vocab-size 300"
[[stage]]
name = "other"
command = "examples {out}.jsonl --stage 2 --count 5"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chain.toml").write_text(CHAIN)
    return tmp_path


def plan(text: str, folder: Path, *overrides: str) -> Plan:
    (folder / "chain.toml").write_text(text)
    return make_plan(load(PipelineConfig, folder / "chain.toml", overrides), "chain.toml")


def finished(folder: Path) -> dict[str, str]:
    state = json.loads((folder / "chain/pipeline.json").read_text())
    return {name: facts["finished"] for name, facts in state.items() if "finished" in facts}


def test_places_are_filled_in(folder: Path) -> None:
    easy, shards, _ = plan(CHAIN, folder).steps
    assert easy.words == ("examples", "chain/easy.jsonl", "--form", "prompts", "--stage", "1", "--count", "12")
    assert shards.words[:4] == ("prepare", "chain/easy.jsonl", "--out", "chain/shards")
    assert plan(CHAIN, folder, "--vars.count", "9").steps[0].words[-1] == "9"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "{easy}.jsonl --out",
            "{esay}.jsonl --out",
            r"stage 'shards': \{esay\} is no earlier stage.*Did you mean 'easy'",
        ),
        ('name = "shards"', 'name = "easy"', "stage 'easy': the name is taken"),
        ('name = "shards"', 'name = "out"', "stage 'out': the name is taken"),
        ('name = "shards"', 'name = "../x"', "stage.1.name"),
        ("--count 5", "--count '5", "stage 'other': command: No closing quotation"),
        ('command = "examples {out}.jsonl --stage 2 --count 5"', 'command = "demo"', "names no stage"),
        ("[vars]", "[variables]", r"variables: unknown key. Did you mean 'vars'"),
    ],
)
def test_mistakes_are_named(folder: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(CHAIN.replace(old, new), folder)


def test_fingerprints_follow_what_a_stage_reads(folder: Path) -> None:
    def fingerprints(text: str = CHAIN, *overrides: str) -> list[str]:
        return [step.fingerprint for step in plan(text, folder, *overrides).steps]

    before = fingerprints()
    assert fingerprints() == before
    more = fingerprints(CHAIN, "--vars.count", "13")
    assert [a == b for a, b in zip(before, more)] == [False, False, True], "what reads a changed stage changes too"
    for option in ("--tokenizer notes.txt", "--tokenizer=notes.txt"):
        with_file = CHAIN.replace("--stage 2", f"--stage 2 {option}")
        (folder / "notes.txt").write_text("one")
        first = fingerprints(with_file)
        (folder / "notes.txt").write_text("two and more")
        assert [a == b for a, b in zip(first, fingerprints(with_file))] == [True, True, False]
    fingerprints(CHAIN.replace("--stage 2", f"--stage 2 --note {'x' * 300}"))  # no name of a file
    (folder / "prepare").mkdir()
    (folder / "prepare/notes.txt").write_text("one")
    assert fingerprints() == before, "the command prepare reads no folder of its own name"


def test_a_chain_runs_once_and_only_what_changed_again(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["pipeline", "chain.toml"]) == 0
    assert len((folder / "chain/easy.jsonl").read_text().splitlines()) == 12
    first, times = finished(folder), (folder / "chain/easy.jsonl").stat().st_mtime_ns
    assert main(["pipeline", "chain.toml"]) == 0
    assert (folder / "chain/easy.jsonl").stat().st_mtime_ns == times
    assert capfd.readouterr().out.count("is finished") == 3

    other = (folder / "chain/other.jsonl").stat().st_mtime_ns
    assert main(["pipeline", "chain.toml", "--vars.count", "15"]) == 0
    assert len((folder / "chain/easy.jsonl").read_text().splitlines()) == 15
    assert len((folder / "chain/old/easy.jsonl").read_text().splitlines()) == 12, "nothing is lost"
    assert (folder / "chain/other.jsonl").stat().st_mtime_ns == other
    assert finished(folder)["other"] == first["other"]
    assert finished(folder)["shards"] != first["shards"]

    (folder / "chain/other.jsonl").unlink()
    assert main(["pipeline", "chain.toml", "--vars.count", "15"]) == 0
    assert (folder / "chain/other.jsonl").exists(), "what was deleted is made again"


def test_a_stage_may_add_to_the_place_of_another(folder: Path) -> None:
    (folder / "chain.toml").write_text(
        CHAIN.replace("{out}.jsonl --stage 2", "{easy}.more.jsonl --stage 2")  # names no place of its own
    )
    assert main(["pipeline", "chain.toml"]) == 0
    made = (folder / "chain/easy.more.jsonl").stat().st_mtime_ns
    assert main(["pipeline", "chain.toml"]) == 0
    assert (folder / "chain/easy.more.jsonl").stat().st_mtime_ns == made


def test_a_failing_stage_stops_the_chain(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "chain.toml").write_text(CHAIN.replace("--stage 2 --count 5", "--stage 7 --count 5"))
    assert main(["pipeline", "chain.toml"]) == 2
    assert "stage 'other' ended with exit code 2" in capfd.readouterr().err
    assert set(finished(folder)) == {"easy", "shards"}


def test_until_and_list(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["pipeline", "chain.toml", "--until", "easy"]) == 0
    assert set(finished(folder)) == {"easy"}
    assert main(["pipeline", "chain.toml", "--list"]) == 0
    lines = [line.split()[1:3] for line in capfd.readouterr().out.splitlines() if "infir2" in line]
    assert lines == [["easy", "done"], ["shards", "to"], ["other", "to"]]
    assert main(["pipeline", "chain.toml", "--until", "nothing"]) == 2


@contextmanager
def running(folder: Path, count: int = 400_000) -> Iterator[subprocess.Popen[str]]:
    """A chain in a process group of its own, in the middle of its first stage."""
    words = ["pipeline", "chain.toml", "--vars.count", str(count)]
    process = subprocess.Popen(
        [sys.executable, "-m", "infir2", *words], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    try:
        while not list((folder / "chain").glob(".easy.jsonl.*")):  # what the stage is writing
            assert process.poll() is None
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_chain_alone_is_handed_on_and_ends_it(folder: Path, number: signal.Signals, code: int) -> None:
    with running(folder) as process:
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert said.splitlines()[-1].endswith("interrupted in stage 'easy'; the same command goes on from there")
    assert not finished(folder)
    assert not (folder / "chain/easy.jsonl").exists(), "the stage has run to its end"


def test_a_signal_is_handed_on_once_whenever_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training stage takes a second one for impatience, and does not save."""
    got: list[int] = []

    class Stage:
        def __init__(self, *arguments: object, **options: object) -> None:
            os.kill(os.getpid(), signal.SIGINT)  # while it is being started

        def send_signal(self, number: int) -> None:
            got.append(number)
            if number == signal.SIGINT:
                os.kill(os.getpid(), signal.SIGTERM)  # while the first one is handed on

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(pipeline_run.subprocess, "Popen", Stage)
    assert pipeline_run._run(["stage"]) == (0, signal.SIGINT)
    assert got == [signal.SIGINT, signal.SIGTERM]


def test_two_chains_do_not_share_a_folder(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with running(folder):
        assert main(["pipeline", "chain.toml"]) == 2
        assert "chain: another pipeline is running in this folder; wait for it" in capfd.readouterr().err
        assert main(["pipeline", "chain.toml", "--list"]) == 0, "to look is allowed"


def test_a_folder_that_cannot_be_written_is_one_line(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "file").touch()
    for run, message in (
        ("/proc/chain", "/proc/chain: cannot be written"),  # not even by root
        ("file/chain", "file/chain: cannot be written: Not a directory"),
        ("file", "file: is a file, but a folder is needed; give another folder"),
    ):
        assert main(["pipeline", "chain.toml", "--run", run]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"infir2: error: {message}")
        assert main(["demo", "--size", "tiny", "--out", run]) == 2
        assert message in capfd.readouterr().err.splitlines()[-1]
    (folder / "chain").mkdir()
    (folder / "chain/pipeline.json").write_text("[]")
    assert main(["pipeline", "chain.toml"]) == 2
    assert "chain/pipeline.json: cannot be read (not a table of stages)" in capfd.readouterr().err.splitlines()[-1]
    (folder / "chain/pipeline.json").unlink()
    (folder / "chain/easy.jsonl").touch()
    (folder / "chain/old").touch()
    assert main(["pipeline", "chain.toml"]) == 2
    assert "chain/old: cannot be written" in capfd.readouterr().err.splitlines()[-1]
    assert (folder / "chain/easy.jsonl").exists()


def test_a_variable_that_the_file_does_not_know_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for words, hint in (
        (["--vars.conut", "3"], " Did you mean 'count'?"),
        (["--vars.conut=3"], " Did you mean 'count'?"),
        (["--vars.xyzzy", "3"], ""),
    ):
        assert main(["pipeline", "chain.toml", *words]) == 2
        name = words[0].partition("=")[0].removeprefix("--")
        message = f"command line: {name}: chain.toml has no such variable.{hint}"
        assert capfd.readouterr().err == f"infir2: error: {message}\n"
    assert not (folder / "chain").exists()
    (folder / "chain.toml").write_text(CHAIN.replace("count = 12", "").replace("{count}", "{how_many}"))
    assert main(["pipeline", "chain.toml", "--list", "--vars.how-many", "3"]) == 0, "the file need not give a value"


def test_killed_in_a_stage_the_chain_goes_on(folder: Path) -> None:
    (folder / "chain.toml").write_text(CHAIN.replace("{count}", "4000"))
    process = subprocess.Popen([sys.executable, "-m", "infir2", "pipeline", "chain.toml"], start_new_session=True)
    try:
        while not (folder / "chain/pipeline.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not finished(folder)
    assert main(["pipeline", "chain.toml", "--vars.count", "4000", "--until", "easy"]) == 0
    assert len((folder / "chain/easy.jsonl").read_text().splitlines()) == 4000


@pytest.mark.slow
def test_a_stage_under_torchrun_keeps_its_own_run_option(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "chain.toml").write_text(
        'run = "chain"\n[[stage]]\nname = "cpt"\n'
        f'launcher = "{Path(sys.executable).parent}/torchrun --standalone --nproc-per-node 1"\n'
        'command = "cpt gone.toml --run {out}"\n'
    )
    assert main(["pipeline", "chain.toml"]) != 0
    error = capfd.readouterr().err
    assert "gone.toml: no such" in error
    assert "ambiguous" not in error


def test_a_stage_waits_for_the_one_that_a_killed_chain_left_behind(tmp_path: Path) -> None:
    left_behind = (
        "import sys\nfrom pathlib import Path\nfrom infir2.launch.held_folder import held\n"
        f"with held(Path({str(tmp_path)!r}), 'busy', 'go'):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", left_behind], text=True, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        wait_until_free(tmp_path, 0.1)
        assert process.poll() is None, "no longer than it was told"
        threading.Timer(0.3, process.stdin.close).start()  # then it ends
        wait_until_free(tmp_path, 60.0)
        with held(tmp_path, "busy", "go"):
            pass
    wait_until_free(tmp_path / "nothing", 60.0)


def test_a_folder_that_a_stage_excludes_by_name_is_none_of_its_inputs(folder: Path) -> None:
    text = CHAIN.replace("--vocab-size 300", "--vocab-size 300 --exclude tests")
    (folder / "tests").mkdir()
    before = [step.fingerprint for step in plan(text, folder).steps]
    (folder / "tests/new.py").write_text("changed")
    assert [step.fingerprint for step in plan(text, folder).steps] == before


def test_a_link_to_nothing_in_a_folder_that_a_stage_reads(folder: Path) -> None:
    """As Emacs makes one beside every file that is edited."""
    (folder / "text").mkdir()
    (folder / "text/.#notes.txt").symlink_to("somebody@machine.1234")
    steps = plan(CHAIN.replace("--stage 2", "--stage 2 --tokenizer text"), folder).steps
    assert steps[2].words[-3:] == ("text", "--count", "5")
