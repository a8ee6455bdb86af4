"""How many programs can run at once without one waiting for the other: time limits are on the wall."""

import contextlib
import os
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may use: those it is bound to, and no more than its control group's share of time; under
    torchrun, its part of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, quota // period)
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
