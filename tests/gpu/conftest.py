"""`make test-gpu` leaves a record: which tests ran, on what, and how they ended (bench/results/gpu_tests.json).

With INFIR2_RESULTS failures are also written there as they come (gpu_failures.txt): a run that is cut off names them.
"""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

_outcomes: Counter[str] = Counter()
_failed: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _outcomes[report.outcome] += 1
        if report.failed:
            _failed.append(report.nodeid)
            folder = os.environ.get("INFIR2_RESULTS")
            if folder and "PYTEST_XDIST_WORKER" not in os.environ:
                with (Path(folder) / "gpu_failures.txt").open("a", encoding="utf-8") as file:
                    file.write(f"{report.nodeid}\n{report.longreprtext[-3000:]}\n\n")


def pytest_sessionfinish(session: pytest.Session) -> None:
    is_worker = hasattr(session.config, "workerinput")  # under xdist only the controlling process writes
    if is_worker or not torch.cuda.is_available() or not _outcomes:
        return
    from infir2.launch.environment import environment

    folder = Path(os.environ.get("INFIR2_RESULTS", Path(__file__).parents[2] / "bench/results"))
    record = {**environment(), "command": "make test-gpu", "tests": dict(_outcomes), "failed": _failed}
    (folder / "gpu_tests.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
