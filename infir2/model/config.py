"""The architecture of a decoder, read from and written to a Hugging Face config.json.

``from_hf`` accepts Qwen2, Qwen3 and Llama in the spelling of transformers 4 (``rope_theta``, ``rope_scaling``) and of
transformers 5 (``rope_parameters``). Anything that this decoder would compute differently is refused, by file and key.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NoReturn

from infir2.errors import CheckpointError, ConfigError, did_you_mean

ModelType = Literal["qwen2", "qwen3", "llama"]

ARCHITECTURES: dict[str, ModelType] = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
}

_LARGEST_SIZE, _MOST_PARAMETERS = 2**31 - 1, 2**43
_MOST = {"num_hidden_layers": 1024, "head_dim": 2**16}
"""Above these a config.json is damaged: torch would fail on the way to such a model, or never come to its end."""
# What transformers assumes where a config.json is silent.
_DEFAULT_ROPE_THETA = 10_000.0
_DEFAULT_POSITIONS = {"qwen2": 32_768, "qwen3": 32_768, "llama": 2_048}
_DEFAULT_BOS = {"qwen2": None, "qwen3": None, "llama": 1}
_DEFAULT_EOS = {"qwen2": None, "qwen3": None, "llama": 2}
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's stretching of the slow rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a decoder. Raises ConfigError, naming the field, where they do not fit together."""

    model_type: ModelType
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = _DEFAULT_ROPE_THETA
    rope_scaling: Llama3RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, field.type, getattr(self, field.name))
        if self.model_type not in ARCHITECTURES.values():
            raise ConfigError(f"model_type: {self.model_type!r} is not one of {', '.join(ARCHITECTURES.values())}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim: {self.head_dim} is odd, but rotary positions turn pairs of dimensions")
        if (size := self.num_parameters()) > _MOST_PARAMETERS:
            raise ConfigError(
                f"hidden_size, num_hidden_layers and the others: would make a model of {size:,} parameters"
            )
        for key, ours, theirs in _family_flags(self):
            if ours != theirs:
                raise ConfigError(f"{key}: {ours} cannot be written as a {self.model_type} model, which has {theirs}")

    def check_sequence_length(self, seq_len: int, key: str = "data.seq_len") -> None:
        """Raise ConfigError where sequences of ``seq_len`` tokens exceed the model's positions."""
        if seq_len > self.max_position_embeddings:
            raise ConfigError(
                f"{key}: {seq_len} tokens exceed the model's max_position_embeddings "
                f"({self.max_position_embeddings}); shorten the sequences or take a model with more positions"
            )

    def num_parameters(self) -> int:
        """Parameters of the model; tied embeddings count once."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        biases = (
            self.qkv_bias * (queries + 2 * keys)
            + self.o_bias * self.hidden_size
            + self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        )
        norms = 2 * self.hidden_size + self.qk_norm * 2 * self.head_dim
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        layers = self.num_hidden_layers * (self._layer_weights() + biases + norms)
        return embeddings + layers + self.hidden_size

    def flops_per_token(self, seq_len: int, attention_span: float | None = None) -> float:
        """Model FLOPs of one forward and backward pass, divided by its tokens.

        6 · W + 12 · layers · heads · head_dim · span, where W counts the weights of every matrix product (the layers'
        projections and the output head, tied or not; no embedding look-up, norm or bias) and ``attention_span`` is the
        mean number of positions a token attends to: (seq_len + 1) / 2 for causal attention over whole sequences (the
        default), sum(n · (n + 1) / 2) / sum(n) for packed documents of n tokens. A product costs 2 FLOPs forward and
        4 backward per weight; attention makes two products (scores, weighted sum). Recomputation is not counted.
        """
        span = (seq_len + 1) / 2 if attention_span is None else attention_span
        weights = self.num_hidden_layers * self._layer_weights() + self.vocab_size * self.hidden_size
        attention = self.num_hidden_layers * self.num_attention_heads * self.head_dim * span
        return 6.0 * weights + 12.0 * attention

    def to_hf(self) -> dict[str, Any]:
        """The dictionary of a config.json that transformers 4 and 5 load as the same model, with bfloat16 weights."""
        rope: dict[str, Any] = {"rope_type": "default"}
        if self.rope_scaling is not None:
            rope = {"rope_type": "llama3"} | {key: getattr(self.rope_scaling, key) for key in _LLAMA3_KEYS}
        eos = list(self.eos_token_ids)
        config: dict[str, Any] = {
            "architectures": [name for name, kind in ARCHITECTURES.items() if kind == self.model_type],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            # Both spellings: transformers 4 and most engines read the first two, transformers 5 the third.
            "rope_theta": self.rope_theta,
            "rope_scaling": None if self.rope_scaling is None else rope,
            "rope_parameters": {"rope_theta": self.rope_theta} | rope,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_dropout": 0.0,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos if len(eos) > 1 else (eos[0] if eos else None),
            "pad_token_id": self.pad_token_id,
            "use_cache": True,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
        }
        if self.model_type == "llama":
            config |= {"attention_bias": self.qkv_bias, "mlp_bias": self.mlp_bias}
        else:
            config |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": self.num_hidden_layers}
        if self.model_type == "qwen3":
            config["attention_bias"] = self.qkv_bias
        return config

    def _layer_weights(self) -> int:
        """Elements of one layer's weight matrices."""
        heads = self.num_attention_heads + self.num_key_value_heads
        return 2 * self.hidden_size * heads * self.head_dim + 3 * self.hidden_size * self.intermediate_size


