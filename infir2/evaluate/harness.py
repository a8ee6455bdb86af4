"""evalscope as asker and grader of the benchmarks: found, ordered in a process of its own, its files read back.

It lives in an interpreter of its own choosing: its dependencies pin old versions of packages that training uses new
ones of. What it does there is in ``evalscope_process.py``; every figure is computed here from what it stored.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import util as importlib_util
from pathlib import Path
from typing import Any

from infir2.errors import DataError, UserError
from infir2.evaluate.local_data import Staged, stage, what_to_put
from infir2.evaluate.respond import Progress
from infir2.evaluate.score import Sample
from infir2.evaluate.tasks import Benchmark
from infir2.reward.sandbox import Sandbox

VARIABLE = "INFIR2_EVALSCOPE_PYTHON"
MINIMUM = (1, 14)
CODE_SECONDS = 6.0
"""Wall time of one test case, as LiveCodeBench has it."""
_RUN = "import sys; sys.path.append({root!r}); from infir2.evaluate.evalscope_process import main; main()"
_POLL_S = 0.5
_COMPLETE = "complete"
_DECIDING = ("model", "dataset_args", "generation_config", "repeats", "limit")
_HOW_TO = (
    "pip install 'infir2[eval]'; or, because it pins old versions of other packages, give it an environment of its "
    "own: python -m venv evalscope-env && evalscope-env/bin/pip install 'evalscope>=1.14', then add "
    f"--evalscope-python evalscope-env/bin/python (or set {VARIABLE})"
)


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server. ``url`` ends in /v1."""

    url: str
    api_key: str
    model: str
    identity: str = ""
    """Differs for different weights, so that an interrupted run is not continued with other ones."""


@dataclass(frozen=True)
class Settings:
    """How evalscope is run."""

    python: Path
    data: Path | None
    limit: int | None
    concurrency: int
    unsafe_code_exec: bool = False


