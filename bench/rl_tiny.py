"""Does two-stage reinforcement learning make a tiny model better, in FP8 as in BF16? On one core of a CPU, in minutes.

    OMP_NUM_THREADS=1 python bench/rl_tiny.py runs/rl_tiny_bench --json bench/results/rl_tiny_cpu.json

The shipped recipes, for every seed: a model of half a million parameters is pre-trained on worked sums (the base),
fine-tuned in two stages, the second one short, and trained on by reinforcement learning in two stages, on easy sums
(recipes/rl_tiny_stage1.toml) and with harder ones among them (_stage2.toml), in each precision from the same fine-tuned
model. The seed decides weights, data order, prompts and samples. After pre-training, fine-tuning and each stage the
same held-out questions of both kinds are asked, greedily and with several samples at temperature 1. Intervals are 95 %,
by Student's t: of one run over questions, paired, and of the mean over seeds. Finished stages are kept: the same
command goes on where it was stopped.
"""

import argparse
import json
import statistics
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from exam import Examiner, by_seed, mean_of
from record import RECIPES, Record, settings_of, shipped

from infir2 import cli
from infir2.config import RlConfig
from infir2.data.worked_solutions import worked_examples
from infir2.evaluate.score import by_problem
from infir2.parallel.runtime import World
from infir2.reward.score import Scorer
from infir2.reward.tasks import ReasoningGymScorer
from infir2.train.metrics import read_metrics

FAMILIES = ("chain_sum",)
WORLD = World(0, 1, torch.device("cpu"), None)
KINDS = {"easy": 1, "harder": 2}
"""Kind of questions -> stage of `infir2 examples`."""
STAGES = ("base", "sft", "rl1", "rl2")

Marks = dict[str, list[float]]
"""Kind of questions (all: both) and way of sampling -> mean mark of each held-out question."""


def infir2(*words: object) -> None:
    """Run one command of the command line."""
    code = cli.main([str(word) for word in words])
    if code:
        raise SystemExit(f"stopped with exit code {code}; run the same command to go on")


