"""config.json in and out, the presets and the counting of parameters and FLOPs."""

import dataclasses
import json

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from infir2.errors import CheckpointError, ConfigError
from infir2.model.config import Llama3RopeScaling, ModelConfig, from_hf
from infir2.model.presets import PRESETS, preset

LLAMA3 = Llama3RopeScaling(8.0, 1.0, 4.0, 8_192)
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 16_384,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 5,
    "eos_token_ids": (7, 9),
}
FAMILIES = {
    "qwen2": ModelConfig(model_type="qwen2", qkv_bias=True, tie_word_embeddings=True, **SHAPE),
    "qwen2-wide-heads": ModelConfig(model_type="qwen2", qkv_bias=True, **(SHAPE | {"head_dim": 32})),
    "qwen3": ModelConfig(model_type="qwen3", qk_norm=True, **(SHAPE | {"head_dim": 32})),
    "qwen3-bias": ModelConfig(model_type="qwen3", qk_norm=True, qkv_bias=True, o_bias=True, **SHAPE),
    "llama": ModelConfig(model_type="llama", **(SHAPE | {"eos_token_ids": (2,)})),
    "llama3-bias": ModelConfig(
        model_type="llama", qkv_bias=True, o_bias=True, mlp_bias=True, rope_scaling=LLAMA3, **SHAPE
    ),
}


def hf_class_config(config: ModelConfig) -> transformers.PretrainedConfig:
    content = config.to_hf()
    return AutoConfig.for_model(content.pop("model_type"), **content)


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_through_transformers(name, tmp_path):
    config = FAMILIES[name]
    hf_class_config(config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written
    assert from_hf(written, "config.json") == config
    assert from_hf(json.loads(json.dumps(config.to_hf())), "config.json") == config


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_4_spelling(name):
    content = FAMILIES[name].to_hf()
    del content["rope_parameters"], content["dtype"]
    assert from_hf(content, "config.json") == FAMILIES[name]


def test_silent_keys_mean_what_transformers_assumes():
    for model_type in ("qwen2", "qwen3", "llama"):
        content = AutoConfig.for_model(model_type).to_dict() | {"model_type": model_type}
        keep = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        short = {key: content[key] for key in (*keep, "num_attention_heads")}
        assert from_hf(short, "a") == from_hf(content, "b")


@pytest.mark.parametrize("name", FAMILIES)
def test_parameter_count_equals_transformers(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_class_config(FAMILIES[name]))
    assert FAMILIES[name].num_parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "count"),
    [("qwen2.5-0.5b", 494_032_768), ("qwen2.5-1.5b", 1_543_714_304), ("qwen2.5-7b", 7_615_616_512)],
)
def test_public_presets_have_the_public_sizes(name, count):
    config = preset(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_class_config(config))
    assert config.num_parameters() == sum(p.numel() for p in model.parameters()) == count


def test_small_presets_fit_fp8_blocks():
    for name in ("micro", "tiny", "small-150m"):
        config = preset(name)
        for size in (
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        ):
            assert size % 128 == 0, name
    assert 140e6 < preset("small-150m").num_parameters() < 160e6


def test_preset_vocabulary_and_unknown_name():
    assert preset("tiny", 640).vocab_size == 640
    assert preset("qwen2.5-0.5b", 640).bos_token_id is None
    assert preset("qwen2.5-0.5b").eos_token_ids == (151_643,)
    with pytest.raises(ConfigError, match=r"model\.preset.*qwen2\.5-15b.*Did you mean 'qwen2\.5-1\.5b'"):
        preset("qwen2.5-15b")


def test_every_preset_is_written_and_read_back():
    for name, config in PRESETS.items():
        assert from_hf(hf_class_config(config).to_dict(), name) == config


def test_flops_count_matches_torch():
    config = FAMILIES["llama"]
    content = config.to_hf() | {"dtype": "float32"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content), attn_implementation="eager")
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=torch.zeros(1, 128, dtype=torch.long), use_cache=False).logits.sum().backward()
    # Eager attention computes the whole square: every token meets all 128 positions.
    expected = 128 * config.flops_per_token(128, attention_span=128)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)
    assert config.flops_per_token(128) == config.flops_per_token(128, attention_span=64.5)


