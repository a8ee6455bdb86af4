"""A few completions of every rollout, for people: samples.jsonl in the run folder, one JSON object a line."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infir2.durable import replace_file
from infir2.errors import UserError

if TYPE_CHECKING:
    from infir2.rl.collect import Group

MAX_TEXT = 8000
"""Characters of a text that are kept: its end, where the answer is."""
_KEYS = {
    *("step", "kind", "question", "response", "reward", "group_reward", "answer", "decided", "tokens", "finish"),
    "version",
}


class SampleLog:
    """Appends to samples.jsonl; with ``enabled=False`` (every rank but 0) it does nothing. Lines of later steps than
    ``first_step``, written before a resume, are dropped, and those of its evaluation where that is made again."""

    def __init__(self, run: Path, first_step: int, evaluates_again: bool = False, enabled: bool = True) -> None:
        self.path, self.enabled = run / "samples.jsonl", enabled
        if not enabled:
            return
        kept = [line for line in read_samples(run) if line["step"] <= first_step] if first_step else []
        if evaluates_again:
            kept = [line for line in kept if (line["step"], line["kind"]) != (first_step, "eval")]
        try:
            replace_file(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None

    def write(self, step: int, kind: str, groups: "Iterable[Group]") -> None:
        """The first sample of each group. ``kind``: train or eval."""
        if not self.enabled:
            return
        lines = [json.dumps({"step": step, "kind": kind, **_described(group)}) for group in groups]
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())  # before the checkpoint that follows
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None


def read_samples(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's samples.jsonl, oldest first; empty where there is none. A torn last line is left out.

    Raises UserError, naming the line, for one that SampleLog does not write.
    """
    path = run / "samples.jsonl"
    if not path.exists():
        return []
    samples: list[dict[str, Any]] = []
    *lines, torn = path.read_bytes().split(b"\n")
    for line in lines:
        try:
            sample = json.loads(line)
        except ValueError:
            sample = None
        if not isinstance(sample, dict) or not sample.keys() >= _KEYS:
            if len(samples) == len(lines) - 1 and not torn:  # a crash of the machine can leave zeros and then a newline
                break
            raise UserError(f"{path}: line {len(samples) + 1} is no sample in JSON; mend or remove it")
        samples.append(sample)
    return samples


def _described(group: "Group") -> dict[str, Any]:
    completion, score = group.completions[0], group.scores[0]
    return {
        "question": group.prompt.question[-MAX_TEXT:],
        "response": (completion.text or "")[-MAX_TEXT:],
        "reward": group.rewards[0],
        "group_reward": sum(group.rewards) / len(group.rewards),
        "answer": score.answer,
        "decided": score.decided,
        "tokens": len(completion.token_ids),
        "finish": completion.finish_reason,
        "version": completion.versions[0],
    }
