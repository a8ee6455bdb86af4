"""Recipes: overrides, and one clear line for every mistake."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from infir2.config import CptConfig, RlConfig, Section, SftConfig, describe, load, parse, to_toml
from infir2.errors import ConfigError

RECIPES = Path(__file__).parents[2] / "recipes"
RECIPE = """
run = "runs/x"
[model]
preset = "tiny"
[data]
seq_len = 256
[data.sources]
"data/a" = 1.0
[optim]
lr = 1e-4
[train]
steps = 10
global_batch = 8
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def test_overrides_are_written_over_the_file(recipe: Path) -> None:
    words = ["--optim.lr", "5e-5", "--train.compile=true", "--data.sources", '{ "b" = 2, "c" = 1 }', "--run", "runs/y"]
    config = load(CptConfig, recipe, words)
    assert (config.optim.lr, config.train.compile, config.run) == (5e-5, True, "runs/y")
    assert config.data.sources == {"b": 2.0, "c": 1.0}
    assert parse(CptConfig, to_toml(config), "copy") == config


def test_an_override_may_start_a_section_and_use_dashes(recipe: Path) -> None:
    config = load(CptConfig, recipe, ["--init.keep-optimizer", "false", "--optim.betas", "[0.9, 0.98]"])
    assert config.init.keep_optimizer is False
    assert config.optim.betas == (0.9, 0.98)


@pytest.mark.parametrize("name", ["données", "数据", "data/\U0001f600", "a b", "a\x7f", "\u2028"])
def test_any_name_survives_the_way_to_toml_and_back(recipe: Path, name: str) -> None:
    config = load(CptConfig, recipe, ["--run", name])
    config = config.model_copy(update={"data": config.data.model_copy(update={"sources": {name: 1.0}})})
    assert parse(CptConfig, to_toml(config), "copy") == config


@pytest.mark.parametrize("word", ["12e4567", "1.10", "2024", "true", "[a]", "{a=1}", "007"])
def test_a_key_that_is_text_takes_a_word_as_it_stands(recipe: Path, word: str) -> None:
    config = load(CptConfig, recipe, ["--run", word, "--init.checkpoint", word])
    assert (config.run, config.init.checkpoint) == (word, word)
    assert load(CptConfig, recipe, ["--run", f"'{word}'"]).run == word, "quotes are TOML's"


def test_a_file_of_an_editor_that_writes_a_byte_order_mark(recipe: Path) -> None:
    plain = load(CptConfig, recipe)
    recipe.write_bytes(b"\xef\xbb\xbf" + RECIPE.replace("\n", "\r\n").encode())
    assert load(CptConfig, recipe) == plain


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim.lrr", "1"], "command line: optim.lrr: unknown key. Did you mean 'lr'?"),
        (["--optimm.lr", "1"], "command line: optimm: unknown key. Did you mean 'optim'?"),
        (["--optim.lr", "-1"], "command line: optim.lr: input should be greater than 0 (got -1)"),
        (["--optim.lr"], "command line: --optim.lr needs a value"),
        (["optim.lr", "1"], "command line: expected --section.key value, got 'optim.lr'"),
        (["--run.x", "1"], "command line: --run.x: run is a value, not a section"),
        (["--fp8.recipe", "blockwize"], "fp8.recipe: input should be 'blockwise', 'hybrid'"),
        (["--train.global_batch", "9", "--train.micro_batch", "2"], "global_batch (9) is not a multiple of"),
        (["--optim.warmup_steps", "11"], "optim.warmup_steps + optim.decay_steps (11) exceed train.steps (10)"),
        (["--optim.min_lr", "1.0"], "optim.min_lr (1) is above optim.lr (0.0001)"),
        (["--model.path", "x", "--model.preset", "tiny"], "model: give exactly one of model.preset and model.path"),
        (["--steps", "5"], "command line: steps: unknown key. Did you mean 'train.steps'?"),
        (["--train.warmup_steps", "1"], "train.warmup_steps: unknown key. Did you mean 'optim.warmup_steps'?"),
        (["--lrr", "1"], "command line: lrr: unknown key. Did you mean 'optim.lr'?"),
        (["--zzz", "1"], "command line: zzz: unknown key."),
        (
            ["--model", "tiny"],
            "model: is a section, with the keys preset, path, vocab_size, dtype, init_std (got 'tiny'",
        ),
        (["--data.sources", "data/x"], """in quotes: --data.sources '{ "data/x" = 1.0 }'"""),
        (["--init.checkpoint", ""], "init.checkpoint: string should have at least 1 character (got '')"),
        (["--model.path", "a\0b"], "model.path: string should match pattern"),
        (["--train.steps", "null"], "train.steps: input should be a valid integer"),
        (["--train.steps", "9" * 5000], "train.steps: unable to parse input string as an integer"),
    ],
)
def test_mistakes_on_the_command_line(recipe: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(CptConfig, recipe, words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RECIPE.replace("seq_len", "seqlen"), "data.seqlen: unknown key. Did you mean 'seq_len'?"),
        (RECIPE.replace("[optim]", "[optimizer]"), "optimizer: unknown key. Did you mean 'optim'?"),
        ("lr = 1e-4\n" + RECIPE.replace("lr = 1e-4", ""), "lr: unknown key. Did you mean 'optim.lr'?"),
        (RECIPE.replace('preset = "tiny"', 'preset = "tiny"\nprest = 1'), "model.prest: unknown key. Did you mean"),
        (RECIPE.replace("steps = 10", 'steps = "ten"'), "train.steps: input should be a valid integer"),
        (RECIPE + "[train]\n", "not valid TOML"),
        (RECIPE.replace("10", "9" * 5000), "not valid TOML"),
        ("x = " + "[" * 5000, "not valid TOML"),
        (RECIPE.replace("lr = 1e-4", ""), "optim.lr: this key is required"),
        (RECIPE + '[fp8]\nrecipe = "bf16"\nhead = true\n', "fp8.head: the recipe bf16 has no FP8 head"),
    ],
)
def test_mistakes_in_the_file_name_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(CptConfig, path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value), "a typo of a required key is not also blamed on the right one"


