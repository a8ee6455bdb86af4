"""Does reinforcement learning raise the held-out accuracy of a model of 125 million parameters, in FP8 as in BF16?

    python bench/rl_100m.py --out FOLDER --json bench/results/rl_100m_h100.json      (one GPU, minutes)
    python bench/plot_rl.py bench/results/rl_100m_h100.json docs/img/rl_100m.svg
    python bench/rl_100m.py --smoke --out FOLDER --json FILE                         (the same code, tiny, on a CPU)

1. `infir2 sft` (recipes/sft_small_stage2.toml) teaches the preset `small-150m`, from random weights, in FP8,
   reasoning-gym's arithmetic with worked solutions, easy and harder ones.
2. It is asked questions of every kind; it practises on, and is examined in, the kinds nearest to 45 % solved.
3. `infir2 rl` (recipes/rl_small_stage1.toml) from there, with FP8 and without, same seed, prompts and steps. Before and
   after, held-out questions are answered greedily and at temperature 1; the intervals resample questions, and gains are
   paired by question.

The result file is written anew after every phase. Finished stages in FOLDER are not repeated, so a second call goes on.
"""

import argparse
import json
import math
import os
import signal
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from exam import Examiner, question
from record import Record, settings_of, write_rows
from rl_100m_recipes import fine_tuning, practice
from rl_step import engine_samples, mean_mismatch

from infir2.data.tokenizer import train_tokenizer
from infir2.data.worked_solutions import Split, WorkedExample, worked_examples
from infir2.errors import DataError
from infir2.evaluate.score import Sample, paired, summarise
from infir2.launch.rl_stage import engine_options
from infir2.parallel.device import free_memory
from infir2.parallel.runtime import World, world
from infir2.reward.dispatch import reward_for
from infir2.reward.score import Scorer
from infir2.stages.rl import train_rl
from infir2.stages.sft import train_sft
from infir2.train.metrics import read_metrics

