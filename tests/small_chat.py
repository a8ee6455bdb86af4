"""Chat models small enough for tests: a byte-level tokenizer with ChatML and a few 100,000 weights, as Hugging Face
folders. One answers with noise, but always the same; the other is taught a handful of answers by heart."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import small_run
import torch
from small_folder import write_tensors

from infir2.data.chat import ChatTokenizer, Sample, choose_template
from infir2.data.conversations import Conversation
from infir2.data.tokenizer import load_tokenizer, train_tokenizer, vocabulary_size
from infir2.model.attention import causal_attention
from infir2.model.transformer import CausalLM

TEXT = ["The cat sat on the mat, the dog on the log. What is 2 + 3? It is 5, or 0.5 + 4.5 = 5."] * 20


def write_chat_model(folder: Path, seed: int = 7, **changes: Any) -> Path:
    """Its answers are noise; it hardly ever ends a turn by itself."""
    model = _new_model(folder, TEXT, 320, seed, {"max_position_embeddings": 1024, **changes})
    return _write(folder, model)


def write_taught_model(folder: Path, lessons: Sequence[tuple[list[dict[str, str]], str]], steps: int) -> Path:
    """A model that answers the messages of each lesson with its text. Of several answers to the same messages it gives
    each now and then."""
    texts = [message["content"] for messages, _ in lessons for message in messages] + [answer for _, answer in lessons]
    model = _new_model(folder, texts * 5, 700, 1, {"max_position_embeddings": 1024})
    tokenizer = load_tokenizer(folder / "tokenizer")
    chat = ChatTokenizer(tokenizer, choose_template(tokenizer, "auto"))
    turns = [Conversation([*messages, {"role": "assistant", "content": answer}]) for messages, answer in lessons]
    samples = chat.encode([chat.render(turn)[0] for turn in turns])
    samples.sort(key=lambda sample: len(sample.ids))
    batches = [_batch(samples[: len(samples) * 3 // 4]), _batch(samples[len(samples) * 3 // 4 :])]  # less padding
    trained = sum(int(sample.trained.sum()) for sample in samples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        for ids, labels in batches:
            logits = model(ids, torch.arange(ids.shape[1]).expand_as(ids), causal_attention)
            flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            (torch.nn.functional.cross_entropy(*flat, reduction="sum") / trained).backward()
        optimizer.step()
    return _write(folder, model)


def _batch(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels (-100 where nothing is learnt), padded on the right."""
    ids = torch.zeros(len(samples), max(len(sample.ids) for sample in samples), dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, sample in enumerate(samples):
        own = torch.tensor(sample.ids).long()
        ids[row, : len(own)] = own
        labels[row, : len(own)] = own.where(torch.tensor(sample.trained), torch.tensor(-100))
    return ids, labels


def _new_model(folder: Path, texts: list[str], vocabulary: int, seed: int, changes: dict[str, Any]) -> CausalLM:
    train_tokenizer(texts, vocabulary, folder / "tokenizer")
    rows = -(-vocabulary_size(load_tokenizer(folder / "tokenizer")) // 64) * 64
    model = CausalLM(dataclasses.replace(small_run.ARCHITECTURE, vocab_size=rows, **changes), torch.float32)
    model.init_weights(seed)
    return model


def _write(folder: Path, model: CausalLM) -> Path:
    tensors = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    config = model.config.to_hf()
    write_tensors(folder / "hf", config, tensors, torch.float32, tokenizer=folder / "tokenizer")
    return folder / "hf"