def write_data(out: Path) -> None:
    """Sums to pre-train on, to fine-tune on and to practise on."""
    for name, stage, form, count, seed in (
        ("worked", 1, "text", 3000, 7),
        ("easy", 1, "messages", 3200, 1),
        ("mixed/easy", 1, "messages", 800, 1),
        ("mixed/harder", 2, "messages", 2400, 1),
        ("practice1/easy", 1, "prompts", 1500, 2),
        ("practice2/easy", 1, "prompts", 1500, 3),
        ("practice2/harder", 2, "prompts", 1500, 2),
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        words = ("--stage", stage, "--form", form, "--count", count, "--seed", seed, "--families", *FAMILIES)
        infir2("examples", out / f"{name}.jsonl", *words)
    infir2("prepare", out / "worked.jsonl", "--out", out / "corpus", "--vocab-size", 512)


def train(out: Path, command: str, recipe: str, run: str, start: str | None, *words: object) -> None:
    """Run or resume one stage; finished ones return at once."""
    source = () if start is None else ("--init.checkpoint", out / start)
    infir2(command, RECIPES / f"{recipe}.toml", "--run", out / run, *source, "--log.tensorboard", "false", *words)


def fine_tuned(out: Path, precision: str, seed: int) -> None:
    """The base and the fine-tuned model of a seed."""
    common = ("--fp8.recipe", precision, "--train.seed", seed)
    sources = f'{{ "{out / "corpus"}" = 1.0 }}'
    micro = ("--model.preset", "micro", "--model.init_std", 0.08, "--data.sources", sources, "--optim.lr", 3e-3)
    train(out, "cpt", "cpt_tiny", f"seed{seed}/base", None, *micro, *common)
    easy, mixed = out / "easy.jsonl", out / "mixed"
    train(out, "sft", "sft_tiny_stage1", f"seed{seed}/sft1", f"seed{seed}/base", "--data.train", easy, *common)
    train(out, "sft", "sft_tiny_stage2", f"seed{seed}/sft", f"seed{seed}/sft1", "--data.train", mixed, *common)


def reinforced(out: Path, precision: str, seed: int, stage: int) -> str:
    """One stage of reinforcement learning; returns the run's name."""
    run = f"seed{seed}/{precision}/rl{stage}"
    start = f"seed{seed}/sft" if stage == 1 else f"seed{seed}/{precision}/rl1"
    # Held-out questions are asked by Exam, after every stage the same ones; so the run asks none.
    practice = out / f"practice{stage}"
    data = ("--data.train", practice, "--data.validation", practice, "--train.eval_every", 0)
    words = ("--fp8.recipe", precision, "--train.seed", seed, "--reward.workers", 1, "--train.keep_checkpoints", 1)
    train(out, "rl", f"rl_tiny_stage{stage}", run, start, *data, *words)
    return run


class Exam:
    """The held-out questions, asked of any run."""

    def __init__(self, out: Path, questions: tuple[int, int], samples: int, scorer: Scorer) -> None:
        self.out, self.samples, self.scorer = out, samples, scorer
        self.examples = {
            kind: list(worked_examples(stage, count, 3, "held_out", FAMILIES))
            for (kind, stage), count in zip(KINDS.items(), questions)
        }

    def marks(self, run: str, precision: str) -> Marks:
        """Asked once: marks are kept beside the run."""
        path = self.out / f"{run}-marks-{precision}.json"
        if not path.exists():
            path.write_text(json.dumps(self._ask(self.out / run, precision)), encoding="utf-8")
        marks: Marks = json.loads(path.read_text(encoding="utf-8"))
        return marks

    def _ask(self, run: Path, precision: str) -> Marks:
        values = {"run": run, "init.checkpoint": run, "fp8.recipe": precision}
        examiner = Examiner(shipped(RlConfig, "rl_tiny_stage1", values), WORLD, self.scorer)
        marks: Marks = {}
        for way, samples, temperature in (("greedy", 1, 0.0), ("temperature 1", self.samples, 1.0)):
            for kind, examples in self.examples.items():
                answers = by_problem(examiner.ask(examples, 112, samples, temperature))
                marks[f"{kind}, {way}"] = [statistics.fmean(scores) for scores in answers.values()]
            marks[f"all, {way}"] = [mark for kind in self.examples for mark in marks[f"{kind}, {way}"]]
        return marks


def gain(later: list[float], earlier: list[float]) -> dict[str, Any]:
    return mean_of([b - a for b, a in zip(later, earlier, strict=True)])


def course_of(run: Path) -> dict[str, Any]:
    """What a stage's own metrics say; rewards are those of the rollouts."""
    steps = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]
    rollouts = [step for step in steps if "reward" in step]
    phases = ("rollout_s", "reward_s", "logprob_s", "update_s", "sync_s")
    return {
        "rewards": [round(one["reward"], 4) for one in rollouts],
        "entropy": [round(step["entropy"], 4) for step in steps],
        "groups_sampled": sum(one["sampled_groups"] for one in rollouts),
        "groups_with_spread": sum(one["groups_with_spread"] for one in rollouts),
        "truncated_mean": round(statistics.fmean(one["truncated"] for one in rollouts), 5),
        "logprob_diff_mean": statistics.fmean(step["logprob_diff"] for step in steps),
        "token_mult_prob_error_max": max(step["token_mult_prob_error"] for step in steps),
        "update_kl_max": max(step["update_kl"] for step in steps),
        "all_steps_s": round(sum(step["step_time_s"] for step in steps), 1),
        "phases_s": {name: round(sum(step.get(name, 0.0) for step in steps), 1) for name in phases},
    }


def before_rl_s(out: Path, seed: int) -> float:
    """Seconds from first to last step of pre-training and of both fine-tuning stages."""
    total = 0.0
    for name in ("base", "sft1", "sft"):
        lines = read_metrics(out / f"seed{seed}/{name}/metrics.jsonl")
        times = [line["time"] for line in lines if line["kind"] == "train"]
        total += times[-1] - times[0]
    return round(total, 1)


