"""Advantages and the policy's loss: by hand, against loops over single tokens, and against finite differences."""

import math
import random
from typing import Any

import pytest
import torch
from small_rl import toy_samples
from torch import Tensor, nn

from infir2.config import PolicySection
from infir2.parallel.runtime import World
from infir2.rl.advantage import group_advantages, has_spread
from infir2.rl.batch import RlBatch, pack_samples
from infir2.rl.objective import PolicyObjective
from infir2.rl.policy_loss import TokenTerms, importance_weights, low_variance_kl, mismatch, policy_loss
from infir2.train.step import train_step

WORLD = World(0, 1, torch.device("cpu"), None)


def test_advantages_by_hand() -> None:
    # mean 1/4, unbiased variance (3 * 1/16 + 9/16) / 3 = 1/4, standard deviation 1/2
    assert group_advantages([1.0, 0.0, 0.0, 0.0]) == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)
    assert group_advantages([1.0, 0.0, 0.0, 0.0], std_normalization=False) == [0.75, -0.25, -0.25, -0.25]
    assert sum(group_advantages([0.3, -1.0, 1.0, 0.2, 0.0])) == pytest.approx(0, abs=1e-12)


def test_advantages_equal_torch() -> None:
    rewards = torch.rand(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    assert group_advantages(rewards.tolist()) == pytest.approx(expected.tolist(), rel=1e-12)


@pytest.mark.parametrize(("rewards", "spread"), [([1.0] * 4, False), ([0.1] * 3, False), ([0.0, 0.0, 1e-5], True)])
def test_a_group_without_spread_teaches_nothing(rewards: list[float], spread: bool) -> None:
    assert has_spread(rewards) is spread
    assert any(group_advantages(rewards)) is spread


def terms(seed: int = 0, tokens: int = 60, reference: bool = True, **changes: Any) -> TokenTerms:
    """Log-probabilities far enough apart that every bound is passed by some tokens of either sign."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(tokens, dtype=torch.float64, generator=generator)

    old = -torch.rand(tokens, dtype=torch.float64, generator=generator) * 3 - 0.1
    made: dict[str, Any] = {
        "logprobs": (old + noise(0.4)).requires_grad_(),
        "entropy": torch.rand(tokens, dtype=torch.float64, generator=generator).requires_grad_(),
        "advantages": noise(1.0),
        "behaviour": old + noise(0.5),
        "old": old,
        "reference": old + noise(0.6) if reference else None,
        "sequence": torch.arange(tokens) // 7,
    }
    return TokenTerms(**made | changes)


def by_loops(t: TokenTerms, policy: PolicySection) -> dict[str, float]:
    """The same from the papers' formulas, one token after the other, with Python's floats."""
    logprobs, entropy, old = t.logprobs.tolist(), t.entropy.tolist(), t.old.tolist()
    advantages, behaviour, sequence = t.advantages.tolist(), t.behaviour.tolist(), t.sequence.tolist()
    totals = dict.fromkeys(("loss", "entropy", "clip_low", "clip_high", "reference_kl", "importance_clipped"), 0.0)
    for i, advantage in enumerate(advantages):
        ratio = math.exp(logprobs[i] - old[i])
        weight = 1.0
        if policy.importance == "token":
            weight = math.exp(old[i] - behaviour[i])
        if policy.importance == "sequence":
            weight = math.exp(sum(old[j] - behaviour[j] for j in range(len(old)) if sequence[j] == sequence[i]))
        totals["importance_clipped"] += policy.importance != "off" and weight >= policy.importance_clip
        weight = min(weight, policy.importance_clip)
        low, high = 1 - policy.clip_low, 1 + policy.clip_high
        unclipped, clipped = ratio * advantage, max(low, min(high, ratio)) * advantage
        totals["clip_low"] += clipped < unclipped and advantage < 0 and ratio < low
        totals["clip_high"] += clipped < unclipped and advantage > 0 and ratio > high
        totals["loss"] -= weight * min(unclipped, clipped)
        if t.reference is not None:
            difference = t.reference.tolist()[i] - logprobs[i]
            kl = math.exp(difference) - difference - 1
            totals["reference_kl"] += kl
            totals["loss"] += policy.kl_coef * kl
        totals["entropy"] += entropy[i]
        totals["loss"] -= policy.entropy_coef * entropy[i]
    return totals


@pytest.mark.parametrize("importance", ["off", "token", "sequence"])
@pytest.mark.parametrize("coefficients", [{}, {"kl_coef": 0.3}, {"kl_coef": 0.1, "entropy_coef": 0.2}])
def test_loss_equals_the_formulas_token_by_token(importance: Any, coefficients: dict[str, float]) -> None:
    policy = PolicySection(importance=importance, importance_clip=1.3, **coefficients)
    t = terms(reference="kl_coef" in coefficients)
    loss, sums = policy_loss(t, policy)
    expected = by_loops(t, policy)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-12)
    for name in ("entropy", "clip_low", "clip_high", "importance_clipped"):
        assert sums[name].item() == pytest.approx(expected[name], rel=1e-12), name
    assert sums["clip_low"] > 0
    assert sums["clip_high"] > 0
    assert (sums["importance_clipped"] > 0) == (importance != "off")
    if coefficients:
        assert sums["reference_kl"].item() == pytest.approx(expected["reference_kl"], rel=1e-12)
    assert ("reference_kl" in sums) == bool(coefficients)


def test_weights_that_are_off_are_not_truncated() -> None:
    _, sums = policy_loss(terms(), PolicySection(importance="off", importance_clip=1.0))
    assert (sums["importance_weight"].item(), sums["importance_clipped"].item()) == (60, 0)


@pytest.mark.parametrize("importance", ["off", "token", "sequence"])
def test_gradient_of_the_loss_equals_finite_differences(importance: Any) -> None:
    policy = PolicySection(importance=importance, kl_coef=0.3, entropy_coef=0.2)
    t = terms()

    def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return policy_loss(TokenTerms(**{**t.__dict__, "logprobs": logprobs, "entropy": entropy}), policy)[0]

    assert torch.autograd.gradcheck(loss, (t.logprobs, t.entropy))


def test_clipping_stops_the_gradient_on_one_side_only() -> None:
    """ratio 2 and 1/2 with either sign of the advantage: PPO's pessimistic bound."""
    old = torch.zeros(4, dtype=torch.float64)
    logprobs = torch.tensor([math.log(2), math.log(2), math.log(0.5), math.log(0.5)], dtype=torch.float64)
    t = terms(tokens=4, reference=False, old=old, behaviour=old, logprobs=logprobs.requires_grad_(),
              advantages=torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64))  # fmt: skip
    loss, sums = policy_loss(t, PolicySection())
    loss.backward()
    assert loss.item() == pytest.approx(-1.28 + 2 - 0.5 + 0.8)
    assert t.logprobs.grad is not None
    assert t.logprobs.grad.tolist() == pytest.approx([0, 2, -0.5, 0])
    assert (sums["clip_high"], sums["clip_low"]) == (1, 1)


