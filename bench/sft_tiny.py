"""Does two-stage fine-tuning teach a tiny model to solve tasks, in FP8 as in BF16? On one core of a CPU, in minutes.

    OMP_NUM_THREADS=1 python bench/sft_tiny.py runs/sft_tiny_bench --seeds 1 2 3 --json bench/results/sft_tiny_cpu.json

recipes/sft_tiny_stage1.toml and _stage2.toml, from random weights of the preset `micro` instead of a pre-training run,
in each precision and from each seed. Before and after each stage the rollout engine answers held-out questions of both
stages, greedily and (after) with four samples at temperature 1, and the reward `reasoning_gym` marks the answers.
Finished stages are kept: the same command goes on where it was stopped.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from exam import Examiner, by_seed
from record import Record, shipped, write_rows

from infir2.config import SftConfig
from infir2.data.tokenizer import train_tokenizer
from infir2.data.worked_solutions import worked_examples
from infir2.evaluate.score import Sample
from infir2.parallel.runtime import World
from infir2.reward.score import Scorer
from infir2.reward.tasks import ReasoningGymScorer
from infir2.stages.sft import train_sft

FAMILIES = ("chain_sum",)
ROWS = {"stage1/easy": (1, 3200), "stage2/easy": (1, 2000), "stage2/harder": (2, 6000)}
"""File -> (kind of questions, how many)."""
WORLD = World(0, 1, torch.device("cpu"), None)


def write_data(out: Path) -> None:
    """The rows of both stages, and a tokenizer trained on them."""
    texts: list[str] = []
    for name, (kind, count) in ROWS.items():
        rows = [example.row() for example in worked_examples(kind, count, 1, families=FAMILIES)]
        write_rows(out / f"{name}.jsonl", rows)
        texts += [f"{message['role']}\n{message['content']}" for row in rows for message in row["messages"]]
    train_tokenizer(texts, 384, out / "tokenizer")


def recipe(out: Path, precision: str, stage: int, seed: int, start: Path | None) -> SftConfig:
    """The shipped recipe with this run's folders, precision and seed; ``start`` is a run to start from."""
    values = {
        "run": run_folder(out, precision, stage, seed),
        "init": f"{{ checkpoint = '{start}' }}" if start else "{}",
        "model": "{}" if start else '{ preset = "micro", init_std = 0.08 }',
        "fp8.recipe": precision,
        "data.train": out / f"stage{stage}",
        "data.tokenizer": out / "tokenizer",
        "train.seed": seed,
        "log.tensorboard": "false",
    }
    return shipped(SftConfig, f"sft_tiny_stage{stage}", values)


def run_folder(out: Path, precision: str, stage: int, seed: int) -> Path:
    return out / f"{precision}-seed{seed}-stage{stage}"


def solved(config: SftConfig, scorer: Scorer, questions: int) -> dict[str, float]:
    """How much of each held-out set the model that a recipe starts from solves; where that is another run's, also at
    temperature 1."""
    examiner = Examiner(config, WORLD, scorer)
    found = {}
    for kind, name in ((1, "easy"), (2, "harder")):
        examples = list(worked_examples(kind, questions, 3, "held_out", FAMILIES))
        found[name] = accuracy(examiner.ask(examples, 112))
        if config.init.checkpoint:
            found[f"{name}_at_temperature_1"] = accuracy(examiner.ask(examples, 112, samples=4, temperature=1.0))
    return found


def accuracy(samples: Sequence[Sample]) -> float:
    return round(statistics.fmean(sample.score for sample in samples), 4)


def run(out: Path, precision: str, seed: int, questions: int, scorer: Scorer) -> dict[str, Any]:
    """Both stages of one precision and seed. CPU seconds are those of stages that this process has trained."""
    result: dict[str, Any] = {"precision": precision, "seed": seed}
    start: Path | None = None
    for stage in (1, 2):
        config = recipe(out, precision, stage, seed, start)
        if stage == 1:
            result["before"] = solved(config, scorer, questions)
        began, cpu_began = time.monotonic(), time.process_time()
        assert train_sft(config, WORLD) is None, "stopped on request; run the same command to go on"
        result[f"stage{stage}_s"] = round(time.monotonic() - began, 1)
        result[f"stage{stage}_cpu_s"] = round(time.process_time() - cpu_began, 1)
        start = run_folder(out, precision, stage, seed)
        result[f"after_stage{stage}"] = solved(recipe(out, precision, stage, seed, start), scorer, questions)
    print(json.dumps(result), flush=True)
    return result


def difference(runs: list[dict[str, Any]], moment: str, name: str) -> dict[str, Any]:
    """FP8 minus BF16, seed by seed, and the mean with its interval."""
    value = {(one["precision"], one["seed"]): one[moment][name] for one in runs}
    seeds = sorted({seed for _, seed in value})
    return by_seed([value["blockwise", seed] - value["bf16", seed] for seed in seeds])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of data and runs")
    parser.add_argument("--precision", nargs="+", default=["bf16", "blockwise"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--questions", type=int, default=200, help="of each held-out set (%(default)s)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    record = Record(options.json)
    record.values |= {"threads": torch.get_num_threads(), "families": FAMILIES, "questions": options.questions}
    if not (options.out / "tokenizer").exists():
        write_data(options.out)
    runs = record.values["runs"] = []
    with closing(ReasoningGymScorer(workers=1)) as scorer:
        for seed in options.seeds:
            for precision in options.precision:
                runs.append(run(options.out, precision, seed, options.questions, scorer))
                record.save()
    if {"bf16", "blockwise"} <= set(options.precision) and len(options.seeds) > 1:
        record.values["fp8_minus_bf16"] = {
            f"{moment}: {name}": difference(runs, moment, name)
            for moment in ("after_stage1", "after_stage2")
            for name in ("easy", "harder")
        }
        record.save()
        print(json.dumps(record.values["fp8_minus_bf16"], indent=1))


if __name__ == "__main__":
    main()