FAMILIES = ("chain_sum", "basic_arithmetic", "products", "gcd", "lcm")
KINDS = [(family, stage) for family in FAMILIES for stage in (1, 2) if (family, stage) != ("lcm", 1)]  # only 362 exist
PRECISIONS = ("blockwise", "bf16")
CHOSEN = 4  # kinds of questions to practise on
WANTED = 0.45  # accuracy at which a group of samples says most
SMOKE = {
    "preset": "micro", "rows": 400, "epochs": 1, "sft_batch": 32, "probe": 2, "questions": 8, "steps": 2, "prompts": 4,
    "samples": 4, "new_tokens": 48, "eval_every": 1, "batch_tokens": 1024, "dtype": "float32",
}  # fmt: skip


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Ask a training loop for a stop when its time is over; it saves what it has."""
    done, deadline = threading.Event(), time.monotonic() + seconds

    def watch() -> None:
        while not done.wait(1.0):
            # Only a loop that listens to the signal: anything else would die of it.
            if time.monotonic() > deadline and callable(signal.getsignal(signal.SIGTERM)):
                os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def write_lessons(out: Path, rows: int) -> None:
    """Worked examples, a fifth of them easy, and a tokenizer trained on them."""
    easy = worked_examples(1, rows // 5, 1, families=FAMILIES)
    examples = [
        example.row() for stream in (easy, worked_examples(2, rows, 1, families=FAMILIES)) for example in stream
    ]
    write_rows(out / "lessons.jsonl", examples)
    train_tokenizer([m["content"] for row in examples[::4] for m in row["messages"]], 512, out / "tokenizer")


def questions(kinds: Sequence[tuple[str, int]], count: int, seed: int, split: Split) -> list[WorkedExample]:
    """About ``count`` questions of some kinds, equally many of each."""
    each = -(-count // len(kinds))
    return [e for family, stage in kinds for e in worked_examples(stage, each, seed, split, (family,))]


@dataclass(frozen=True)
class Study:
    """What all phases need."""

    options: argparse.Namespace
    here: World
    scorer: Scorer
    record: Record

    @property
    def out(self) -> Path:
        return self.options.out


def examiner_of(study: Study, precision: str, run: Path) -> Examiner:
    """Of the model of a run, in a precision."""
    config = practice(study.options, precision, run, study.out / "none")
    return Examiner(config, study.here, study.scorer, engine_options(config))


def examine(study: Study, precision: str, run: Path, examples: Sequence[WorkedExample]) -> dict[str, list[Sample]]:
    examiner, most = examiner_of(study, precision, run), study.options.new_tokens
    return {"greedy": examiner.ask(examples, most), "temperature 1": examiner.ask(examples, most, 4, 1.0)}


def choose_kinds(examiner: Examiner, options: argparse.Namespace) -> list[dict[str, Any]]:
    """How well the model does on new questions of every kind (not the held-out ones), and which it is to practise."""
    found: list[dict[str, Any]] = []
    for kind in KINDS:
        result = summarise(examiner.ask(questions([kind], options.probe, 5, "train"), options.new_tokens, 2, 1.0))
        found.append({"family": kind[0], "stage": kind[1], "accuracy": result.average, "tokens": result.mean_tokens})
    nearest = sorted(found, key=lambda row: abs(row["accuracy"] - WANTED))
    for row in found:
        row["chosen"] = row in nearest[:CHOSEN]
        print("   {family} {stage}: {accuracy:.3f}, {tokens:.0f} tokens, chosen: {chosen}".format(**row), flush=True)
    return found


def write_practice(options: argparse.Namespace, kinds: Sequence[dict[str, Any]]) -> None:
    chosen = [(kind["family"], kind["stage"]) for kind in kinds if kind["chosen"]]
    count = options.prompts * options.steps // len(chosen)
    rows: list[dict[str, Any]] = []
    for family, stage in chosen:  # a small family may not have so many questions
        rows += [e.prompt_row() for e in at_most(count, worked_examples(stage, count, 6, families=(family,)))]
    write_rows(options.out / "practice.jsonl", rows)
    write_rows(options.out / "exam.jsonl", [e.prompt_row() for e in shuffled(exam(kinds, options))])


def at_most(count: int, examples: Iterator[WorkedExample]) -> list[WorkedExample]:
    taken = []
    try:
        for example in examples:
            taken.append(example)
    except DataError:
        print(f"   only {len(taken)} of {count} different questions exist", flush=True)
    return taken


def exam(kinds: Sequence[dict[str, Any]], options: argparse.Namespace) -> list[WorkedExample]:
    return questions([(k["family"], k["stage"]) for k in kinds if k["chosen"]], options.questions, 7, "held_out")


def shuffled(examples: list[WorkedExample]) -> list[WorkedExample]:
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(1)).tolist()
    return [examples[index] for index in order]


def described(samples: Sequence[Sample]) -> dict[str, Any]:
    """Accuracy with its interval, and by family."""
    families: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        families[sample.problem.split()[0]].append(sample.score)
    by_family = {name: round(statistics.fmean(scores), 4) for name, scores in families.items()}
    return {**summarise(samples).to_json(), "by_family": by_family}


def curves(run: Path, asked: int) -> dict[str, Any]:
    """The run's course, from its metrics; held-out accuracy with the 95 % interval of so many independent answers."""
    lines = read_metrics(run / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "train"]
    held_out = [(line["step"], line["eval_reward"]) for line in lines if line["kind"] == "eval"]
    half = [1.96 * math.sqrt(p * (1 - p) / asked) for _, p in held_out]
    phases = ("rollout_s", "reward_s", "sync_s", "update_s", "step_time_s")
    per_step = ("reward", "entropy", "response_length", "truncated", "logprob_diff", "token_mult_prob_error")
    return {
        "steps": len(steps),
        "held_out": [[step, round(p, 4), round(p - h, 4), round(p + h, 4)] for (step, p), h in zip(held_out, half)],
        **{name: [round(step[name], 6) for step in steps] for name in (*per_step, "kept_groups", "grad_norm")},
        "seconds": {name: round(statistics.median(step[name] for step in steps), 3) for name in phases},
        "rollout_tokens_per_s": statistics.median(step["rollout_tokens_per_s"] for step in steps),
        "peak_memory_gb": max(step.get("peak_memory_gb", 0.0) for step in steps),
    }


def reinforce(study: Study, precision: str, examples: list[WorkedExample]) -> dict[str, list[Sample]]:
    """Exam, practice, exam; returns the answers of the last exam."""
    run, start, record = study.out / precision, study.out / "sft", study.record
    found: dict[str, Any] = {}
    with record.phase(f"{precision}: exam before"):
        before = examine(study, precision, start, examples)
        found["before"] = {name: described(samples) for name, samples in before.items()}
        record.values["runs"][precision] = found
    free_memory()
    with record.phase(f"{precision}: practice"), stopped_after(study.options.rl_seconds):
        train_rl(practice(study.options, precision, start, run), study.here)
        found |= curves(run, len(examples))
    free_memory()
    with record.phase(f"{precision}: exam after"):
        after = examine(study, precision, run, examples)
        found["after"] = {name: described(samples) for name, samples in after.items()}
        found["gain"] = {name: paired(before[name], after[name]).to_json() for name in after}
    for name, gain in found["gain"].items():
        old, new = found["before"][name]["average"], found["after"][name]["average"]
        span = "–" if gain["low"] is None else f"{gain['low']:+.3f} to {gain['high']:+.3f}"
        print(f"   {precision}, {name}: {old:.3f} -> {new:.3f} ({span})", flush=True)
    free_memory()
    return after


