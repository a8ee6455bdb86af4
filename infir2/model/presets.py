"""Architectures that start from random weights: three small ones of ours and the public Qwen2.5 sizes."""

from dataclasses import replace

from infir2.errors import ConfigError, did_you_mean
from infir2.model.config import ModelConfig


def _qwen2(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **rest: object) -> ModelConfig:
    defaults: dict[str, object] = {"head_dim": hidden // heads, "rope_theta": 1_000_000.0, "tie_word_embeddings": True}
    return ModelConfig(
        model_type="qwen2",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        qkv_bias=True,
        **(defaults | rest),  # type: ignore[arg-type]
    )


def _qwen25(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **rest: object) -> ModelConfig:
    return _qwen2(hidden, intermediate, layers, heads, kv_heads, bos_token_id=151_643, eos_token_ids=(151_643,), **rest)


# Every projection of the three small ones is a multiple of 128 in both dimensions, so that all of them run in FP8.
PRESETS: dict[str, ModelConfig] = {
    # Learns sums in two minutes on one core: docs/sft.md.
    "micro": _qwen2(128, 384, 2, 8, 8, vocab_size=512, max_position_embeddings=4_096, rope_theta=10_000.0),
    "tiny": _qwen2(256, 512, 4, 4, 2, vocab_size=4_096, max_position_embeddings=32_768),
    "small-150m": _qwen2(768, 3_840, 12, 12, 4, vocab_size=32_768, max_position_embeddings=32_768),
    "qwen2.5-0.5b": _qwen25(896, 4_864, 24, 14, 2, vocab_size=151_936, max_position_embeddings=32_768),
    "qwen2.5-1.5b": _qwen25(1_536, 8_960, 28, 12, 2, vocab_size=151_936, max_position_embeddings=131_072),
    "qwen2.5-7b": _qwen25(
        3_584, 18_944, 28, 28, 4, vocab_size=152_064, max_position_embeddings=131_072, tie_word_embeddings=False
    ),
}


def preset(name: str, vocab_size: int = 0) -> ModelConfig:
    """A preset's architecture; ``vocab_size`` 0 keeps the preset's own vocabulary.

    Another vocabulary means another tokenizer, so it also forgets the preset's special tokens.
    Raises ConfigError for an unknown name.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"model.preset: no preset {name!r}; there are {', '.join(PRESETS)}.{did_you_mean(name, PRESETS)}"
        )
    config = PRESETS[name]
    if vocab_size in (0, config.vocab_size):
        return config
    return replace(config, vocab_size=vocab_size, bos_token_id=None, eos_token_ids=())
