"""Seconds, GB/s and peak memory of converting a model of a given shape: Hugging Face -> FP8 -> Hugging Face.

    python bench/convert.py RESULT.json [--preset qwen2.5-7b] [--twice] [--work FOLDER]

Weights are random, made tensor by tensor. Every conversion is a process of its own, so that its peak resident memory
is its own; memory that is mapped from the source's files counts as resident. --twice goes on to FP8 once more and tells
how many codes and values differ from the first time. Needs disk for a bfloat16 and an FP8 folder (--twice: two of
these), in a temporary folder that is deleted at the end.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from record import Record
from torch import Tensor

from infir2.checkpoint.fp8_format import dequantize_weight
from infir2.checkpoint.huggingface import HfFolder, write_folder
from infir2.checkpoint.safetensors_writer import TensorSpec
from infir2.fp8.tensor import Operand
from infir2.model.presets import preset
from infir2.model.transformer import CausalLM

VOCABULARY = 152_064
# What one process does: convert, then say how long it took and how much memory it has ever had.
CHILD = """
import json, sys, time
from pathlib import Path
import torch
from infir2.stages.convert import convert_model
status = lambda key: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) * 1024
before, started = status("VmHWM"), time.monotonic()
written = convert_model(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
print(json.dumps({"seconds": time.monotonic() - started, "peak_rss_bytes": status("VmHWM"),
                  "rss_before_bytes": before, "tensors": written.tensors, "written_bytes": written.nbytes}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--preset", default="qwen2.5-7b")
    parser.add_argument("--twice", action="store_true", help="convert to FP8 once more and compare")
    parser.add_argument("--work", type=Path, help="where the temporary folder is made")
    args = parser.parse_args()
    record = Record(args.result)
    result = record.values
    result |= {
        "preset": args.preset,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory(prefix="convert-", dir=args.work) as name:
        work = Path(name)
        result["largest_tensor_bytes"] = make_model(work / "hf", args.preset)
        result["to_fp8"] = convert(work / "hf", work / "fp8", "fp8")
        delete(work / "hf")
        result["to_hf"] = convert(work / "fp8", work / "hf2", "hf")
        if args.twice:
            result["to_fp8_again"] = convert(work / "hf2", work / "fp8-2", "fp8")
            result["second_round"] = compare(HfFolder(work / "fp8"), HfFolder(work / "fp8-2"))
    record.save()
    print(json.dumps(result, indent=1))


def make_model(folder: Path, name: str) -> int:
    """Write the model; returns the bytes of its largest tensor."""
    config = preset(name, VOCABULARY)
    with torch.device("meta"):
        model = CausalLM(config)
    specs = {key: TensorSpec(torch.bfloat16, tuple(value.shape)) for key, value in model.named_parameters()}
    write_folder(folder, config.to_hf(), random_tensors(specs), specs)
    return max(spec.nbytes for spec in specs.values())


def random_tensors(specs: dict[str, TensorSpec]) -> Iterator[tuple[str, Tensor]]:
    """Normal numbers: a pool of them, from another place and with another spread for every tensor."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(1 << 24, generator=generator)
    for index, (name, spec) in enumerate(specs.items()):
        count = math.prod(spec.shape)
        scaled = (pool.roll(index * 7919)[: max(count, 1)] * (0.01 + 0.001 * (index % 20))).to(torch.bfloat16)
        yield name, scaled.repeat(-(-count // len(scaled)))[:count].reshape(spec.shape)


def convert(source: Path, out: Path, to: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", CHILD, source, out, to], check=True, capture_output=True, text=True)
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    facts["load_average"] = os.getloadavg()[0]  # Above 1 to 2 on an idle machine: others were at work.
    facts["read_bytes"] = HfFolder(source).nbytes
    facts["read_and_written_gb_per_s"] = (facts["read_bytes"] + facts["written_bytes"]) / facts["seconds"] / 1e9
    print(out.name, facts, file=sys.stderr)
    return facts


def compare(first: HfFolder, second: HfFolder) -> dict[str, int]:
    """Counts of tensors, codes and values of an FP8 folder, and of those that differ in another."""
    counts = dict.fromkeys(("tensors", "codes", "codes_that_differ", "values_that_differ"), 0)
    for name in first.names:
        mine, theirs = first.tensor(name), second.tensor(name)
        counts["tensors"] += 1
        if mine.dtype == torch.float8_e4m3fn:
            counts["codes"] += mine.numel()
            counts["codes_that_differ"] += int((mine.view(torch.uint8) != theirs.view(torch.uint8)).sum())
            mine, theirs = (
                dequantize_weight(Operand(codes, folder.tensor(f"{name}_scale_inv"), "block"), torch.bfloat16)
                for codes, folder in ((mine, first), (theirs, second))
            )
        if not name.endswith("_scale_inv"):
            counts["values_that_differ"] += int((mine != theirs).sum())
    return counts


def delete(folder: Path) -> None:
    """Remove a model folder that this script wrote, file by file."""
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


if __name__ == "__main__":
    main()
