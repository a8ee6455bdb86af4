"""Hugging Face folders: what we write loads in transformers bit for bit, and a folder that does not fit is an error."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_folder import write_tensors
from tensors import assert_same_tensors
from torch import Tensor, nn

from infir2.checkpoint.huggingface import HfFolder, load_into, read_config, write_folder
from infir2.checkpoint.safetensors_writer import TensorSpec
from infir2.errors import CheckpointError, DataError

transformers = pytest.importorskip("transformers")


def qwen(tied: bool, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        eos_token_id=1,
        bos_token_id=0,
    )
    return transformers.Qwen2ForCausalLM(config).float()


def write(out: Path, model: nn.Module, **options: Any) -> Path:
    config: Any = model.config
    weights = model.named_parameters()  # tied ones once
    write_tensors(out, {**config.to_dict(), "architectures": ["Qwen2ForCausalLM"]}, weights, **options)
    return out


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def edit(folder: Path, **changes: Tensor | None) -> None:
    """Replace or (None) remove tensors of a single-file folder; ``__`` in a name stands for a dot."""
    tensors = load_file(folder / "model.safetensors")
    for key, value in changes.items():
        name = key.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 3_000])
def test_transformers_loads_what_we_write(tmp_path: Path, tied: bool, shard_bytes: int) -> None:
    model = qwen(tied)
    out = write(tmp_path / "out", model, max_shard_bytes=shard_bytes)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16
    assert_same_tensors(parameters(loaded), {name: value.bfloat16() for name, value in parameters(model).items()})
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert loaded.generation_config.eos_token_id == 1
    shards = sorted(out.glob("*.safetensors"))
    if shard_bytes > 10_000:
        assert [path.name for path in shards] == ["model.safetensors"]
    else:
        assert len(shards) > 3
        index = json.loads((out / "model.safetensors.index.json").read_text())
        tensors = [tensor for path in shards for tensor in load_file(path).values()]
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)
        assert len(index["weight_map"]) == len(tensors)
        assert max(sum(t.nbytes for t in load_file(path).values()) for path in shards) <= shard_bytes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 3_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_round_trip(tmp_path: Path, tied: bool, shard_bytes: int, dtype: torch.dtype) -> None:
    model, other = qwen(tied), qwen(tied, seed=1)
    out = write(tmp_path / "out", model, dtype=dtype, max_shard_bytes=shard_bytes)
    load_into(other, out)
    assert_same_tensors(parameters(other), {name: value.to(dtype).float() for name, value in parameters(model).items()})
    assert read_config(out)["dtype"] == str(dtype).removeprefix("torch.")


def test_we_load_what_transformers_writes(tmp_path: Path) -> None:
    for tied in (True, False):
        model, other = qwen(tied), qwen(tied, seed=1)
        model.save_pretrained(tmp_path / str(tied))
        load_into(other, tmp_path / str(tied))
        assert_same_tensors(parameters(other), parameters(model))
        folder = HfFolder(tmp_path / str(tied))
        assert ("lm_head.weight" in folder.names) == (not tied)
        assert folder.shapes["model.embed_tokens.weight"] == (40, 16)
        assert folder.dtypes["model.norm.weight"] == "F32"


def test_codes_and_scales_are_kept(tmp_path: Path) -> None:
    codes, scale = torch.randn(8, 8).to(torch.float8_e4m3fn), torch.rand(1, 1)
    write_tensors(tmp_path / "out", {"model_type": "x"}, [("w", codes), ("w_scale_inv", scale)], dtype=None)
    folder = HfFolder(tmp_path / "out")
    assert folder.dtypes == {"w": "F8_E4M3", "w_scale_inv": "F32"}
    assert torch.equal(folder.tensor("w").view(torch.uint8), codes.view(torch.uint8))


def test_tied_weight_on_disk(tmp_path: Path) -> None:
    model, other = qwen(True), qwen(True, seed=1)
    embedding = model.model.embed_tokens.weight.detach().clone()
    both = write(tmp_path / "both", model, dtype=None)
    edit(both, lm_head__weight=embedding.clone())
    load_into(other, both)
    assert_same_tensors(parameters(other), parameters(model))
    edit(both, lm_head__weight=embedding + 1)
    fresh = qwen(True, seed=1)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_into(fresh, both)
    assert_same_tensors(parameters(fresh), parameters(qwen(True, seed=1)))
    edit(both, model__embed_tokens__weight=None, lm_head__weight=embedding.clone())
    load_into(fresh, both)
    assert torch.equal(fresh.model.embed_tokens.weight, embedding)
    tied = write(tmp_path / "tied", model)
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight .*tie_word_embeddings"):
        load_into(qwen(False), tied)


def test_keys_that_do_not_fit_are_one_error_and_change_nothing(tmp_path: Path) -> None:
    out = write(tmp_path / "out", qwen(False), dtype=None)
    norm, q = torch.ones(16), torch.zeros(16, 16)
    name = "model.layers.0.self_attn.q_proj.weight"
    cases: list[tuple[dict[str, Tensor | None], str]] = [
        ({"model__norm__weight": None}, r"missing: model\.norm\.weight$"),
        ({"model__extra": norm}, r"unexpected: model\.extra$"),
        ({"model__norm__weight": torch.ones(17)}, r"shape: model\.norm\.weight \[17\] \(expected \[16\]\)$"),
        (
            {"model__norm__weight": None, "model__nrom__weight": norm},
            r"missing: model\.norm.*unexpected: model\.nrom",
        ),
        ({name.replace(".", "__"): q.to(torch.float8_e4m3fn)}, rf"plain floating-point .*{name} F8_E4M3"),
        ({name.replace(".", "__"): q.to(torch.int32)}, rf"{name} I32"),
        ({f"a{i}": norm.clone() for i in range(9)}, r"unexpected: a0, a1, a2, a3, \.\.\. \(9 in all\)"),
    ]
    for changes, message in cases:
        bad = tmp_path / "bad"
        shutil.copytree(out, bad)
        edit(bad, **changes)
        model = qwen(False, seed=1)
        with pytest.raises(CheckpointError, match=message):
            load_into(model, bad)
        assert_same_tensors(parameters(model), parameters(qwen(False, seed=1)))
        shutil.rmtree(bad)
    edit(out, model__layers__0__self_attn__rotary_emb__inv_freq=norm)
    load_into(qwen(False), out)  # A leftover of old Llama folders, not an error.


def sharded(tmp_path: Path) -> tuple[Path, dict[str, Any], Path]:
    out = write(tmp_path / "out", qwen(False), max_shard_bytes=3_000)
    path = out / "model.safetensors.index.json"
    return out, json.loads(path.read_text()), path


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/x.safetensors", "a/../../x.safetensors", "", "..", "a\\b", 3, None]
)
def test_an_index_cannot_leave_the_folder(tmp_path: Path, file: Any) -> None:
    out, index, path = sharded(tmp_path)
    shutil.copy(out / index["weight_map"]["model.norm.weight"], tmp_path / "x.safetensors")
    index["weight_map"]["model.norm.weight"] = file
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json: refused: model\.norm\.weight points to"):
        HfFolder(out)


def test_bad_indexes(tmp_path: Path) -> None:
    out, index, path = sharded(tmp_path)
    weight_map = index["weight_map"]
    first, other = weight_map["model.norm.weight"], weight_map["model.embed_tokens.weight"]

    def refuse(message: str, **changes: Any) -> None:
        path.write_text(json.dumps({**index, "weight_map": {**weight_map, **changes}}))
        with pytest.raises(CheckpointError, match=message):
            HfFolder(out)

    refuse(r"model\.norm\.weight is said to be in gone\.safetensors", **{"model.norm.weight": "gone.safetensors"})
    refuse(r"model\.norm\.weight is not in model-", **{"model.norm.weight": other})
    refuse(r"model\.ghost is not in model-", **{"model.ghost": other})
    left_out = {name: file for name, file in weight_map.items() if name != "model.layers.0.mlp.up_proj.weight"}
    path.write_text(json.dumps({"weight_map": left_out}))
    with pytest.raises(CheckpointError, match="not in the index"):
        HfFolder(out)
    save_file({**load_file(out / first), "model.embed_tokens.weight": torch.zeros(2)}, out / first)
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight is also in"):
        HfFolder(out)
    for text, message in (("{", "not valid JSON"), ("[]", "not a JSON object"), ("{}", "weight_map")):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            HfFolder(out)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"neither.*copy model\.safetensors\.index\.json too"):
        HfFolder(out)


def test_pickled_weights_are_told_apart_from_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json$"):
        HfFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"neither.*pytorch_model\.bin is a pickle, which infir2 never opens"):
        HfFolder(tmp_path)


def test_damaged_files_name_themselves(tmp_path: Path) -> None:
    out = write(tmp_path / "out", qwen(False))
    path = out / "model.safetensors"
    data = path.read_bytes()
    header = struct.unpack("<Q", data[:8])[0]
    for damaged in (
        b"",
        data[:7],
        data[: header // 2],
        data[: header + 8],
        data[:-1],
        struct.pack("<Q", 1 << 40) + data[8:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors"):
            load_into(qwen(False), out)
    with pytest.raises(CheckpointError, match="no such model folder"):
        HfFolder(tmp_path / "nowhere")


def test_links_out_of_the_folder_are_refused_except_in_the_hub_cache(tmp_path: Path) -> None:
    out = write(tmp_path / "out", qwen(False))
    outside = tmp_path / "blobs" / "0123"
    outside.parent.mkdir()
    (out / "model.safetensors").rename(outside)
    (out / "model.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="a link that leaves the model folder"):
        HfFolder(out)
    snapshot = tmp_path / "snapshots" / "revision"
    snapshot.parent.mkdir()
    out.rename(snapshot)
    load_into(qwen(False), snapshot)


def test_read_config(tmp_path: Path) -> None:
    assert read_config(write(tmp_path / "out", qwen(True)))["tie_word_embeddings"] is True
    path = tmp_path / "out" / "config.json"
    for text, message in (("{", "not valid JSON"), ("[1]", "not a JSON object"), ("{}", "model_type")):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
            read_config(tmp_path / "out")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        read_config(tmp_path / "out")
    with pytest.raises(CheckpointError, match="no such model folder"):
        read_config(tmp_path / "nowhere")


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        write(tmp_path / "full", qwen(True))
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", qwen(True))

    def failing() -> Any:
        yield "a", torch.zeros(4)
        raise CheckpointError("no more")

    one = ("a", torch.zeros(4))
    specs = {name: TensorSpec(torch.float32, (4,)) for name in "ab"}
    for tensors, message in (
        (failing(), "no more"),
        ([one, one], "a: given twice"),
        ([one], r"b: not given \(1 in all\)"),
        ([one, ("c", one[1])], "c: not expected"),
        ([one, ("b", torch.zeros(5))], "b: .* was given where .* was announced"),
    ):
        with pytest.raises(CheckpointError, match=message):
            write_folder(tmp_path / "part", {}, tensors, specs)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/out: cannot be written"):
        write_tensors(tmp_path / "file" / "out", {}, [one])
    with pytest.raises(CheckpointError, match="not a plain file name"):
        write_tensors(tmp_path / "part", {}, [one], extra_files={"../x": ""})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_tokenizer_and_extra_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors", "run.py"):
        (source / name).write_text(name)
    out = write(tmp_path / "out", qwen(True), tokenizer=source, extra_files={"README.md": "hello"})
    assert sorted(path.name for path in out.iterdir()) == [
        *("README.md", "chat_template.jinja", "config.json", "generation_config.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    ]
    assert (out / "README.md").read_text() == "hello"
    write(tmp_path / "one", qwen(True), tokenizer=source / "tokenizer.json")
    assert (tmp_path / "one" / "tokenizer.json").read_text() == "tokenizer.json"
    with pytest.raises(DataError, match="no tokenizer files"):
        write(tmp_path / "none", qwen(True), tokenizer=tmp_path / "nowhere")
