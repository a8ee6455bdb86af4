"""From the name of a reward, as a recipe spells it, to the thing that scores."""

from typing import Any, Literal, get_args

from infir2.errors import ConfigError, did_you_mean
from infir2.reward.score import Scorer

RewardKind = Literal["math", "choice", "reasoning_gym", "code", "python"]


def reward_for(kind: RewardKind, **options: Any) -> Scorer:
    """The scorer of this kind; ``options`` are its constructor's. ConfigError for another name."""
    if kind == "math":
        from infir2.reward.math import MathScorer

        return MathScorer(**options)
    if kind == "choice":
        from infir2.reward.choice import ChoiceScorer

        return ChoiceScorer(**options)
    if kind == "reasoning_gym":
        from infir2.reward.tasks import ReasoningGymScorer

        return ReasoningGymScorer(**options)
    if kind == "code":
        from infir2.reward.code import CodeScorer

        return CodeScorer(**options)
    if kind == "python":
        from infir2.reward.python_file import PythonScorer

        return PythonScorer(**options)
    known = get_args(RewardKind)
    raise ConfigError(f"no reward is called {kind!r}; there are {', '.join(known)}.{did_you_mean(str(kind), known)}")
