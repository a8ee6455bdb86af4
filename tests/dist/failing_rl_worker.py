"""What both ranks of test_rl_failures.py run: `infir2 rl` again and again, each time with another failure on one rank.

failing_rl_worker.py RECIPE OUT: each rank writes OUT/rank-N.json, the outcome by the failure's name.
"""

import contextlib
import faulthandler
import io
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infir2 import cli
from infir2.checkpoint.store import CheckpointStore
from infir2.data import prompts
from infir2.errors import CheckpointError, UserError
from infir2.launch import rl_reference
from infir2.rl.collect import Collector
from infir2.rl.samples import SampleLog
from infir2.train.metrics import MetricsWriter

RANK = int(os.environ["RANK"])


def full_disk(owner: Any, method: str, when: Callable[..., bool]) -> Callable[[pytest.MonkeyPatch], None]:
    """Rank 0 cannot write what ``when`` is true of."""
    true = getattr(owner, method)

    def write(*args: Any, **options: Any) -> None:
        if RANK == 0 and when(*args[1:]):
            raise UserError("the disk is full")
        true(*args, **options)

    return lambda patch: patch.setattr(owner, method, write)


def odd_reward(patch: pytest.MonkeyPatch) -> None:
    """A fault of the program, on rank 1."""
    true = Collector._shaped

    def reward_of_rank_1(self: Collector, *args: Any) -> float:
        if RANK == 1:
            raise ValueError("odd")
        return true(self, *args)

    patch.setattr(Collector, "_shaped", reward_of_rank_1)


def other_prompts(patch: pytest.MonkeyPatch) -> None:
    """Rank 1's host has another copy of the file."""
    true = prompts.read_prompts

    def read(*args: Any) -> prompts.PromptSet:
        found = true(*args)
        return prompts.PromptSet(found.prompts[RANK:], found.counts)

    patch.setattr(prompts, "read_prompts", read)


def save_that_fails_in_an_evaluation(patch: pytest.MonkeyPatch) -> None:
    """The background save of step 2 fails in the evaluation after step 4, and rank 0 sees it first."""
    evaluates = threading.Event()
    true_write, true_share = CheckpointStore._write, Collector._sample_share

    def write(self: CheckpointStore, step: int, *rest: Any) -> None:
        if step == 2:
            evaluates.wait()
            time.sleep(RANK)
            raise CheckpointError("step 2 could not be saved")
        true_write(self, step, *rest)

    def share(self: Collector, rows: Any, params: Any, stream: str, interrupted: Any) -> Any:
        if stream == "eval" and self.engine.weight_version == 4:
            evaluates.set()
            time.sleep(0.3)
        return true_share(self, rows, params, stream, interrupted)

    patch.setattr(CheckpointStore, "_write", write)
    patch.setattr(Collector, "_sample_share", share)


FAILURES = {
    "prompts": other_prompts,
    "reference": full_disk(rl_reference, "write_reference", lambda *_: True),
    "samples at the start": full_disk(SampleLog, "__init__", lambda *_: True),
    "evaluation at the start": full_disk(MetricsWriter, "log", lambda step, *_: step == 0),
    "samples": full_disk(SampleLog, "write", lambda step, kind, _: (step, kind) == (3, "train")),
    "samples of an evaluation": full_disk(SampleLog, "write", lambda step, kind, _: (step, kind) == (4, "eval")),
    "no spread": full_disk(MetricsWriter, "event", lambda step, event: event == "no_spread"),
    "save": save_that_fails_in_an_evaluation,
    "reward": odd_reward,
}


def outcome(recipe: str, run: Path) -> dict[str, Any]:
    """The exit code, None after a traceback, and what was written on stderr."""
    code = None
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = cli.main(["rl", recipe, "--run", str(run)])
        except Exception:
            traceback.print_exc()
    return {"code": code, "err": err.getvalue()}


if __name__ == "__main__":
    recipe, out = sys.argv[1], Path(sys.argv[2])
    faulthandler.dump_traceback_later(60, exit=True)  # where one waits for another that has gone
    outcomes = {}
    for number, (name, fail) in enumerate(FAILURES.items()):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # for a process group of its own
        with pytest.MonkeyPatch.context() as patch:
            fail(patch)
            outcomes[name] = outcome(recipe, out / name)
    (out / f"rank-{RANK}.json").write_text(json.dumps(outcomes))
