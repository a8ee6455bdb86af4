"""The policy's loss, token by token. Pure functions of log-probabilities; tensors are [tokens] over trained-on tokens.

- clipped surrogate with two bounds (PPO, arXiv 1707.06347; "clip-higher" and token-level loss of DAPO, arXiv
  2503.14476, sections 3.1 and 3.3): every token of the global batch counts the same, whatever response it is in;
- truncated importance sampling (https://fengyao.notion.site/off-policy-rl): the engine drew the tokens, the trainer
  computes with its own probabilities of them;
- KL to a reference by the estimator exp(d) - d - 1 (http://joschu.net/blog/kl-approx.html, "k3"), with the bounds that
  verl and slime give their ``low_var_kl``.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from infir2.config import PolicySection

_MOST = 20.0
"""Differences of log-probabilities are bounded by this before they are exponentiated."""
_MOST_KL = 10.0


@dataclass(frozen=True)
class TokenTerms:
    """What the loss needs to know of every token; all but ``logprobs`` and ``entropy`` are without gradient."""

    logprobs: Tensor
    """The policy's, under the sampling temperature."""
    entropy: Tensor
    """Of the policy's distribution, in nats."""
    advantages: Tensor
    behaviour: Tensor
    """Log-probabilities that the rollout engine drew the tokens with."""
    old: Tensor
    """The trainer's log-probabilities before the first update on this rollout."""
    reference: Tensor | None
    """Those of the frozen reference; None where the KL term is off."""
    sequence: Tensor
    """int64: number of the response that the token belongs to."""


def policy_loss(terms: TokenTerms, policy: PolicySection) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss (scalar with gradient) and sums over tokens of what is logged (scalars without)."""
    log_ratio = (terms.logprobs - terms.old).clamp(-_MOST, _MOST)
    ratio, advantages = log_ratio.exp(), terms.advantages
    clipped = ratio.clamp(1 - policy.clip_low, 1 + policy.clip_high)
    weights = importance_weights(terms, policy)
    loss = -(weights * torch.minimum(ratio * advantages, clipped * advantages)).sum()
    sums = {
        "entropy": terms.entropy,
        "update_kl": low_variance_kl(terms.old, terms.logprobs),
        "clip_low": (ratio < 1 - policy.clip_low) & (advantages < 0),
        "clip_high": (ratio > 1 + policy.clip_high) & (advantages > 0),
        **mismatch(terms.old, terms.behaviour),
        "importance_weight": weights,
        "importance_clipped": (weights >= policy.importance_clip) & (policy.importance != "off"),
    }
    if terms.reference is not None:
        kl = low_variance_kl(terms.logprobs, terms.reference)
        loss = loss + policy.kl_coef * kl.sum()
        sums["reference_kl"] = kl
    if policy.entropy_coef:
        loss = loss - policy.entropy_coef * terms.entropy.sum()
    return loss, {name: value.detach().double().sum() for name, value in sums.items()}


def importance_weights(terms: TokenTerms, policy: PolicySection) -> Tensor:
    """min(trainer's / engine's probability, importance_clip), no gradient; of whole responses: of their products."""
    if policy.importance == "off":
        return torch.ones_like(terms.old)
    log_weights = terms.old - terms.behaviour
    if policy.importance == "sequence":
        sequences = int(terms.sequence.max()) + 1 if terms.sequence.numel() else 0
        totals = log_weights.new_zeros(sequences).index_add(0, terms.sequence, log_weights)
        log_weights = totals[terms.sequence]
    limit = math.log(policy.importance_clip)
    # Where it is truncated exactly the limit, whatever exp(log(limit)) rounds to.
    weights = log_weights.clamp(max=limit).exp()
    return torch.where(log_weights >= limit, policy.importance_clip, weights)


def low_variance_kl(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) by each token the policy drew: exp(d) - d - 1, d = reference - policy."""
    difference = (reference - logprobs).clamp(-_MOST, _MOST)
    return (difference.exp() - difference - 1).clamp(-_MOST_KL, _MOST_KL)


def mismatch(trainer: Tensor, engine: Tensor) -> dict[str, Tensor]:
    """How far trainer and engine are apart on tokens that the engine drew.

    ``logprob_diff``: |trainer - engine|. ``token_mult_prob_error``: exp of that, 1 where they agree (NeMo-RL's gate).
    ``mismatch_k3``: estimate of KL(engine || trainer).
    """
    difference = (trainer - engine).clamp(-_MOST, _MOST)
    return {
        "logprob_diff": difference.abs(),
        "token_mult_prob_error": difference.abs().exp(),
        "mismatch_k3": difference.exp() - difference - 1,
    }
