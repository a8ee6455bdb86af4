"""Text that arrives token by token equals the text decoded at once."""

import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from infir2.data.tokenizer import load_tokenizer, train_tokenizer
from infir2.rollout.text import IncrementalText, decode

TEXT = "naïve café, 数学の問題 🙂👩‍🔬 x² ≤ 4\n\n\tdef f(): return 'ok'  # done"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the cat sat on the mat"] * 20, 280, folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def pieces_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece makes them: a space is part of the token behind it, but for the first of a text; bytes for all
    that has no token. </s> is token 2."""
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    words = ["hello world the stop a b c"] * 50
    trained.train_from_iterator(words, trainers.BpeTrainer(vocab_size=60, special_tokens=special))
    table = json.loads(trained.to_str())
    vocabulary = table["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    made = Tokenizer.from_str(json.dumps(table))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def stream(tokenizer, tokens: list[int], skip: bool = True) -> tuple[list[str], str]:
    text = IncrementalText(tokenizer, skip)
    pieces = [text.push(token) for token in tokens]
    pieces.append(text.flush())
    return pieces, text.text


def test_whole_characters_arrive_and_nothing_is_lost(tokenizer) -> None:
    tokens = tokenizer.encode(TEXT)
    assert len(tokens) > len(TEXT), "characters must be split over tokens for this test to see anything"
    pieces, text = stream(tokenizer, tokens)
    assert text == TEXT == "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""


def test_an_unfinished_character_is_held_back_until_the_end(tokenizer) -> None:
    tokens = tokenizer.encode("ok 🙂")[:-1]
    pieces, text = stream(tokenizer, tokens)
    assert "".join(pieces[:-1]) == "ok "
    assert pieces[-1].startswith("\ufffd")
    assert text == decode(tokenizer, tokens, True)


@pytest.mark.parametrize("skip", [True, False])
def test_random_tokens(tokenizer, skip: bool) -> None:
    rng = random.Random(1)
    for _ in range(50):
        tokens = [rng.randrange(len(tokenizer)) for _ in range(60)]
        assert stream(tokenizer, tokens, skip)[1] == decode(tokenizer, tokens, skip)


def test_a_skipped_special_token_takes_no_space_with_it(pieces_tokenizer) -> None:
    encode = lambda text: pieces_tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    tokens = [*encode("hello"), 2, *encode("the world")]
    assert stream(pieces_tokenizer, tokens)[1] == decode(pieces_tokenizer, tokens, True) == "hello the world"
    many = [*encode("hello"), *[2] * 500, *encode("the world")]
    text = IncrementalText(pieces_tokenizer)
    for token in many:
        text.push(token)
        assert len(text._context) <= 128, "the cost of a token does not grow with the tokens before it"
    assert text.text == "hello the world"


@pytest.mark.parametrize("skip", [True, False])
def test_random_text_with_special_tokens(pieces_tokenizer, skip: bool) -> None:
    rng = random.Random(2)
    for _ in range(300):
        tokens: list[int] = []
        for _ in range(rng.randrange(1, 8)):
            text = "".join(rng.choice("你é😀 \n\tabc stop") for _ in range(rng.randrange(1, 8)))
            tokens += pieces_tokenizer(text, add_special_tokens=False)["input_ids"] + [2] * (rng.random() < 0.4)
        assert stream(pieces_tokenizer, tokens, skip)[1] == decode(pieces_tokenizer, tokens, skip)


def test_endless_broken_bytes_do_not_pile_up(tokenizer) -> None:
    broken = tokenizer.encode("🙂")[0]
    text = IncrementalText(tokenizer)
    for _ in range(500):
        text.push(broken)
        assert len(text._pending) < 64
    assert len(text.text) > 400
