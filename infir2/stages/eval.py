"""Evaluate a model: `infir2 eval MODEL --tasks held_out_1`, or compare two: `infir2 eval A B --paired --tasks ...`.

MODEL is whatever `infir2 serve` takes; with --api-url it is the name of a model at that OpenAI-compatible server (ours,
SGLang's, vLLM's), whose key is --api-key or the variable INFIR2_API_KEY. Tasks:

{tasks}

The benchmarks run with the paper's numbers of tokens and samples, temperature 0.65 and top-p 0.95, through a server
that the command starts and stops; --data DIR reads their rows from local copies. Local tasks run in this process.

It prints a table and writes OUT/eval.json, and every sample to OUT/MODEL/TASK.jsonl as soon as a task is finished. The
same command again goes on after the finished local tasks. Other tasks of the same models join those in OUT; another
evaluation (models, weights, problems, settings) wants another --out.

With --paired, both models are asked the same problems, in local tasks with the same random numbers, and the difference
has a confidence interval and the p-value of a sign-flip permutation test over problems.
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from infir2.errors import ConfigError, UserError
from infir2.evaluate.results_folder import Origin, ResultsFolder, distinct_names, file_name, problems_digest
from infir2.evaluate.server import KEY_VARIABLE
from infir2.evaluate.tasks import HELP, Benchmark, LocalTask, Problem, parse_tasks, problems_of, with_sampling
from infir2.launch.inference import InferenceOptions, add_inference_arguments
from infir2.launch.progress import count_bar

if TYPE_CHECKING:
    from infir2.evaluate.harness import Settings
    from infir2.evaluate.local_data import Staged
    from infir2.evaluate.respond import Responder
    from infir2.evaluate.score import Paired, Sample, TaskScore
    from infir2.reward.score import Scorer
    from infir2.rollout.options import EngineOptions

__doc__ = (__doc__ or "").replace("{tasks}", HELP)
Task = Benchmark | LocalTask
Samples = dict[str, "list[Sample]"]
"""By task."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="one or several models")
    add("--tasks", required=True, metavar="A,B", help="what to evaluate, separated by commas")
    add("--paired", action="store_true", help="compare the second model with the first, problem by problem")
    add("--out", type=Path, help="folder for everything that is written (default: runs/eval/MODEL+MODEL...)")
    add("--samples", type=int, metavar="K", help="samples of each problem (default: the task's)")
    add("--max-tokens", type=int, metavar="N", help="longest response, in tokens (default: the task's)")
    add("--temperature", type=float, metavar="T", help="sampling temperature; 0 = greedy (default: 0.65)")
    add("--top-p", type=float, metavar="P", help="probability mass that is sampled from (default: 0.95)")
    add("--limit", type=int, metavar="N", help="only the first N problems of each task")
    add(
        "--data", type=Path, metavar="DIR", help="local copies of the benchmarks' rows, DIR/aime24/test.jsonl and so on"
    )
    add("--api-url", metavar="URL", help="ask this server, such as http://127.0.0.1:8000/v1")
    add("--api-key", help=f"its key; prefer the variable {KEY_VARIABLE}")
    add("--concurrency", type=int, default=64, metavar="N", help="requests at a time to a server")
    add(
        "--evalscope-python",
        type=Path,
        metavar="PATH",
        help="interpreter of an environment that has evalscope (default: INFIR2_EVALSCOPE_PYTHON, else this one)",
    )
    add("--unsafe-code-exec", action="store_true", help="run programs even where the sandbox does not hold")
    add_inference_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from infir2.evaluate.harness import find_evalscope
    from infir2.evaluate.table import print_table
    from infir2.launch.environment import environment
    from infir2.launch.held_folder import held

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160  # a file has no edge at which a table would have to break
    tasks, names = _tasks(args), _names(args)
    out = args.out or Path("runs/eval") / "+".join(names)
    python = find_evalscope(args.evalscope_python) if any(isinstance(task, Benchmark) for task in tasks) else None
    environment_now = environment()
    with closing(_Scorers(args.unsafe_code_exec)) as scorers:
        # Whatever can be wrong shows before anything is asked.
        problems = _problems(args, tasks, scorers)
        weights = _checked_models(args, tasks, console)
        with held(out, "another evaluation is writing into this folder", "give another --out"):
            folder = ResultsFolder(out, {key: environment_now[key] for key in ("commit", "device", "versions")})
            models = _models(args, names, weights, tasks, problems, python, out)
            folder.check([origin for model in models for origin in model.origins.values()])
            work = _Work(args, tasks, problems, python, folder, console, scorers)
            samples = {model.name: _evaluate(work, model) for model in models}
            result, shown = _figures(args, names, tasks, samples)
            folder.write_figures({**environment_now, **result})
    print_table(console, names, [task.name for task in tasks], *shown)
    console.print(f"written to {folder.figures}; every sample beside it")
    return 0


