"""Commands under torchrun, in processes on this machine's CPU."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def torchrun(*words: str, processes: int = 2, **options: Any) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        f"{processes}",
        *words,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def together(*words: str, processes: int = 2) -> None:
    process = torchrun(*words, processes=processes)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
