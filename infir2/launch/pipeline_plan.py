"""What a pipeline file asks for: every stage's command with its places filled in, and whether it is finished.

A stage's fingerprint covers all that its result follows from: the words of its command, the recipes it names, the other
files and folders it names (their sizes and times), the variables, and the fingerprints of the stages it reads.
``RUN/pipeline.json`` says for each stage with which fingerprint it was started and finished.
"""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from infir2.config import Section, load
from infir2.durable import replace_file
from infir2.errors import ConfigError, did_you_mean
from infir2.launch.held_folder import writing
from infir2.report.stage_table import STAGE_TABLE, read_stage_table

_PLACE = re.compile(r"\{([A-Za-z0-9_.-]+)\}")


class StageSection(Section):
    """One stage of a pipeline file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """What other stages call it, and its place in the chain's folder."""
    command: str
    """An infir2 command, such as "cpt recipes/cpt_tiny.toml --run {out}"."""
    launcher: str = ""
    """Started through this, such as "torchrun --nproc-per-node 8"; empty = this Python."""


class PipelineConfig(Section):
    """A pipeline file."""

    run: str = Field(min_length=1)
    """Folder of the chain; every stage has its place in it."""
    vars: dict[str, Annotated[str, BeforeValidator(str)]] = Field(default_factory=dict)
    """Words that commands can name as {NAME}."""
    stage: list[StageSection] = Field(min_length=1)


@dataclass(frozen=True)
class Step:
    """One stage of the chain."""

    name: str
    words: tuple[str, ...]
    """The infir2 command, its places filled in."""
    launcher: tuple[str, ...]
    """Put before `-m infir2 ...` instead of this Python: torchrun and its options."""
    out: Path
    makes: bool
    """Whether the command names {out}; if not, it adds to another stage's place."""
    fingerprint: str

    @property
    def command_line(self) -> str:
        return shlex.join(["infir2", *self.words])


@dataclass(frozen=True)
class Plan:
    run: Path
    steps: tuple[Step, ...]

    def state(self) -> dict[str, dict[str, Any]]:
        """stage -> what is known of it. Raises UserError for a damaged file."""
        return read_stage_table(self.run)

    def note(self, step: Step, **facts: Any) -> None:
        """Write down facts about a stage."""
        state = self.state()
        state[step.name] = {**state.get(step.name, {}), **facts}
        with writing(self.run):
            self.run.mkdir(parents=True, exist_ok=True)
            replace_file(self.run / STAGE_TABLE, json.dumps(state, indent=1).encode())

    def is_finished(self, step: Step) -> bool:
        facts = self.state().get(step.name, {})
        return facts.get("finished") == step.fingerprint and bool(not step.makes or outputs(step))

    def is_started(self, step: Step) -> bool:
        """Whether what lies in the stage's place was begun with the same inputs."""
        return self.state().get(step.name, {}).get("started") == step.fingerprint


def outputs(step: Step) -> list[Path]:
    """What the stage has made: its place, or files of that name with an ending."""
    return [path for path in (step.out, *step.out.parent.glob(f"{step.out.name}.*")) if path.exists()]


def read_plan(path: Path, overrides: Sequence[str]) -> Plan:
    """The plan of a pipeline file, with ``--run`` and ``--vars.NAME`` of the command line. Raises ConfigError."""
    config = load(PipelineConfig, path, overrides)
    declared = load(PipelineConfig, path, [f"--run={config.run}"]).vars
    known = {*declared, *(name for stage in config.stage for name in _PLACE.findall(stage.command))}
    given = [word.removeprefix("--vars.").partition("=")[0] for word in overrides if word.startswith("--vars.")]
    for name in (word.replace("-", "_") for word in given):
        if name not in known:
            hint = did_you_mean(name, sorted(declared))
            raise ConfigError(f"command line: vars.{name}: {path} has no such variable.{hint}")
    return make_plan(config, str(path))


def make_plan(config: PipelineConfig, file: str) -> Plan:
    """Fill in and fingerprint every stage. Raises ConfigError, naming file, stage and word."""
    run = Path(config.run)
    places: dict[str, str] = dict(config.vars)
    fingerprints: dict[str, str] = {}
    steps = []
    for stage in config.stage:
        where = f"{file}: stage {stage.name!r}"
        if stage.name in places or stage.name in ("out", "run", "old", "pipeline"):
            raise ConfigError(f"{where}: the name is taken; give every stage and variable a name of its own")
        words = _words(stage.command, where)
        known = {**places, "out": str(run / stage.name), "run": str(run)}
        filled = tuple(_fill(word, known, where) for word in words)
        read = sorted({name for word in words for name in _PLACE.findall(word)} - {"out", "run"})
        # The first word is the command's name: a folder of that name here is another matter.
        own = [word for plain, word in zip(words[1:], filled[1:]) if set(_PLACE.findall(plain)) <= config.vars.keys()]
        facts = {
            "words": words,
            "read": {name: fingerprints.get(name) or config.vars[name] for name in read},
            "files": [_file_fingerprint(path) for path in _named_files(own)],
        }
        fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        launcher, makes = tuple(shlex.split(stage.launcher)), "{out}" in stage.command
        steps.append(Step(stage.name, filled, launcher, run / stage.name, makes, fingerprint))
        places[stage.name], fingerprints[stage.name] = str(run / stage.name), fingerprint
    return Plan(run, tuple(steps))


def _words(command: str, where: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"{where}: command: {error}") from None
    if words[:1] == ["infir2"]:
        words = words[1:]
    if not words or words[0] in ("pipeline", "demo"):
        raise ConfigError(f"{where}: command: {command!r} names no stage of infir2")
    return words


def _fill(word: str, places: dict[str, str], where: str) -> str:
    def place(match: re.Match[str]) -> str:
        name = match[1]
        if name not in places:
            hint = did_you_mean(name, places)
            raise ConfigError(f"{where}: {{{name}}} is no earlier stage and no variable.{hint}")
        return places[name]

    return _PLACE.sub(place, word)


def _named_files(words: Sequence[str]) -> list[Path]:
    """The words that are files or folders here. What --exclude names is left out by the stage, whatever lies here."""
    found, excluded = [], False
    for word in words:
        if word.startswith("--"):
            option, _, word = word.partition("=")
            excluded = option == "--exclude"
        if not excluded and os.path.exists(word):
            found.append(Path(word))
    return found


def _file_fingerprint(path: Path) -> list[Any]:
    """A recipe by its content, anything else by names, sizes and times."""
    if path.suffix == ".toml":
        return [str(path), hashlib.sha256(path.read_bytes()).hexdigest()]
    rows = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if name != "__pycache__")  # Python writes there as it pleases
        rows += [_stat(Path(folder) / name) for name in sorted(names)]
    return [str(path), hashlib.sha256(json.dumps(rows or [_stat(path)]).encode()).hexdigest()]


def _stat(path: Path) -> list[Any]:
    try:
        found = path.stat()
    except OSError:  # a link to nothing: an editor's lock is one
        found = path.lstat()
    return [str(path), found.st_size, found.st_mtime_ns]