def test_importance_weights_by_hand() -> None:
    """Two responses: log-weights (0.5, 0.5) and (-1, 0.2); clip 2 = exp(0.693)."""
    difference = torch.tensor([0.5, 0.5, -1.0, 0.2], dtype=torch.float64)
    t = terms(
        tokens=4, old=difference, behaviour=torch.zeros(4, dtype=torch.float64), sequence=torch.tensor([0, 0, 1, 1])
    )
    token = importance_weights(t, PolicySection(importance="token"))
    assert token.tolist() == pytest.approx([math.exp(0.5)] * 2 + [math.exp(-1), math.exp(0.2)])
    sequence = importance_weights(t, PolicySection(importance="sequence"))
    assert sequence.tolist() == pytest.approx([2.0, 2.0, math.exp(-0.8), math.exp(-0.8)])
    assert importance_weights(t, PolicySection(importance="off")).tolist() == [1.0] * 4
    far = TokenTerms(**{**t.__dict__, "old": torch.full((4,), 900.0)})
    assert importance_weights(far, PolicySection()).tolist() == [2.0] * 4, "no overflow on the way"


def test_low_variance_kl_estimates_the_divergence() -> None:
    generator = torch.Generator().manual_seed(3)
    p, q = (torch.randn(8, dtype=torch.float64, generator=generator).log_softmax(0) for _ in range(2))
    drawn = torch.multinomial(p.exp(), 200_000, replacement=True, generator=generator)
    estimate = low_variance_kl(p[drawn], q[drawn])
    exact = (p.exp() * (p - q)).sum().item()
    assert estimate.mean().item() == pytest.approx(exact, rel=0.02)
    assert estimate.min() >= 0
    assert low_variance_kl(torch.tensor([0.0]), torch.tensor([-1000.0])).item() == 10.0, "bounded"


