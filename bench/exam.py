"""Held-out questions, asked of the model that a recipe starts from, and the figures made of its marks."""

import statistics
from collections.abc import Sequence
from typing import Any

from infir2.config import RlConfig, SftConfig
from infir2.data.tokenizer import load_tokenizer
from infir2.data.worked_solutions import WorkedExample
from infir2.evaluate.local import run_local_task
from infir2.evaluate.respond import EngineResponder
from infir2.evaluate.score import Sample
from infir2.evaluate.student import student_interval
from infir2.evaluate.tasks import LocalTask, Problem, Sampling
from infir2.launch.chat_model import open_model
from infir2.launch.model import start_model
from infir2.parallel.runtime import World
from infir2.reward.score import Scorer
from infir2.rollout.engine import Engine
from infir2.rollout.options import EngineOptions


class Examiner:
    """Asks the model, and has its answers marked by the reward ``reasoning_gym``."""

    def __init__(
        self, config: RlConfig | SftConfig, here: World, scorer: Scorer, options: EngineOptions | None = None
    ) -> None:
        self.config, self.scorer, options = config, scorer, options or EngineOptions(max_sequences=512)
        self.chat, self.tokenizer, architecture = open_model(config)
        self.model, _ = start_model(config, architecture, here)
        self.engine = Engine(self.model, load_tokenizer(self.tokenizer), options)
        end = self.chat.end_of_turn()
        assert end is not None
        longest = options.max_length or architecture.max_position_embeddings
        self.responder = EngineResponder(self.engine, self.chat, [end], longest)

    def ask(
        self, examples: Sequence[WorkedExample], max_tokens: int, samples: int = 1, temperature: float = 0.0
    ) -> list[Sample]:
        """``samples`` answers to each question, in their order; greedy as it stands."""
        task = LocalTask("held out", "reasoning_gym", Sampling(samples, max_tokens, temperature, top_p=1.0))
        problems = [
            Problem(f"{one.family} {one.question}", [question(one)], one.prompt_row()["label"]) for one in examples
        ]
        self.engine.wake()
        found = run_local_task(task, problems, self.responder, self.scorer, 1, lambda finished, total: None)
        self.engine.sleep()
        return found


def question(example: WorkedExample) -> dict[str, str]:
    """As a message."""
    return {"role": "user", "content": example.question}


def mean_of(values: Sequence[float]) -> dict[str, Any]:
    """Mean and its 95 % interval (two values or more), by Student's t."""
    low, high = student_interval(values)
    interval = {} if low is None or high is None else {"interval": [round(low, 4), round(high, 4)]}
    return {"mean": round(statistics.fmean(values), 4), **interval}


def by_seed(values: Sequence[float]) -> dict[str, Any]:
    """The same of one value a seed, and the values."""
    return {"by_seed": [round(value, 4) for value in values], **mean_of(values)}
