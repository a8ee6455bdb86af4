"""Tokenizers: training, exact round trips, what transformers makes of the folder, and unusable folders."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from infir2.data import tokenizer as tok
from infir2.errors import DataError

TEXT = [Path(json.__file__).with_name(name).read_text() for name in ("decoder.py", "encoder.py", "scanner.py")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tok.train_tokenizer(TEXT, 600, path)
    return path


def test_trained_tokenizer_loads_in_transformers(folder: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    assert len(loaded) == tok.vocabulary_size(loaded) == 600
    assert loaded.eos_token == tok.END_OF_TEXT
    assert tok.end_of_document(loaded) == loaded.convert_tokens_to_ids("<|endoftext|>") == 595
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "<think>\nx</think>2"}]
    text = loaded.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>\nx</think>2<|im_end|>\n"
    prompt = loaded.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    ids = loaded(text, add_special_tokens=False)["input_ids"]
    assert [ids.count(loaded.convert_tokens_to_ids(t)) for t in ("<|im_start|>", "<think>", "</think>")] == [2, 1, 1]
    assert loaded.decode(ids, skip_special_tokens=True) == "user\n1+1?\nassistant\n<think>\nx</think>2\n"


def test_round_trip_is_exact(folder: Path) -> None:
    loaded = tok.load_tokenizer(folder)
    rng = random.Random(0)
    texts = [*TEXT, "  leading, trailing  \r\n\t", "数学 é e\u0301 🙂🏽 \x01 \u200b ﬁ", "12345 1e-5", "a , b ."]
    texts += ["".join(chr(rng.choice([rng.randrange(32, 0xD800), rng.randrange(0xE000, 0x10000)])) for _ in range(200))]
    for ids, text in tok.encode_documents(loaded.backend_tokenizer, [(t, t) for t in texts], 595):
        assert ids.dtype == np.int32
        assert ids[-1] == 595
        assert loaded.decode(ids[:-1].tolist()) == text
    assert loaded.tokenize("1234") == ["1", "2", "3", "4"]


def test_training_is_deterministic(folder: Path, tmp_path: Path) -> None:
    tok.train_tokenizer(iter(TEXT), 600, tmp_path)
    files = list(folder.iterdir())
    assert {file.name for file in files} == {"tokenizer.json", "tokenizer_config.json"}
    for file in files:
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_a_small_corpus_gives_a_smaller_vocabulary(tmp_path: Path) -> None:
    tok.train_tokenizer(["abab"], 5000, tmp_path)
    assert 256 + 5 < tok.vocabulary_size(tok.load_tokenizer(tmp_path)) < 300
    for size in (260, 10_000_001):
        with pytest.raises(DataError, match="has 261 to 10,000,000 tokens"):
            tok.train_tokenizer(["abab"], size, tmp_path)


def test_bare_tokenizer_json(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "mine.json"
    bare.write_bytes((folder / "tokenizer.json").read_bytes())
    loaded = tok.load_tokenizer(bare)
    assert tok.end_of_document(loaded) == 595
    assert tok.fingerprint(loaded) == tok.fingerprint(tok.load_tokenizer(folder))
    tok.copy_tokenizer(bare, tmp_path / "copy")
    assert tok.end_of_document(AutoTokenizer.from_pretrained(tmp_path / "copy")) == 595


def test_copy_takes_only_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tok.copy_tokenizer(folder, model)
    (model / "model.safetensors").write_bytes(b"weights")
    tok.copy_tokenizer(model, tmp_path / "copy")
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == sorted(p.name for p in folder.iterdir())


def test_copy_completes_a_tokenizer_only_where_asked(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "mine.json"
    bare.write_bytes((folder / "tokenizer.json").read_bytes())
    tok.copy_tokenizer(bare, tmp_path / "copy", complete=False)
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["tokenizer.json"]
    tok.copy_tokenizer(bare, tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer_config.json").is_file()
    assert not [path for path in (tmp_path / "copy").iterdir() if path.is_dir()]
    with pytest.raises(DataError, match="no tokenizer files"):
        tok.copy_tokenizer(tmp_path, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_truncation_in_a_tokenizer_file_is_ignored(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = tok.load_tokenizer(tmp_path)
    ((ids, _),) = tok.encode_documents(loaded.backend_tokenizer, [(TEXT[0], None)], 595)
    assert loaded.decode(ids[:-1].tolist()) == TEXT[0]


def test_tokenizers_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer"):
        tok.load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="no tokenizer"):
        tok.load_tokenizer("Qwen/Qwen2.5-1.5B")  # a name is not looked up anywhere
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot be loaded"):
        tok.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match=str(tmp_path)):
        tok.load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()