@dataclass(frozen=True)
class _Model:
    """A model that has been checked."""

    text: str
    """As the command line names it."""
    name: str
    """In the table and in OUT."""
    weights: str
    """Changes when they do."""
    staged: "dict[str, Staged]"
    """Rows of each benchmark, where they are local copies."""
    origins: dict[str, Origin]
    """What the samples of each task follow from."""


@dataclass(frozen=True)
class _Work:
    """What is done with every model."""

    args: argparse.Namespace
    tasks: list[Task]
    problems: dict[str, list[Problem]]
    """Of every local task."""
    python: Path | None
    """evalscope's, where there is a benchmark."""
    folder: ResultsFolder
    console: Console
    scorers: "_Scorers"

    @property
    def settings(self) -> "Settings":
        assert self.python is not None
        return _evalscope_settings(self.args, self.python)


def _problems(args: argparse.Namespace, tasks: list[Task], scorers: "_Scorers") -> dict[str, list[Problem]]:
    """Of every local task; each has a label that its grader can use."""
    from infir2.evaluate.local import check_labels

    found = {}
    for task in tasks:
        if isinstance(task, LocalTask):
            found[task.name] = problems_of(task, args.limit)
            check_labels(task, found[task.name], scorers.of(task))
    return found


def _checked_models(args: argparse.Namespace, tasks: list[Task], console: Console) -> list[str]:
    """What tells each model's weights from others. Raises UserError for a model that cannot be asked."""
    from infir2.evaluate.server import base_url, served_models
    from infir2.launch.inference import check_chat_model

    if args.api_url is None:
        checked = [check_chat_model(text, InferenceOptions.of(args)) for text in args.models]
        for text, model in zip(args.models, checked):
            _check_room(text, model.longest, tasks, console)
        return [model.weights for model in checked]
    args.api_url = base_url(args.api_url)
    listed = served_models(args.api_url, _api_key(args))
    for text in args.models:
        if listed is not None and text not in listed:
            raise UserError(f"{args.api_url}: serves {', '.join(listed)}, not {text}")
    return [f"{text} at {args.api_url}" for text in args.models]


def _check_room(text: str, longest: int, tasks: list[Task], console: Console) -> None:
    """Say where responses cannot be as long as they may. Our server refuses such requests."""
    for task in tasks:
        if (wanted := task.sampling.max_tokens) < longest:
            continue
        room = f"{task.name} asks for responses of {wanted} tokens, but with the prompt there is room for {longest}"
        if isinstance(task, Benchmark):
            raise UserError(f"{text}: {room}; give a smaller --max-tokens")
        console.print(f"note: {text}: {room}: longer ones are cut, and count as truncated")


