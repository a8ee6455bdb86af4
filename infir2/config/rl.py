"""The sections of reinforcement learning."""

from typing import Annotated, Literal

import pydantic
from pydantic import Field, PositiveFloat

from infir2.config.section import MOST, Count, Name, OptionalName, Positive, Section
from infir2.config.training import LoopSection, SftInitSection, TrainingConfig, TrainSection, check_ramps

_BLOCK = 16
"""Tokens of a block of the engine's cache (block_size of infir2/rollout/options.py)."""


class RlDataSection(Section):
    """What reinforcement learning asks the model: prompts, one a row, each with what its answers are scored against."""

    train: Name
    """A .jsonl (also .gz, .zst) or .parquet file, a folder of them, or the name of a data set (owner/name or
    owner/name:split). Rows hold prompt (text, or messages) and label: the form of DAPO-math-17k."""
    validation: OptionalName = None
    """Held-out prompts, named like train; needed where train.eval_every is not 0."""
    max_prompt_tokens: Positive = 2048
    """Longest prompt, in tokens; longer ones are left out and counted."""
    max_tokens_per_gpu: Positive = 32_768
    """Most tokens in one forward pass of the trainer; samples are packed up to it."""
    chat_template: Name = "auto"
    """auto = the tokenizer's own, else chatml; chatml = the one that comes with infir2; or a .jinja file."""
    tokenizer: OptionalName = None
    """Tokenizer folder; by default that of the model that training starts from."""
    max_bad_rows: str = "1%"
    """Bad rows to tolerate: a count such as 20, or a share such as 1%."""


class RolloutSection(Section):
    """What is sampled for one rollout, and the sizes of the engine that samples it."""

    prompts: Positive = 128
    """Prompts whose groups are trained on in one rollout."""
    samples: Annotated[int, Field(ge=2, le=MOST)] = 16
    """Samples of each prompt: its group."""
    max_new_tokens: Positive = 8192
    """Longest response, in tokens."""
    temperature: Annotated[float, Field(ge=1e-5)] = 1.0  # what is below is greedy to the engine
    """Sampling temperature; the trainer computes its log-probabilities under the same one. No top-p, no top-k."""
    filter_groups: bool = True
    """Leave out groups whose scores, the penalty of reward.overlong_buffer aside, are all the same, and sample other
    prompts in their place (DAPO)."""
    oversample: Positive = 3
    """Prompts tried for one rollout, at most, in multiples of prompts."""
    cache_tokens: Positive = 262_144
    """Tokens whose keys and values the engine's cache holds; room for the longest prompt and response at least."""
    max_sequences: Positive = 256
    """Samples that run at once."""
    max_batch_tokens: Positive = 8192
    """Tokens of one forward pass of the engine."""
    cache_dtype: Literal["auto", "fp8"] = "auto"
    """auto = keys and values in the compute dtype; fp8 = in half of that, rounded."""


class RewardSection(Section):
    """How responses are scored."""

    kind: Literal["math", "choice", "reasoning_gym", "code", "python"] = "math"
    """Which scorer reads response and label (docs/rewards.md)."""
    file: OptionalName = None
    """With kind = "python": the Python file whose function score(response, label) returns a number from 0 to 1."""
    think: Literal["auto", "required", "ignore"] = "auto"
    """required = no reward without </think>; auto = an unclosed <think> earns none; ignore = the tags mean nothing."""
    limit_s: PositiveFloat = 5.0
    """Seconds one answer may take to score (code: one program); then it earns nothing."""
    workers: Count = 0
    """Processes that score, under torchrun for each of its processes; 0 = by the number of cores."""
    overlong_buffer: Count = 0
    """DAPO's soft penalty: over the last so many tokens before rollout.max_new_tokens it falls to -1; 0 = none."""

    @pydantic.model_validator(mode="after")
    def _has_its_file(self) -> "RewardSection":
        if (self.kind == "python") != (self.file is not None):
            raise ValueError('reward.file: needed with reward.kind = "python", and only then')
        return self


