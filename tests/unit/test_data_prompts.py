"""Prompts: rows of every form, bad ones counted with their lines, an order that follows from seed and rollout."""

from pathlib import Path

import pytest
import small_rl

from infir2.data.chat import ChatTokenizer
from infir2.data.conversations import RowSource
from infir2.data.documents import RowLedger
from infir2.data.prompts import PromptOrder, PromptSet, order_fingerprint, prompt_row, read_prompts
from infir2.data.tokenizer import MIN_VOCAB, train_tokenizer
from infir2.errors import DataError
from infir2.reward.math import label_text


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["Solve the problem. Answer: 34"], MIN_VOCAB, folder)
    return small_rl.open_chat(folder)


def read(path: Path, chat: ChatTokenizer, limit: str = "100%", max_tokens: int = 200) -> PromptSet:
    ledger = RowLedger(limit, "data.max_bad_rows")
    return read_prompts(RowSource(str(path), "data.train", prompt_row), chat, max_tokens, ledger, label_text)


ROWS = [
    b'{"prompt": "What is 1 + 1?", "label": "2", "metadata": {"source": "x"}}',
    b'{"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}], "label": 4}',
    b"not json",
    b'{"prompt": "no label"}',
    b'{"prompt": "label is a list", "label": [1]}',
    b'{"question": "no prompt", "label": "1"}',
    b'{"prompt": "   ", "label": "1"}',
    b'{"prompt": [{"role": "nobody", "content": "?"}], "label": "1"}',
    b"",
    b'{"prompt": "\xff", "label": "1"}',
    b'{"prompt": "' + b"long " * 300 + b'", "label": "1"}',
]


def test_every_form_of_row_and_every_fault(tmp_path: Path, chat: ChatTokenizer) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\n".join(ROWS) + b"\n")
    found = read(path, chat)
    assert [(p.question, p.label) for p in found.prompts] == [("What is 1 + 1?", "2"), ("2 + 2?", 4)]
    text = chat._backend.decode(found.prompts[1].ids, skip_special_tokens=False)
    assert (
        text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert found.counts.rows == len(ROWS)
    assert found.counts.dropped == 1
    expected = {"bad_json": 1, "bad_label": 2, "no_prompt": 2, "bad_message": 1, "empty": 1, "bad_utf8": 1}
    assert found.counts.bad == expected
    assert found.counts.examples["bad_label"] == [f"{path}:4", f"{path}:5"]
    assert "2 bad: bad_label" in found.counts.summary()


def test_too_many_bad_rows_stop_the_run(tmp_path: Path, chat: ChatTokenizer) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\n".join(ROWS) + b"\n")
    with pytest.raises(
        DataError, match=r"prompts.jsonl:3: bad_json: .*prompts.jsonl:4\), more than data.max_bad_rows 1 allows"
    ):
        read(path, chat, limit="1")


def test_a_file_without_a_usable_prompt(tmp_path: Path, chat: ChatTokenizer) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(ROWS[-1] + b"\n")
    with pytest.raises(DataError, match=r"no prompt is left \(1 rows, 1 dropped as too long\)"):
        read(path, chat)


def test_every_prompt_once_an_epoch_in_an_order_of_the_seed() -> None:
    order = PromptOrder(60, seed=3, per_rollout=12)
    epochs = [[row for rollout in range(5 * e, 5 * e + 5) for row in order.rows(rollout)] for e in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(60))] * 2
    assert epochs[0] != epochs[1]
    assert PromptOrder(60, seed=3, per_rollout=12).rows(7) == order.rows(7), "no state"
    assert PromptOrder(60, seed=4, per_rollout=12).rows(7) != order.rows(7)


def test_a_rollout_never_asks_a_prompt_twice() -> None:
    """Also where an epoch ends within it, and with spares that would use up all prompts."""
    order = PromptOrder(10, seed=1, per_rollout=4)
    for rollout in range(30):
        rows, spares = order.rows(rollout), order.spares(rollout, 8)
        assert len(rows) == 4
        assert sorted(rows + spares) == list(range(10)), "all of them, once"
    assert len(order.spares(0, 3)) == 3
    assert len({tuple(order.spares(rollout, 3)) for rollout in range(20)}) > 10
    with pytest.raises(DataError, match="10 prompts are fewer than the 11"):
        PromptOrder(10, seed=1, per_rollout=11)


def test_the_fingerprint_sees_labels_prompts_and_order(tmp_path: Path, chat: ChatTokenizer) -> None:
    prints = []
    for name, rows in (("a", ROWS[:2]), ("b", [ROWS[1], ROWS[0]]), ("c", [ROWS[0], ROWS[1].replace(b": 4}", b": 5}")])):
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(b"\n".join(rows) + b"\n")
        prints.append(order_fingerprint(read(path, chat), 1, 2)["sha256"])
    assert len(set(prints)) == 3
