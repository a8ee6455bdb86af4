"""Sampling: the stated distribution, its log-probabilities, and numbers that nothing but seed and place can change."""

import math

import pytest
import torch
from torch import Tensor

from infir2.kernels.sample import Sampled, sample
from infir2.kernels.split_mix import uniform
from infir2.rollout.records import RequestError, SamplingParams
from infir2.rollout.sampler import most_likely, random_key, sampling_batch

# 99.99 % quantiles of chi-square for 1 to 11 degrees of freedom; the seeds are fixed, so a pass stays a pass.
CHI2 = [0.0, 15.14, 18.42, 21.11, 23.51, 25.74, 27.86, 29.88, 31.83, 33.72, 35.56, 37.37]


def draw(logits: Tensor, params: SamplingParams | list[SamplingParams], keys: list[int], counter: int = 0) -> Sampled:
    rows = logits.shape[0]
    listed = params if isinstance(params, list) else [params] * rows
    return sample(logits, sampling_batch(listed, keys, [counter] * rows, "cpu"))


def expected_distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """By hand, in float64: temperature, then the k best, then the smallest set that reaches top_p."""
    p = (logits.double() / params.temperature).softmax(-1)
    order = sorted(range(len(p)), key=lambda i: (-p[i].item(), i))
    kept = order[: params.top_k or len(p)]
    total = sum(p[i].item() for i in kept)
    mass, nucleus = 0.0, []
    for i in kept:
        if mass / total < params.top_p or params.top_p == 1:
            nucleus.append(i)
        mass += p[i].item()
    out = torch.zeros_like(p)
    out[nucleus] = p[nucleus] / p[nucleus].sum()
    return out


CASES = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=2.0),
    SamplingParams(top_k=4),
    SamplingParams(top_k=1),
    SamplingParams(top_p=0.8),
    SamplingParams(top_p=1e-6),
    SamplingParams(temperature=1.5, top_k=7, top_p=0.7),
]


@pytest.mark.parametrize("params", CASES, ids=lambda p: f"T{p.temperature:g}-k{p.top_k}-p{p.top_p:g}")
def test_draws_follow_the_distribution_and_logprobs_state_it(params: SamplingParams) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(4)) * 1.5
    logits[5] = logits[2]  # a tie
    expected = expected_distribution(logits, params)
    draws = 40_000
    sampled = draw(logits.expand(draws, -1), params, [random_key(0, i) for i in range(draws)])
    counts = torch.bincount(sampled.tokens, minlength=12).double()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi2 = ((counts - draws * expected)[kept] ** 2 / (draws * expected[kept])).sum().item()
    assert chi2 <= CHI2[int(kept.sum()) - 1] + 1e-9, f"chi-square {chi2:.1f} over {int(kept.sum())} tokens"
    assert (sampled.logprobs - expected[sampled.tokens].log()).abs().max() < 2e-6
    assert (sampled.raw_logprobs - logits.double().log_softmax(-1)[sampled.tokens]).abs().max() < 2e-6


def test_greedy_takes_the_most_likely_and_its_plain_logprob() -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    sampled = draw(logits, SamplingParams(temperature=0.0, top_k=3, top_p=0.5), list(range(50)))
    assert torch.equal(sampled.tokens, logits.argmax(-1))
    assert torch.allclose(sampled.logprobs, logits.log_softmax(-1).amax(-1), atol=1e-6)
    assert torch.equal(sampled.logprobs, sampled.raw_logprobs)


