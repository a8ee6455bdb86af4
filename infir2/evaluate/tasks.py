"""What can be evaluated: the four benchmarks of the paper, and local tasks that need neither network nor evalscope."""

from dataclasses import dataclass, replace
from typing import Any

from infir2.data.conversations import Message, RowSource
from infir2.data.documents import REASONS, BadRow
from infir2.data.prompts import prompt_row
from infir2.errors import ConfigError, DataError, did_you_mean
from infir2.reward.dispatch import RewardKind

LOCAL_PROBLEMS = 100
"""Problems of a generated task, without --limit."""
_BOXED = "\n\nPut your final answer within \\boxed{}."


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    samples: int
    max_tokens: int
    temperature: float = 0.65
    top_p: float = 0.95


@dataclass(frozen=True)
class Benchmark:
    """One that evalscope asks and grades."""

    name: str
    evalscope_name: str
    sampling: Sampling
    """The paper's (docs/evaluation.md)."""
    hub: dict[str, Any]
    """evalscope's dataset_args where no local copy is given."""
    options: dict[str, Any]
    """evalscope's dataset_args in any case."""


@dataclass(frozen=True)
class LocalTask:
    """One whose problems are generated or lie in a file."""

    name: str
    grader: RewardKind
    sampling: Sampling
    grader_file: str | None = None
    """Where the grader ``python`` lies."""


@dataclass(frozen=True)
class Problem:
    """A question and what decides about an answer."""

    id: str
    messages: list[Message]
    label: Any


_AFTER_THINKING = {"filters": {"remove_until": "</think>"}}
_LCB_DATES = {"extra_params": {"start_date": "2024-08-01", "end_date": "2025-02-28"}}
BENCHMARKS = {
    task.name: task
    for task in (
        Benchmark("aime24", "aime24", Sampling(32, 31_000), {}, _AFTER_THINKING),
        Benchmark("aime25", "aime25", Sampling(32, 31_000), {}, _AFTER_THINKING),
        Benchmark(
            "gpqa_diamond", "gpqa_diamond", Sampling(8, 26_000),
            {"dataset_id": "Idavidrein/gpqa", "subset_list": ["gpqa_diamond"]}, _AFTER_THINKING,
        ),
        Benchmark(
            "livecodebench_v5", "live_code_bench", Sampling(8, 27_000),
            {"subset_list": ["release_v5"]}, {**_AFTER_THINKING, **_LCB_DATES},
        ),
    )
}  # fmt: skip
_LOCAL_SAMPLING = Sampling(4, 1024)
_GENERATED = {"held_out_1": 1, "held_out_2": 2}
_FILE_GRADERS: tuple[RewardKind, ...] = ("math", "choice", "code", "reasoning_gym", "python")

HELP = """  aime24 aime25 gpqa_diamond livecodebench_v5
                     the paper's benchmarks, by evalscope
  held_out_1 held_out_2
                     held-out questions of the worked examples, easy and harder (`infir2 examples --split held_out`)
  rg:NAME            a reasoning-gym data set, such as rg:gcd
  math:FILE choice:FILE code:FILE reasoning_gym:FILE
                     rows {"prompt": text or messages, "label": ...} in a .jsonl or .parquet file, graded by that reward
                     (docs/rewards.md)
  python:GRADER.py:FILE
                     such rows, graded by the function score(response, label) in GRADER.py: a number from 0 to 1"""


def parse_tasks(text: str) -> list[Benchmark | LocalTask]:
    """The tasks of ``--tasks a,b``, in order. Raises ConfigError for an unknown one and for one named twice."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError("--tasks: names no task")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--tasks: {twice} is named twice")
    return [_parse(name) for name in names]


def with_sampling(
    task: Benchmark | LocalTask,
    samples: int | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
) -> Benchmark | LocalTask:
    """The task with other settings where they are given. Raises ConfigError for values out of range."""
    given = {"samples": samples, "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    for name, value in given.items():
        low, high = (1, 10**9) if name in ("samples", "max_tokens") else (0.0, 1.0 if name == "top_p" else 100.0)
        if value is not None and not low <= value <= high:
            raise ConfigError(f"--{name.replace('_', '-')}: {value} is not between {low:g} and {high:g}")
    kept = {name: value for name, value in given.items() if value is not None}
    return replace(task, sampling=replace(task.sampling, **kept))  # type: ignore[arg-type]


def problems_of(task: LocalTask, limit: int | None) -> list[Problem]:
    """The problems of a local task, the same ones every time. Raises DataError for a file that cannot be used."""
    kind, _, rest = task.name.partition(":")
    if kind in _GENERATED:
        return _held_out(_GENERATED[kind], limit or LOCAL_PROBLEMS)
    if kind == "rg":
        return _reasoning_gym(rest, limit or LOCAL_PROBLEMS)
    return _from_file(rest.removeprefix(f"{task.grader_file}:"), limit)


def _parse(name: str) -> Benchmark | LocalTask:
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    kind, colon, rest = name.partition(":")
    if name in _GENERATED:
        return LocalTask(name, "reasoning_gym", _LOCAL_SAMPLING)
    if kind == "rg" and rest:
        _check_data_set(rest)
        return LocalTask(name, "reasoning_gym", _LOCAL_SAMPLING)
    if colon and rest and (grader := next((one for one in _FILE_GRADERS if one == kind), None)):
        if grader != "python":
            return LocalTask(name, grader, _LOCAL_SAMPLING)
        stem, _, file = rest.partition(".py:")
        if not (stem and file):
            raise ConfigError(f"--tasks: {name}: should read python:GRADER.py:FILE")
        return LocalTask(name, grader, _LOCAL_SAMPLING, f"{stem}.py")
    known = [*BENCHMARKS, *_GENERATED]
    hint = did_you_mean(name, known) or f" There are {', '.join(known)}, rg:NAME and math:FILE (see --help)."
    raise ConfigError(f"--tasks: {name}: no such task.{hint}")


def _check_data_set(name: str) -> None:
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise ConfigError(f"--tasks: rg:{name}: reasoning-gym has no such data set.{did_you_mean(name, DATASETS)}")


def _held_out(stage: int, count: int) -> list[Problem]:
    from infir2.data.worked_solutions import worked_examples

    examples = worked_examples(stage, count, seed=0, split="held_out")
    return [
        Problem(f"{number}-{one.family}", _user(one.question), {"dataset": one.family, "entry": one.reference})
        for number, one in enumerate(examples)
    ]


def _reasoning_gym(name: str, count: int) -> list[Problem]:
    import reasoning_gym

    entries = reasoning_gym.create_dataset(name, size=count, seed=0)
    return [
        Problem(str(number), _user(entry["question"] + _BOXED), {"dataset": name, "entry": entry})
        for number, entry in enumerate(entries)
    ]


def _from_file(path: str, limit: int | None) -> list[Problem]:
    found: list[Problem] = []
    for row in RowSource(path, "--tasks", prompt_row):
        try:
            messages, label = row.parse()
        except BadRow as error:  # none is left out: the average would silently be over other problems
            raise DataError(f"{row.path}:{row.line}: {REASONS[error.reason]} {error.detail}".rstrip()) from None
        found.append(Problem(str(len(found)), messages, label))
        if len(found) == limit:
            break
    if not found:
        raise DataError(f"--tasks: {path}: holds no problem")
    return found


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]