class PolicySection(Section):
    """The policy's loss."""

    clip_low: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Probability ratios below 1 - clip_low are clipped."""
    clip_high: PositiveFloat = 0.28
    """Probability ratios above 1 + clip_high are clipped."""
    std_normalization: bool = True
    """Divide a group's advantages by the standard deviation of its rewards (GRPO); false only takes off their mean."""
    kl_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the low-variance KL to the model that the run started from, which is loaded for it; 0 = not loaded."""
    entropy_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the entropy bonus."""
    importance: Literal["off", "token", "sequence"] = "token"
    """Truncated importance sampling of the trainer's over the engine's probabilities: of every token, of whole
    responses (sequence), or not at all."""
    importance_clip: PositiveFloat = 2.0
    """Where the importance weight is truncated."""
    mismatch_limit: Annotated[float, Field(gt=1.0)] = 1.1
    """token_mult_prob_error, the mean of exp|trainer's - engine's log-probability|, above which an alarm is raised."""


class RlEvalSection(Section):
    """Held-out evaluation, every train.eval_every steps over the first train.eval_sequences prompts."""

    samples: Positive = 1
    """Samples of each prompt; the mean reward is reported."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """0 = greedy."""
    max_new_tokens: Count = 0
    """Longest response, in tokens; 0 = that of the rollouts."""


class RlTrainSection(LoopSection):
    """The training loop over rollouts."""

    steps: Positive
    """Optimiser steps of this run. A rollout serves rollout.prompts x rollout.samples / global_batch of them."""

    def loop(self) -> TrainSection:
        """The same, for the loop that all stages share."""
        return TrainSection(**self.model_dump())


class RlConfig(TrainingConfig):
    """Reinforcement learning (GRPO with DAPO's refinements)."""

    train: RlTrainSection
    data: RlDataSection
    rollout: RolloutSection = RolloutSection()
    reward: RewardSection = RewardSection()
    policy: PolicySection = PolicySection()
    eval: RlEvalSection = RlEvalSection()
    init: SftInitSection = SftInitSection()

    @property
    def longest(self) -> tuple[int, str]:
        """Tokens of the longest sequence, and the keys that say so."""
        longest = self.data.max_prompt_tokens + self.rollout.max_new_tokens
        return longest, "data.max_prompt_tokens + rollout.max_new_tokens"

    @property
    def longest_sample(self) -> tuple[int, str]:
        """Tokens of the longest prompt and response that the engine may have to make, and the keys that say so."""
        longest, keys = self.longest
        evaluated = self.data.max_prompt_tokens + self.eval.max_new_tokens
        if self.train.eval_every and evaluated > longest:
            return evaluated, "data.max_prompt_tokens + eval.max_new_tokens"
        return longest, keys

    @property
    def updates(self) -> int:
        """Optimiser steps that one rollout serves."""
        return self.rollout.prompts * self.rollout.samples // self.train.global_batch

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "RlConfig":
        rollout, train, data = self.rollout, self.train, self.data
        check_ramps(self.optim, train.steps)
        if self.updates < 1 or rollout.prompts * rollout.samples % train.global_batch:
            raise ValueError(
                f"rollout.prompts x rollout.samples ({rollout.prompts * rollout.samples}) is not a multiple of "
                f"train.global_batch ({train.global_batch})"
            )
        if self.updates > rollout.samples:
            raise ValueError(
                f"a rollout would serve {self.updates} steps, more than rollout.samples; raise global_batch"
            )
        for name in ("steps", "eval_every", "save_every"):
            if getattr(train, name) % self.updates:
                raise ValueError(
                    f"train.{name} ({getattr(train, name)}) is not a multiple of the {self.updates} steps of a rollout"
                )
        if train.eval_every and data.validation is None:
            raise ValueError("train.eval_every: no prompts are held out; give data.validation, or set it to 0")
        longest, keys = self.longest
        if longest > data.max_tokens_per_gpu:
            raise ValueError(f"{keys} ({longest}) exceed data.max_tokens_per_gpu ({data.max_tokens_per_gpu})")
        longest, keys = self.longest_sample
        if longest > rollout.cache_tokens // _BLOCK * _BLOCK:
            raise ValueError(
                f"{keys} ({longest}) exceed rollout.cache_tokens ({rollout.cache_tokens}, in whole blocks of {_BLOCK})"
            )
        if rollout.max_sequences > rollout.max_batch_tokens:
            raise ValueError(
                f"rollout.max_sequences ({rollout.max_sequences}) is above rollout.max_batch_tokens "
                f"({rollout.max_batch_tokens}): every sequence decodes a token in one forward pass"
            )
        if self.fp8.head:
            raise ValueError("fp8.head: the engine's log-probabilities come from a bf16 head; leave it off")
        if self.reward.overlong_buffer > rollout.max_new_tokens:
            raise ValueError("reward.overlong_buffer is above rollout.max_new_tokens")
        return self