UNSUPPORTED = {
    "architectures": (["MistralForCausalLM"], "MistralForCausalLM"),
    "model_type": ("mistral", "contradicts"),
    "quantization_config": ({"quant_method": "fp8"}, "fp8"),
    "hidden_act": ("gelu", "gelu"),
    "attention_dropout": (0.1, "0.1"),
    "rope_scaling": ({"rope_type": "yarn", "factor": 4.0}, "yarn"),
    "rope_parameters": ({"type": "dynamic", "factor": 4.0}, "dynamic"),
    "partial_rotary_factor": (0.5, "0.5"),
    "layer_types": (["full_attention", "sliding_attention"], "sliding_attention"),
    "num_attention_heads": (3, "does not divide hidden_size"),
    "num_key_value_heads": (3, "does not divide"),
    "head_dim": (15, "odd"),
    "hidden_size": (None, "required"),
    "max_position_embeddings": (0, "positive"),
    "intermediate_size": (12.5, "12.5"),
    "num_hidden_layers": (100_000, "up to 1024"),
    "vocab_size": (2**62, "up to 2147483647"),
    "rope_theta": (10**400, "expected float"),
    "rms_norm_eps": (0.0, "positive"),
    "tie_word_embeddings": ("yes", "yes"),
    "eos_token_id": ("<end>", "<end>"),
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_unsupported_config_is_refused_by_file_and_key(key):
    value, reason = UNSUPPORTED[key]
    content = FAMILIES["qwen2"].to_hf()
    del content["rope_scaling"], content["rope_parameters"], content["head_dim"]
    content[key] = value
    with pytest.raises(CheckpointError) as caught:
        from_hf(content, "models/x/config.json")
    message = str(caught.value)
    assert message.startswith("models/x/config.json: ")
    assert key in message
    assert reason in message
    assert "\n" not in message


def test_sizes_that_make_too_large_a_model_together_are_refused():
    content = {**FAMILIES["qwen2"].to_hf(), "vocab_size": 2**31 - 1, "intermediate_size": 2**31 - 1}
    content |= {"num_hidden_layers": 1024}
    with pytest.raises(CheckpointError, match=r"^x: hidden_size, .* would make a model of [\d,]+ parameters$"):
        from_hf(content, "x")


def test_sliding_window_is_refused_only_where_layers_use_it():
    content = FAMILIES["qwen2"].to_hf() | {"use_sliding_window": True, "sliding_window": 128}
    assert from_hf(content | {"max_window_layers": 2}, "x") == FAMILIES["qwen2"]
    with pytest.raises(CheckpointError, match="use_sliding_window"):
        from_hf(content | {"max_window_layers": 1}, "x")


def test_llama3_scaling_needs_its_parameters():
    content = FAMILIES["llama3-bias"].to_hf()
    del content["rope_scaling"]["high_freq_factor"]
    with pytest.raises(CheckpointError, match=r"rope_scaling: high_freq_factor: this key is required"):
        from_hf(content, "config.json")


@pytest.mark.parametrize("changes", [{"factor": float("nan")}, {"high_freq_factor": float("inf")}, {"factor": 0.5}])
def test_llama3_scaling_that_is_no_scaling_is_refused(changes):
    content = FAMILIES["llama3-bias"].to_hf()
    content["rope_scaling"] |= changes
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        from_hf(content, "config.json")


def test_original_positions_named_twice_must_agree():
    content = FAMILIES["llama3-bias"].to_hf()
    assert from_hf(content | {"original_max_position_embeddings": 8_192}, "x") == FAMILIES["llama3-bias"]
    with pytest.raises(CheckpointError, match="original_max_position_embeddings: 4096 contradicts the 8192"):
        from_hf(content | {"original_max_position_embeddings": 4_096}, "config.json")


@pytest.mark.parametrize("key", ["architectures", "layer_types"])
@pytest.mark.parametrize("value", [5, [["LlamaForCausalLM"]], ["full_attention", "sliding_attention"]])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_lists_of_names_are_lists_of_known_names(family, key, value):
    with pytest.raises(CheckpointError, match=key):
        from_hf(FAMILIES[family].to_hf() | {key: value}, "config.json")


def test_positions_that_differ_by_layer_are_refused():
    content = FAMILIES["llama"].to_hf() | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}
    with pytest.raises(CheckpointError, match=r"rope_parameters\.full_attention"):
        from_hf(content, "config.json")


def test_what_config_json_cannot_say_is_refused():
    with pytest.raises(ConfigError, match="qkv_bias"):
        dataclasses.replace(FAMILIES["qwen2"], qkv_bias=False)
    with pytest.raises(ConfigError, match="o_bias"):
        dataclasses.replace(FAMILIES["llama"], qkv_bias=True)


def test_sequence_length():
    config = preset("tiny")
    config.check_sequence_length(32_768)
    with pytest.raises(ConfigError, match=r"data\.seq_len: 32769 .*32768"):
        config.check_sequence_length(32_769)
