"""What ran, by which command, on what: the record that stands beside every run and every measured figure."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import infir2


def environment() -> dict[str, Any]:
    """command, started (UTC), commit, device, versions of what computes and of peers that may be measured."""
    on_gpu = torch.cuda.is_available()
    versions = {"infir2": infir2.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for package in ("flash-attn-4", "transformers", "torchao"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    if on_gpu:
        import triton

        versions |= {"triton": triton.__version__, "cuda": str(torch.version.cuda)}
    return {
        "command": command(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {os.cpu_count()} cores",
        "versions": versions,
    }


def command() -> str:
    """The command of this process, as a shell takes it; `python -m infir2` is the same as infir2."""
    program = Path(sys.argv[0]).name
    return shlex.join(["infir2" if program == "__main__.py" else program, *sys.argv[1:]])


def commit() -> str | None:
    """Commit of the source tree that runs, else the variable INFIR2_COMMIT (for copies without history), else None."""
    folder = Path(infir2.__file__).parent
    try:
        # An installed package may lie in a virtual environment inside somebody else's repository.
        _git("ls-files", "--error-unmatch", "__init__.py", folder=folder)
        return _git("rev-parse", "HEAD", folder=folder)
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("INFIR2_COMMIT")


def _git(*words: str, folder: Path) -> str:
    command = ["git", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