def _models(
    args: argparse.Namespace,
    names: list[str],
    weights: list[str],
    tasks: list[Task],
    problems: dict[str, list[Problem]],
    python: Path | None,
    out: Path,
) -> list[_Model]:
    """With the rows of the benchmarks, which lie in OUT/NAME from now on."""
    from infir2.evaluate.harness import prepare
    from infir2.reward.python_file import digest

    benchmarks = [task for task in tasks if isinstance(task, Benchmark)]
    files = distinct_names([file_name(task.name) for task in tasks])
    digests: dict[str, str | None] = {name: problems_digest(found) for name, found in problems.items()}
    engine = {"seed": args.seed, "max_length": args.max_length, **_engine(args)}
    models = []
    for text, name, own in zip(args.models, names, weights):
        place = out / name / "evalscope"
        staged = prepare(benchmarks, _evalscope_settings(args, python), place) if python is not None else {}
        digests |= {benchmark: rows.digest for benchmark, rows in staged.items()}
        origins = {}
        for task, file in zip(tasks, files):
            asked = {"task": task.name, **task.sampling.__dict__, "limit": args.limit}
            asked["problems"] = digests.get(task.name)
            if isinstance(task, LocalTask) and task.grader_file is not None:
                asked["grader"] = digest(task.grader_file)
            origins[task.name] = Origin(name, file, {"weights": own, **engine}, asked)
        models.append(_Model(text, name, own, staged, origins))
    return models


def _evalscope_settings(args: argparse.Namespace, python: Path) -> "Settings":
    from infir2.evaluate.harness import Settings

    return Settings(python, args.data, args.limit, args.concurrency, args.unsafe_code_exec)


def _api_key(args: argparse.Namespace) -> str:
    return args.api_key or os.environ.get(KEY_VARIABLE) or "EMPTY"


def _engine(args: argparse.Namespace) -> dict[str, Any]:
    return {"precision": args.precision, "dtype": args.dtype, "cache_dtype": args.cache_dtype}


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

    names = [file_name(text) if args.api_url else model_name(text) for text in args.models]
    return distinct_names(names)


class _Scorers:
    """The scorer of each grader, made when it is first needed: its processes start once for all models and tasks."""

    def __init__(self, unsafe_code_exec: bool) -> None:
        self._unsafe_code_exec = unsafe_code_exec
        self._made: dict[tuple[str, str | None], Scorer] = {}

    def of(self, task: LocalTask) -> "Scorer":
        from infir2.reward.dispatch import reward_for

        key = task.grader, task.grader_file
        if key not in self._made:
            options: dict[str, Any] = {"unsafe_code_exec": self._unsafe_code_exec} if task.grader == "code" else {}
            if task.grader_file is not None:
                options["file"] = task.grader_file
            self._made[key] = reward_for(task.grader, **options)
        return self._made[key]

    def close(self) -> None:
        for scorer in self._made.values():
            scorer.close()


def _evaluate(work: _Work, model: _Model) -> Samples:
    """All tasks of one model: local ones in this process, benchmarks through a server."""
    from infir2.evaluate.respond import ApiResponder

    args = work.args
    local = [task for task in work.tasks if isinstance(task, LocalTask)]
    found = _finished(work, model, local)
    if missing := [task for task in local if task.name not in found]:
        if args.api_url:
            responder = ApiResponder(args.api_url, _api_key(args), model.text, args.concurrency)
            found |= _local(work, model, missing, responder)
        else:
            found |= _in_process(work, model, missing)
    if work.python is not None:
        found |= _benchmarks(work, model)
    return found


def _finished(work: _Work, model: _Model, tasks: list[LocalTask]) -> Samples:
    """The samples of tasks that were finished before. None through a server: nobody can tell what it serves now."""
    found: Samples = {}
    for task in tasks if work.args.api_url is None else ():
        origin = model.origins[task.name]
        if (samples := work.folder.finished(origin)) is not None:
            found[task.name] = samples
            place = work.folder.samples_file(origin)
            work.console.print(f"{model.name}: {task.name} is finished: {place}; delete that file to ask again")
    return found


def _in_process(work: _Work, model: _Model, tasks: list[LocalTask]) -> Samples:
    """Local tasks with an engine of this process, whose memory is given back for the next model or the server."""
    from infir2.parallel.device import enough_memory, fresh_memory

    with fresh_memory():
        responder, options = _engine_responder(work.args, model.text, work.console)
        with enough_memory("the engine", options.smaller()):
            return _local(work, model, tasks, responder)


