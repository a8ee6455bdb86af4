"""The policy's loss as an objective of the trainer's step, and the log-probabilities that stay fixed during it."""

import torch
from torch import Tensor

from infir2.config import PolicySection
from infir2.kernels.logprob import token_logprobs
from infir2.model.transformer import CausalLM
from infir2.rl.batch import RlBatch
from infir2.rl.policy_loss import TokenTerms, policy_loss
from infir2.train.step import AttentionFor
from infir2.types import IGNORE, Batch


class PolicyObjective:
    """An ``infir2.train.step.Objective`` over ``RlBatch``es sampled at ``temperature``."""

    def __init__(self, policy: PolicySection, temperature: float) -> None:
        self.policy, self.temperature = policy, temperature

    def __call__(self, hidden: Tensor, weight: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(batch, RlBatch)
        rows = (batch.labels.reshape(-1) != IGNORE).nonzero().squeeze(1)

        def chosen(values: Tensor) -> Tensor:
            return values.reshape(-1)[rows]

        flat = hidden.reshape(-1, hidden.shape[-1])[rows]
        logprobs, entropy = token_logprobs(flat, weight, chosen(batch.labels), self.temperature)
        terms = TokenTerms(
            logprobs=logprobs,
            entropy=entropy,
            advantages=chosen(batch.advantages),
            behaviour=chosen(batch.behaviour),
            old=logprobs.detach() if batch.old is None else chosen(batch.old),
            reference=None if batch.reference is None else chosen(batch.reference),
            sequence=torch.searchsorted(batch.cu_seqlens[1:].long(), rows, right=True),
        )
        return policy_loss(terms, self.policy)


@torch.no_grad()
def batch_logprobs(model: CausalLM, batch: Batch, attention_for: AttentionFor, temperature: float) -> Tensor:
    """Log-probabilities of the labels, float32 [batch, length] in the batch's memory; 0 where there is no label.

    The forward pass is the one of the training step, so that on unchanged weights it gives the same bits.
    """
    here = batch.to(model.lm_head.weight.device)

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        return token_logprobs(flat, weight, here.labels.reshape(-1), temperature)[0]

    logprobs = model(here.input_ids, here.position_ids, attention_for(here), head=head)
    return logprobs.view(batch.labels.shape).to(batch.labels.device)
