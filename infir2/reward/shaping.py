"""What is added to the score of an answer: the penalty for overlong responses. Pure."""


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