def find_evalscope(given: Path | None) -> Path:
    """An interpreter that has evalscope: the one given, that of the variable, or this one.

    Raises UserError, saying how to install it, where there is none or it is too old.
    """
    named = given or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is None and importlib_util.find_spec("evalscope") is None:
        raise UserError(f"these tasks are asked by evalscope, which is not installed here: {_HOW_TO}")
    python = named or Path(sys.executable)
    ask = "import importlib.metadata as m; print(m.version('evalscope'))"
    try:
        done = subprocess.run([str(python), "-I", "-c", ask], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{python}: cannot be run: {error}") from None
    version = done.stdout.strip()
    if done.returncode:
        raise UserError(f"{python}: has no evalscope; install it: {_HOW_TO}")
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < MINIMUM:
        raise UserError(f"{python}: has evalscope {version}, which is too old; install a newer one: {_HOW_TO}")
    return python


def prepare(benchmarks: Sequence[Benchmark], settings: Settings, out: Path) -> dict[str, Staged]:
    """What can fail before a model is loaded: the local rows of each benchmark by its name (none without --data), laid
    out under ``out``, and the sandbox for programs.

    Raises DataError for rows that are missing or bad, and SandboxError where programs could not be run safely.
    """
    if any(one.evalscope_name == "live_code_bench" for one in benchmarks):
        Sandbox(None, settings.unsafe_code_exec)
    staged = {}
    for benchmark in benchmarks if settings.data is not None else ():
        assert settings.data is not None
        dates = benchmark.options.get("extra_params")
        window = (dates["start_date"], dates["end_date"]) if dates else None
        staged[benchmark.name] = stage(
            benchmark.evalscope_name, settings.data, out / "data" / benchmark.name, settings.limit, window
        )
    return staged


def run_benchmarks(
    benchmarks: Sequence[Benchmark],
    staged: dict[str, Staged],
    endpoint: Endpoint,
    settings: Settings,
    out: Path,
    progress: Progress,
) -> dict[str, list[Sample]]:
    """The samples of each benchmark, by its name. Everything that evalscope writes goes under ``out``; what is there
    from an interrupted run of the same model with the same settings is not asked again.

    Raises DataError where rows could not be fetched, and UserError, naming evalscope's log, where it fails.
    """
    tasks = [_task(one, staged.get(one.name), endpoint, settings, out) for one in benchmarks]
    samples = sum(staged[one.name].rows * one.sampling.samples for one in benchmarks) if staged else 0
    order = {
        "tasks": tasks,
        "outcome": str((out / "outcome.json").resolve()),
        "code_s": CODE_SECONDS,
        "unsafe_code": settings.unsafe_code_exec,
    }
    scored = LineCounter([Path(task["work_dir"]) for task in tasks], "reviews/*/*.jsonl")
    _run(order, endpoint, settings, out, lambda: progress(scored.count(), samples))
    found = {one.name: read_samples(Path(task["work_dir"]), one) for one, task in zip(benchmarks, tasks)}
    for task in tasks:
        (Path(task["work_dir"]) / _COMPLETE).touch()
    return found


def read_samples(work_dir: Path, benchmark: Benchmark) -> list[Sample]:
    """What evalscope stored of one benchmark: reviews joined with predictions.

    Raises UserError where the server refused a request, or nothing was scored.
    """
    predictions = {}
    for row in _lines(work_dir / "predictions"):
        output = row["model_output"]
        choice = output["choices"][0]
        if output["usage"] is None:  # the text is then the server's complaint, not an answer
            raise UserError(f"{benchmark.name}: the server refused a request: {choice['message']['content']}")
        response = _whole_text(choice["message"]["content"])
        truncated = choice["stop_reason"] == "max_tokens"
        predictions[row["index"]] = (response, int(output["usage"]["output_tokens"]), truncated)
    # Where a run was interrupted and went on, a sample may stand there twice: as for evalscope, the last one counts.
    reviews = {row["index"]: row for row in _lines(work_dir / "reviews") if row["index"] in predictions}
    samples = []
    for row in reviews.values():
        review, score = row["sample_score"], row["sample_score"]["score"]
        # evalscope leaves out of its average what it could not score, such as a formula that no parser gets through in
        # time. To count it as wrong is the safer side: a model gains nothing by writing what cannot be read.
        unscored = score["status"] != "success"
        value = 0.0 if unscored else score["value"][score["main_score_name"] or next(iter(score["value"]))]
        response, tokens, truncated = predictions[row["index"]]
        samples.append(
            Sample(
                problem=str(review["group_id"]),
                index=int(review["generation_index"]),
                score=float(value),
                tokens=tokens,
                truncated=truncated,
                response=response,
                answer=score["extracted_prediction"],
                decided="unscored" if unscored else score["explanation"] or "",
            )
        )
    if not samples:
        raise UserError(f"{benchmark.name}: evalscope has scored no sample; see {work_dir}/logs")
    return sorted(samples, key=lambda sample: (int(sample.problem), sample.index))


def _task(
    benchmark: Benchmark, staged: Staged | None, endpoint: Endpoint, settings: Settings, out: Path
) -> dict[str, Any]:
    """evalscope's TaskConfig as a table."""
    name, sampling = benchmark.evalscope_name, benchmark.sampling
    arguments, rows = {**benchmark.options, **benchmark.hub}, ""
    if staged is not None:
        rows = staged.digest
        arguments = {**benchmark.options, "local_path": str(staged.folder.resolve()), "subset_list": ["default"]}
    generation = {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_tokens}
    task = {
        "model": endpoint.model,
        "datasets": [name],
        "dataset_args": {name: arguments},
        # Streamed, so that a connection is never silent for as long as 30,000 tokens take.
        "generation_config": {**generation, "stream": True, "timeout": 3600},
        "repeats": sampling.samples,
        "eval_batch_size": settings.concurrency,
        "limit": settings.limit,
        "collect_perf": False,
        "no_timestamp": True,
    }
    # Other settings or other rows, other folder: evalscope refuses to go on where a setting has changed, and would take
    # the answers to other rows for answers to these. What the rows hold decides, and not where they lie.
    decisive = {**task, "dataset_args": {**arguments, "local_path": rows}}
    deciding = [endpoint.identity, *(decisive[key] for key in _DECIDING)]
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:8]
    work_dir = out / f"{benchmark.name}-{digest}"
    task["work_dir"] = str(work_dir.resolve())
    if (work_dir / _COMPLETE).exists():
        shutil.rmtree(work_dir)  # who asks again wants new samples
    if (work_dir / "predictions").is_dir():
        _cut_torn_lines(work_dir)
        task["use_cache"] = task["work_dir"]
    return task


