"""The decoder against transformers' models, and the rules of construction and initialisation."""

import copy
import dataclasses

import pytest
import torch
from tensors import relative_error
from transformers import AutoConfig, AutoModelForCausalLM

from infir2.kernels import rotary
from infir2.model.attention import causal_attention
from infir2.model.config import Llama3RopeScaling, ModelConfig
from infir2.model.presets import preset
from infir2.model.transformer import CausalLM, Linear
from infir2.parallel.apply import compile_layer

SHAPE = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rope_theta": 10_000.0,
    "initializer_range": 0.1,
}
FAMILIES = {
    "qwen2-tied": ModelConfig(model_type="qwen2", qkv_bias=True, tie_word_embeddings=True, **SHAPE),
    "qwen2-untied": ModelConfig(model_type="qwen2", qkv_bias=True, **SHAPE),
    "qwen3": ModelConfig(model_type="qwen3", qk_norm=True, **(SHAPE | {"head_dim": 32})),
    "llama": ModelConfig(model_type="llama", **(SHAPE | {"num_key_value_heads": 4})),
    "llama3-bias": ModelConfig(
        model_type="llama",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        rope_scaling=Llama3RopeScaling(4.0, 1.0, 4.0, 64),
        **SHAPE,
    ),
}


def inputs(rows: int = 2, length: int = 150, vocab_size: int = 160) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(3))
    return ids, torch.arange(length).expand(rows, length)


def hugging_face_pair(config: ModelConfig, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, CausalLM]:
    """A transformers model with random norms and biases, and ours with the same weights."""
    content = config.to_hf() | {"dtype": "float32", "torch_dtype": "float32"}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content), attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    ours = CausalLM(config, dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.train(), ours


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_equal_transformers(name):
    theirs, ours = hugging_face_pair(FAMILIES[name])
    ids, positions = inputs()
    expected = theirs(input_ids=ids, use_cache=False).logits
    actual = ours(ids, positions, causal_attention)
    assert expected.std() > 0.3, "logits too small for the comparison to mean anything"
    assert (actual - expected).abs().max() <= 2e-5
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weight).sum().backward()
    (actual * weight).sum().backward()
    reference = dict(theirs.named_parameters())
    assert {n for n, _ in ours.named_parameters()} == set(reference)
    for parameter_name, parameter in ours.named_parameters():
        gradient = reference[parameter_name].grad
        error = relative_error(parameter.grad, gradient)
        assert error <= 1e-4, f"{parameter_name}: {error:.2e}"


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_as_close_to_float32_as_transformers_is(name):
    theirs, ours = hugging_face_pair(FAMILIES[name], torch.bfloat16)
    ids, positions = inputs()
    with torch.no_grad():
        exact = theirs(input_ids=ids, use_cache=False).logits
        their_error = (theirs.bfloat16()(input_ids=ids, use_cache=False).logits.float() - exact).norm()
        logits = ours(ids, positions, causal_attention)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).norm() <= 1.05 * their_error


def test_positions_are_taken_from_position_ids():
    _, ours = hugging_face_pair(FAMILIES["llama3-bias"])
    ids, positions = inputs(rows=1, length=24)
    with torch.no_grad():
        plain = ours(ids, positions, causal_attention)
        shifted = ours(ids, positions + 100, causal_attention)
        doubled = ours(ids, positions * 2, causal_attention)
    assert (plain - shifted).abs().max() < 1e-4  # rotary attention knows only distances
    assert (plain - doubled).abs().max() > 1e-2


def test_head_gets_hidden_states_and_the_head_weight():
    _, ours = hugging_face_pair(FAMILIES["qwen2-tied"])
    ids, positions = inputs()
    seen = {}

    def head(hidden, weight):
        seen["weight"] = weight
        return hidden @ weight.T

    logits = ours(ids, positions, causal_attention, head=head)
    assert seen["weight"] is ours.model.embed_tokens.weight
    torch.testing.assert_close(logits, ours(ids, positions, causal_attention))


def test_attention_back_end_sees_layer_numbers_and_grouped_heads():
    config = FAMILIES["qwen3"]
    calls = []

    def attend(q, k, v, layer_index):
        calls.append((layer_index, tuple(q.shape), tuple(k.shape), tuple(v.shape), q.dtype))
        return causal_attention(q, k, v, layer_index)

    CausalLM(config)(*inputs(2, 10), attend)
    assert calls == [
        (layer, (2, 10, 4, 32), (2, 10, 2, 32), (2, 10, 2, 32), torch.bfloat16)
        for layer in range(config.num_hidden_layers)
    ]