def prepare(study: Study) -> list[dict[str, Any]]:
    """Data and fine-tuning, and the choice of what to practise."""
    out, record, options = study.out, study.record, study.options
    with record.phase("data"):
        if not (out / "tokenizer").exists():
            write_lessons(out, options.rows)
    with record.phase("fine-tuning"), stopped_after(options.sft_seconds):
        train_sft(fine_tuning(options), study.here)
        lines = read_metrics(out / "sft" / "metrics.jsonl")
        losses = [[x["step"], round(x["loss"], 4)] for x in lines if x["kind"] == "train"]
        held_out = [[x["step"], round(x["eval_loss"], 4)] for x in lines if x["kind"] == "eval"]
        record.values["fine_tuning"] = {"loss": losses, "held_out_loss": held_out}
    free_memory()
    with record.phase("choice of questions"):
        chosen_file = out / "kinds.json"
        if not chosen_file.exists():
            kinds = choose_kinds(examiner_of(study, "blockwise", study.out / "sft"), options)
            write_practice(options, kinds)
            chosen_file.write_text(json.dumps(kinds))
        record.values["kinds"] = kinds = json.loads(chosen_file.read_text())
    free_memory()
    return kinds


def compare_precisions(study: Study, examples: list[WorkedExample]) -> None:
    """The FP8 engine's answers, read by trainers of both precisions: the fine-tuned weights, before any practice."""
    found: dict[str, Any] = {}
    for precision in PRECISIONS:
        examiner = examiner_of(study, precision, study.out / "sft")
        study.record.values["parameters"] = sum(parameter.numel() for parameter in examiner.model.parameters())
        if precision == "blockwise":
            asked = examples[:: max(1, len(examples) // 64)]
            prompts = [examiner.chat.prompt([question(example)]) for example in asked]
            answers = engine_samples(
                examiner.model, examiner.tokenizer, examiner.config, prompts, 4, study.options.new_tokens
            )
            found["tokens"] = sum(len(answer.response_ids) for answer in answers)
        found[f"{precision} trainer, blockwise engine"] = mean_mismatch(examiner.model, answers, examiner.config)
        del examiner
        free_memory()
    study.record.values["mismatch"] = found
    print(json.dumps(found), flush=True)


def measure(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    record = Record(options.json, settings_of(options, "out", "json", "smoke", "precisions"))
    record.values["runs"] = {}
    if options.json and options.json.exists():  # of an earlier call on the same folder
        record.values["runs"] = json.loads(options.json.read_text(encoding="utf-8"))["runs"]
    with world() as here, closing(reward_for("reasoning_gym")) as scorer:
        study = Study(options, here, scorer, record)
        examples = exam(prepare(study), options)
        with record.phase("mismatch"):
            compare_precisions(study, examples)
        after = {}
        for precision in options.precisions:
            after[precision] = reinforce(study, precision, examples)
            # Where time was up: the other precision is to have no more steps.
            options.steps = record.values["runs"][precision]["steps"]
    if set(after) == set(PRECISIONS):
        record.values["fp8_minus_bf16"] = {
            name: paired(after["bf16"][name], after["blockwise"][name]).to_json() for name in after["bf16"]
        }
    record.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of data and runs")
    parser.add_argument("--json", type=Path, help="result file")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does the script run?")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--preset", default="small-150m")
    parser.add_argument("--dtype", default="bfloat16", help="what is not FP8 is computed in this dtype")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--rows", type=int, default=40_000, help="harder worked examples; and a fifth as many easy ones"
    )
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--sft-batch", type=int, default=128)
    parser.add_argument("--sft-lr", type=float, default=6e-4)
    parser.add_argument("--sft-seconds", type=float, default=45, help="fine-tuning is cut off after them")
    parser.add_argument("--probe", type=int, default=64, help="questions of each kind for the choice")
    parser.add_argument("--questions", type=int, default=512, help="held-out questions")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--lr", type=float, default=4e-5)
    parser.add_argument("--eval-every", type=int, default=10)
    parser.add_argument(
        "--rl-seconds", type=float, default=110, help="practice in each precision is cut off after them"
    )
    parser.add_argument("--batch-tokens", type=int, default=32_768, help="tokens of one forward pass of the trainer")
    options = parser.parse_args()
    if options.out is None:
        parser.error("--out: name a folder for data and runs")
    for name, value in SMOKE.items() if options.smoke else ():
        setattr(options, name, value)
    measure(options)


if __name__ == "__main__":
    main()
