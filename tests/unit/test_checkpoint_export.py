"""FP8 folders: the trainer's own codes, values that survive every round trip, and the same numbers in transformers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import ARCHITECTURE, write_model
from tensors import tensors_in
from torch import Tensor

from infir2.checkpoint.export_fp8 import plan_export
from infir2.checkpoint.fp8_format import Fp8Folder, dequantize_weight, quantize_weight
from infir2.cli import main
from infir2.errors import CheckpointError, ConfigError
from infir2.fp8.linear import Fp8Linear
from infir2.fp8.tensor import Operand
from infir2.stages.convert import Options, convert_model


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def edit(folder: Path, **changes: Tensor | None) -> None:
    """Replace or (None) remove tensors; ``__`` in a name stands for a dot."""
    tensors = load_file(folder / "model.safetensors")
    for key, value in changes.items():
        tensors.pop(key.replace("__", "."), None)
        if value is not None:
            tensors[key.replace("__", ".")] = value
    save_file(tensors, folder / "model.safetensors")


# The quantiser


@pytest.mark.parametrize("shape", [(128, 128), (256, 4224), (4224, 256), (1, 7), (300, 2500)])
@pytest.mark.parametrize("scale_format", ["ue8m0", "fp32"])
def test_tiles_change_nothing(shape: tuple[int, int], scale_format: str) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 20, shape[1])
    whole = Operand.quantize(weight.bfloat16(), "block", scale_format)
    tiled = quantize_weight(weight, scale_format)
    assert torch.equal(bits(tiled.codes), bits(whole.codes))
    assert torch.equal(tiled.scale, whole.scale)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(dequantize_weight(tiled, dtype), whole.dequantize(dtype))


def test_the_exported_codes_are_those_of_the_trained_layers(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infir2.launch import training

    built: list[Any] = []
    build = training.build_model
    monkeypatch.setattr(training, "build_model", lambda *words: built.append(build(*words)) or built[-1])
    path, run = recipe(**{"train.steps": 3, "fp8.bf16_first_layers": 1, "optim.decay_steps": 0})
    assert main(["cpt", str(path)]) == 0
    convert_model(str(run), tmp_path / "fp8", "fp8")
    model, report = built[0]
    stored = tensors_in(tmp_path / "fp8")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    assert len(layers) == 7
    for name, module in layers.items():
        operand = module.weight_operand()
        assert torch.equal(bits(stored.pop(f"{name}.weight")), bits(operand.codes)), name
        assert torch.equal(stored.pop(f"{name}.weight_scale_inv"), operand.scale), name
    parameters = dict(model.named_parameters())
    for name, tensor in stored.items():
        assert torch.equal(tensor, parameters[name].detach().bfloat16()), name
    listed = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert set(listed) == set(report.kept), "layers that training kept in bf16 stay in bf16"


# Round trips


def adversarial() -> dict[str, Tensor]:
    """bfloat16 [256, 256] tensors whose blocks are at the edges of what the format can say."""
    generator = torch.Generator().manual_seed(1)
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).reshape(256, 256)
    finite = torch.where(every.isfinite() & (every.abs() < 2.9e38), every, 0)
    normal = torch.randn(256, 256, generator=generator)
    just_above = normal.clamp(-1, 1)
    just_above[::128, ::128] = 225 / 128  # 225 x scale, which rounds onto 224 x scale: the other spelling
    half = torch.full((256, 256), 1.0) * 2.0 ** torch.randint(-9, 1, (256, 256), generator=generator)
    return {
        "every bfloat16": finite,
        "sorted by size": finite.flatten().sort().values.reshape(256, 256),
        "normal": normal.bfloat16(),
        "heavy tails": (normal * normal.abs().exp() ** 4).bfloat16(),
        "just above 224": just_above.bfloat16(),
        "powers of two": half.bfloat16(),
        "smallest": (normal * 2.0**-133).bfloat16(),
        "subnormal scales": (normal * 2.0**-120).bfloat16(),
        "largest": (normal.clamp(-1, 1) * 2.9e38).bfloat16(),
        "zero": torch.zeros(256, 256).bfloat16(),
        "minus zero": -torch.zeros(256, 256).bfloat16(),
    }


@pytest.mark.parametrize("name", adversarial())
def test_values_never_change_again_and_codes_only_where_a_maximum_rounds_onto_224(name: str) -> None:
    first = quantize_weight(adversarial()[name], "ue8m0")
    values = dequantize_weight(first, torch.bfloat16)
    assert torch.equal(values.float(), dequantize_weight(first, torch.float32)), "bfloat16 holds every value"
    second = quantize_weight(values, "ue8m0")
    assert torch.equal(bits(dequantize_weight(second, torch.bfloat16)), bits(values)), "to the sign of a zero"

    blocks = first.codes.float().reshape(2, 128, 2, 128).abs().amax(dim=(1, 3))
    respelled = (blocks == 224) & (first.scale > 2.0**-126)  # The smallest scale cannot be halved.
    assert torch.equal(second.scale, torch.where(respelled, first.scale / 2, first.scale))
    changed = (bits(first.codes) != bits(second.codes)).reshape(2, 128, 2, 128).any(dim=3).any(dim=1)
    assert torch.equal(changed, respelled), "codes change in those blocks and in no other"
    third = quantize_weight(dequantize_weight(second, torch.bfloat16), "ue8m0")
    assert torch.equal(bits(third.codes), bits(second.codes)), "and at most once"
    if name == "just above 224":
        assert respelled.all()
    if name == "normal":
        assert not respelled.any()


def test_how_often_codes_are_spelled_otherwise() -> None:
    """Counted on blocks of normal weights of many sizes: about one block in thirty, never a value."""
    spread = torch.logspace(-3, 3, 512, base=2).repeat_interleave(128)[:, None]
    weight = (torch.randn(512 * 128, 128, generator=torch.Generator().manual_seed(2)) * spread).bfloat16()
    first = quantize_weight(weight, "ue8m0")
    second = quantize_weight(dequantize_weight(first, torch.bfloat16), "ue8m0")
    respelled = (first.scale != second.scale).sum().item()
    assert 5 <= respelled <= 40
    assert torch.equal(dequantize_weight(first, torch.float32), dequantize_weight(second, torch.float32))


def test_folders_go_round(tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf")
    edit(source, model__layers__0__mlp__up_proj__weight=adversarial()["just above 224"][:, :128].float())
    convert_model(str(source), tmp_path / "fp8", "fp8")
    convert_model(str(tmp_path / "fp8"), tmp_path / "bf16")
    convert_model(str(tmp_path / "bf16"), tmp_path / "fp8-2", "fp8", Options(scale_dtype="e8m0"))
    convert_model(str(tmp_path / "fp8-2"), tmp_path / "bf16-2")
    first, last = tensors_in(tmp_path / "bf16"), tensors_in(tmp_path / "bf16-2")
    assert first.keys() == last.keys() == tensors_in(source).keys()
    assert all(torch.equal(bits(first[name]), bits(last[name])) for name in first)
    codes, again = tensors_in(tmp_path / "fp8"), tensors_in(tmp_path / "fp8-2")
    layers = [name for name in codes if name.endswith("proj.weight")]
    respelled = [name for name in layers if not torch.equal(bits(codes[name]), bits(again[name]))]
    assert respelled == ["model.layers.0.mlp.up_proj.weight"]


# The folder


def test_what_is_written(tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", tie_word_embeddings=True)
    for scale_format, scale_dtype, label, dtype in (
        ("ue8m0", "fp32", "ue8m0", torch.float32),
        ("ue8m0", "e8m0", "ue8m0", torch.float8_e8m0fnu),
        ("fp32", "fp32", "float", torch.float32),
    ):
        out = tmp_path / f"{scale_format}-{scale_dtype}"
        convert_model(str(source), out, "fp8", Options(scale_format=scale_format, scale_dtype=scale_dtype))
        config = json.loads((out / "config.json").read_text())
        assert config["quantization_config"] == {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "scale_fmt": label,
            "modules_to_not_convert": ["lm_head"],
        }
        assert config["dtype"] == config["torch_dtype"] == "bfloat16"
        stored = tensors_in(out)
        assert "lm_head.weight" not in stored
        assert len(stored) == 26 + 14
        up = "model.layers.1.mlp.up_proj.weight"
        expected = Operand.quantize(tensors_in(source)[up].bfloat16(), "block", scale_format)
        assert torch.equal(bits(stored[up]), bits(expected.codes))
        scale = stored[f"{up}_scale_inv"]
        assert (scale.dtype, scale.shape) == (dtype, (2, 1))
        assert torch.equal(scale.float(), expected.scale)
        rest = [value for name, value in stored.items() if "proj.weight" not in name]
        assert {value.dtype for value in rest} == {torch.bfloat16}


def test_fused_groups_are_skipped_whole() -> None:
    odd = dataclasses.replace(ARCHITECTURE, num_key_value_heads=2, intermediate_size=192, num_hidden_layers=1)
    export = plan_export(odd)
    assert export.converted == ("model.layers.0.self_attn.o_proj",)
    reasons = {name.rpartition(".")[2]: reason for name, reason in export.skipped.items()}
    assert reasons["q_proj"] == "fused with k_proj, which is not quantised"
    assert reasons["k_proj"] == "shape: rows 64 is not a multiple of 128"
    assert reasons["gate_proj"] == reasons["up_proj"] == "shape: rows 192 is not a multiple of 128"
    assert export.config()["modules_to_not_convert"] == [
        "lm_head",
        *(f"model.layers.0.self_attn.{name}_proj" for name in "qkv"),
        *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
    ]
    kept = plan_export(ARCHITECTURE, keep={"model.layers.1.mlp.gate_proj": "by hand"})
    assert {"model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj", "lm_head"} == set(kept.skipped)
    with pytest.raises(ConfigError, match="powers of two only"):
        plan_export(ARCHITECTURE, "fp32", "e8m0")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.2e38, 1e39])
@pytest.mark.parametrize("scale_format", ["ue8m0", "fp32"])
def test_values_that_fp8_cannot_store(tmp_path: Path, value: float, scale_format: Any) -> None:
    source = write_model(tmp_path / "hf")
    weight = torch.zeros(256, 128, dtype=torch.float64)
    weight[200, 100] = value
    edit(source, model__layers__0__mlp__up_proj__weight=weight)
    if value == 3.2e38 and scale_format == "fp32":
        convert_model(str(source), tmp_path / "fp8", "fp8", Options(scale_format=scale_format))
        convert_model(str(tmp_path / "fp8"), tmp_path / "back")
        return
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight: holds a value that FP8 cannot store"):
        convert_model(str(source), tmp_path / "fp8", "fp8", Options(scale_format=scale_format))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("value", "to", "dtype", "message"),
    [
        (float("nan"), "fp8", None, r"norm\.weight: holds NaN or Inf"),
        (float("inf"), "fp8", None, r"norm\.weight: holds NaN or Inf"),
        (3.4e38, "fp8", None, r"norm\.weight: holds a value above 3\.39e\+38, the largest that bfloat16 can store"),
        (
            3.4e38,
            "hf",
            "bfloat16",
            r"norm\.weight: holds a value above 3\.39e\+38, the largest that bfloat16 can store",
        ),
        (7e4, "hf", "float16", r"norm\.weight: holds a value above 6\.55e\+04, the largest that float16 can store"),
    ],
)
def test_no_value_becomes_infinite_on_the_way(tmp_path: Path, value: float, to: Any, dtype: Any, message: str) -> None:
    source = write_model(tmp_path / "hf")
    weight = torch.ones(128)
    weight[5] = -value
    edit(source, model__norm__weight=weight)
    with pytest.raises(CheckpointError, match=message):
        convert_model(str(source), tmp_path / "out", to, Options(dtype=dtype))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# transformers


@pytest.mark.parametrize(
    ("changes", "scales"),
    [
        ({}, ("ue8m0", "fp32")),
        ({"tie_word_embeddings": False}, ("ue8m0", "e8m0")),
        ({"num_key_value_heads": 2, "intermediate_size": 192}, ("ue8m0", "fp32")),
        ({"model_type": "qwen3", "qk_norm": True, "qkv_bias": False}, ("fp32", "fp32")),
        ({"model_type": "llama", "qkv_bias": False, "intermediate_size": 384}, ("ue8m0", "fp32")),
    ],
    ids=["qwen2", "untied, e8m0", "odd shapes", "qwen3, fp32", "llama"],
)
@pytest.mark.filterwarnings("ignore")
def test_transformers_computes_the_dequantised_weights(tmp_path: Path, changes: Any, scales: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    source = write_model(tmp_path / "hf", **changes)
    edit(source, model__norm__weight=torch.rand(128) + 0.5)
    convert_model(str(source), tmp_path / "fp8", "fp8", Options(scale_format=scales[0], scale_dtype=scales[1]))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fp8").eval()

    view = Fp8Folder(tmp_path / "fp8")
    plain = transformers.AutoConfig.from_pretrained(source)
    reference = type(model)._from_config(plain, dtype=torch.bfloat16).eval()
    missing, unexpected = reference.load_state_dict({name: view.tensor(name) for name in view.names}, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if plain.tie_word_embeddings else [], [])
    reference.tie_weights()
    theirs, ours = dict(model.named_parameters()), dict(reference.named_parameters())
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)
        again = [m.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False) for m in (model, reference)]
    assert again[0].shape == (2, 29)
    assert torch.equal(*again)


# Folders of others, and broken ones


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    convert_model(str(write_model(tmp_path / "hf")), tmp_path / "fp8", "fp8")
    return tmp_path / "fp8"


UP, SCALE = "model__layers__0__mlp__up_proj__weight", "model__layers__0__mlp__up_proj__weight_scale_inv"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
def test_other_scale_dtypes_are_read(fp8: Path, dtype: torch.dtype) -> None:
    expected = Fp8Folder(fp8).tensor(UP.replace("__", "."))
    scale = load_file(fp8 / "model.safetensors")[SCALE.replace("__", ".")]
    edit(fp8, **{SCALE: scale.to(dtype)})
    assert torch.equal(Fp8Folder(fp8).tensor(UP.replace("__", ".")), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({SCALE: None}, "holds FP8 codes, but .*up_proj.weight_scale_inv is missing"),
        ({SCALE: torch.ones(1, 1)}, r"shape \[1, 1\], but .* has \[2, 1\] blocks of 128 x 128"),
        ({SCALE: torch.full((2, 1), 120, dtype=torch.uint8)}, "U8 scales cannot be read, only F32"),
        ({SCALE: torch.full((2, 1), float("nan"))}, "a scale is not a number"),
        ({SCALE: torch.full((2, 1), -1.0)}, "a scale is not a number, or is negative"),
        ({SCALE: torch.full((2, 1), 3e38)}, "code times scale is not a finite number"),
        ({UP: torch.full((256, 128), float("nan")).to(torch.float8_e4m3fn)}, "code times scale is not a finite number"),
        ({UP: torch.zeros(256, 128)}, r"unexpected: .*up_proj\.weight_scale_inv"),
        ({UP: torch.zeros(256, 128).to(torch.float8_e5m2), SCALE: None}, r"not a plain .*F8_E5M2"),
        ({"model__norm__weight": None}, r"missing: model\.norm\.weight"),
        ({"extra": torch.zeros(1)}, "unexpected: extra"),
    ],
)
def test_broken_fp8_folders(fp8: Path, tmp_path: Path, changes: dict[str, Tensor | None], message: str) -> None:
    edit(fp8, **changes)
    with pytest.raises(CheckpointError, match=message):
        convert_model(str(fp8), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp8", "hf"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quant_method", "gptq", "quant_method: 'gptq' cannot be read, only 'fp8'"),
        ("fmt", "e5m2", "fmt: 'e5m2' cannot be read"),
        ("weight_block_size", None, r"weight_block_size: None cannot be read, only \[128, 128\]"),
        ("weight_block_size", [1, 32], r"weight_block_size: \[1, 32\] cannot be read"),
    ],
)
def test_other_quantisations_are_refused(fp8: Path, tmp_path: Path, key: str, value: Any, message: str) -> None:
    config = json.loads((fp8 / "config.json").read_text())
    config["quantization_config"][key] = value
    (fp8 / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        convert_model(str(fp8), tmp_path / "out")