def test_parameters_are_float32_and_every_product_is_a_named_linear():
    model = CausalLM(FAMILIES["llama"])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    linears = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, Linear)}
    assert linears == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    assert [name for name, _ in model.named_buffers()] == ["model.rotary.inv_freq"]
    assert not any("rotary" in name for name in model.state_dict())


@pytest.mark.parametrize("name", ["qwen2-tied", "llama3-bias"])
def test_meta_construction_gives_the_same_model(name):
    config = FAMILIES[name]
    direct = CausalLM(config, torch.float32)
    direct.init_weights(11)
    with torch.device("meta"):
        model = CausalLM(config, torch.float32)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.init_weights(11)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == config.tie_word_embeddings
    assert len(list(model.named_parameters())) == len(list(direct.named_parameters()))
    arguments = (*inputs(), causal_attention)
    torch.testing.assert_close(model(*arguments), direct(*arguments), rtol=0, atol=0)


def test_assigning_a_state_dict_to_a_meta_model_works():
    config = FAMILIES["llama3-bias"]
    direct = CausalLM(config, torch.float32)
    direct.init_weights(0)
    with torch.device("meta"):
        model = CausalLM(config, torch.float32)
    model.load_state_dict(direct.state_dict(), assign=True)
    arguments = (*inputs(), causal_attention)
    torch.testing.assert_close(model(*arguments), direct(*arguments), rtol=0, atol=0)


def test_rotary_frequencies_survive_a_change_of_dtype():
    model = CausalLM(FAMILIES["llama"])
    before = model.model.rotary.inv_freq.clone()
    model.to(torch.bfloat16)
    assert model.model.rotary.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary.inv_freq, before)


def test_initial_values_do_not_depend_on_order_or_on_the_rest_of_the_model():
    config = FAMILIES["qwen2-untied"]
    model = CausalLM(config)
    torch.manual_seed(99)  # the global generator must not matter
    values = dict(model.initial_values(5))
    deeper = dict(CausalLM(dataclasses.replace(config, num_hidden_layers=5)).initial_values(5))
    assert all(torch.equal(values[name], deeper[name]) for name in values)
    model.init_weights(5)
    assert all(torch.equal(parameter, values[name]) for name, parameter in model.named_parameters())
    other = dict(model.initial_values(6))
    assert not torch.equal(values["lm_head.weight"], other["lm_head.weight"])
    assert not torch.equal(
        values["model.layers.0.self_attn.q_proj.weight"], values["model.layers.1.self_attn.q_proj.weight"]
    )


def test_initial_values_follow_their_kind():
    for name, value in CausalLM(FAMILIES["qwen3"]).initial_values(0):
        if "norm" in name:
            assert torch.equal(value, torch.ones_like(value)), name
        else:
            assert value.std().item() == pytest.approx(0.1, rel=0.05), name
    biases = [v for n, v in CausalLM(FAMILIES["llama3-bias"]).initial_values(0) if n.endswith("bias")]
    assert len(biases) == 3 * 7
    assert not any(value.any() for value in biases)


def test_a_tied_model_stays_tied_when_copied_or_moved():
    model = CausalLM(FAMILIES["qwen2-tied"])
    for other in (copy.deepcopy(model), model.to(torch.float64), model.float()):
        assert other.lm_head.weight is other.model.embed_tokens.weight


def test_compiled_layers_share_one_graph():
    """28 layers must not mean 28 compilations: torch gives up after a few of the same code."""
    from torch._dynamo.testing import CompileCounter

    model = CausalLM(dataclasses.replace(FAMILIES["llama"], num_hidden_layers=12), torch.float32)
    counter = CompileCounter()
    expected = model(*inputs(), causal_attention)
    for layer in model.model.layers:
        compile_layer(layer, counter)
    actual = model(*inputs(), causal_attention)
    assert counter.frame_count == 2, "before attention and after it"
    torch.testing.assert_close(actual, expected)


def test_cast_weights_are_used_without_gradients_only() -> None:
    model = CausalLM(preset("tiny", 256), torch.bfloat16)
    model.init_weights(0)
    ids, positions = torch.arange(12)[None], torch.arange(12)[None]
    with torch.no_grad():
        expected = model(ids, positions, causal_attention)
    model.cast_weights()
    copy = model.lm_head.cast if model.lm_head.cast is not None else model.model.layers[0].mlp.up_proj.cast
    assert copy is not None
    assert copy.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(model(ids, positions, causal_attention), expected)
        model.model.layers[0].mlp.up_proj.weight.zero_()
        assert torch.equal(model(ids, positions, causal_attention), expected), "the copy is what is multiplied"
        model.cast_weights()
        assert not torch.equal(model(ids, positions, causal_attention), expected)
    model(ids, positions, causal_attention).sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    model.drop_casts()
    assert all(getattr(module, "cast", None) is None for module in model.modules())


