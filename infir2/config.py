"""Recipes: a TOML file plus dotted overrides becomes one typed, frozen configuration.

``load(CptConfig, path, ["--optim.lr", "5e-5"])`` reads the file, writes the overrides over it and checks the result.
A mistake raises ConfigError with the file, the key and the nearest valid key. The resolved configuration is written
beside the run with ``to_toml``. Nothing here imports torch: a recipe can be read where no accelerator library is.
"""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import Field, PositiveFloat, PositiveInt

from infir2.errors import ConfigError, did_you_mean

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=0)]


class Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class ModelSection(Section):
    """Which model, and the arithmetic of everything that is not FP8."""

    preset: str | None = None
    """Architecture with random weights: micro, tiny, small-150m, qwen2.5-0.5b, qwen2.5-1.5b or qwen2.5-7b."""
    path: str | None = None
    """Hugging Face folder to start from (config.json + safetensors). Give this or preset, not both; or neither, with
    init.checkpoint."""
    vocab_size: Count = 0
    """Rows of the embedding with a preset; 0 takes the tokenizer's size, rounded up to a multiple of 128."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype outside the FP8 GEMMs. Master weights, gradients and moments are always float32."""
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
    """blockwise = the paper's (1x128 activations and gradients, 128x128 weights); bf16 = no FP8 at all."""
    scale_format: Literal["ue8m0", "fp32"] = "ue8m0"
    """ue8m0 = powers of two (what FP8 checkpoints store); fp32 = amax / 448."""
    mlp_activations: Literal["fp8", "bf16", "recompute"] = "fp8"
    """How gate and up, the largest activations, wait for the backward pass of blockwise and hybrid: as FP8 codes, as
    they are (more memory, no rounding), or recomputed (least memory, one more GEMM)."""
    bf16_first_layers: Count = 0
    """Decoder layers at the bottom that stay in BF16."""
    bf16_last_layers: Count = 0
    """Decoder layers at the top that stay in BF16."""
    health_every: Count = 100
    """Steps between two per-layer FP8 health measurements (saturation, underflow, signal-to-noise); 0 = never."""


class DataSection(Section):
    """What the model reads."""

    sources: Annotated[dict[str, PositiveFloat], Field(min_length=1)]
    """Folder made by `infir2 prepare` (or the prefix of a Megatron .bin/.idx pair) -> weight in the mixture."""
    seq_len: PositiveInt
    """Tokens per sequence."""
    document_attention: bool = True
    """True: packed documents attend only to themselves. False: plain causal attention over the sequence."""
    validation_fraction: Fraction = 0.05
    """Documents held out from a Megatron pair that has no validation split of its own (the last ones)."""


class ChatDataSection(Section):
    """What supervised fine-tuning learns from: conversations, one a row."""

    train: str
    """A .jsonl (also .gz, .zst) or .parquet file, a folder of them, or the name of a data set (owner/name or
    owner/name:split) that the package datasets can load. Rows hold messages, or prompt and completion."""
    validation: str | None = None
    """Held-out conversations, named like train."""
    validation_fraction: Fraction = 0.01
    """Share of the rows of train that is held out, at least one row; used where validation is not given."""
    max_length: PositiveInt = 32_768
    """Longest conversation in tokens."""
    max_tokens_per_gpu: PositiveInt = 32_768
    """Most tokens in one forward pass of one process; conversations are packed up to it."""
    too_long: Literal["drop", "truncate"] = "drop"
    """What is done with a conversation above max_length: left out, or cut at the end. Either is counted."""
    chat_template: str = "auto"
    """auto = the tokenizer's own, else chatml; chatml = the one that comes with infir2; or a .jinja file."""
    tokenizer: str | None = None
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


class RlDataSection(Section):
    """What reinforcement learning asks the model: prompts, one a row, each with what its answers are scored against."""

    train: str
    """A .jsonl (also .gz, .zst) or .parquet file, a folder of them, or the name of a data set (owner/name or
    owner/name:split). Rows hold prompt (text, or messages) and label: the form of DAPO-math-17k."""
    validation: str | None = None
    """Held-out prompts, named like train; needed where train.eval_every is not 0."""
    max_prompt_tokens: PositiveInt = 2048
    """Longest prompt; longer ones are left out and counted."""
    max_tokens_per_gpu: PositiveInt = 32_768
    """Most tokens in one forward pass of the trainer; samples are packed up to it."""
    chat_template: str = "auto"
    """auto = the tokenizer's own, else chatml; chatml = the one that comes with infir2; or a .jinja file."""
    tokenizer: str | None = None
    """Tokenizer folder; by default that of the model that training starts from."""
    max_bad_rows: str = "1%"
    """Bad rows to tolerate: a count such as 20, or a share such as 1%."""