def from_hf(config: Mapping[str, Any], name: str) -> ModelConfig:
    """Parse the content of a config.json; ``name`` is what error messages call it (usually its path).

    Raises CheckpointError, naming the file and the key, for anything this decoder does not compute.
    """
    reader = _Reader(config, name)
    model_type = _model_type(reader)
    _refuse_unsupported(reader, model_type)
    theta, scaling = _rope(reader)
    heads = reader.get("num_attention_heads", int)
    hidden = reader.get("hidden_size", int)
    head_dim = reader.get("head_dim", int, 128 if model_type == "qwen3" else None)
    if head_dim is None:
        if heads < 1 or hidden % heads:
            reader.fail("num_attention_heads", f"{heads} does not divide hidden_size ({hidden})")
        head_dim = hidden // heads
    bias = reader.get("attention_bias", bool, False) if model_type != "qwen2" else False
    try:
        return ModelConfig(
            model_type=model_type,
            vocab_size=reader.get("vocab_size", int),
            hidden_size=hidden,
            intermediate_size=reader.get("intermediate_size", int),
            num_hidden_layers=reader.get("num_hidden_layers", int),
            num_attention_heads=heads,
            num_key_value_heads=reader.get("num_key_value_heads", int, heads),
            head_dim=head_dim,
            max_position_embeddings=reader.get("max_position_embeddings", int, _DEFAULT_POSITIONS[model_type]),
            rms_norm_eps=reader.get("rms_norm_eps", float, 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=reader.get("tie_word_embeddings", bool, False),
            qkv_bias=bias or model_type == "qwen2",
            o_bias=bias,
            mlp_bias=reader.get("mlp_bias", bool, False) if model_type == "llama" else False,
            qk_norm=model_type == "qwen3",
            initializer_range=reader.get("initializer_range", float, 0.02),
            bos_token_id=config.get("bos_token_id", _DEFAULT_BOS[model_type]),
            eos_token_ids=_token_ids(config.get("eos_token_id", _DEFAULT_EOS[model_type])),
            pad_token_id=config.get("pad_token_id"),
        )
    except ConfigError as error:
        raise CheckpointError(f"{name}: {error}") from None


class _Reader:
    """Typed access to a config.json; what is missing or of the wrong type is a CheckpointError."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config, self.name = config, name

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """The value of a key; null counts as absent, a whole number is taken where a float is asked for."""
        value = self.config.get(key)
        if value is None:
            if default is ...:
                self.fail(key, "this key is required")
            return default
        if kind is float and type(value) is int and abs(value) < 2**1023:  # else it is no float
            return float(value)
        if type(value) is not kind:
            self.fail(key, f"expected {kind.__name__}, got {value!r}")
        return value

    def fail(self, key: str, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.name}: {key}: {problem}")


def _model_type(reader: _Reader) -> ModelType:
    """The family of the model, from ``architectures`` or, where that is absent, from ``model_type``."""
    known = ", ".join(ARCHITECTURES)
    names = reader.get("architectures", list, [])
    stated = reader.get("model_type", str, None)
    if not names:
        if stated not in ARCHITECTURES.values():
            reader.fail("model_type", f"{stated!r} is not supported; supported are {known}")
        return stated
    first = str(names[0])
    if len(names) != 1 or first not in ARCHITECTURES:
        hint = did_you_mean(first, ARCHITECTURES)
        reader.fail("architectures", f"{names} is not supported; supported are {known}.{hint}")
    model_type = ARCHITECTURES[first]
    if stated not in (None, model_type):
        reader.fail("model_type", f"{stated!r} contradicts architectures ({first})")
    return model_type


def _refuse_unsupported(reader: _Reader, model_type: ModelType) -> None:
    """Options that would change the result and that this decoder does not have."""
    config = reader.config
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            method = config[key].get("quant_method", "unknown") if isinstance(config[key], Mapping) else "unknown"
            mend = f"; make such a folder with `infir2 convert {reader.name.removesuffix('/config.json')} OUT --to hf`"
            reader.fail(
                key,
                f"the folder is quantised ({method}); training starts from unquantised weights"
                f"{mend if method == 'fp8' else ''}",
            )
    if (activation := config.get("hidden_act", "silu")) != "silu":
        reader.fail("hidden_act", f"{activation!r} is not supported; only 'silu' is")
    if config.get("attention_dropout"):
        reader.fail("attention_dropout", f"{config['attention_dropout']} is not supported; only 0 is")
    layer_types = reader.get("layer_types", list, None)
    if other := sorted({str(kind) for kind in layer_types or ()} - {"full_attention"}):
        reader.fail("layer_types", f"{', '.join(other)} is not supported; only 'full_attention' is")
    if model_type == "llama" or layer_types is not None:
        return
    slides = config.get("use_sliding_window") and config.get("sliding_window", 4096) is not None
    if slides and reader.get("max_window_layers", int, 28) < reader.get("num_hidden_layers", int):
        reader.fail("use_sliding_window", "sliding-window attention is not supported; only full attention is")


def _rope(reader: _Reader) -> tuple[float, Llama3RopeScaling | None]:
    """Theta and scaling, in either spelling. As in transformers, ``rope_scaling`` wins over ``rope_parameters``."""
    key = "rope_scaling" if reader.config.get("rope_scaling") else "rope_parameters"
    rope = _Reader(reader.get(key, dict, {}), f"{reader.name}: {key}")
    nested = [name for name, value in rope.config.items() if isinstance(value, Mapping)]
    if nested:
        reader.fail(f"{key}.{nested[0]}", "positions that differ from layer to layer are not supported")
    for place in (reader, rope):
        if (share := place.get("partial_rotary_factor", float, 1.0)) != 1.0:
            place.fail("partial_rotary_factor", f"{share:g} is not supported; only 1 is")
    theta = rope.get("rope_theta", float, reader.get("rope_theta", float, _DEFAULT_ROPE_THETA))
    rope_type = rope.config.get("rope_type", rope.config.get("type", "default"))
    if rope_type == "default":
        return theta, None
    if rope_type != "llama3":
        rope.fail("rope_type", f"{rope_type!r} is not supported; supported are 'default' and 'llama3'")
    positions = "original_max_position_embeddings"
    original = rope.get(positions, int, None) or reader.get("max_position_embeddings", int)
    if (beside := reader.get(positions, int, original)) != original:  # which of them counts differs among programs
        reader.fail(positions, f"{beside} contradicts the {original} of {key}")
    scaling = Llama3RopeScaling(
        factor=rope.get("factor", float),
        low_freq_factor=rope.get("low_freq_factor", float),
        high_freq_factor=rope.get("high_freq_factor", float),
        original_max_position_embeddings=original,
    )
    if not 0 < scaling.low_freq_factor < scaling.high_freq_factor < math.inf:
        rope.fail("high_freq_factor", "must be above low_freq_factor, which must be above 0")
    if not 1 <= scaling.factor < math.inf or scaling.original_max_position_embeddings < 1:
        rope.fail("factor", "factor and original_max_position_embeddings must be at least 1")
    return theta, scaling


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _family_flags(config: ModelConfig) -> list[tuple[str, bool, bool]]:
    """(field, value, the only value that config.json can express for this family)."""
    family = config.model_type
    return [
        ("qkv_bias", config.qkv_bias, family == "qwen2" or config.qkv_bias),
        ("o_bias", config.o_bias, family != "qwen2" and config.qkv_bias),
        ("mlp_bias", config.mlp_bias, family == "llama" and config.mlp_bias),
        ("qk_norm", config.qk_norm, family == "qwen3"),
    ]


def _check_type(name: str, annotation: Any, value: Any) -> None:
    """Sizes are whole and positive, constants finite and positive, token ids whole and not negative."""
    most = _MOST.get(name, _LARGEST_SIZE)
    if annotation is int and (type(value) is not int or not 1 <= value <= most):
        raise ConfigError(f"{name}: expected a positive whole number up to {most}, got {value!r}")
    if annotation is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise ConfigError(f"{name}: expected a positive number, got {value!r}")
    if name.endswith(("token_id", "token_ids")):
        for token in value if isinstance(value, tuple) else (value,):
            # Some public folders write -1 for "none"; keep whatever whole number they have.
            if token is not None and type(token) is not int:
                raise ConfigError(f"{name.removesuffix('s')}: expected a token id, got {token!r}")
