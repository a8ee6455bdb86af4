"""A training run small enough for tests: token data with something to learn, a model of 0.4M parameters, a recipe."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_folder import write_tensors

from infir2.data.dataset import DatasetRecord, ShardWriter, write_record
from infir2.model.config import ModelConfig
from infir2.model.presets import PRESETS
from infir2.model.transformer import CausalLM

VOCAB, SEQ_LEN = 256, 64
# Every projection is a multiple of 128 in both dimensions, so all of them run in FP8.
ARCHITECTURE: ModelConfig = dataclasses.replace(
    PRESETS["tiny"],
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=32,
    vocab_size=VOCAB,
    max_position_embeddings=128,
)


def write_corpus(folder: Path, vocab_size: int = VOCAB, seed: int = 0) -> Path:
    """A prepared folder of short documents that count upwards in steps of 1 to 3."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    with ShardWriter(folder, vocab_size, shard_tokens=10**6) as writer:
        for split, documents in (("train", 300), ("validation", 40)):
            for _ in range(documents):
                ramp = np.cumsum(rng.integers(1, 4, int(rng.integers(5, 150))))
                writer.add(split, (int(rng.integers(vocab_size)) + ramp) % vocab_size)
        splits = writer.finish()
    content = {"format_version": 1, "tokenizer": "", "tokenizer_fingerprint": "", "vocab_size": vocab_size, "eos_id": 3}
    content |= {"dtype": "uint16", "seed": seed, "validation_fraction": 0.2, "sources": []}
    bad_rows = {"rows": 0, "counts": {}, "examples": {}}
    write_record(folder, DatasetRecord(**content, splits=splits, bad_rows=bad_rows))
    return folder


def write_model(folder: Path, seed: int = 7, **changes: Any) -> Path:
    """A Hugging Face folder of ARCHITECTURE with random float32 weights."""
    architecture = dataclasses.replace(ARCHITECTURE, **changes)
    with torch.device("meta"):
        model = CausalLM(architecture)
    write_tensors(folder, architecture.to_hf(), model.initial_values(seed), dtype=torch.float32)
    return folder


def write_recipe(path: Path, run: Path, corpus: Path, model: Path, **overrides: Any) -> Path:
    """A recipe file; overrides are dotted keys: ``**{"train.steps": 5}``."""
    table: dict[str, Any] = {
        "model": {"path": str(model)},
        "fp8": {"health_every": 0},
        "data": {"seq_len": SEQ_LEN, "sources": {str(corpus): 1.0}},
        "optim": {"lr": 2e-3, "warmup_steps": 2, "decay_steps": 2},
        "train": {"steps": 8, "global_batch": 4, "micro_batch": 2, "eval_every": 4, "eval_sequences": 4},
        "log": {"tensorboard": False},
    }
    table["train"]["save_every"] = 4
    return write_toml(path, run, table, overrides)


def write_toml(path: Path, run: Path, table: dict[str, Any], overrides: dict[str, Any]) -> Path:
    """A recipe file of sections; overrides are dotted keys, and None takes a key out."""
    for name, value in overrides.items():
        section, key = name.split(".")
        table.setdefault(section, {})[key] = value
    lines = [f"run = {json.dumps(str(run))}"]
    for section, values in table.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def metrics_lines(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of one kind, in file order, as they are written."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def loss_bits(run: Path) -> list[tuple[Any, ...]]:
    """(step, loss, gradient norm, held-out loss) of every train and eval line: JSON keeps every bit of a float."""
    lines = metrics_lines(run) + metrics_lines(run, "eval")
    lines.sort(key=lambda line: (line["step"], line["kind"] != "train"))  # the order in which they are written
    return [(line["step"], line.get("loss"), line.get("grad_norm"), line.get("eval_loss")) for line in lines]


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)
