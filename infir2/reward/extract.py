r"""Find the final answer in a response: after the thinking, in the last \boxed{...} or the last "Answer: ..." line.

Every search is a single pass, so that no response is slow to read.
"""

import re
from typing import Literal

Think = Literal["auto", "required", "ignore"]
"""``auto``: an unclosed <think> means truncated, no answer; a response without tags is read whole. ``required``: no
</think>, no answer (for templates that open the thought in the prompt). ``ignore``: the tags mean nothing."""

TAIL = 100_000
"""Characters at the end of a response that are searched."""
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_ANSWER = re.compile(r"\banswer\b[ \t]{0,4}(?:\*\*)?[ \t]{0,4}:(?:\*\*)?", re.IGNORECASE)


def after_thinking(response: str, think: Think = "auto") -> str | None:
    """The part of the response that answers (its last TAIL characters); None where the thought was never closed."""
    if think != "ignore":
        _, closed, rest = response.rpartition("</think>")
        if "<think>" in rest or (think == "required" and not closed):
            return None
        response = rest
    return response[-TAIL:]


def last_boxed(text: str) -> str | None:
    r"""Content of the \boxed{...} (or \fbox{...}) that closes last, braces balanced; boxes in boxes are opened."""
    opened: list[int] = []  # where the content of an open box begins, -1 for a plain brace
    found = None
    for match in _BRACES.finditer(text):
        token = match[0]
        if token == "}":
            if opened and (start := opened.pop()) >= 0:
                found = text[start : match.start()]
        elif token == "{":
            opened.append(-1)
        elif token.endswith("{") and len(token) > 2:  # a box, not the escaped brace \{
            opened.append(match.end())
    return _open_box(found) if found is not None else None


def _open_box(content: str) -> str:
    while inner := re.match(r"\s*\\(?:boxed|fbox)\s*\{(.*)\}\s*\Z", content, re.DOTALL):
        content = inner[1]
    return content.strip()


def last_answer_line(text: str) -> str | None:
    """What stands behind "Answer:" in the last line that has it (bold markers dropped); None where none has."""
    for line in reversed(text.splitlines()):
        found = list(_ANSWER.finditer(line))
        if found:
            return line[found[-1].end() :].strip().strip("*").strip() or None
    return None


def final_answer(response: str, think: Think = "auto") -> str | None:
    r"""The last \boxed{...} after the thinking, else the last "Answer: ..." line, else None."""
    text = after_thinking(response, think)
    if text is None:
        return None
    boxed = last_boxed(text)
    return boxed if boxed is not None else last_answer_line(text)
