"""Runs inside evalscope's interpreter: one benchmark after the other, programs only in the project's sandbox.

That interpreter has neither torch nor the rest of this package's dependencies, so what is imported here from it needs
the standard library alone. The order comes on standard input as a line of JSON (see ``harness.py``), the outcome goes
to a file.
"""

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from infir2.evaluate.stored_cases import pickled_string
from infir2.reward.code import judge, parse_problem
from infir2.reward.sandbox import Limits, Sandbox


def main() -> None:
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, name="end of input", daemon=True).start()
    outcome: dict[str, Any] = {}
    try:
        _grade_programs_in(Sandbox(program_limits(order["code_s"]), order["unsafe_code"]))
        for task in order["tasks"]:
            outcome = {"failed": task["datasets"][0]}
            _run(task)
        outcome = {"failed": None}
    except BaseException as error:
        outcome |= {"error": type(error).__name__, "message": str(error)}
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    Path(order["outcome"]).write_text(json.dumps(outcome), encoding="utf-8")
    _end()


def program_limits(case_s: float) -> Limits:
    """As the benchmark has them: a time limit a case, memory beyond what solutions take, no small bound on output."""
    return Limits(wall_s=case_s, cpu_s=int(case_s) + 1, memory_mib=4096, output_kib=16 * 1024)


def _end_with_parent() -> None:
    """The pipe closes when the process that started this one is gone, however it ended."""
    while os.read(0, 4096):  # not through sys.stdin: its lock would be held in every process that evalscope forks
        pass
    _end()


def _end() -> None:
    """End this process and the children that evalscope has started: the harness has given them a group of their own."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _run(task: dict[str, Any]) -> None:
    from evalscope import TaskConfig, run_task

    # The address is told by the environment: in the configuration, another port would look like another model.
    key = os.environ["EVALSCOPE_API_KEY"]
    run_task(TaskConfig(eval_type="openai_api", api_key=key, dataset_hub="huggingface", **task))


def _grade_programs_in(sandbox: Sandbox) -> None:
    """Let LiveCodeBench's programs run in ``sandbox``, and nothing else; evalscope would run them in its own process.

    Pickled test cases are read without being executed.
    """
    from evalscope.api.metric import Score
    from evalscope.benchmarks.live_code_bench import evaluate_utils, live_code_bench_adapter, load_utils, testing_util

    class StringsOnly:
        loads = staticmethod(pickled_string)

    def match_score(
        self: Any, original_prediction: str, filtered_prediction: str, reference: str, task_state: Any
    ) -> Score:
        verdict = judge(filtered_prediction, parse_problem(as_label(task_state.metadata["evaluation_sample"])), sandbox)
        return Score(
            extracted_prediction=filtered_prediction,
            prediction=original_prediction,
            value={"acc": float(verdict.outcome == "passed")},
            explanation=f"{verdict.outcome}: {verdict.passed} of {verdict.total} cases",
            main_score_name="acc",
        )

    def refuse(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("programs run in the sandbox of infir2 only")

    load_utils.pickle = StringsOnly
    live_code_bench_adapter.LiveCodeBenchAdapter.match_score = match_score
    evaluate_utils.codegen_metrics = refuse
    testing_util.run_test = refuse


def as_label(evaluation_sample: str) -> dict[str, Any]:
    """evalscope's form of a problem as a label of ``reward.code``. Cases that expect no output prove nothing and go."""
    data = json.loads(evaluation_sample)
    kind = "functional" if data["fn_name"] else "stdin"
    pairs = zip(data["inputs"], data["outputs"], strict=True)
    tests = [{"input": given, "output": wanted, "testtype": kind} for given, wanted in pairs if str(wanted).strip()]
    return {"tests": tests, "fn_name": data["fn_name"]}
