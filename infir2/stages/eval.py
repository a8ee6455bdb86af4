"""Evaluate a model: `infir2 eval MODEL --tasks held_out_1`, or compare two: `infir2 eval A B --paired --tasks ...`.

MODEL is whatever `infir2 serve` takes; with --api-url it is the name of a model at that OpenAI-compatible server (ours,
SGLang's, vLLM's), whose key is --api-key or the variable INFIR2_API_KEY. Tasks:

{tasks}

The benchmarks run with the paper's numbers of tokens and samples, temperature 0.65 and top-p 0.95, through a server
that the command starts and stops; --data DIR reads their rows from local copies. Local tasks run in this process.

It prints a table and writes OUT/eval.json and every sample to OUT/MODEL/TASK.jsonl. With --paired, both models are
asked the same problems, in local tasks with the same random numbers, and the difference has a confidence interval and
the p-value of a sign-flip permutation test over problems.
"""

import argparse
import gc
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from infir2.durable import replace_file
from infir2.errors import ConfigError, UserError
from infir2.evaluate.server import KEY_VARIABLE
from infir2.evaluate.tasks import HELP, Benchmark, LocalTask, parse_tasks, problems_of, with_sampling
from infir2.launch.inference import InferenceOptions, add_inference_arguments
from infir2.launch.progress import count_bar

if TYPE_CHECKING:
    from infir2.evaluate.respond import Responder
    from infir2.evaluate.score import Paired, Sample, TaskScore
    from infir2.reward.score import Scorer