@pytest.mark.parametrize(
    ("kind", "name"), [(CptConfig, "cpt_tiny"), (SftConfig, "sft_tiny_stage1"), (RlConfig, "rl_tiny_stage1")]
)
def test_no_whole_number_may_be_of_absurd_size(kind: type[Section], name: str) -> None:
    """Beyond what 64 bits hold a step later they end in the words of numpy or torch."""
    keys = [key for key in whole_numbers(kind) if key != "train.seed"]  # which any 63 bits may be
    assert {"model.vocab_size", "train.global_batch", "optim.warmup_steps"} <= set(keys)
    for key in keys:
        with pytest.raises(ConfigError) as caught:
            load(kind, RECIPES / f"{name}.toml", [f"--{key}", str(2**62)])
        assert f"command line: {key}: input should be less than or equal to " in str(caught.value)


def whole_numbers(kind: type[Section], place: str = "") -> Iterator[str]:
    """The keys that take whole numbers, dotted."""
    for name, field in kind.model_fields.items():
        if field.annotation is int:
            yield place + name
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from whole_numbers(field.annotation, f"{place}{name}.")


def test_every_mistake_has_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    text = RECIPE.replace("lr = 1e-4", "lrr = 1e-4").replace("seq_len = 256", "").replace("steps = 10", "steps = 0")
    path.write_text(text.replace('"tiny"', '"tiny"\nprest = 1'))
    with pytest.raises(ConfigError) as caught:
        load(CptConfig, path, ["--fp8.recipe", "fp4"])
    lines = str(caught.value).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [str(path)] * 2 + ["command line"] + [str(path)] * 2
    assert [line.partition(": ")[2].partition(":")[0] for line in lines] == [
        *("model.prest", "optim.lrr"),
        *("fp8.recipe", "train.steps"),
        "data.seq_len",
    ]


@pytest.mark.parametrize("name", ["cpt_tiny", "sft_1.5b_stage2", "rl_tiny_stage1", "pipeline_tiny"])
@pytest.mark.parametrize("kind", [CptConfig, SftConfig, RlConfig])
def test_a_recipe_of_another_kind_is_known_by_its_keys(name: str, kind: type[Section]) -> None:
    path, command = RECIPES / f"{name}.toml", name.partition("_")[0]
    if kind.__name__.lower() == f"{command}config":
        load(kind, path)
        return
    with pytest.raises(ConfigError, match=rf"this looks like an? {command} recipe: infir2 {command} {path}$"):
        load(kind, path)


def test_typos_do_not_make_a_recipe_one_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "typos.toml"
    path.write_text(RECIPE.replace("[data]", "[dat]").replace("seq_len", "seqlen").replace("[data.", "[dat."))
    with pytest.raises(ConfigError, match=r"dat: unknown key\. Did you mean 'data'\?"):
        load(CptConfig, path)


def test_the_command_line_can_switch_the_model_and_unset_keys(recipe: Path) -> None:
    model = load(CptConfig, recipe, ["--model.path", "models/x"]).model
    assert (model.preset, model.path) == (None, "models/x")
    recipe.write_text(RECIPE.replace('preset = "tiny"', 'path = "models/x"'))
    model = load(CptConfig, recipe, ["--model.preset", "micro"]).model
    assert (model.preset, model.path) == ("micro", None)
    for word in ("null", "none"):
        config = load(CptConfig, recipe, ["--model.path", word, "--init.checkpoint", "runs/a"])
        assert (config.model.is_named, config.init.checkpoint) == (False, "runs/a")
    words = ["--train.activation_checkpointing", "none", "--run", "none"]
    config = load(CptConfig, recipe, words)
    assert (config.train.activation_checkpointing, config.run) == ("none", "none"), "a word where None is no value"


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such recipe file"):
        load(CptConfig, tmp_path / "none.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(CptConfig, binary)


@pytest.mark.parametrize("kind", [CptConfig, SftConfig, RlConfig])
def test_every_key_has_a_meaning(kind: type[Section]) -> None:
    keys = describe(kind)
    assert len(keys) > 50
    assert [key for key, _, text in keys if not text] == []


def test_the_list_of_keys_names_the_values_that_a_key_takes_and_its_default() -> None:
    values = {key: told for key, told, _ in describe(RlConfig)}
    assert values["policy.importance"] == '{off, token, sequence}  ["token"]'
    assert values["optim.lr"] == "[required]"
    assert values["train.seed"] == "[1236]"


def test_a_config_cannot_be_changed(recipe: Path) -> None:
    config = load(CptConfig, recipe)
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 1.0
