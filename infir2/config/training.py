"""The sections that training stages share, pre-training and fine-tuning."""

from typing import Annotated, ClassVar, Literal

import pydantic
from pydantic import Field, PositiveFloat

from infir2.config.section import Count, Fraction, Name, OptionalName, Positive, Section


class ModelSection(Section):
    """Which model, and the arithmetic of everything that is not FP8."""

    alternatives: ClassVar[tuple[str, ...]] = ("preset", "path")
    preset: str | None = None
    """Architecture with random weights: micro, tiny, small-150m, qwen2.5-0.5b, qwen2.5-1.5b or qwen2.5-7b."""
    path: OptionalName = None
    """Hugging Face folder to start from (config.json + safetensors). Give this or preset, not both; or neither, with
    init.checkpoint. On the command line, either takes the place of the other in the file, and null unsets it."""
    vocab_size: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    """Rows of the embedding with a preset; 0 takes the tokenizer's size, rounded up to a multiple of 128."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype outside the FP8 GEMMs. Master weights and gradients are always float32."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of random weights."""

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> "ModelSection":
        if self.preset is not None and self.path is not None:
            raise ValueError("give exactly one of model.preset and model.path")
        return self

    @property
    def is_named(self) -> bool:
        """Whether it says which model; if not, the checkpoint that the run starts from does."""
        return self.preset is not None or self.path is not None


class Fp8Section(Section):
    """FP8 training: which recipe, and which layers stay out of it."""

    recipe: Literal["blockwise", "hybrid", "rowwise", "tensorwise", "bf16"] = "blockwise"
    """What shares a scale. blockwise = the paper's: 1x128 of activations and gradients, 128x128 of weights; hybrid =
    the same, but a whole channel in the weight gradient, which runs faster on Hopper; rowwise = a row or channel
    everywhere; tensorwise = the whole tensor; bf16 = no FP8 at all."""
    scale_format: Literal["ue8m0", "fp32"] = "ue8m0"
    """ue8m0 = powers of two (what FP8 checkpoints store); fp32 = amax / 448."""
    mlp_activations: Literal["fp8", "bf16", "recompute"] = "fp8"
    """How gate and up, the largest activations, wait for the backward pass of blockwise and hybrid: as FP8 codes, as
    they are (more memory, no rounding), or recomputed (least memory, one more GEMM)."""
    head: bool = False
    """Whether the output head's three GEMMs of pre-training and fine-tuning run in FP8 too. Held-out losses, generation
    and exports do not use that: the head's weight stays what it is."""
    bf16_first_layers: Count = 0
    """Decoder layers at the bottom that stay in BF16."""
    bf16_last_layers: Count = 0
    """Decoder layers at the top that stay in BF16."""
    health_every: Count = 100
    """Steps between two per-layer FP8 health measurements (saturation, underflow, signal-to-noise); 0 = never."""


class DataSection(Section):
    """What the model reads."""

    sources: Annotated[dict[Name, PositiveFloat], Field(min_length=1)]
    """Folder made by `infir2 prepare` (or the prefix of a Megatron .bin/.idx pair) -> weight in the mixture."""
    seq_len: Positive
    """Tokens per sequence."""
    document_attention: bool = True
    """true = packed documents attend only to themselves; false = plain causal attention over the sequence."""
    validation_fraction: Fraction = 0.05
    """Documents held out from a Megatron pair that has no validation split of its own (the last ones)."""


class ChatDataSection(Section):
    """What supervised fine-tuning learns from: conversations, one a row."""

    train: Name
    """A .jsonl (also .gz, .zst) or .parquet file, a folder of them, or the name of a data set (owner/name or
    owner/name:split) that the package datasets can load. Rows hold messages, or prompt and completion."""
    validation: OptionalName = None
    """Held-out conversations, named like train."""
    validation_fraction: Fraction = 0.01
    """Share of the rows of train that is held out, at least one row; used where validation is not given."""
    max_length: Positive = 32_768
    """Longest conversation in tokens."""
    max_tokens_per_gpu: Positive = 32_768
    """Most tokens in one forward pass of one process; conversations are packed up to it."""
    too_long: Literal["drop", "truncate"] = "drop"
    """What is done with a conversation above max_length: left out, or cut at the end. Either is counted."""
    chat_template: Name = "auto"
    """auto = the tokenizer's own, else chatml; chatml = the one that comes with infir2; or a .jinja file."""
    tokenizer: OptionalName = None
    """Tokenizer folder; by default that of the model that training starts from."""
    max_bad_rows: str = "1%"
    """Bad rows to tolerate: a count such as 20, or a share such as 1%."""

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "ChatDataSection":
        if self.max_length > self.max_tokens_per_gpu:
            raise ValueError(
                f"data.max_length ({self.max_length}) is above data.max_tokens_per_gpu ({self.max_tokens_per_gpu})"
            )
        return self