__doc__ = (__doc__ or "").replace("{tasks}", HELP)
Task = Benchmark | LocalTask
Samples = dict[str, "list[Sample]"]
"""By task."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="one or several models")
    add("--tasks", required=True, metavar="A,B", help="what to evaluate, separated by commas")
    add("--paired", action="store_true", help="compare the second model with the first, problem by problem")
    add("--out", type=Path, default=Path("runs/eval"), help="folder for everything that is written (%(default)s)")
    add("--samples", type=int, metavar="K", help="samples of each problem (default: the task's)")
    add("--max-tokens", type=int, metavar="N", help="longest response (default: the task's)")
    add("--temperature", type=float, metavar="T", help="(default: 0.65)")
    add("--top-p", type=float, metavar="P", help="(default: 0.95)")
    add("--limit", type=int, metavar="N", help="only the first N problems of each task")
    add(
        "--data", type=Path, metavar="DIR", help="local copies of the benchmarks' rows, DIR/aime24/test.jsonl and so on"
    )
    add("--api-url", metavar="URL", help="ask this server, such as http://127.0.0.1:8000/v1")
    add("--api-key", help=f"its key; prefer the variable {KEY_VARIABLE}")
    add("--concurrency", type=int, default=64, metavar="N", help="requests at a time to a server (%(default)s)")
    add("--evalscope-python", type=Path, metavar="PATH", help="interpreter of an environment that has evalscope")
    add("--unsafe-code-exec", action="store_true", help="run programs even where the sandbox does not hold")
    add_inference_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from infir2.evaluate.harness import find_evalscope
    from infir2.evaluate.score import paired, summarise
    from infir2.launch.environment import environment

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160  # a file has no edge at which a table would have to break
    tasks = _tasks(args)
    names = _names(args)
    files = dict(zip([task.name for task in tasks], _distinct([_file_name(task.name) for task in tasks])))
    python = find_evalscope(args.evalscope_python) if any(isinstance(task, Benchmark) for task in tasks) else None
    environment_now = environment()
    samples: dict[str, Samples] = {}
    with closing(_Scorers(args.unsafe_code_exec)) as scorers:
        for text, name in zip(args.models, names):
            samples[name] = _evaluate(args, text, name, tasks, python, console, scorers)
            for task in tasks:
                _write_samples(args.out / name / f"{files[task.name]}.jsonl", samples[name][task.name])
    scores = {name: {task.name: summarise(samples[name][task.name]) for task in tasks} for name in names}
    pairs = {}
    if args.paired:
        first, second = (samples[name] for name in names)
        pairs = {task.name: paired(first[task.name], second[task.name]) for task in tasks}
    _write_json(args.out / "eval.json", {**environment_now, **_result(args, names, tasks, scores, pairs)})
    _show(console, names, tasks, scores, pairs)
    console.print(f"written to {args.out / 'eval.json'}; every sample beside it")
    return 0


def _tasks(args: argparse.Namespace) -> list[Task]:
    for name in ("limit", "concurrency"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ConfigError(f"--{name}: {value} is less than 1")
    if args.paired and len(args.models) != 2:
        raise ConfigError(f"--paired compares two models, not {len(args.models)}")
    if args.data is not None and not args.data.is_dir():
        raise ConfigError(f"--data {args.data}: no such folder")
    settings = (args.samples, args.max_tokens, args.temperature, args.top_p)
    return [with_sampling(task, *settings) for task in parse_tasks(args.tasks)]


def _names(args: argparse.Namespace) -> list[str]:
    """What each model is called in the table and in OUT: different for different models."""
    from infir2.launch.inference import model_name

    names = [_file_name(text) if args.api_url else model_name(text) for text in args.models]
    return _distinct(names)


def _distinct(names: Sequence[str]) -> list[str]:
    """Each name, with a number behind it where it has been given out before: also where a file system does not tell
    capital letters from small ones."""
    given: dict[str, str] = {}
    for name in names:
        found, number = name, 1
        while found.casefold() in given:
            number += 1
            found = f"{name}-{number}"
        given[found.casefold()] = found
    return list(given.values())


class _Scorers:
    """The scorer of each grader, made when it is first needed: its processes start once for all models and tasks."""

    def __init__(self, unsafe_code_exec: bool) -> None:
        self._unsafe_code_exec = unsafe_code_exec
        self._made: dict[str, Scorer] = {}

    def of(self, task: LocalTask) -> "Scorer":
        from infir2.reward.dispatch import reward_for

        if task.grader not in self._made:
            options = {"unsafe_code_exec": self._unsafe_code_exec} if task.grader == "code" else {}
            self._made[task.grader] = reward_for(task.grader, **options)
        return self._made[task.grader]

    def close(self) -> None:
        for scorer in self._made.values():
            scorer.close()


def _evaluate(
    args: argparse.Namespace,
    text: str,
    name: str,
    tasks: list[Task],
    python: Path | None,
    console: Console,
    scorers: _Scorers,
) -> Samples:
    """All tasks of one model: local ones in this process, benchmarks through a server."""
    from infir2.evaluate.harness import Endpoint, Settings, prepare, run_benchmarks
    from infir2.evaluate.respond import ApiResponder

    local = [task for task in tasks if isinstance(task, LocalTask)]
    benchmarks = [task for task in tasks if isinstance(task, Benchmark)]
    key = args.api_key or os.environ.get(KEY_VARIABLE) or "EMPTY"
    folder = args.out / name / "evalscope"
    if python is not None:
        settings = Settings(python, args.data, args.limit, args.concurrency, args.unsafe_code_exec)
        staged = prepare(benchmarks, settings, folder)  # what is missing shows before a model is loaded
    found: Samples = {}
    if local and args.api_url:
        responder = ApiResponder(args.api_url, key, text, args.concurrency)
        found |= _local(args, local, responder, name, console, scorers)
    elif local:
        found |= _in_process(args, text, local, name, console, scorers)
    if python is not None:
        with _endpoint(args, text, key, console) as (url, api_key, model):
            endpoint = Endpoint(url, api_key, model, url if args.api_url else _weights_identity(text))
            with count_bar(console, f"{name}: evalscope") as progress:
                found |= run_benchmarks(benchmarks, staged, endpoint, settings, folder, progress)
    return found


def _in_process(
    args: argparse.Namespace, text: str, tasks: list[LocalTask], name: str, console: Console, scorers: _Scorers
) -> Samples:
    """Local tasks with an engine of this process, whose memory is given back for the next model or the server."""
    import torch

    try:
        return _local(args, tasks, _engine_responder(args, text, console), name, console, scorers)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _local(
    args: argparse.Namespace,
    tasks: list[LocalTask],
    responder: "Responder",
    name: str,
    console: Console,
    scorers: _Scorers,
) -> Samples:
    from infir2.evaluate.local import run_local_task

    found: Samples = {}
    for task in tasks:
        with count_bar(console, f"{name}: {task.name}") as progress:
            problems = problems_of(task, args.limit)
            found[task.name] = run_local_task(task, problems, responder, scorers.of(task), args.seed, progress)
    return found


def _engine_responder(args: argparse.Namespace, text: str, console: Console) -> "Responder":
    from infir2.evaluate.respond import EngineResponder
    from infir2.launch.inference import end_ids, load_engine
    from infir2.serve.prompts import ServedModel

    engine, tokenizer, source = load_engine(text, InferenceOptions.of(args), console)
    served = ServedModel.of(engine, text, tokenizer, end_ids(source))
    if served.chat is None:
        raise UserError(f"{text}: {served.chat_problem}")
    return EngineResponder(engine, served.chat, sorted(served.chat_end_ids), served.longest)


@contextmanager
def _endpoint(args: argparse.Namespace, text: str, key: str, console: Console) -> Iterator[tuple[str, str, str]]:
    """(URL, key, model's name there): of the server that was named, else of one that lives as long as the block."""
    from infir2.evaluate.server import LocalServer, served_models

    if args.api_url:
        url = args.api_url.rstrip("/")
        listed = served_models(url, key)
        if text not in listed:
            raise UserError(f"{url}: serves {', '.join(listed)}, not {text}")
        yield url, key, text
        return
    console.print(f"starting a server for {text}")
    with LocalServer(text, _server_options(args)) as server:
        yield server.url, server.api_key, server.name


def _weights_identity(text: str) -> str:
    """Changes when the weights do: names, sizes and times of their files."""
    path = Path(text).expanduser()
    files = sorted(file for pattern in ("*.safetensors", "*.distcp") for file in path.rglob(pattern))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _server_options(args: argparse.Namespace) -> list[str]:
    """The engine's options, as they were given here."""
    options = []
    for name, default in InferenceOptions().__dict__.items():
        if (value := getattr(args, name)) != default:
            options += [f"--{name.replace('_', '-')}", str(value)]
    return options


def _result(
    args: argparse.Namespace, names: list[str], tasks: list[Task], scores: dict[str, Any], pairs: "dict[str, Paired]"
) -> dict[str, Any]:
    models = [
        {"name": name, "model": text, "tasks": {task: score.to_json() for task, score in scores[name].items()}}
        for name, text in zip(names, args.models)
    ]
    settings = {task.name: {**task.sampling.__dict__, "limit": args.limit} for task in tasks}
    engine = {"precision": args.precision, "dtype": args.dtype, "cache_dtype": args.cache_dtype}
    result: dict[str, Any] = {"seed": args.seed, "engine": engine, "settings": settings, "models": models}
    if pairs:
        compared = {task: pair.to_json() for task, pair in pairs.items()}
        result["paired"] = {"first": names[0], "second": names[1], "tasks": compared}
    return result


def _show(
    console: Console,
    names: list[str],
    tasks: list[Task],
    scores: "dict[str, dict[str, TaskScore]]",
    pairs: "dict[str, Paired]",
) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("task", "model", "problems", "avg@k (95 % interval)", "pass@k", "tokens", "truncated"):
        table.add_column(column, justify="left" if column in ("task", "model") else "right", overflow="fold")
    for task in tasks:
        for name in names:
            score = scores[name][task.name]
            k = score.samples
            average = f"{score.average:.1%} @{k}  ({_interval(score.low, score.high)})"
            lengths = f"{score.mean_tokens:,.0f}", f"{score.truncated:.0%}"
            table.add_row(task.name, name, str(score.problems), average, f"{score.pass_at[k]:.1%} @{k}", *lengths)
    console.print(table)
    for task_name, pair in pairs.items():
        console.print(
            f"{task_name}: {names[1]} minus {names[0]}: {pair.difference:+.1%} "
            f"({_interval(pair.low, pair.high, '+')}), p = {pair.p_value:.3f}, "
            f"better on {pair.better} and worse on {pair.worse} of {pair.problems} problems"
        )


def _interval(low: float | None, high: float | None, sign: str = "") -> str:
    """A dash where there is none."""
    return "–" if low is None or high is None else f"{low:{sign}.1%} to {high:{sign}.1%}"


def _write_samples(path: Path, samples: "list[Sample]") -> None:
    _write(path, "".join(json.dumps(sample.__dict__, ensure_ascii=False) + "\n" for sample in samples))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, json.dumps(content, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _file_name(name: str) -> str:
    """A name that can stand in a folder."""
    return (
        "".join(character if character.isalnum() or character in "-_." else "-" for character in name).strip(".-")
        or "unnamed"
    )
