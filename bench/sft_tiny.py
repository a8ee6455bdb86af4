"""Does two-stage fine-tuning teach a tiny model to solve tasks? On a laptop CPU, in minutes.

    python bench/sft_tiny.py --out runs/sft_tiny_bench --precision bf16 blockwise --json bench/results/FILE.json

Makes worked examples and a tokenizer, trains a model of 0.9 million parameters from random weights through
`infir2 sft`'s two stages, and asks it held-out easy questions before and after, greedily. Finished stages are not
repeated. The answer that counts is the last boxed one, and the library that made the question marks it.
"""

import argparse
import dataclasses
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from infir2.checkpoint.huggingface import write_folder
from infir2.checkpoint.state import model_state
from infir2.checkpoint.store import CheckpointStore
from infir2.config import SftConfig
from infir2.data import tokenizer as tok
from infir2.data.worked_solutions import WorkedExample, boxed, score, worked_examples
from infir2.fp8.convert import refresh_weights
from infir2.model.attention import causal_attention
from infir2.model.presets import PRESETS
from infir2.model.transformer import CausalLM
from infir2.parallel.runtime import World
from infir2.stages.environment import environment
from infir2.stages.sft import open_model, train_sft
from infir2.stages.training import build_model

FAMILIES = ("chain_sum", "basic_arithmetic")
WORLD = World(0, 1, torch.device("cpu"), None)