class RolloutSection(Section):
    """What is sampled for one rollout, and the sizes of the engine that samples it."""

    prompts: PositiveInt = 128
    """Prompts whose groups are trained on in one rollout."""
    samples: Annotated[int, Field(ge=2)] = 16
    """Samples of each prompt: its group."""
    max_new_tokens: PositiveInt = 8192
    """Longest response."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the trainer computes its log-probabilities under the same one. No top-p, no top-k."""
    filter_groups: bool = True
    """Leave out groups whose rewards are all the same, and sample other prompts in their place (DAPO)."""
    oversample: PositiveInt = 3
    """Prompts tried for one rollout, at most, in multiples of prompts."""
    cache_tokens: PositiveInt = 262_144
    """Tokens whose keys and values the engine's cache holds."""
    max_sequences: PositiveInt = 256
    """Samples that run at once."""
    max_batch_tokens: PositiveInt = 8192
    """Tokens of one forward pass of the engine."""
    cache_dtype: Literal["auto", "fp8"] = "auto"
    """auto = keys and values in the compute dtype."""


class RewardSection(Section):
    """How responses are scored."""

    kind: Literal["math", "choice", "reasoning_gym", "code"] = "math"
    """Which scorer reads response and label."""
    think: Literal["auto", "required", "ignore"] = "auto"
    """required = no reward without </think>; auto = an unclosed <think> earns none; ignore = the tags mean nothing."""
    limit_s: PositiveFloat = 5.0
    """Seconds one answer may take to score (code: one program); then it earns nothing."""
    workers: Count = 0
    """Processes that score; 0 = by the number of cores."""
    overlong_buffer: Count = 0
    """DAPO's soft penalty: over the last so many tokens before rollout.max_new_tokens it falls to -1; 0 = none."""


class PolicySection(Section):
    """The policy's loss."""

    clip_low: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Probability ratios below 1 - clip_low are clipped."""
    clip_high: PositiveFloat = 0.28
    """Probability ratios above 1 + clip_high are clipped."""
    std_normalization: bool = True
    """Divide a group's advantages by the standard deviation of its rewards (GRPO); False only takes off their mean."""
    kl_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the low-variance KL to the model that the run started from, which is loaded for it; 0 = not loaded."""
    entropy_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the entropy bonus."""
    importance: Literal["off", "token", "sequence"] = "token"
    """Truncated importance sampling of the trainer's over the engine's probabilities: of every token, of whole
    responses, or not at all."""
    importance_clip: PositiveFloat = 2.0
    """Where the importance weight is truncated."""
    mismatch_limit: Annotated[float, Field(gt=1.0)] = 1.1
    """token_mult_prob_error, the mean of exp|trainer's - engine's log-probability|, above which an alarm is raised."""


class RlEvalSection(Section):
    """Held-out evaluation, every train.eval_every steps over the first train.eval_sequences prompts."""

    samples: PositiveInt = 1
    """Samples of each prompt; the mean reward is reported."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """0 = greedy."""
    max_new_tokens: Count = 0
    """Longest response; 0 = that of the rollouts."""


class OptimSection(Section):
    """AdamW and the learning-rate schedule."""

    lr: PositiveFloat
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """Learning rate at the end of the decay."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """wsd = linear warm-up, stable, decay over the last decay_steps; cosine = warm-up, then cosine to the end."""
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
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Decoupled weight decay; not applied to biases and norms."""
    clip: Annotated[float, Field(ge=0.0)] = 1.0
    """Global gradient-norm limit; 0 = no clipping."""

    def warmup(self, steps: int) -> int:
        """Steps of warm-up in a run of ``steps``."""
        return self.warmup_steps or round(self.warmup_fraction * steps)


