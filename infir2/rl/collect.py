"""Prompts to scored groups: sample, score, leave out groups that teach nothing, sample others in their place.

Every number drawn is a function of (seed, rollout, prompt, sample): neither what was drawn before nor a resume in
between has a part in it, nor how many processes share the prompts.
"""

import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from infir2.config import RewardSection, RolloutSection
from infir2.data.prompts import Prompt, PromptOrder
from infir2.parallel.ranks import Ranks
from infir2.reward.score import Score, Scorer
from infir2.reward.shaping import overlong_penalty
from infir2.rl.advantage import has_spread
from infir2.rollout.interface import RolloutEngine
from infir2.rollout.records import Completion, Request, SamplingParams

Show = Callable[[str], object]
"""Takes a line that says how far a long job is."""


class Interrupted(Exception):
    """Internal: the rollout was given up because the run is to stop."""


@dataclass(frozen=True)
class Group:
    """The samples of one prompt."""

    row: int
    """Number of the prompt."""
    prompt: Prompt
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...]
    rewards: tuple[float, ...]
    """Scores with what shaping adds."""

    @property
    def has_spread(self) -> bool:
        """Whether it tells right samples from wrong ones. Scores decide: by the penalty for length alone a group of
        wrong answers would teach to be wrong in fewer words."""
        return has_spread(self.values)

    @property
    def values(self) -> tuple[float, ...]:
        """Of the scores."""
        return tuple(score.value for score in self.scores)


@dataclass
class Rollout:
    """All groups of one rollout and those that are trained on."""

    sampled: list[Group] = field(default_factory=list)
    kept: list[Group] = field(default_factory=list)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By phase: rollout_s, reward_s."""


class Collector:
    """Draws groups from an engine and scores them. ``stop_ids`` end a response. With several ``ranks`` each has an
    engine, samples and scores its share, and all get all of it: what is said below is collective."""

    def __init__(
        self,
        engine: RolloutEngine,
        scorer: Scorer,
        rollout: RolloutSection,
        reward: RewardSection,
        stop_ids: Sequence[int],
        seed: int,
        show: Show = lambda text: None,
        ranks: Ranks | None = None,
    ) -> None:
        self.engine, self.scorer, self.rollout, self.reward = engine, scorer, rollout, reward
        self.ranks = ranks or Ranks()
        self.stop_ids, self.seed, self.show = tuple(stop_ids), seed, show

    def collect(
        self, prompts: Sequence[Prompt], order: PromptOrder, number: int, interrupted: Callable[[], object]
    ) -> Rollout:
        """Rollout ``number`` (from 0): up to ``rollout.prompts`` groups to train on.

        Fewer where ``rollout.oversample`` times as many prompts did not give enough groups with spread; one without
        spread where none had any. Raises Interrupted on a true answer of ``interrupted``, of any rank's.
        """
        settings, done = self.rollout, Rollout()
        rows = order.rows(number)
        spares = order.spares(number, (settings.oversample - 1) * settings.prompts) if settings.filter_groups else []
        params = SamplingParams(
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            n=settings.samples,
            stop_token_ids=self.stop_ids,
        )
        while rows:
            groups = self.sample([(row, prompts[row]) for row in rows], params, str(number), done.seconds, interrupted)
            # While they were scored; an evaluation is worth keeping then, a rollout is not.
            if any(self.ranks.each(interrupted)):
                raise Interrupted
            done.sampled += groups
            done.kept += [g for g in groups if not settings.filter_groups or g.has_spread]
            missing = settings.prompts - len(done.kept)
            if missing <= 0:
                break
            share = max(len(done.kept) / len(done.sampled), 1 / settings.oversample)
            wanted = math.ceil(missing / share)
            rows, spares = spares[:wanted], spares[wanted:]
        # A step needs something to train on; without the penalty a group without spread has no advantages.
        done.kept = done.kept[: settings.prompts] or [replace(done.sampled[0], rewards=done.sampled[0].values)]
        return done

    def sample(
        self,
        rows: Sequence[tuple[int, Prompt]],
        params: SamplingParams,
        stream: str,
        seconds: defaultdict[str, float],
        interrupted: Callable[[], object] = lambda: None,
    ) -> list[Group]:
        """One scored group a prompt. ``stream`` names the random numbers; seconds by phase, of the slowest rank, are
        added to ``seconds``. Raises Interrupted as ``collect`` does."""
        mine = self.ranks.share(list(rows))
        shares = self.ranks.each(lambda: self._sample_share(mine, params, stream, interrupted))
        found = [share for share in shares if share is not None]
        if len(found) < len(shares):
            raise Interrupted
        for name in ("rollout_s", "reward_s"):
            seconds[name] += max(spent[name] for _, spent in found)
        return [found[index % len(found)][0][index // len(found)] for index in range(len(rows))]

    def _sample_share(
        self,
        rows: Sequence[tuple[int, Prompt]],
        params: SamplingParams,
        stream: str,
        interrupted: Callable[[], object],
    ) -> tuple[list[Group], dict[str, float]] | None:
        """What ``sample`` does, of this process; None where interrupted."""
        began = time.perf_counter()

        def progress(finished: int, total: int) -> None:
            if interrupted():
                raise Interrupted
            self.show(f"sampling {finished}/{total}")

        requests = [Request(p.ids, _seeded(params, self.seed, stream, row)) for row, p in rows]
        try:
            answers = self.engine.generate(requests, progress)
        except Interrupted:
            return None
        sampled = time.perf_counter()
        self.show(f"scoring {len(rows) * params.n}")
        pairs = [(c.text or "", prompt.label) for (_, prompt), group in zip(rows, answers) for c in group]
        scores = self.scorer.score_many(pairs)
        spent = {"rollout_s": sampled - began, "reward_s": time.perf_counter() - sampled}
        groups = []
        for index, ((row, prompt), completions) in enumerate(zip(rows, answers)):
            own = scores[index * params.n : (index + 1) * params.n]
            rewards = [self._shaped(score, completion) for score, completion in zip(own, completions)]
            groups.append(Group(row, prompt, tuple(completions), tuple(own), tuple(rewards)))
        return groups, spent

    def _shaped(self, score: Score, completion: Completion) -> float:
        buffer = self.reward.overlong_buffer
        if not buffer:
            return score.value
        return score.value + overlong_penalty(len(completion.token_ids), self.rollout.max_new_tokens, buffer)


def _seeded(params: SamplingParams, seed: int, stream: str, row: int) -> SamplingParams:
    digest = hashlib.blake2b(f"{seed}:{stream}:{row}".encode(), digest_size=8).digest()
    return SamplingParams(**{**params.__dict__, "seed": int.from_bytes(digest, "little")})
