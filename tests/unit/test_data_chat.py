"""Loss masks, token by token, against hand-written segments; templates that misbehave; rows that cannot be used."""

import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from infir2.data import time_limit
from infir2.data import tokenizer as tok
from infir2.data.chat import ChatTokenizer, choose_template
from infir2.data.conversations import Conversation, ConversationSource, conversation_of
from infir2.data.documents import BadRow, RowLedger
from infir2.data.sft import tokenize_rows
from infir2.errors import DataError

TEXT = [
    "The sum of 12 and 30 is 42. <think>",
    "Sort: über, naïve, 数学",
    "a b  c\n\nd",
    "assistant user system tool",
] * 3

# Qwen's manner: an earlier assistant turn loses its <think> part, tool answers come in a user turn.
QWEN = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- set c = m.content if loop.last else m.content.split('</think>')[-1].lstrip('\\n') -%}
{{- '<|im_start|>assistant\\n' + c + '<|im_end|>\\n' -}}
{%- elif m.role == 'tool' -%}{{- '<|im_start|>user\\n<tool_response>' + m.content + '</tool_response><|im_end|>\\n' -}}
{%- else -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
# Llama's: a token at the very beginning, headers, no line feed after a turn.
LLAMA = """{{- bos_token -}}{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '<|im_end|>\\n\\n' + m.content | trim + eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant<|im_end|>\\n\\n' -}}{%- endif -%}"""

Segments = list[tuple[str, bool]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    tok.train_tokenizer(TEXT, 420, folder)
    loaded = tok.load_tokenizer(folder)
    loaded.bos_token = "<|endoftext|>"
    return loaded


def chatml(messages: list[dict[str, Any]]) -> list[Segments]:
    parts: Segments = []
    for m in messages:
        parts.append((f"<|im_start|>{m['role']}\n", False))
        parts.append((m["content"] + "<|im_end|>", m["role"] == "assistant"))
        parts.append(("\n", False))
    return [parts]


def llama(messages: list[dict[str, Any]]) -> list[Segments]:
    parts: Segments = [("<|endoftext|>", False)]
    for m in messages:
        parts.append((f"<|im_start|>{m['role']}<|im_end|>\n\n", False))
        parts.append((m["content"].strip() + "<|endoftext|>", m["role"] == "assistant"))
    return [parts]


def qwen(messages: list[dict[str, Any]]) -> list[Segments]:
    """Texts and what is learnt in each."""
    texts: list[Segments] = []
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    stripped = {i: messages[i]["content"].split("</think>")[-1].lstrip("\n") for i in turns}
    # The text of the whole conversation shows the turns that have nothing to lose as the model wrote them; every other
    # turn but the last needs a text that ends with it.
    changed = [i for i in turns[:-1] if stripped[i] != messages[i]["content"]]
    for end in [*changed, turns[-1]]:
        learnt = [end] if end in changed else [i for i in turns if i not in changed]
        parts: Segments = []
        for i, m in enumerate(messages[: end + 1]):
            role = "user" if m["role"] == "tool" else m["role"]
            content = m["content"] if i == end else stripped.get(i, m["content"])
            content = f"<tool_response>{content}</tool_response>" if m["role"] == "tool" else content
            parts.append((f"<|im_start|>{role}\n", False))
            parts.append((f"{content}<|im_end|>", i in learnt))
            parts.append(("\n", False))
        texts.append(parts)
    return texts


def expected(tokenizer: PreTrainedTokenizerBase, parts: Segments) -> tuple[list[int], list[bool]]:
    """Ids of the whole text, and for each whether a byte of it is trained on. Counts bytes, not offsets: in a
    byte-level vocabulary every character of an ordinary token stands for one byte."""
    ids = tokenizer("".join(text for text, _ in parts), add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    trained_bytes = [flag for text, flag in parts for _ in text.encode()]
    place, flags = 0, []
    for i in ids:
        size = len(added[i].content.encode()) if i in added else len(tokenizer.convert_ids_to_tokens(i))
        flags.append(any(trained_bytes[place : place + size]))
        place += size
    assert place == len(trained_bytes)
    return ids, flags


def conversations(count: int, seed: int) -> list[list[dict[str, Any]]]:
    rng = random.Random(seed)
    pieces = ["12", " 42", "\n", "é", "数学", "  ", "sum", "🙂", ".", "<think>", "b c", "\t", "Sort: "]
    made = []
    for _ in range(count):
        messages = [{"role": "system", "content": "You sort."}] if rng.random() < 0.5 else []
        for _ in range(rng.randint(1, 4)):
            messages.append({"role": rng.choice(["user", "tool"]), "content": "".join(rng.choices(pieces, k=4))})
            answer = "".join(rng.choices([p for p in pieces if "think" not in p], k=4))
            thought = f"<think>\n{''.join(rng.choices(pieces[:8], k=3))}</think>\n" if rng.random() < 0.6 else ""
            messages.append({"role": "assistant", "content": thought + answer})
        made.append(messages)
    return made


@pytest.mark.parametrize(
    ("template", "by_hand"),
    [(tok.CHAT_TEMPLATE, chatml), (QWEN, qwen), (LLAMA, llama)],
    ids=["chatml", "qwen", "llama"],
)
def test_masks_token_by_token(tokenizer: PreTrainedTokenizerBase, template: str, by_hand: Any) -> None:
    chat = ChatTokenizer(tokenizer, template)
    tokens = several = 0
    for messages in conversations(80, seed=3):
        rendered = chat.render(Conversation(messages))
        wanted = by_hand(messages)
        assert [text.text for text in rendered] == ["".join(text for text, _ in parts) for parts in wanted]
        for sample, parts in zip(chat.encode(rendered), wanted, strict=True):
            assert (sample.ids.tolist(), sample.trained.tolist()) == expected(tokenizer, parts), messages
            tokens += len(sample.ids)
        several += len(rendered) > 1
    assert tokens > 5000
    assert (several > 10) == (template == QWEN), "only Qwen's manner needs several texts"


def test_masks_like_those_of_transformers(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = ChatTokenizer(tokenizer, tok.CHAT_TEMPLATE)
    for messages in conversations(40, seed=5):
        messages = [{**m, "content": m["content"].strip() + "."} for m in messages]
        (sample,) = chat.encode(chat.render(Conversation(messages)))
        theirs = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, chat_template=tok.CHAT_TEMPLATE
        )
        assert sample.ids.tolist() == theirs["input_ids"]
        assert sample.trained.astype(int).tolist() == theirs["assistant_masks"]


def test_tools_and_tool_calls_in_the_shipped_template(tokenizer: PreTrainedTokenizerBase) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    row = {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "1+2?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "3", "tool_call_id": "1"},
            {"role": "assistant", "content": [{"type": "text", "text": "3"}], "tool_calls": None},
            {"role": "user", "content": "after the last answer nothing is learnt"},
        ],
        "tools": json.dumps([{"type": "function", "function": {"name": "add"}}]),
    }
    (text,) = ChatTokenizer(tokenizer, tok.CHAT_TEMPLATE).render(conversation_of(row))
    assert text.text.startswith("<|im_start|>system\nS\n\nTools you can call")
    assert '{"type": "function", "function": {"name": "add"}}<|im_end|>\n<|im_start|>user\n1+2?' in text.text
    assert text.text.endswith("<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n")
    assert text.text.count("<|im_start|>system") == 1
    assert [text.text[a:b] for a, b in text.spans] == [
        '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call><|im_end|>',
        "3<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception('no tools here') }}", "no tools here"),
        ("{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}", "drops the <think> part"),
        ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}{{ messages|length }}", "otherwise than it asks"),
        ("{% if false %}{% generation %}{% endgeneration %}{% endif %}", "is not reached"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "drops tool calls"),
    ],
)
def test_templates_that_cannot_be_used(tokenizer: PreTrainedTokenizerBase, template: str, said: str) -> None:
    call = {"function": {"name": "secret"}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>x</think>a"}]
    if "tool calls" in said:
        messages[1] |= {"content": "a", "tool_calls": [call]}  # type: ignore[operator]
    with pytest.raises(BadRow) as caught:
        ChatTokenizer(tokenizer, template).render(Conversation(messages))
    assert caught.value.reason == "bad_template"
    assert said in caught.value.detail


def test_which_template(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    own, file = tokenizer.chat_template, tmp_path / "mine.jinja"
    file.write_text(LLAMA)
    assert choose_template(tokenizer, "auto") == own
    assert choose_template(tokenizer, "chatml") == tok.CHAT_TEMPLATE
    assert choose_template(tokenizer, str(file)) == LLAMA
    with pytest.raises(DataError, match=r"--option: .*gone.jinja: cannot be read: No such file or directory$"):
        choose_template(tokenizer, str(tmp_path / "gone.jinja"), "--option")
    with pytest.raises(DataError, match="not a Jinja template"):
        ChatTokenizer(tokenizer, "{% if %}")
    bare = tok.load_tokenizer(tmp_path_without_template(tokenizer, tmp_path))
    assert bare.chat_template is None
    assert choose_template(bare, "auto") == tok.CHAT_TEMPLATE


def tmp_path_without_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(tokenizer.backend_tokenizer.to_str())
    return path


# Rows


GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
ROWS: list[tuple[str | bytes, str | None]] = [
    (json.dumps(GOOD), None),
    (json.dumps({"prompt": "q", "completion": "a"}), None),
    (json.dumps({"prompt": GOOD["messages"][:1], "completion": GOOD["messages"][1:]}), None),
    ("{broken", "bad_json"),
    ("[1]", "bad_json"),
    ("", "empty"),
    (b'{"messages": "\xff"}', "bad_utf8"),
    (json.dumps({"text": "x"}), "no_messages"),
    (json.dumps({"messages": []}), "no_messages"),
    (json.dumps({"messages": GOOD["messages"][:1]}), "no_assistant"),
    (json.dumps({"messages": [{"role": "asistant", "content": "a"}]}), "bad_message"),
    (json.dumps({"messages": [{"role": "assistant", "content": 3}]}), "bad_message"),
    (json.dumps({"messages": [{"role": "assistant"}]}), "bad_message"),
    ('{"prompt": "\\ud800", "completion": "a"}', "bad_utf8"),
    (json.dumps({"prompt": "\0", "completion": "a"}), "nul"),
    (json.dumps({"prompt": "2 + 2", "completion": 4}), "bad_message"),
    (json.dumps({"prompt": {"role": "user"}, "completion": "a"}), "bad_message"),
]


def test_bad_rows_are_counted_by_reason_and_line(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(r if isinstance(r, bytes) else r.encode() for r, _ in ROWS) + b"\n")
    chat = ChatTokenizer(tokenizer, tok.CHAT_TEMPLATE)
    ledger = RowLedger("100", "data.max_bad_rows")
    rows, origins, counts = tokenize_rows(ConversationSource(str(path)), chat, 100, "drop", ledger)
    assert (len(rows), origins.tolist(), counts.rows, counts.samples) == (3, [0, 1, 2], len(ROWS), 3)
    wanted: dict[str, list[str]] = {}
    for line, (_, reason) in enumerate(ROWS, 1):
        if reason:
            wanted.setdefault(reason, []).append(f"{path}:{line}")
    assert counts.examples == wanted
    assert counts.bad == {reason: len(lines) for reason, lines in wanted.items()}
    ids = [rows.row(i)[0].tolist() for i in range(3)]
    assert ids[0] == ids[1] == ids[2]

    with pytest.raises(DataError) as caught:
        tokenize_rows(ConversationSource(str(path)), chat, 100, "drop", RowLedger("3", "data.max_bad_rows"))
    message = str(caught.value)
    assert message.startswith(f"{path}:4: bad_json: not a JSON object")
    assert f"bad_utf8 1: {path}:7" in message
    assert "more than data.max_bad_rows 3 allows" in message
    assert "\n" not in message


@pytest.mark.parametrize("rule", ["drop", "truncate"])
def test_rows_that_are_too_long(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, rule: str) -> None:
    chat = ChatTokenizer(tokenizer, tok.CHAT_TEMPLATE)
    path = tmp_path / "rows.jsonl"
    questions = [("1", "2" * 10), ("1", "2" * 200), ("1" * 200, "2")]
    path.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in questions))
    rows, origins, counts = tokenize_rows(ConversationSource(str(path)), chat, 64, rule, RowLedger("0"))
    if rule == "drop":
        assert (origins.tolist(), counts.dropped, counts.truncated) == ([0], 2, 0)
    else:
        assert (origins.tolist(), counts.dropped, counts.truncated) == ([0, 1], 1, 1), "the third has nothing to learn"
        ids, trained = rows.row(1)
        (whole,) = chat.encode(chat.render(conversation_of({"prompt": "1", "completion": "2" * 200})))
        assert ids.tolist() == whole.ids[:64].tolist()
        assert trained.tolist() == whole.trained[:64].tolist()


