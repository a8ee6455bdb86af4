"""`infir2 doctor`: what this machine can do, which FP8 path will run on it, and what to do about it."""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

OPTIONAL = {
    "flash-attn-4": "attention over packed documents, on Hopper more than twice as fast: pip install 'infir2[flash]'",
    "wandb": "Weights & Biases logging: pip install 'infir2[wandb]'",
}
HARDWARE = {
    "native-blockwise": "native, block scaling included (compute capability 9.0)",
    "native-rowwise": "native for one scale a row or tensor only (compute capability 8.9, and above 9.0)",
    "emulated": "none: operands are dequantised and multiplied",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    findings = examine()
    if args.json:
        print(json.dumps(findings, indent=2))
    else:
        _show(findings)
    return 0


def examine() -> dict[str, Any]:
    """Everything doctor knows, as plain JSON values. Sizes are GiB."""
    import torch

    from infir2.kernels.matmul import describe_backend
    from infir2.parallel.device import default_device
    from infir2.reward.cores import usable_cores

    backend, reason = describe_backend(default_device())
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())]
    findings = {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
        },
        "cpu_cores": usable_cores(),
        "memory_gib": _memory_gib(),
        "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
        "gpus": gpus,
        "fp8": {"backend": backend, "reason": reason, "hardware": fp8_hardware(gpus)},
        "distributed": {
            "torchrun": bool(shutil.which("torchrun")) or Path(sys.executable).with_name("torchrun").exists(),
            "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
            "nccl": torch.distributed.is_available() and torch.distributed.is_nccl_available(),
        },
        "optional": {name: _version(name) is not None for name in OPTIONAL},
    }
    return {**findings, "advice": advise(findings)}


def fp8_hardware(gpus: list[dict[str, Any]]) -> str:
    """What the FP8 units of the first GPU can scale: native-blockwise, native-rowwise or emulated."""
    if not gpus:
        return "emulated"
    capability = tuple(int(part) for part in gpus[0]["compute_capability"].split("."))
    return "native-blockwise" if capability == (9, 0) else "native-rowwise" if capability >= (8, 9) else "emulated"


def advise(findings: dict[str, Any]) -> str:
    """One line: what this machine is good for."""
    gpus, hardware = findings["gpus"], findings["fp8"]["hardware"]
    if findings["disk_free_gib"] < 10:
        return "Less than 10 GiB of disk is free here: checkpoints of anything but a tiny model will not fit."
    if not gpus:
        return "No GPU: run `infir2 demo` here; FP8 is emulated exactly, but too slowly to train a real model."
    if findings["fp8"]["backend"] == "reference":
        return "FP8 is emulated on this GPU: results are right, speed is not; for speed train with --fp8.recipe bf16."
    if hardware == "native-blockwise" and len(gpus) > 1:
        return f"Ready: start with `torchrun --standalone --nproc-per-node {len(gpus)} -m -- infir2 cpt RECIPE`."
    return "Ready: start with `infir2 cpt RECIPE`."


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory_gib() -> float:
    """Memory of the machine, or the container's limit where it is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return round(min(total, int(limit) if limit.isdigit() else total) / 2**30, 1)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _show(findings: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    def mark(present: bool) -> str:
        return "[green]yes[/]" if present else "[yellow]no[/]"

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, version in findings["versions"].items():
        table.add_row(name, version or "[dim]none[/]")
    table.add_row("CPU", f"{findings['cpu_cores']} cores, {findings['memory_gib']:g} GiB memory")
    table.add_row("disk", f"{findings['disk_free_gib']:g} GiB free here")
    for index, gpu in enumerate(findings["gpus"]):
        capability = f"compute capability {gpu['compute_capability']}, {gpu['memory_gib']:g} GiB"
        table.add_row(f"GPU {index}", f"{escape(gpu['name'])}, {capability}")
    if not findings["gpus"]:
        table.add_row("GPU", "[yellow]none[/]")
    fp8 = findings["fp8"]
    color = "yellow" if fp8["backend"] == "reference" else "green"
    table.add_row("FP8 path", f"[{color}]{fp8['backend']}[/]: {escape(fp8['reason'])}")
    table.add_row("FP8 hardware", HARDWARE[fp8["hardware"]])
    table.add_row("distributed", "  ".join(f"{name} {mark(here)}" for name, here in findings["distributed"].items()))
    for name, here in findings["optional"].items():
        table.add_row(name, mark(here) if here else f"{mark(here)} [dim]({escape(OPTIONAL[name])})[/]")
    console = Console()
    console.print(table)
    console.print(f"\n[bold]{findings['advice']}[/]", highlight=False)
