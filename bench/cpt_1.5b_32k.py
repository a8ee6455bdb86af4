"""The 1.5B recipe at 32,768 tokens on one GPU: train, save, SIGKILL, resume bit-identically, export, load elsewhere.

    python bench/cpt_1.5b_32k.py WORK_FOLDER RESULT.json

Random weights of Qwen2.5-1.5B's shape, text of the installed Python packages, deterministic kernels. The run is killed
after it has gone past its checkpoint; the steps it had already done are compared, bit by bit, with the same steps
after the resume. The exported Hugging Face folder is loaded by transformers and its logits compared with ours.
"""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import torch
from record import RECIPES, Record, override_words, train_lines

from infir2.model.attention import causal_attention
from infir2.model.config import from_hf
from infir2.model.transformer import CausalLM
from infir2.stages.convert import convert_model

STEPS, SAVE_EVERY, KILL_AFTER = 10, 4, 6


def main(work: Path, result_file: Path) -> None:
    record, command = Record(result_file), recipe_command(work)
    record.values["recipe_command"] = ["infir2", "cpt", "recipes/cpt_1.5b.toml", *command[5:]]
    with record.phase("prepare"):
        prepare(work)
    with record.phase("first process"):
        before = train_until_killed(command, work / "run")
    with record.phase("second process"):
        # Only the last step is saved again: 18 GB of checkpoint take longer than the steps between.
        subprocess.run([*command, "--train.save_every", "0"], check=True)
        record.values |= course_of(before, train_lines(work / "run"))
    with record.phase("export"):
        convert_model(str(work / "run"), work / "hf")
    with record.phase("transformers"):
        record.values |= compare_with_transformers(work / "hf")
    print(json.dumps(record.values, indent=1))


def course_of(before: list[dict], after: list[dict]) -> dict:
    """The whole run, and whether what was done twice was done alike. ``before``: what was written before the kill."""
    keys = ("step", "loss", "grad_norm", "tokens", "valid_tokens", "lr")
    repeated = sorted({line["step"] for line in before if line["step"] > SAVE_EVERY})
    pick = {line["step"]: [line[key] for key in keys] for line in after}
    alike = all([line[key] for key in keys] == pick[line["step"]] for line in before)
    return {
        "losses": [line["loss"] for line in after],
        "step_time_s": [round(line["step_time_s"], 3) for line in after],
        "peak_memory_gb": max(line["peak_memory_gb"] for line in after),
        "steps_repeated_after_resume": repeated,
        "bit_identical": bool(repeated) and alike,
    }


def recipe_command(work: Path) -> list[str]:
    """The shipped recipe, with random weights and few, small steps."""
    overrides = {
        "run": work / "run",
        "model": '{ preset = "qwen2.5-1.5b", vocab_size = 151936 }',
        "data.sources": f'{{ "{work / "data"}" = 1.0 }}',
        "optim.warmup_steps": 2,
        "optim.decay_steps": 0,
        "train.steps": STEPS,
        "train.global_batch": 2,
        "train.save_every": SAVE_EVERY,
        "train.keep_every": 0,
        "train.keep_checkpoints": 1,
        "train.eval_every": 0,
        "train.compile": "false",
        "train.deterministic": "true",
        "fp8.health_every": 0,
    }
    return [sys.executable, "-m", "infir2", "cpt", str(RECIPES / "cpt_1.5b.toml"), *override_words(overrides)]


def prepare(work: Path) -> None:
    text = sysconfig.get_path("stdlib")
    words = ["--extensions", ".py", "--exclude", "site-packages", "--vocab-size", "16384", "--max-bytes", "16000000"]
    subprocess.run([sys.executable, "-m", "infir2", "prepare", text, "--out", str(work / "data"), *words], check=True)


def train_until_killed(command: list[str], run: Path) -> list[dict]:
    """Train lines written before the kill, which comes after step KILL_AFTER and after the checkpoint is on disk."""
    process = subprocess.Popen(command)
    while process.poll() is None:
        saved = (run / "checkpoints" / f"step-{SAVE_EVERY:06d}").exists()
        if saved and len(train_lines(run)) >= KILL_AFTER:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.05)
    if process.returncode != -signal.SIGKILL:
        raise SystemExit(f"the first process ended by itself with {process.returncode}")
    return train_lines(run)


@torch.no_grad()
def compare_with_transformers(folder: Path) -> dict:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    with torch.device("meta"):
        ours = CausalLM(from_hf(json.loads((folder / "config.json").read_text()), str(folder)))
    ours.to_empty(device="cuda")
    state = {name: value.float() for name, value in theirs.state_dict().items()}
    ours.load_state_dict(state, strict=False)
    ids = torch.arange(512, device="cuda")[None]
    a = theirs(ids).logits.float()
    b = ours(ids, ids, causal_attention).float()
    return {
        "transformers_parameters": sum(p.numel() for p in theirs.parameters()),
        "logits_relative_difference": ((a - b).norm() / a.norm()).item(),
        "logits_finite": bool(a.isfinite().all()),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