def test_samples_with_nothing_to_learn(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Under a template that writes nothing but the answer: no token at all, and one, which is the label of none."""
    answers = "{% for m in messages[1:] %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "q", "completion": a}) + "\n" for a in ("", "1", "1+2")))
    chat = ChatTokenizer(tokenizer, answers)
    rows, origins, counts = tokenize_rows(ConversationSource(str(path)), chat, 64, "drop", RowLedger("0"))
    assert (origins.tolist(), counts.empty, counts.dropped) == ([2], 2, 0)
    assert rows.lengths.tolist() == [3]
    assert "2 left out with nothing to train on" in counts.summary()


@pytest.mark.parametrize("template", [tok.CHAT_TEMPLATE, QWEN, LLAMA])
def test_a_prompt_ends_where_the_trained_turn_begins(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    chat = ChatTokenizer(tokenizer, template)
    asked = [
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    conversation = Conversation([*asked, {"role": "assistant", "content": "The sum"}])
    sample = chat.encode(chat.render(conversation))[-1]
    prompt = chat.prompt(asked)
    assert sample.ids[: len(prompt)].tolist() == prompt
    assert sample.trained[len(prompt)]
    assert not sample.trained[len(prompt) - 1]
    # The token that ends a turn is the last one that is trained on.
    assert chat.end_of_turn() == sample.ids[sample.trained.nonzero()[0][-1]]
    with pytest.raises(BadRow, match="bad_template"):
        ChatTokenizer(tokenizer, "{{ raise_exception('no') }}").prompt(asked)


def test_a_template_may_end_turns_with_plain_text(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + ';' }}{% endfor %}"
    assert (
        ChatTokenizer(tokenizer, plain + "{% if add_generation_prompt %}assistant: {% endif %}").end_of_turn() is None
    )


@pytest.mark.parametrize(
    "endless",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    ],
    ids=["loops", "macro"],
)
def test_a_template_that_does_not_end_is_stopped(
    tokenizer: PreTrainedTokenizerBase, endless: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_limit, "LIMIT_S", 1)
    with pytest.raises(DataError, match="the chat template has not ended"):
        ChatTokenizer(tokenizer, endless)
    chat = ChatTokenizer(tokenizer, "{% if messages[0].content == 'loop' %}" + endless + "{% endif %}fine")
    with ThreadPoolExecutor(1) as thread:  # as a server does
        with pytest.raises(DataError, match="the chat template has not ended"):
            thread.submit(chat.prompt, [{"role": "user", "content": "loop"}]).result()
        assert thread.submit(chat.prompt, [{"role": "user", "content": "?"}]).result()


def test_a_template_cannot_spend_its_time_where_no_exception_counts(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jinja computes constants beforehand, and goes on where that raises an exception."""
    monkeypatch.setattr(time_limit, "LIMIT_S", 1)
    endless = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match="the chat template has not ended"):
        ChatTokenizer(tokenizer, "{{ ('word ' * 6000000) | title | length }}" + endless)


def test_prompts_are_made_by_many_threads_at_once(tokenizer: PreTrainedTokenizerBase) -> None:
    """A server's requests come together; transformers marks generation blocks for one thread at a time only."""
    chat = ChatTokenizer(tokenizer, tok.CHAT_TEMPLATE)
    asked = [[{"role": "user", "content": f"{number} + {number}"}] for number in range(300)]
    alone = [chat.prompt(messages) for messages in asked]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(16) as threads:
            for _ in range(5):
                assert list(threads.map(chat.prompt, asked)) == alone
    finally:
        sys.setswitchinterval(before)
