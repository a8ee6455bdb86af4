"""The demo, killed in the middle of every stage: does it end with the numbers of a demo that was left alone?

    python bench/demo_kill.py runs/demo runs/demo_killed RESULT.json

`infir2 demo --size tiny` runs to its end in the first folder, unless it has done so already. Then it runs in the
second, and while each stage runs, after a third to two thirds of the time that it took before, the whole process group
gets SIGKILL and the same command is given again.
Compared are every step's loss, gradient norm and reward, every held-out result, the evaluation, and the exported
weights, byte for byte.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import Record

from infir2.train.metrics import read_metrics

NUMBERS = ("loss", "grad_norm", "reward", "entropy", "response_length", "eval_loss", "eval_reward", "tokens")


def start(folder: Path) -> subprocess.Popen:
    log = (folder.parent / f"{folder.name}.log").open("ab")
    command = [sys.executable, "-m", "infir2", "demo", "--size", "tiny", "--out", str(folder)]
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def state(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "pipeline.json"
    return json.loads(path.read_text()) if path.exists() else {}


def running(folder: Path) -> str | None:
    """The stage that was started and not finished."""
    return next((name for name, facts in state(folder).items() if facts["started"] != facts.get("finished")), None)


def left_alone(folder: Path) -> dict[str, float]:
    """Run the demo to its end; seconds of every stage."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if start(folder).wait() != 0:
        raise SystemExit(f"the demo failed: see {folder}.log")
    return {name: facts["seconds"] for name, facts in state(folder).items()}


def killed(folder: Path, seconds: dict[str, float], rng: random.Random) -> dict[str, float]:
    """Run the demo to its end, killed once in every stage; after how many seconds of each."""
    kills: dict[str, float] = {}
    process = start(folder)
    while process.poll() is None:
        stage = running(folder)
        if stage is not None and stage not in kills:
            kills[stage] = round(seconds[stage] * rng.uniform(1 / 3, 2 / 3), 2)
            time.sleep(kills[stage])
            if running(folder) == stage:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                print(f"killed {stage} after {kills[stage]} s", flush=True)
                process = start(folder)
            else:
                kills[stage] = -1.0  # it was quicker this time
        time.sleep(0.05)
    if process.returncode != 0:
        raise SystemExit(f"the killed demo failed: see {folder}.log")
    return kills


def numbers(folder: Path) -> dict[str, Any]:
    """All results of a demo that are not times."""
    found: dict[str, Any] = {}
    for metrics in sorted(folder.glob("*/metrics.jsonl")):
        for line in read_metrics(metrics):  # of a step that was done twice the last line counts
            if line["kind"] in ("train", "eval"):
                key = f"{metrics.parent.name} {line['kind']} {line['step']}"
                found[key] = {name: line[name] for name in NUMBERS if name in line}
    for model in json.loads((folder / "eval" / "eval.json").read_text())["models"]:
        # A task is named after the file of its questions, which lies in the demo's folder.
        found[f"evaluation of {model['name']}"] = {Path(name).name: figures for name, figures in model["tasks"].items()}
    for weights in sorted((folder / "model").glob("*.safetensors")):
        found[f"model {weights.name}"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    return found


def main(alone_folder: Path, killed_folder: Path, result_file: Path) -> None:
    record = Record(result_file)
    stages = record.values["stages_s"] = left_alone(alone_folder)
    record.values["killed_after_s"] = killed(killed_folder, stages, random.Random(1))
    alone, after = numbers(alone_folder), numbers(killed_folder)
    different = sorted(key for key in alone.keys() | after.keys() if alone.get(key) != after.get(key))
    record.values |= {"compared": len(alone), "different": different}
    record.save()
    print(f"{len(alone)} results compared, {len(different)} differ: {different[:10]}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