class OptimSection(Section):
    """AdamW and the learning-rate schedule."""

    lr: PositiveFloat
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """Learning rate at the end of the decay."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """wsd = linear warm-up, stable, decay over the last decay_steps; cosine = warm-up, then cosine to the end;
    constant = no decay."""
    warmup_steps: Count = 0
    """Steps of linear warm-up from 0."""
    warmup_fraction: Fraction = 0.0
    """Warm-up as a share of all steps, rounded; instead of warmup_steps."""
    decay_steps: Count = 0
    """Length of the decay at the end (wsd only)."""
    decay: Literal["cosine", "linear"] = "cosine"
    """Shape of the WSD decay."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's moment decays."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """How AdamW keeps its two moments: bfloat16 (stochastically rounded) takes half the memory, 4 bytes a parameter."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Decoupled weight decay; not applied to biases and norms."""
    clip: Annotated[float, Field(ge=0.0)] = 1.0
    """Global gradient-norm limit; 0 = no clipping."""

    def warmup(self, steps: int) -> int:
        """Steps of warm-up in a run of ``steps``."""
        return self.warmup_steps or round(self.warmup_fraction * steps)


class LoopSection(Section):
    """The training loop, but for how long it runs."""

    global_batch: Annotated[int, Field(gt=0, le=2**20)]
    """Sequences per optimiser step, over all ranks."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1236
    """Seed of the weights and of the data order."""
    eval_every: Count = 100
    """Steps between held-out evaluations; 0 = never."""
    eval_sequences: Positive = 64
    """Held-out sequences per evaluation."""
    save_every: Count = 1000
    """Steps between checkpoints; the last step is always saved. 0 = only the last step."""
    keep_checkpoints: Count = 3
    """Newest checkpoints kept; 0 = all of them."""
    keep_every: Count = 0
    """Checkpoints at multiples of this step are never deleted (for decay runs); 0 = none."""
    async_save: bool = True
    """Write checkpoints in the background."""
    activation_checkpointing: Literal["none", "attention", "full"] = "none"
    """full = keep only each decoder layer's input and recompute the layer in the backward pass; attention = keep the
    inputs and the output of attention as well, which takes longest to recompute where sequences are long."""
    compile: bool = False
    """torch.compile what is not a kernel of its own in decoder layers: all but attention, and fused FP8."""
    deterministic: bool = False
    """Ask torch for deterministic kernels: the same run gives the same bits on the same device."""
    max_skipped_steps: Positive = 10
    """Stop after this many steps in a row were skipped for a non-finite loss or gradient."""
    accept_changes: bool = False
    """Resume even if the recipe's changes would have given the steps that are done another course."""


class TrainSection(LoopSection):
    """The training loop over sequences of one length."""

    steps: Positive
    """Optimiser steps of this run."""
    micro_batch: Positive = 1
    """Sequences per forward pass and rank; the rest of the global batch is gradient accumulation."""
    cuda_graphs: bool = False
    """Run micro-batches as CUDA graphs, so that the GPU does not wait for Python. Same numbers. Used on a GPU that
    holds the whole model (one process, or parallel.replicate as many as processes); elsewhere it does nothing."""


class EpochTrainSection(LoopSection):
    """The training loop over rows that are visited a number of times."""

    epochs: Positive
    """Times that every row is seen. The number of steps follows from rows, epochs and global_batch."""
    cuda_graphs: bool = False
    """Fill every micro-batch up to data.max_tokens_per_gpu, so that all have one shape, and run them as a CUDA graph:
    the GPU does not wait for Python. Used on a GPU that holds the whole model (one process, or parallel.replicate as
    many as processes); elsewhere it does nothing."""

    def with_steps(self, steps: int) -> TrainSection:
        """The same loop, now that the number of steps is known."""
        return TrainSection(steps=steps, **self.model_dump(exclude={"epochs"}))