def _local(work: _Work, model: _Model, tasks: list[LocalTask], responder: "Responder") -> Samples:
    from infir2.evaluate.local import run_local_task

    found: Samples = {}
    for task in tasks:
        problems, scorer = work.problems[task.name], work.scorers.of(task)
        with count_bar(work.console, f"{model.name}: {task.name}") as progress:
            found[task.name] = run_local_task(task, problems, responder, scorer, work.args.seed, progress)
        work.folder.write(model.origins[task.name], found[task.name])
    return found


def _benchmarks(work: _Work, model: _Model) -> Samples:
    from infir2.evaluate.harness import Endpoint, run_benchmarks

    benchmarks = [task for task in work.tasks if isinstance(task, Benchmark)]
    place = work.folder.out / model.name / "evalscope"
    with _endpoint(work, model) as (url, api_key, name):
        endpoint = Endpoint(url, api_key, name, url if work.args.api_url else model.weights)
        with count_bar(work.console, f"{model.name}: evalscope") as progress:
            found = run_benchmarks(benchmarks, model.staged, endpoint, work.settings, place, progress)
    for task in benchmarks:
        work.folder.write(model.origins[task.name], found[task.name])
    return found


def _engine_responder(args: argparse.Namespace, text: str, console: Console) -> "tuple[Responder, EngineOptions]":
    from infir2.evaluate.respond import EngineResponder
    from infir2.launch.end_tokens import end_ids
    from infir2.launch.inference import load_engine
    from infir2.serve.prompts import ServedModel

    engine, tokenizer, source = load_engine(text, InferenceOptions.of(args), console)
    served = ServedModel.of(engine, text, tokenizer, end_ids(source))
    if served.chat is None:
        raise UserError(f"{text}: {served.chat_problem}")
    responder = EngineResponder(engine, served.chat, sorted(served.chat_end_ids), served.longest)
    return responder, engine.options


@contextmanager
def _endpoint(work: _Work, model: _Model) -> Iterator[tuple[str, str, str]]:
    """(URL, key, model's name there): of the server that was named, else of one that lives as long as the block."""
    from infir2.evaluate.server import LocalServer

    if work.args.api_url:
        yield work.args.api_url, _api_key(work.args), model.text
        return
    work.console.print(f"starting a server for {model.text}")
    with LocalServer(model.text, _server_options(work.args)) as server:
        yield server.url, server.api_key, server.name


def _server_options(args: argparse.Namespace) -> list[str]:
    """The engine's options, as they were given here."""
    options = []
    for name, default in InferenceOptions().__dict__.items():
        if (value := getattr(args, name)) != default:
            options += [f"--{name.replace('_', '-')}", str(value)]
    return options


def _figures(
    args: argparse.Namespace, names: list[str], tasks: list[Task], samples: dict[str, Samples]
) -> "tuple[dict[str, Any], tuple[dict[str, dict[str, TaskScore]], dict[str, Paired]]]":
    """What eval.json holds, and the scores of models and the comparisons in it."""
    from infir2.evaluate.score import paired, summarise

    scores = {name: {task.name: summarise(samples[name][task.name]) for task in tasks} for name in names}
    models = [
        {"name": name, "model": text, "tasks": {task: score.to_json() for task, score in scores[name].items()}}
        for name, text in zip(names, args.models)
    ]
    settings = {task.name: {**task.sampling.__dict__, "limit": args.limit} for task in tasks}
    result: dict[str, Any] = {"seed": args.seed, "engine": _engine(args), "settings": settings, "models": models}
    pairs = {}
    if args.paired:
        first, second = (samples[name] for name in names)
        pairs = {task.name: paired(first[task.name], second[task.name]) for task in tasks}
        compared = {task: pair.to_json() for task, pair in pairs.items()}
        result["paired"] = {"first": names[0], "second": names[1], "tasks": compared}
    return result, (scores, pairs)
