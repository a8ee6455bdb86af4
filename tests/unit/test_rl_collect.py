"""Groups: which are kept, what takes the place of the others, and that nothing but seed and numbers decides it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import small_rl
import torch

from infir2.config import RewardSection, RolloutSection
from infir2.data.prompts import Prompt, PromptOrder
from infir2.data.tokenizer import MIN_VOCAB, load_tokenizer, train_tokenizer
from infir2.model.transformer import CausalLM
from infir2.reward.score import Score
from infir2.rl.collect import Collector, Group, Interrupted, Rollout
from infir2.rollout.engine import Engine
from infir2.rollout.options import EngineOptions

COUNT = 30


class ByRule:
    """Scores by what the label says: ``all`` and ``none`` are rewarded alike, ``some`` by a hash of the response."""

    def score_many(self, pairs: Sequence[tuple[str, Any]]) -> list[Score]:
        return [Score(self._value(response, label), None, "rule") for response, label in pairs]

    def _value(self, response: str, label: str) -> float:
        return {"all": 1.0, "none": 0.0}.get(label, float(sum(response.encode()) % 2))

    def close(self) -> None:
        """Nothing to end."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["Answer: 0123456789"], MIN_VOCAB, folder)
    model = CausalLM(small_rl.POLICY, torch.float32)
    model.init_weights(3)
    return Engine(model, load_tokenizer(folder), EngineOptions(cache_tokens=4096, max_sequences=64))


def prompts(*labels: str) -> list[Prompt]:
    return [Prompt(f"question {i}", (5, 6, i + 7), label) for i, label in enumerate(labels)]


def collect(
    engine: Engine,
    asked: list[Prompt],
    number: int = 0,
    reward: Any = None,
    stop_ids: Sequence[int] = (),
    **settings: Any,
) -> Rollout:
    rollout = RolloutSection(**{"prompts": 4, "samples": 6, "max_new_tokens": 8, "oversample": 3} | settings)
    collector = Collector(engine, ByRule(), rollout, reward or RewardSection(), stop_ids, seed=9)
    order = PromptOrder(len(asked), 1, rollout.prompts)
    return collector.collect(asked, order, number, lambda: None)


def rows(groups: list[Group]) -> list[int]:
    return [group.row for group in groups]


def test_groups_without_spread_are_replaced(engine: Engine) -> None:
    labels = ["some" if i % 3 else ("all" if i % 2 else "none") for i in range(COUNT)]
    for number in range(8):
        done = collect(engine, prompts(*labels), number)
        first = PromptOrder(COUNT, 1, 4).rows(number)
        assert rows(done.sampled)[:4] == first
        assert len(done.kept) == 4
        assert len(done.sampled) <= 12
        assert len(set(rows(done.sampled))) == len(done.sampled)
        differing = [group.row for group in done.sampled if len(set(group.rewards)) > 1]
        assert all(labels[row] == "some" for row in differing)
        assert rows(done.kept) == differing[:4]
        enough = len(set(first) & set(differing)) == 4
        assert enough == (len(done.sampled) == 4), "more is sampled only where it is needed"


def test_over_sampling_ends_at_its_limit(engine: Engine) -> None:
    labels = ["all"] * COUNT
    for row in PromptOrder(COUNT, 1, 4).rows(0)[:1]:
        labels[row] = "some"
    done = collect(engine, prompts(*labels))
    assert len(done.sampled) == 12
    assert len(done.kept) == 1
    done = collect(engine, prompts(*["none"] * COUNT), oversample=2)
    assert (len(done.sampled), len(done.kept)) == (8, 1), "a step needs something to train on"
    done = collect(engine, prompts(*["none"] * 5))
    assert len(done.sampled) == 5, "no prompt is asked twice"


def test_without_the_filter_everything_is_kept(engine: Engine) -> None:
    done = collect(engine, prompts(*["none"] * COUNT), filter_groups=False)
    assert rows(done.kept) == rows(done.sampled) == PromptOrder(COUNT, 1, 4).rows(0)


def test_samples_depend_on_seed_rollout_and_prompt_only(engine: Engine) -> None:
    asked = prompts(*["some"] * COUNT)
    tokens = [
        {g.row: [c.token_ids for c in g.completions] for g in collect(engine, asked, n).sampled} for n in (0, 0, 1)
    ]
    assert tokens[0] == tokens[1]
    assert all(len(set(samples)) == len(samples) for samples in tokens[0].values())
    collector = Collector(engine, ByRule(), RolloutSection(max_new_tokens=8), RewardSection(), [], seed=9)
    from infir2.rollout.records import SamplingParams

    alone = next(iter(tokens[0]))
    params = SamplingParams(n=6, max_new_tokens=8)
    (group,) = collector.sample([(alone, asked[alone])], params, "0", {"rollout_s": 0.0, "reward_s": 0.0})
    assert [c.token_ids for c in group.completions] == tokens[0][alone], "whatever else was in the batch"
    (other,) = collector.sample([(alone, asked[alone])], params, "1", {"rollout_s": 0.0, "reward_s": 0.0})
    assert [c.token_ids for c in other.completions] != tokens[0][alone]


def test_the_overlong_penalty_is_added_to_the_score(engine: Engine) -> None:
    done = collect(engine, prompts(*["all"] * COUNT), reward=RewardSection(overlong_buffer=4))
    pairs = [pair for group in done.sampled for pair in zip(group.completions, group.rewards)]
    assert max(len(completion.token_ids) for completion, _ in pairs) > 4, "proves nothing"
    for completion, reward in pairs:
        over = max(0, len(completion.token_ids) - 4)
        assert reward == pytest.approx(1 - over / 4)


@pytest.mark.parametrize("label", ["none", "all"])
def test_the_penalty_gives_no_group_spread(engine: Engine, label: str) -> None:
    asked, ends = prompts(*[label] * COUNT), range(0, small_rl.VOCAB, 6)
    done = collect(engine, asked, reward=RewardSection(overlong_buffer=8), stop_ids=ends, temperature=3.0)
    assert all(len(set(group.rewards)) > 1 for group in done.sampled), (
        "lengths must differ for this test to see anything"
    )
    assert not any(group.has_spread for group in done.sampled)
    assert len(done.sampled) == 12, "others are sampled in their place"
    assert [set(group.rewards) for group in done.kept] == [{float(label == "all")}], (
        "the one that is kept teaches nothing"
    )


def test_an_interrupted_rollout_leaves_nothing_behind(engine: Engine) -> None:
    rollout = RolloutSection(prompts=4, samples=4, max_new_tokens=8)
    collector = Collector(engine, ByRule(), rollout, RewardSection(), [], seed=9)
    answers = iter([None, None, True])
    with pytest.raises(Interrupted):
        collector.collect(prompts(*["some"] * COUNT), PromptOrder(COUNT, 1, 4), 0, lambda: next(answers))
    assert not engine.has_unfinished
    assert engine.stats().blocks_held == 0


def test_a_rollout_interrupted_while_it_is_scored_is_given_up(engine: Engine) -> None:
    rollout = RolloutSection(prompts=4, samples=4, max_new_tokens=8)
    scorer, scored = ByRule(), []

    class Noting(ByRule):
        def score_many(self, pairs: Sequence[tuple[str, Any]]) -> list[Score]:
            scored.append(len(pairs))
            return scorer.score_many(pairs)

    collector = Collector(engine, Noting(), rollout, RewardSection(), [], seed=9)
    with pytest.raises(Interrupted):
        collector.collect(prompts(*["some"] * COUNT), PromptOrder(COUNT, 1, 4), 0, lambda: bool(scored))
    assert scored == [16]
