"""A training process that a test may kill: forked from a clean server that has imported everything already.

Not from the test process: it may have run parallel torch code, after which a fork can hang or be refused.
"""

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *("infir2.cli", "infir2.stages.cpt", "infir2.stages.rl", "infir2.launch.training", "infir2.launch.dry_run"),
        *("infir2.launch.rl_stage", "infir2.data.chat", "transformers.tokenization_utils_tokenizers"),
    ]
)


def start(recipe: Path, log: Path, command: str = "cpt") -> ForkServerProcess:
    """Run `infir2 COMMAND RECIPE` in a new process, its output appended to ``log``."""
    process = _CONTEXT.Process(target=_train, args=(recipe, log, command))
    process.start()
    return process


def _train(recipe: Path, log: Path, command: str) -> None:
    import torch

    from infir2 import cli

    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        sys.exit(cli.main([command, str(recipe)]))