def training_minutes(runs: list[dict[str, Any]]) -> float:
    """Of all steps of all runs, in whichever call they were made; examining not included."""
    before = {run["seed"]: run["before_rl_s"] for run in runs}
    stages = sum(run[stage]["all_steps_s"] for run in runs for stage in ("rl1", "rl2"))
    return round((sum(before.values()) + stages) / 60, 1)


def examined(out: Path, exam: Exam, start: str, precision: str, seed: int) -> tuple[dict[str, Any], dict[str, Marks]]:
    """Both stages of one seed and precision: the record of the run, and the marks behind it."""
    marks = {"base": exam.marks(f"seed{seed}/base", start), "sft": exam.marks(f"seed{seed}/sft", precision)}
    record: dict[str, Any] = {"precision": precision, "seed": seed, "before_rl_s": before_rl_s(out, seed)}
    for stage in (1, 2):
        run = reinforced(out, precision, seed, stage)
        record[f"rl{stage}"] = course_of(out / run)
        marks[f"rl{stage}"] = exam.marks(run, precision)
    steps = (("sft", "base"), ("rl1", "sft"), ("rl2", "rl1"), ("rl2", "sft"))
    record["held_out"] = {
        way: {
            **{name: mean_of(marks[name][way]) for name in STAGES},
            **{f"{b} - {a}": gain(marks[b][way], marks[a][way]) for b, a in steps},
        }
        for way in marks["base"]
    }
    return record, marks


def summary(found: dict[tuple[str, int], dict[str, Marks]]) -> dict[str, Any]:
    """Means over seeds: accuracies, gains by stage, and FP8 minus BF16 of the same seed."""
    seeds = sorted({seed for _, seed in found})
    precisions = sorted({precision for precision, _ in found})
    total: dict[str, Any] = {}
    for way in next(iter(found.values()))["base"]:
        mean = {key: {name: statistics.fmean(marks[name][way]) for name in STAGES} for key, marks in found.items()}
        part = total[way] = {}
        for precision in precisions:
            own = [mean[precision, seed] for seed in seeds if (precision, seed) in mean]
            part[precision] = {name: by_seed([one[name] for one in own]) for name in STAGES}
            for b, a in (("sft", "base"), ("rl1", "sft"), ("rl2", "rl1"), ("rl2", "sft")):
                part[precision][f"{b} - {a}"] = by_seed([one[b] - one[a] for one in own])
        both = [seed for seed in seeds if all((precision, seed) in mean for precision in ("blockwise", "bf16"))]
        if both:
            part["blockwise - bf16"] = {
                name: by_seed([mean["blockwise", seed][name] - mean["bf16", seed][name] for seed in both])
                for name in STAGES[1:]
            }
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of data and runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--precision", nargs="+", choices=("blockwise", "bf16"), default=["blockwise", "bf16"])
    parser.add_argument("--start", choices=("blockwise", "bf16"), default="blockwise", help="precision before RL")
    parser.add_argument(
        "--questions", nargs=2, type=int, default=[300, 400], help="held out, easy and harder (300 400)"
    )
    parser.add_argument("--samples", type=int, default=3, help="of each at temperature 1 (%(default)s)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    out = options.out
    record = Record(options.json, settings_of(options, "out", "json"))
    record.values |= {"threads": torch.get_num_threads(), "families": FAMILIES}
    if not (out / "corpus" / "tokenizer").exists():
        write_data(out)
    runs, found = [], {}
    with closing(ReasoningGymScorer(workers=1)) as scorer:
        exam = Exam(out, tuple(options.questions), options.samples, scorer)
        for seed in options.seeds:
            fine_tuned(out, options.start, seed)
            for precision in options.precision:
                run, found[precision, seed] = examined(out, exam, options.start, precision, seed)
                runs.append(run)
                print(json.dumps(run["held_out"]), flush=True)
                over_seeds = summary(found)
                record.values |= {"training_minutes": training_minutes(runs), "over_seeds": over_seeds, "runs": runs}
                record.save()
    print(json.dumps(over_seeds, indent=1))


if __name__ == "__main__":
    main()
