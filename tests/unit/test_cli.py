"""The console script, in a process of its own where that matters: exit codes, one-line errors, lazy imports."""

import argparse
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infir2 import __version__, cli
from infir2.cli import UsageError, main, split_overrides
from infir2.errors import ConfigError, TrainingStopped, how_to_fetch

STAGES = Path(cli.__file__).parent / "stages"


def infir2(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "infir2", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """A stage that notes its arguments and ends as told."""

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("recipe")
        parser.add_argument("--dry-run", action="store_true")

    def run(args: argparse.Namespace) -> int:
        fake.args = args
        if fake.end is not None:
            raise fake.end
        return 7

    fake = argparse.Namespace(add_arguments=add_arguments, run=run, ACCEPTS_OVERRIDES=True, end=None, args=None)
    monkeypatch.setattr("importlib.import_module", lambda name: fake)
    return fake


def test_help_is_complete_and_needs_no_torch() -> None:
    done = infir2("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name, line in cli.COMMANDS.items():
        assert f"{name:<9} {line}" in done.stdout
    check = (
        "import sys, infir2.cli as c; c.main(['--help']); print(sorted({'torch', 'numpy', 'rich'} & set(sys.modules)))"
    )
    listed = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert listed.stdout.splitlines()[-1] == "[]"


def test_stages_are_the_commands_and_nothing_else() -> None:
    assert {path.stem for path in STAGES.glob("*.py")} - {"__init__"} == cli.COMMANDS.keys()


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_its_stage(name: str) -> None:
    tree = ast.parse((STAGES / f"{name}.py").read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {"add_arguments", "run"} <= functions


def test_version_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"infir2 {__version__}\n"
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_a_user_error_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    for words, message in (
        (["docter"], "docter: unknown command. Did you mean 'doctor'?"),
        (["zzz"], "zzz: unknown command. Commands: doctor, prepare"),
        (["report"], "the following arguments are required: RUN (see `infir2 report --help`)"),
        (["report", "x", "--lables", "y"], "unrecognized arguments: --lables y"),
        (["report", str(tmp_path / "gone")], f"{tmp_path / 'gone'}: no such run folder."),
    ):
        done = infir2(*words)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith(f"infir2: error: {message}")
        assert done.stderr.count("\n") == 1


def test_only_rank_0_speaks_and_every_rank_tells_torchrun(tmp_path: Path) -> None:
    error_file = tmp_path / "error.json"
    quiet = infir2("docter", RANK="3", TORCHELASTIC_ERROR_FILE=str(error_file))
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (2, "", "")
    assert "docter: unknown command" in error_file.read_text()
    assert "unknown command" in infir2("docter", RANK="0").stderr


def test_exit_codes(stage: argparse.Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cpt", "r.toml"]) == 7
    for end, code, line in (
        (ConfigError("r.toml: no"), 2, "infir2: error: r.toml: no\n"),
        (ConfigError("r.toml: one\nr.toml: two"), 2, "infir2: error: r.toml: one\ninfir2: error: r.toml: two\n"),
        (TrainingStopped("diverged"), 3, "infir2: error: diverged\n"),
        (KeyboardInterrupt(), 130, "infir2: interrupted\n"),
        (SystemExit(5), 5, ""),
    ):
        stage.end = end
        assert main(["cpt", "r.toml"]) == code
        assert capsys.readouterr().err == line
    stage.end = ZeroDivisionError("a fault of ours")
    with pytest.raises(ZeroDivisionError):
        main(["cpt", "r.toml"])


def test_a_closed_pipe_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "infir2", "--help"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    "words",
    [
        ["r.toml", "--optim.lr", "-5e-5", "--dry-run", "--run=runs/x", "--optim.betas", "[0.9, 0.95]"],
        ["--optim.lr", "-5e-5", "r.toml", "--run=runs/x", "--optim.betas", "[0.9, 0.95]", "--dry-run"],
        ["--optim.lr", "-5e-5", "--dry-run", "--run=runs/x", "--optim.betas", "[0.9, 0.95]", "r.toml"],
    ],
)
def test_overrides_may_stand_anywhere(words: list[str], stage: argparse.Namespace) -> None:
    assert main(["cpt", *words]) == 7
    assert (stage.args.recipe, stage.args.dry_run) == ("r.toml", True)
    assert stage.args.overrides == ["--optim.lr", "-5e-5", "--run=runs/x", "--optim.betas", "[0.9, 0.95]"]


@pytest.mark.parametrize(
    "words",
    [["r.toml", "--dry-rnu"], ["--dryrun", "r.toml"], ["r.toml", "--dry_run", "--run", "x"], ["--dry", "r.toml"]],
)
def test_a_mistyped_option_is_not_taken_for_an_override(words: list[str]) -> None:
    parser = cli.Parser(prog="infir2 cpt")
    parser.add_argument("--dry-run", action="store_true")
    with pytest.raises(
        UsageError, match=r"--dry\w*(-rnu)?: (needs a value|no such option). Did you mean '--dry-run'\?"
    ):
        split_overrides(words, parser)
    assert split_overrides(["r.toml", "--run", "x"], parser) == (["r.toml"], ["--run", "x"])


def test_every_line_of_the_list_of_keys_is_indented(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("cpt", "sft", "rl"):
        assert main([command, "--help"]) == 0
        keys = capsys.readouterr().out.partition("recipe keys")[2].splitlines()[1:]
        assert len(keys) > 50
        assert all(line.startswith("  ") for line in keys), command


def test_a_stage_without_overrides_refuses_them(stage: argparse.Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    stage.ACCEPTS_OVERRIDES = False
    assert main(["cpt", "r.toml", "--optim.lr", "1"]) == 2
    assert "unrecognized arguments: --optim.lr 1" in capsys.readouterr().err


def test_the_demo_is_a_chain_of_the_shipped_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--list", "--out", str(tmp_path / "demo")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[2:4] == ["to", "do"]
    assert any("sft_tiny_stage2.toml" in line for line in lines)
    assert not (tmp_path / "demo").exists()
    assert cli.main(["demo", "--until", "nothing", "--out", str(tmp_path / "demo")]) == 2
    assert "the stages are worked, corpus, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folder", "command"),
    [
        ("models/Qwen2.5-1.5B", "hf download Qwen/Qwen2.5-1.5B --local-dir models/Qwen2.5-1.5B"),
        ("Qwen/Qwen2.5-7B", "hf download Qwen/Qwen2.5-7B --local-dir models/Qwen2.5-7B"),
        ("models/mine", "hf download OWNER/NAME --local-dir models/mine"),
    ],
)
def test_the_way_to_a_model_that_is_not_there(folder: str, command: str) -> None:
    assert how_to_fetch(folder).endswith(f": {command}")