def _cut_torn_lines(work_dir: Path) -> None:
    """Drop what an interruption left of a last line: evalscope would write the next row behind it, and lose both."""
    for kind in ("predictions", "reviews"):
        for file in work_dir.glob(f"{kind}/*/*.jsonl"):
            content = file.read_bytes()
            if not content.endswith(b"\n"):
                os.truncate(file, content.rfind(b"\n") + 1)


def _run(order: dict[str, Any], endpoint: Endpoint, settings: Settings, out: Path, show: Any) -> None:
    out.mkdir(parents=True, exist_ok=True)
    outcome, log = Path(order["outcome"]), out / "evalscope.log"
    outcome.unlink(missing_ok=True)
    root = str(Path(__file__).parents[2])
    command = [str(settings.python), "-I", "-c", _RUN.format(root=root)]
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, text=True,
            env=_environment(endpoint, settings, out), start_new_session=True,
        )  # fmt: skip
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended already: its exit code tells
                process.stdin.write(json.dumps(order) + "\n")
                process.stdin.flush()  # and left open: its end tells the process that this one has died
            while process.poll() is None:
                show()
                time.sleep(_POLL_S)
            show()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
    told = _outcome(outcome)
    if told.get("failed", "") is not None:
        raise _failure(told, log, settings)


def _environment(endpoint: Endpoint, settings: Settings, out: Path) -> dict[str, str]:
    cache = str((out / "cache").resolve())
    ours = {
        "EVALSCOPE_BASE_URL": endpoint.url,
        "EVALSCOPE_API_KEY": endpoint.api_key,
        "HF_DATASETS_CACHE": cache,
        "MODELSCOPE_CACHE": cache,
    }
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if settings.data is not None else {}
    return {**os.environ, **ours, **offline}


def _outcome(file: Path) -> dict[str, Any]:
    """What the process has written at its end; its exit code says nothing, because it kills its own group."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _failure(told: dict[str, Any], log: Path, settings: Settings) -> UserError:
    name, message = told.get("failed"), str(told.get("message", "")).strip()
    where = f"evalscope failed{f' at {name}' if name else ''} (its log: {log})"
    first = message.splitlines()[0] if message else "without a word"
    if name and settings.data is None and told.get("error") in _NOT_FETCHED:
        return DataError(f"{where}: its rows could not be fetched: {first}. Without network give --data DIR; "
                         f"{what_to_put(name, 'DIR')}")  # fmt: skip
    return UserError(f"{where}: {told.get('error', 'it ended')}: {first}")


_NOT_FETCHED = {
    "ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "DatasetNotFoundError", "HfHubHTTPError",
    "GatedRepoError", "RepositoryNotFoundError", "ConnectError", "ConnectTimeout", "ReadTimeout", "MaxRetryError",
}  # fmt: skip


class LineCounter:
    """Counts the lines of files that grow to hundreds of MB, again and again: what was counted is not read anew."""

    def __init__(self, folders: Sequence[Path], pattern: str) -> None:
        self._folders, self._pattern = folders, pattern
        self._counted: dict[Path, tuple[int, int]] = {}
        """File -> its bytes that were read, and the lines in them."""

    def count(self) -> int:
        """Lines of all files that match so far."""
        for path in (path for folder in self._folders for path in folder.glob(self._pattern)):
            size, lines = self._counted.get(path, (0, 0))
            with open(path, "rb") as file:
                file.seek(size)
                new = file.read()
            self._counted[path] = size + len(new), lines + new.count(b"\n")
        return sum(lines for _, lines in self._counted.values())


def _whole_text(content: Any) -> str:
    """A message's content; evalscope takes thoughts out of the text and keeps them beside it."""
    if isinstance(content, str):
        return content
    parts = [
        f"<think>\n{part['reasoning']}\n</think>\n" if part["type"] == "reasoning" else part.get("text", "")
        for part in content
    ]
    return "".join(parts)


def _lines(folder: Path) -> list[dict[str, Any]]:
    """Rows of all files of one kind. evalscope writes one folder a model and one file a subset."""
    rows = []
    for file in sorted(folder.glob("*/*.jsonl")):
        with open(file, encoding="utf-8") as lines:
            rows += [json.loads(line) for line in lines]
    return rows
