"""What is added to the score of an answer: the penalty for overlong responses and the reward for the form. Pure."""

import re

_FORM = re.compile(r"\A\s*(?:<think>)?(?P<thought>.*?)</think>(?P<answer>.*)\Z", re.DOTALL)


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, section 3.4), in [-1, 0], added to the score.

    ``length``, ``limit`` and ``buffer`` are numbers of tokens (L, L_max and L_cache of the paper):
    0 up to ``limit - buffer``, from there linearly down to -1 at ``limit``, and -1 beyond. ``buffer`` 0: a step at
    ``limit``. ValueError if ``buffer`` is not within [0, limit].
    """
    if not 0 <= buffer <= limit:
        raise ValueError(f"the buffer ({buffer}) must lie between 0 and the limit ({limit})")
    free = limit - buffer
    if length <= free:
        return 0.0
    return -1.0 if length > limit else (free - length) / buffer


def format_reward(response: str, reward: float) -> float:
    """``reward`` for a response that thinks once and then answers: ``<think>...</think>answer``; else 0.

    The opening tag may be missing (many templates put it into the prompt). A second thought, or nothing before or after
    the closing tag, earns nothing.
    """
    match = _FORM.match(response)
    if not match or "<think>" in match["thought"]:
        return 0.0
    rest = match["answer"]
    closed_once = "<think>" not in rest and "</think>" not in rest
    return reward if closed_once and match["thought"].strip() and rest.strip() else 0.0