class ParallelSection(Section):
    """How torchrun's processes are used; one process needs nothing here."""

    replicate: Positive = 1
    """Copies of the model. As many as there are processes: each holds the whole model, works as a single process does,
    CUDA graphs included, and gradients are added up once a step. Fewer: the remaining factor shards each copy (FSDP2),
    which takes less memory."""
    reshard_after_forward: bool = True
    """Free gathered parameters after each layer's forward pass (less memory, one more gather)."""
    gather_dtype: Literal["float32", "bfloat16"] = "float32"
    """float32 = the losses of a single process; bfloat16 halves the traffic and rounds each process's gradients."""


class InitSection(Section):
    """Start from another run's checkpoint: weights and optimiser state kept, schedule fresh (a WSD decay run)."""

    checkpoint: OptionalName = None
    """A checkpoint folder (runs/NAME/checkpoints/step-N), or a run folder for its newest one."""
    keep_optimizer: bool = True
    """Keep the optimiser's moments; false starts them at zero."""


class SftInitSection(InitSection):
    """Start from another run's checkpoint, such as stage 1's: its weights, a fresh optimiser and schedule."""

    keep_optimizer: bool = False
    """Keep the optimiser's moments; false starts them at zero."""


class LogSection(Section):
    """What is written while training. metrics.jsonl is always written."""

    every: Positive = 1
    """Steps between two lines of metrics."""
    tensorboard: bool = True
    """Also write TensorBoard events."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (needs the wandb extra)."""
    profile_steps: Count = 0
    """Write a torch profiler trace of this many steps after the third one."""


class TrainingConfig(Section):
    """What every training stage needs; each stage adds its own data section."""

    run: Name
    """Run folder: config.toml, metrics.jsonl, checkpoints/ and more are written there."""
    model: ModelSection = ModelSection()
    fp8: Fp8Section = Fp8Section()
    optim: OptimSection
    train: LoopSection
    parallel: ParallelSection = ParallelSection()
    init: InitSection = InitSection()
    log: LogSection = LogSection()

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "TrainingConfig":
        optim = self.optim
        if not (self.model.is_named or self.init.checkpoint):
            raise ValueError("model: give exactly one of model.preset and model.path, or init.checkpoint")
        if optim.min_lr > optim.lr:
            raise ValueError(f"optim.min_lr ({optim.min_lr:g}) is above optim.lr ({optim.lr:g})")
        if optim.warmup_steps and optim.warmup_fraction:
            raise ValueError("give optim.warmup_steps or optim.warmup_fraction, not both")
        if self.fp8.head and self.fp8.recipe == "bf16":
            raise ValueError("fp8.head: the recipe bf16 has no FP8 head; choose another fp8.recipe or leave it off")
        return self


class CptConfig(TrainingConfig):
    """Continual pre-training."""

    train: TrainSection
    data: DataSection

    @pydantic.model_validator(mode="after")
    def _steps_suffice(self) -> "CptConfig":
        optim, train = self.optim, self.train
        check_ramps(optim, train.steps)
        if train.global_batch % train.micro_batch:
            raise ValueError(
                f"train.global_batch ({train.global_batch}) is not a multiple of "
                f"train.micro_batch ({train.micro_batch})"
            )
        return self


class SftConfig(TrainingConfig):
    """Supervised fine-tuning."""

    train: EpochTrainSection
    data: ChatDataSection
    init: SftInitSection = SftInitSection()

    @property
    def longest(self) -> tuple[int, str]:
        """Tokens of the longest sequence, and the key that says so."""
        return self.data.max_length, "data.max_length"


def check_ramps(optim: OptimSection, steps: int) -> None:
    """Raise ValueError where warm-up and decay do not fit into the steps."""
    ramps = optim.warmup(steps) + (optim.decay_steps if optim.schedule == "wsd" else 0)
    if ramps > steps:
        raise ValueError(f"optim.warmup_steps + optim.decay_steps ({ramps}) exceed train.steps ({steps})")
