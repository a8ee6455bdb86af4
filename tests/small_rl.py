"""A reinforcement-learning run small enough for tests: a model that already answers with a digit, any digit."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import torch
from small_folder import write_tensors
from small_run import ARCHITECTURE, write_toml

from infir2 import cli
from infir2.config import OptimSection
from infir2.data.chat import ChatTokenizer, choose_template
from infir2.data.conversations import Conversation
from infir2.data.packing import pack_documents
from infir2.data.tokenizer import MIN_VOCAB, copy_tokenizer, load_tokenizer, train_tokenizer
from infir2.model.attention import document_attention
from infir2.model.config import ModelConfig
from infir2.model.transformer import CausalLM
from infir2.parallel.runtime import World
from infir2.rl.batch import TrainingSample
from infir2.train.optimizer import build_optimizer
from infir2.train.step import train_step

WORLD = World(0, 1, torch.device("cpu"), None)
VOCAB = -(-MIN_VOCAB // 128) * 128
POLICY: ModelConfig = dataclasses.replace(ARCHITECTURE, vocab_size=VOCAB, max_position_embeddings=256)


def questions(count: int, seed: int = 0) -> list[str]:
    dice = random.Random(seed)
    return [f"{dice.choice('abcdef')}{dice.randrange(100)}?" for _ in range(count)]


def write_policy(folder: Path, steps: int = 40) -> Path:
    """A Hugging Face folder with tokenizer: "Answer: d" with a digit that the question says nothing about."""
    tokenizer = folder.with_name("tokenizer")
    train_tokenizer(["Answer: 0123456789"], MIN_VOCAB, tokenizer)
    chat = open_chat(tokenizer)
    model = CausalLM(POLICY, torch.float32)
    model.init_weights(1)
    optimizer = build_optimizer(model, OptimSection(lr=3e-3))
    dice = random.Random(2)
    for step in range(steps):
        talks = [
            Conversation([{"role": "user", "content": text}, {"role": "assistant", "content": f"Answer: {digit}"}])
            for text, digit in zip(questions(16, seed=step), dice.choices(range(10), k=16))
        ]
        samples = chat.encode([text for talk in talks for text in chat.render(talk)])
        batch = pack_documents([(sample.ids, sample.trained) for sample in samples], 128)
        train_step(model, optimizer, [batch], WORLD, lambda b: document_attention(b, torch.float32), 1.0)
    weights = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    write_tensors(folder, POLICY.to_hf(), weights, dtype=torch.float32)
    copy_tokenizer(tokenizer, folder)
    return folder


def open_chat(folder: Path) -> ChatTokenizer:
    tokenizer = load_tokenizer(folder)
    return ChatTokenizer(tokenizer, choose_template(tokenizer, "auto"))


def write_prompts(path: Path, count: int = 40, seed: int = 0, label: str = "7") -> Path:
    """Questions whose answer is always the same digit: what reinforcement learning has to find out."""
    rows = [{"prompt": text, "label": label} for text in questions(count, seed)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_rl_recipe(path: Path, run: Path, policy: Path, prompts: Path, **overrides: Any) -> Path:
    """A recipe file; overrides are dotted keys: ``**{"train.steps": 5}``."""
    table: dict[str, Any] = {
        "model": {"path": str(policy), "dtype": "float32"},
        "fp8": {"recipe": "bf16", "health_every": 0},
        "data": {"train": str(prompts), "validation": str(prompts), "max_prompt_tokens": 48, "max_tokens_per_gpu": 256},
        "rollout": {"prompts": 4, "samples": 8, "max_new_tokens": 16, "cache_tokens": 4096, "max_sequences": 32},
        "reward": {"kind": "math"},
        "optim": {"lr": 1e-3, "schedule": "constant", "betas": [0.9, 0.98]},
        "train": {"steps": 4, "global_batch": 32, "eval_every": 2, "eval_sequences": 8, "save_every": 2},
        "log": {"tensorboard": False},
    }
    return write_toml(path, run, table, overrides)


def rl(path: Path, *words: str) -> int:
    return cli.main(["rl", str(path), *words])


def toy_samples(seed: int = 0) -> list[TrainingSample]:
    """Of a vocabulary of 11, with random log-probabilities and advantages."""
    dice = random.Random(seed)
    return [
        TrainingSample(
            tuple(dice.choices(range(11), k=dice.randint(1, 4))),
            tuple(dice.choices(range(11), k=(length := dice.randint(1, 9)))),
            tuple(-dice.random() * 3 for _ in range(length)),
            dice.gauss(0, 1),
        )
        for _ in range(9)
    ]
