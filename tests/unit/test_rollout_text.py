"""Text that arrives token by token equals the text decoded at once."""

import random

import pytest

from infir2.data.tokenizer import load_tokenizer, train_tokenizer
from infir2.rollout.text import IncrementalText, decode

TEXT = "naïve café, 数学の問題 🙂👩‍🔬 x² ≤ 4\n\n\tdef f(): return 'ok'  # done"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the cat sat on the mat"] * 20, 280, folder)
    return load_tokenizer(folder)


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


def test_endless_broken_bytes_do_not_pile_up(tokenizer) -> None:
    broken = tokenizer.encode("🙂")[0]
    text = IncrementalText(tokenizer)
    for _ in range(500):
        text.push(broken)
        assert len(text._pending) < 64
    assert len(text.text) > 400
