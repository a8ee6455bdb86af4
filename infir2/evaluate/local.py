"""Local tasks: ask every problem, score every response. Nothing but this package is needed."""

from collections.abc import Sequence

from infir2.errors import DataError
from infir2.evaluate.respond import Asked, Progress, Responder, seed_of
from infir2.evaluate.score import Sample
from infir2.evaluate.tasks import LocalTask, Problem
from infir2.reward.score import Scorer


def run_local_task(
    task: LocalTask, problems: Sequence[Problem], responder: Responder, scorer: Scorer, seed: int, progress: Progress
) -> list[Sample]:
    """All samples of all problems. Raises DataError, before anything is asked, for a label that cannot be used."""
    check_labels(task, problems, scorer)
    places = [(problem, index) for problem in problems for index in range(task.sampling.samples)]
    asked = [Asked(problem.messages, seed_of(seed, problem.id, problem.messages, index)) for problem, index in places]
    responses = responder.respond(asked, task.sampling, progress)
    scores = scorer.score_many([(one.text, problem.label) for one, (problem, _) in zip(responses, places)])
    return [
        Sample(
            problem.id,
            index,
            score.value,
            one.tokens,
            one.truncated,
            one.text,
            score.answer,
            score.decided,
            problem.messages[-1]["content"],
        )
        for (problem, index), one, score in zip(places, responses, scores)
    ]


def check_labels(task: LocalTask, problems: Sequence[Problem], scorer: Scorer) -> None:
    """Score an empty response to each, so that a bad label is found before hours of generation."""
    try:
        scorer.score_many([("", problem.label) for problem in problems])
    except DataError as error:
        raise DataError(f"{task.name}: {error}") from None