class LoopSection(Section):
    """The training loop, but for how long it runs."""

    global_batch: PositiveInt
    """Sequences per optimiser step, over all ranks."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1236
    """Seed of the weights and of the data order."""
    eval_every: Count = 100
    """Steps between held-out evaluations; 0 = never."""
    eval_sequences: PositiveInt = 64
    """Held-out sequences per evaluation."""
    save_every: Count = 1000
    """Steps between checkpoints; the last step is always saved. 0 = only the last step."""
    keep_checkpoints: Count = 3
    """Newest checkpoints kept; 0 = all of them."""
    keep_every: Count = 0
    """Checkpoints at multiples of this step are never deleted (for decay runs); 0 = none."""
    async_save: bool = True
    """Write checkpoints in the background."""
    activation_checkpointing: Literal["none", "full"] = "none"
    """full = keep only each decoder layer's input and recompute the layer in the backward pass."""
    compile: bool = False
    """torch.compile every decoder layer."""
    deterministic: bool = False
    """Ask torch for deterministic kernels: the same run gives the same bits on the same device."""
    max_skipped_steps: PositiveInt = 10
    """Stop after this many steps in a row were skipped for a non-finite loss or gradient."""
    accept_changes: bool = False
    """Resume even if the recipe's changes would have given the steps that are done another course."""


class TrainSection(LoopSection):
    """The training loop over sequences of one length."""

    steps: PositiveInt
    """Optimiser steps of this run."""
    micro_batch: PositiveInt = 1
    """Sequences per forward pass and rank; the rest of the global batch is gradient accumulation."""


class EpochTrainSection(LoopSection):
    """The training loop over rows that are visited a number of times."""

    epochs: PositiveInt
    """Times that every row is seen. The number of steps follows from rows, epochs and global_batch."""

    def with_steps(self, steps: int) -> TrainSection:
        """The same loop, now that the number of steps is known."""
        return TrainSection(steps=steps, **self.model_dump(exclude={"epochs"}))


class RlTrainSection(LoopSection):
    """The training loop over rollouts."""

    steps: PositiveInt
    """Optimiser steps of this run. A rollout serves rollout.prompts x rollout.samples / global_batch of them."""

    def loop(self) -> TrainSection:
        """The same, for the loop that all stages share."""
        return TrainSection(**self.model_dump())


class ParallelSection(Section):
    """How torchrun's processes are used; one process needs nothing here."""

    replicate: PositiveInt = 1
    """Copies of the sharded model (hybrid sharding); the remaining factor of the world size shards (FSDP2)."""
    reshard_after_forward: bool = True
    """Free gathered parameters after each layer's forward pass (less memory, one more gather)."""
    gather_dtype: Literal["float32", "bfloat16"] = "float32"
    """float32 = the losses of a single process; bfloat16 halves the traffic and rounds each process's gradients."""


class InitSection(Section):
    """Start from another run's checkpoint: weights and optimiser state kept, schedule fresh (a WSD decay run)."""

    checkpoint: str | None = None
    """A checkpoint folder (runs/NAME/checkpoints/step-N), or a run folder for its newest one."""
    keep_optimizer: bool = True
    """Keep the optimiser's moments; False starts them at zero."""


class SftInitSection(InitSection):
    """Start from another run's checkpoint, such as stage 1's: its weights, a fresh optimiser and schedule."""

    keep_optimizer: bool = False
    """Keep the optimiser's moments; False starts them at zero."""


class LogSection(Section):
    """What is written while training. metrics.jsonl is always written."""

    every: PositiveInt = 1
    """Steps between two lines of metrics."""
    tensorboard: bool = True
    """Also write TensorBoard events."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (needs the wandb extra)."""
    profile_steps: Count = 0
    """Write a torch profiler trace of this many steps after the third one."""


class TrainingConfig(Section):
    """What every training stage needs; each stage adds its own data section."""

    run: Annotated[str, Field(min_length=1)]
    """Run folder: config.toml, metrics.jsonl, checkpoints/ and the report are written there."""
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
        if self.reward.overlong_buffer > rollout.max_new_tokens:
            raise ValueError("reward.overlong_buffer is above rollout.max_new_tokens")
        return self


def check_ramps(optim: OptimSection, steps: int) -> None:
    """Raise ValueError where warm-up and decay do not fit into the steps."""
    ramps = optim.warmup(steps) + (optim.decay_steps if optim.schedule == "wsd" else 0)
    if ramps > steps:
        raise ValueError(f"optim.warmup_steps + optim.decay_steps ({ramps}) exceed train.steps ({steps})")