@pytest.mark.parametrize("family", ["qwen2-tied", "llama3-bias", "qwen3"])
@pytest.mark.parametrize("frozen", [False, True])
def test_joined_weights_change_nothing(family: str, frozen: bool) -> None:
    """q, k, v and gate, up in one GEMM each while generating: copies of masters, or frozen parameters, moved."""
    model = CausalLM(FAMILIES[family], torch.float32 if frozen else torch.bfloat16)
    model.init_weights(0)
    model.requires_grad_(not frozen)
    layer = model.model.layers[0]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Linear) and module.bias is not None:
                module.bias.normal_()
        expected = model(*inputs(), causal_attention)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.cast_weights()
        joined = layer.self_attn.q_proj.joined
        assert joined is not None
        assert layer.mlp.gate_proj.joined.weight.shape == (2 * 112, 64)
        torch.testing.assert_close(model(*inputs(), causal_attention), expected)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

        layer.self_attn.v_proj.weight.mul_(2.0)
        if layer.self_attn.v_proj.bias is not None:
            layer.self_attn.v_proj.bias.add_(1.0)
        model.cast_weights()
        assert layer.self_attn.q_proj.joined is joined, "recorded graphs go on reading the same memory"
        last = joined.weight[sum(joined.sizes[:2]) :]
        assert torch.equal(last, layer.self_attn.v_proj.weight.to(last.dtype))
        changed = model(*inputs(), causal_attention)
        model.drop_casts()
        assert (layer.self_attn.q_proj.joined is None) != frozen
        torch.testing.assert_close(changed, model(*inputs(), causal_attention))
        assert not torch.allclose(changed, expected)


def test_parameters_that_were_put_elsewhere_are_not_taken_for_joined_ones() -> None:
    model = CausalLM(FAMILIES["qwen2-tied"], torch.float32).requires_grad_(False)
    model.init_weights(0)
    model.cast_weights()
    other = copy.deepcopy(model)
    other.init_weights(1)
    with torch.no_grad():
        expected = other(*inputs(), causal_attention)
        fresh = CausalLM(FAMILIES["qwen2-tied"], torch.float32)
        fresh.init_weights(1)
        torch.testing.assert_close(expected, fresh(*inputs(), causal_attention))


def test_weights_that_are_trained_in_the_compute_dtype_stay_alone() -> None:
    model = CausalLM(FAMILIES["qwen2-tied"], torch.float32)
    model.cast_weights()
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    assert all(linear.joined is None and linear.cast is None for linear in linears)


def test_frozen_parameters_may_change_without_being_joined_again() -> None:
    """Loading other weights writes into the joined memory, biases included: nobody can meet an old one."""
    model, other = (CausalLM(FAMILIES["llama3-bias"], torch.float32).requires_grad_(False) for _ in range(2))
    for seed, each in enumerate((model, other)):
        each.init_weights(seed)
        for module in each.modules():
            if isinstance(module, Linear) and module.bias is not None:
                module.bias.normal_()
    model.cast_weights()
    assert model.model.layers[0].self_attn.q_proj.joined.bias is not None
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs(), causal_attention), other(*inputs(), causal_attention))


def test_parameters_of_two_dtypes_are_not_joined() -> None:
    model = CausalLM(FAMILIES["llama3-bias"], torch.bfloat16).requires_grad_(False)
    model.init_weights(0)
    attention = model.model.layers[0].self_attn
    attention.k_proj.to(torch.bfloat16)  # its weight would get a copy that nothing refreshes
    model.cast_weights()
    assert attention.q_proj.joined is None
    assert attention.k_proj.cast is None
    with torch.no_grad():
        before = model(*inputs(), causal_attention)
        attention.k_proj.weight.mul_(3.0)
        model.cast_weights()
        assert not torch.equal(model(*inputs(), causal_attention), before)


def test_heads_that_the_kernel_cannot_turn_go_to_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(2, 5, 4, 24), torch.randn(2, 5, 2, 24)
    angles = torch.randn(2, 5, 12)
    expected = rotary.rotate(q, k, angles.cos(), angles.sin())
    monkeypatch.setattr(rotary, "inference_on_cuda", lambda x: True)
    for got, turned in zip(rotary.rotate(q, k, angles.cos(), angles.sin()), expected, strict=True):
        assert torch.equal(got, turned)