def test_a_row_does_not_depend_on_the_others() -> None:
    """Bit for bit: some rows sort and some do not, and that must stay each row's own affair."""
    params = [CASES[i % len(CASES)] if i % 9 else SamplingParams(temperature=0.0) for i in range(64)]
    logits = torch.randn(64, 200, generator=torch.Generator().manual_seed(3)) * 2
    keys = [random_key(i, 0) for i in range(64)]
    together = draw(logits, params, keys, counter=5)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = draw(logits[order], [params[i] for i in order], [keys[i] for i in order], counter=5)
    assert torch.equal(shuffled.tokens, together.tokens[order])
    assert torch.equal(shuffled.logprobs, together.logprobs[order])
    for i in range(64):
        alone = draw(logits[i : i + 1], params[i], keys[i : i + 1], counter=5)
        assert alone.tokens.item() == together.tokens[i].item()
        assert alone.logprobs.item() == pytest.approx(together.logprobs[i].item(), abs=1e-6)


def split_mix(key: int, counter: int) -> float:
    """The generator in whole numbers of Python."""
    mask = (1 << 64) - 1
    z = (key + (counter + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


def test_uniform_is_splitmix64() -> None:
    keys, counters = [0, 1, -1, random_key(7, 3), -(1 << 63)], [0, 1, 2, 40_000, 1 << 40]
    got = uniform(torch.tensor(keys), torch.tensor(counters)).tolist()
    assert got == [split_mix(key, counter) for key, counter in zip(keys, counters)]
    # The first output of the published generator for state 0 is 0xE220A8397B1DCDAF.
    assert got[0] == (0xE220A8397B1DCDAF >> 11) / (1 << 53)


def test_uniform_numbers_of_different_seeds_samples_and_places_are_unrelated() -> None:
    keys = torch.tensor([random_key(seed, index) for seed in range(40) for index in range(5)])
    numbers = uniform(keys[:, None].expand(-1, 500).reshape(-1), torch.arange(500).repeat(200)).view(200, 500)
    ranked = numbers.flatten().sort().values
    distance = (ranked - (torch.arange(100_000) + 0.5) / 100_000).abs().max().item()
    assert distance < 1.95 / math.sqrt(100_000)  # Kolmogorov-Smirnov, 0.1 %
    centred = numbers - 0.5
    for other in (centred.roll(1, 0), centred.roll(1, 1)):
        correlation = (centred * other).mean().item() * 12
        assert abs(correlation) < 4 / math.sqrt(100_000)
    assert len({random_key(seed, index) for seed in range(100) for index in range(100)}) == 10_000


def test_no_draw_lands_on_an_impossible_token() -> None:
    logits = torch.full((2000, 9), -torch.inf)
    logits[:, 3], logits[:, 6] = 0.0, -20.0
    tokens = draw(logits, SamplingParams(), [random_key(1, i) for i in range(2000)]).tokens
    assert set(tokens.tolist()) <= {3, 6}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature: -1.0 is not between"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"top_p": 1.1}, "top_p: 1.1"),
        ({"top_p": 0.0}, "top_p: 0 keeps no token"),
        ({"top_k": -1}, "top_k: -1 is not a whole number of at least 0"),
        ({"top_k": 2**63}, "top_k: 9223372036854775808 is above 2147483647"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"n": 0}, "n: 0"),
        ({"n": 1.5}, "n: 1.5"),
        ({"seed": "x"}, "seed: 'x'"),
        ({"stop": ("",)}, "stop: an empty string"),
    ],
)
def test_parameters_out_of_range_are_named(values: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**values)


def test_the_most_likely_tokens_are_those_of_the_untouched_distribution() -> None:
    logits = torch.randn(4, 11, generator=torch.Generator().manual_seed(0))
    found = most_likely(logits, [0, 3, 20, 1])
    expected = logits.log_softmax(-1)
    assert [len(row) for row in found] == [0, 3, 11, 1]
    for row, pairs in enumerate(found):
        assert [token for token, _ in pairs] == logits[row].argsort(descending=True)[: len(pairs)].tolist()
        assert [value for _, value in pairs] == pytest.approx([expected[row, token].item() for token, _ in pairs])
    greedy = draw(logits, SamplingParams(temperature=0), [0] * 4)
    assert found[3] == ((greedy.tokens[3].item(), greedy.raw_logprobs[3].item()),)