C = TypeVar("C", bound=Section)


def load(kind: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """Read a recipe and apply dotted overrides such as ``["--optim.lr", "5e-5"]`` (values in TOML notation).

    Raises ConfigError, naming the file, the key and the nearest valid key.
    """
    table = _read_toml(Path(path))
    changed = _apply_overrides(table, overrides)
    try:
        return kind.model_validate(table)
    except pydantic.ValidationError as error:
        key = ".".join(str(part) for part in error.errors(include_url=False)[0]["loc"])
        where = "command line" if any(word == key or word.startswith(f"{key}.") for word in changed) else str(path)
        raise ConfigError(f"{where}: {_explain(kind, error)}") from None


def parse(kind: type[C], text: str, name: str) -> C:
    """A configuration from TOML text; ``name`` is what error messages call it."""
    try:
        return kind.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not valid TOML: {error}") from None
    except pydantic.ValidationError as error:
        raise ConfigError(f"{name}: {_explain(kind, error)}") from None


def to_toml(config: Section) -> str:
    """The configuration as TOML text that ``parse`` reads back to an equal object. Unset (None) keys are left out."""
    lines: list[str] = []
    _write_table(config.model_dump(mode="json", exclude_none=True), "", lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def describe(kind: type[Section], prefix: str = "") -> list[tuple[str, str, str]]:
    """Every key of a configuration as (dotted key, default, meaning): what ``--help`` prints."""
    rows: list[tuple[str, str, str]] = []
    for name, field in kind.model_fields.items():
        annotation: Any = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            rows.extend(describe(annotation, f"{prefix}{name}."))
        else:
            default = "required" if field.is_required() else json.dumps(field.default)
            rows.append((f"{prefix}{name}", default, field.description or ""))
    return rows


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _apply_overrides(table: dict[str, Any], overrides: Sequence[str]) -> set[str]:
    """Write ``--section.key value`` (or ``--section.key=value``) pairs into the table; returns the keys written."""
    words, changed = list(overrides), set()
    while words:
        flag, equals, text = words.pop(0).partition("=")
        if not flag.startswith("--") or len(flag) < 3:
            raise ConfigError(f"command line: expected --section.key value, got {flag!r}")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"command line: {flag} needs a value")
            text = words.pop(0)
        *sections, key = flag[2:].replace("-", "_").split(".")
        place = table
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"command line: {flag}: {section} is a value, not a section")
        place[key] = _toml_value(text)
        changed.add(".".join([*sections, key]))
    return changed


def _toml_value(text: str) -> Any:
    """A value in TOML notation (1e-4, true, [1, 2], { a = 1 }); anything else is taken as a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(kind: type[Section], error: pydantic.ValidationError) -> str:
    """The first problem of a validation error in one line: key, what is wrong, nearest valid key."""
    problem = error.errors(include_url=False)[0]
    keys = [str(part) for part in problem["loc"]]
    where = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key.{did_you_mean(keys[-1], _keys_beside(kind, keys))}"
    if problem["type"] == "missing":
        return f"{where}: this key is required"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}".removeprefix(": ")
    return f"{where}: {message[0].lower()}{message[1:]} (got {problem['input']!r})"


def _keys_beside(kind: type[Section], keys: Sequence[str]) -> list[str]:
    """The valid keys of the section in which an unknown key was found."""
    section: Any = kind
    for key in keys[:-1]:
        field = section.model_fields.get(key) if hasattr(section, "model_fields") else None
        section = field.annotation if field else None
    return list(section.model_fields) if section is not None and hasattr(section, "model_fields") else []


def _write_table(table: dict[str, Any], prefix: str, lines: list[str]) -> None:
    for key, value in table.items():
        if not isinstance(value, dict):
            lines.append(f"{_toml_key(key)} = {json.dumps(value)}")
    for key, value in table.items():
        if isinstance(value, dict):
            name = f"{prefix}{_toml_key(key)}"
            lines.extend(["", f"[{name}]"])
            _write_table(value, f"{name}.", lines)


def _toml_key(key: str) -> str:
    return key if key.isidentifier() else json.dumps(key)
