"""Does two-stage fine-tuning teach a tiny model to solve tasks, in FP8 as in BF16? On one core of a CPU, in minutes.

    OMP_NUM_THREADS=1 python bench/sft_tiny.py runs/sft_tiny_bench --seeds 1 2 3 --json bench/results/sft_tiny_cpu.json

recipes/sft_tiny_stage1.toml and _stage2.toml, from random weights of the preset `micro` instead of a pre-training run,
in each precision and from each seed. Before and after each stage the rollout engine answers held-out questions of both
stages, greedily and (after) with four samples at temperature 1, and the reward `reasoning_gym` marks the answers.
Finished stages are kept: the same command goes on where it was stopped.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from infir2.checkpoint.state import model_state
from infir2.checkpoint.store import CheckpointStore
from infir2.config import SftConfig, load
from infir2.data import tokenizer as tok
from infir2.data.chat import ChatTokenizer
from infir2.data.worked_solutions import WorkedExample, worked_examples
from infir2.fp8.convert import refresh_weights
from infir2.launch.chat_model import open_model
from infir2.launch.environment import environment
from infir2.launch.model import build_model
from infir2.parallel.runtime import World
from infir2.reward.score import Scorer
from infir2.reward.tasks import ReasoningGymScorer
from infir2.rollout.engine import Engine
from infir2.rollout.records import Request, SamplingParams
from infir2.stages.sft import train_sft

RECIPES = Path(__file__).parents[1] / "recipes"
FAMILIES = ("chain_sum",)
ROWS = {"stage1/easy": (1, 3200), "stage2/easy": (1, 2000), "stage2/harder": (2, 6000)}
"""File -> (kind of questions, how many)."""
WORLD = World(0, 1, torch.device("cpu"), None)
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t for a two-sided 95 % interval of the mean of so many seeds."""


def write_data(out: Path) -> None:
    """The rows of both stages, and a tokenizer trained on them."""
    texts: list[str] = []
    for name, (kind, count) in ROWS.items():
        path = out / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [example.row() for example in worked_examples(kind, count, 1, families=FAMILIES)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        texts += [f"{message['role']}\n{message['content']}" for row in rows for message in row["messages"]]
    tok.train_tokenizer(texts, 384, out / "tokenizer")


def recipe(out: Path, precision: str, stage: int, seed: int) -> SftConfig:
    """The shipped recipe with this run's folders, precision and seed."""
    name = f"{precision}-seed{seed}-stage"
    start = f"{{ checkpoint = '{out / name}1' }}" if stage == 2 else "{}"
    model = "{}" if stage == 2 else '{ preset = "micro", init_std = 0.08 }'
    words = {
        "run": out / f"{name}{stage}",
        "init": start,
        "model": model,
        "fp8.recipe": precision,
        "data.train": out / f"stage{stage}",
        "data.tokenizer": out / "tokenizer",
        "train.seed": seed,
        "log.tensorboard": "false",
    }
    overrides = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    return load(SftConfig, RECIPES / f"sft_tiny_stage{stage}.toml", overrides)


def accuracy(
    engine: Engine, chat: ChatTokenizer, scorer: Scorer, examples: list[WorkedExample], params: SamplingParams
) -> float:
    """Mean score over questions and samples."""
    prompts = [chat.prompt([{"role": "user", "content": example.question}]) for example in examples]
    samples = engine.generate([Request(tuple(prompt), params) for prompt in prompts])
    labels = [example.prompt_row()["label"] for example in examples]
    pairs = [(one.text, label) for given, label in zip(samples, labels) for one in given]
    return round(statistics.fmean(score.value for score in scorer.score_many(pairs)), 4)


def solved(config: SftConfig, checkpoint: str | None, scorer: Scorer, questions: int) -> dict[str, float]:
    """How much of each held-out set the model solves, with the weights of a run or (None) its first ones."""
    chat, folder, architecture = open_model(config)
    model, _ = build_model(config, architecture, WORLD)
    if checkpoint:
        store = CheckpointStore(Path(checkpoint) / "checkpoints")
        store.load(store.find(checkpoint), {"model": model_state(model)}, ("optim",))
    refresh_weights(model)
    model.eval()
    engine = Engine(model, tok.load_tokenizer(folder))
    end = chat.end_of_turn()
    assert end is not None
    greedy = SamplingParams(temperature=0.0, max_new_tokens=112, seed=1, stop_token_ids=(end,))
    found = {}
    for kind, name in ((1, "easy"), (2, "harder")):
        examples = list(worked_examples(kind, questions, 3, "held_out", FAMILIES))
        found[name] = accuracy(engine, chat, scorer, examples, greedy)
        if checkpoint:
            sampled = replace(greedy, temperature=1.0, n=4)
            found[f"{name}_at_temperature_1"] = accuracy(engine, chat, scorer, examples, sampled)
    return found


def run(out: Path, precision: str, seed: int, questions: int, scorer: Scorer) -> dict[str, Any]:
    """Both stages of one precision and seed. CPU seconds are those of stages that this process has trained."""
    result: dict[str, Any] = {"precision": precision, "seed": seed}
    for stage in (1, 2):
        config = recipe(out, precision, stage, seed)
        if stage == 1:
            result["before"] = solved(config, None, scorer, questions)
        began, cpu_began = time.monotonic(), time.process_time()
        assert train_sft(config, WORLD) is None, "stopped on request; run the same command to go on"
        result[f"stage{stage}_s"] = round(time.monotonic() - began, 1)
        result[f"stage{stage}_cpu_s"] = round(time.process_time() - cpu_began, 1)
        result[f"after_stage{stage}"] = solved(config, config.run, scorer, questions)
    print(json.dumps(result), flush=True)
    return result


def difference(runs: list[dict[str, Any]], moment: str, name: str) -> dict[str, Any]:
    """FP8 minus BF16, seed by seed, and the 95 % interval of the mean by Student's t."""
    value = {(one["precision"], one["seed"]): one[moment][name] for one in runs}
    seeds = sorted({seed for _, seed in value})
    differences = [round(value["blockwise", seed] - value["bf16", seed], 4) for seed in seeds]
    mean = statistics.fmean(differences)
    half = T_95[len(seeds)] * statistics.stdev(differences) / math.sqrt(len(seeds))
    return {"by_seed": differences, "mean": round(mean, 4), "interval": [round(mean - half, 4), round(mean + half, 4)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of data and runs")
    parser.add_argument("--precision", nargs="+", default=["bf16", "blockwise"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--questions", type=int, default=200, help="of each held-out set (%(default)s)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    record = {**environment(), "threads": torch.get_num_threads(), "families": FAMILIES, "questions": options.questions}
    if not (options.out / "tokenizer").exists():
        write_data(options.out)
    scorer = ReasoningGymScorer(workers=1)
    try:
        runs = [
            run(options.out, precision, seed, options.questions, scorer)
            for seed in options.seeds
            for precision in options.precision
        ]
    finally:
        scorer.close()
    record["runs"] = runs
    if {"bf16", "blockwise"} <= set(options.precision) and len(options.seeds) in T_95:
        record["fp8_minus_bf16"] = {
            f"{moment}: {name}": difference(runs, moment, name)
            for moment in ("after_stage1", "after_stage2")
            for name in ("easy", "harder")
        }
        print(json.dumps(record["fp8_minus_bf16"], indent=1))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