def write_data(out: Path, counts: tuple[int, int]) -> None:
    """Stage 1: easy examples. Stage 2: as many harder ones as other easy ones."""
    one = [e.row() for e in worked_examples(1, counts[0], 1, families=FAMILIES)]
    two = [e.row() for e in worked_examples(1, counts[1] // 2, 2, families=FAMILIES)]
    two += [e.row() for e in worked_examples(2, counts[1] // 2, 2, families=FAMILIES)]
    for name, rows in (("stage1", one), ("stage2", two)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = [message["content"] for row in [*one, *two] for message in row["messages"]]
    tok.train_tokenizer(texts, 384, out / "tokenizer")


def write_model(out: Path, seed: int) -> None:
    """A Hugging Face folder with random weights and the tokenizer."""
    folder = out / f"start-seed{seed}"
    if folder.exists():
        return
    size = tok.vocabulary_size(tok.load_tokenizer(out / "tokenizer"))
    architecture = dataclasses.replace(
        PRESETS["tiny"],
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        head_dim=32, vocab_size=-(-size // 128) * 128, max_position_embeddings=1024, bos_token_id=None,
        eos_token_ids=(), rope_theta=10_000.0,
    )  # fmt: skip
    with torch.device("meta"):
        model = CausalLM(architecture)
    write_folder(folder, architecture.to_hf(), model.initial_values(seed), dtype=torch.float32)
    tok.copy_tokenizer(out / "tokenizer", folder)


def recipe(out: Path, precision: str, stage: int, seed: int, options: argparse.Namespace) -> SftConfig:
    name = f"{precision}-seed{seed}-stage"
    start: dict[str, Any] = {"model": {"path": str(out / f"start-seed{seed}"), "dtype": options.dtype}}
    if stage == 2:
        start = {"init": {"checkpoint": str(out / f"{name}1")}, "model": {"dtype": options.dtype}}
    table: dict[str, Any] = {
        "run": str(out / f"{name}{stage}"),
        **start,
        "fp8": {"recipe": precision, "health_every": 0},
        "data": {
            "train": str(out / f"stage{stage}.jsonl"),
            "validation_fraction": 0.01,
            "max_length": 256,
            "max_tokens_per_gpu": 512,
        },
        "optim": {
            "lr": options.lr if stage == 1 else options.lr / 2,
            "min_lr": options.lr / 20,
            "schedule": "cosine",
            "warmup_fraction": 0.05,
            "weight_decay": 0.0,
        },
        "train": {
            "epochs": options.epochs[stage - 1],
            "global_batch": options.batch,
            "seed": seed,
            "eval_every": 200,
            "save_every": 200,
            "keep_checkpoints": 1,
        },
        "log": {"tensorboard": False, "every": 10},
    }
    return SftConfig.model_validate(table)


@torch.no_grad()
def answers(model: CausalLM, tokenizer: Any, questions: list[str], most_tokens: int) -> list[str]:
    """Greedy completions. The whole text is read again for every new token: right for a tiny model, no more."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    lengths = torch.tensor([len(ids) for ids in prompts])
    texts = torch.zeros(len(prompts), int(lengths.max()) + most_tokens, dtype=torch.int64)
    for row, ids in enumerate(prompts):
        texts[row, : len(ids)] = torch.tensor(ids)
    begins, going = lengths.clone(), torch.arange(len(prompts))
    for _ in range(most_tokens):
        width = int(lengths[going].max())
        ids = texts[going, :width]
        positions = torch.arange(width).expand(len(going), -1)
        last = lengths[going] - 1

        def head(hidden: torch.Tensor, weight: torch.Tensor, last: torch.Tensor = last) -> torch.Tensor:
            return hidden[torch.arange(len(last)), last].float() @ weight.float().T

        chosen = model(ids, positions, causal_attention, head=head).argmax(-1)
        texts[going, lengths[going]] = chosen
        lengths[going] += 1
        going = going[chosen != end]
        if not len(going):
            break
    return [tokenizer.decode(row[b:n]) for row, b, n in zip(texts, begins, lengths)]


def accuracy(model: CausalLM, tokenizer: Any, examples: list[WorkedExample]) -> dict[str, float]:
    """Share solved, in all and by family."""
    model.eval()
    solved: Counter[str] = Counter()
    texts = answers(model, tokenizer, [example.question for example in examples], most_tokens=96)
    model.train()
    for example, text in zip(examples, texts):
        solved[example.family] += int(score(example, boxed(text)))
    total = Counter(example.family for example in examples)
    return {"all": solved.total() / len(examples), **{name: solved[name] / total[name] for name in total}}


def run(out: Path, precision: str, seed: int, options: argparse.Namespace, examples: list[WorkedExample]) -> dict:
    """Both stages of one precision and seed."""
    result: dict[str, Any] = {"precision": precision, "seed": seed}
    began = time.monotonic()
    for stage in (1, 2):
        config = recipe(out, precision, stage, seed, options)
        assert train_sft(config, WORLD), "stopped on request; run the same command to go on"
        _, folder, architecture = open_model(config)
        model, _ = build_model(config, architecture, WORLD)
        tokenizer = tok.load_tokenizer(folder)
        if stage == 1:
            result["before"] = accuracy(model, tokenizer, examples)
        store = CheckpointStore(Path(config.run) / "checkpoints")
        store.load(store.find(config.run), {"model": model_state(model)}, ("optim",))
        refresh_weights(model)
        result[f"after_stage{stage}"] = accuracy(model, tokenizer, examples)
        print({key: value for key, value in result.items() if isinstance(value, dict)}, flush=True)
    result["seconds"] = round(time.monotonic() - began, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--precision", nargs="+", default=["bf16", "blockwise"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--dtype", default="float32", help="what is not FP8 is computed in this dtype")
    parser.add_argument("--counts", nargs=2, type=int, default=[10_000, 6_000], help="examples of the two stages")
    parser.add_argument("--epochs", nargs=2, type=int, default=[2, 1])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.out / "tokenizer").exists():
        write_data(options.out, tuple(options.counts))
    examples = list(worked_examples(1, options.questions, 3, "held_out", FAMILIES))
    results = []
    for seed in options.seeds:
        write_model(options.out, seed)
        results += [run(options.out, precision, seed, options, examples) for precision in options.precision]
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "json")}
    record = {**environment(), "settings": settings, "families": FAMILIES, "runs": results}
    print(json.dumps(results, indent=1))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