def test_mismatch_by_hand() -> None:
    found = mismatch(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.9]))
    assert found["logprob_diff"].tolist() == pytest.approx([0.5, 0.1])
    assert found["token_mult_prob_error"].tolist() == pytest.approx([math.exp(0.5), math.exp(0.1)])
    assert found["mismatch_k3"].tolist() == pytest.approx([math.exp(0.5) - 1.5, math.exp(-0.1) + 0.1 - 1], rel=1e-4)


class Toy(nn.Module):
    """A language model in float64 whose next token depends on the last two."""

    def __init__(self, vocabulary: int = 11, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Parameter(torch.randn(vocabulary, width, dtype=torch.float64))
        self.mix = nn.Parameter(torch.randn(2 * width, width, dtype=torch.float64) / 2)
        self.head = nn.Parameter(torch.randn(vocabulary, width, dtype=torch.float64))

    def forward(self, input_ids: Tensor, position_ids: Tensor, attend: Any, head: Any) -> Any:
        now = self.embedding[input_ids]
        before = now.roll(1, dims=1) * (position_ids > 0)[..., None]
        return head(torch.tanh(torch.cat([now, before], -1) @ self.mix), self.head)


def with_fixed(batches: list[RlBatch], **values: Any) -> list[RlBatch]:
    """The batches with random old and reference log-probabilities."""
    torch.manual_seed(6)
    noise = [-3 * torch.rand(2, *batch.labels.shape, dtype=torch.float64) for batch in batches]
    fixed = [{"old": n[0], "reference": n[1]} for n in noise]
    return [RlBatch(**{**batch.__dict__, **f, **values}) for batch, f in zip(batches, fixed)]


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_the_gradient_of_one_whole_step_equals_finite_differences(importance: Any) -> None:
    """Through train_step: packing, accumulation over micro-batches, global normalisation, temperature."""
    model, samples = Toy(), toy_samples()
    policy = PolicySection(importance=importance, kl_coef=0.2, entropy_coef=0.1)
    batches = with_fixed(pack_samples(samples, 128))
    batches += with_fixed(pack_samples(toy_samples(1)[:3], 128))
    objective = PolicyObjective(policy, temperature=1.3)
    gradient: dict[str, Tensor] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: gradient.update({name: p.grad.clone() for name, p in model.named_parameters()})
    )

    def step() -> float:
        result = train_step(model, optimizer, batches, WORLD, lambda b: None, 0.0, objective=objective)
        assert result is not None
        tokens = sum(len(sample.response_ids) for sample in samples + toy_samples(1)[:3])
        assert result.valid_tokens == tokens, "the loss is a mean over response tokens"
        return result.loss

    step()
    analytic = dict(gradient)
    dice, width = random.Random(0), 1e-6
    for name, parameter in model.named_parameters():
        for _ in range(12):
            place = tuple(dice.randrange(size) for size in parameter.shape)
            parameter.data[place] += width
            above = step()
            parameter.data[place] -= 2 * width
            below = step()
            parameter.data[place] += width
            numeric = (above - below) / (2 * width)
            assert analytic[name][place].item() == pytest.approx(numeric, rel=1e-6, abs=1e-8), (name, place)


def test_token_level_loss_does_not_care_how_samples_are_batched() -> None:
    results = []
    for batches in (pack_samples(toy_samples(), 128), [b for s in toy_samples() for b in pack_samples([s], 128)]):
        model = Toy()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        result = train_step(model, optimizer, batches, WORLD, lambda b: None, 0.0,
                            objective=PolicyObjective(PolicySection(importance="sequence"), 1.0))  # fmt: skip
        assert result is not None
        results.append((result, [p.detach().clone() for p in model.parameters()]))
    (one, weights), (many, others) = results
    assert one.loss == pytest.approx(many.loss, rel=1e-10)
    assert one.means == pytest.approx(many.means, rel=1e-9)
    for a, b in zip(weights, others):
        assert torch.allclose(a, b, rtol=1e-10)
