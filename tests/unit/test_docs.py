"""The documents are true where a program can tell: links and paths exist, commands and recipe keys are real."""

import ast
import json
import re
from pathlib import Path

import pytest

from infir2 import kernels
from infir2.cli import COMMANDS
from infir2.config import CptConfig, describe
from infir2.serve.protocol import ChatRequest, parse

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
KEYS = {key for key, _, _ in describe(CptConfig)}
LINK = re.compile(r"\]\(([^)#]+)")
PATH = re.compile(r"`((?:infir2|tests|bench|recipes|docs)/[\w./*{},-]+)`")
COMMAND = re.compile(r"^\s*(?:torchrun .*-m (?:-- )?)?infir2 ([a-z]\w*)", flags=re.MULTILINE)


@pytest.mark.parametrize(("pattern", "least"), [(LINK, 50), (PATH, 30), (COMMAND, 25)], ids=["link", "path", "command"])
def test_what_is_looked_at_is_found(pattern: re.Pattern[str], least: int) -> None:
    """About half of what there is: the tests below say nothing of what their pattern passes over."""
    assert sum(len(pattern.findall(page.read_text())) for page in PAGES) > least


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_of_this_repository_exist(page: Path) -> None:
    for path in PATH.findall(page.read_text()):
        if "{" not in path and "*" not in path:
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_the_map_of_the_kernels_names_each_file_and_its_twin() -> None:
    """On a GPU attention has two files, and what kernels share has no twin of its own; all others lie in pairs."""
    lines = kernels.__doc__.split("\n\n")[2].splitlines()
    named = re.findall(r"\w+", re.sub(r"\(.*?\)|on a GPU", "", " ".join(line[16:] for line in lines)))
    files = {path.stem for path in Path(kernels.__file__).parent.glob("[!_]*.py")}
    assert sorted(named) == sorted(name for name in files if name in named or not name.endswith("_triton"))
    alone = {name for name in files if name.endswith("_triton") and name.removesuffix("_triton") not in files}
    assert alone == {"paged_decode_triton", "codes_triton"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    for name in COMMAND.findall(page.read_text()):
        assert name in COMMANDS, f"{page.name}: infir2 {name}"


def test_recipe_keys_in_the_training_guide_exist() -> None:
    text = (ROOT / "docs/training.md").read_text()
    sections = {key.split(".")[0] for key in KEYS}
    named = {key for key in re.findall(r"(?:`|--)(\w+\.\w+)", text) if key.split(".")[0] in sections}
    named = {key for key in named if not key.endswith((".json", ".toml"))}
    assert len(named) > 10
    assert named <= KEYS


def messages_of_the_source() -> str:
    """Every string of the package on a line, what is filled into it as {}."""
    found = []
    for path in sorted((ROOT / "infir2").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_request_in_the_guide_to_serving_is_one() -> None:
    (body,) = re.findall(r"-d '(.*)'", (ROOT / "docs/serving.md").read_text())
    assert parse(ChatRequest, body.encode()).max_tokens == 200


def test_messages_in_troubleshooting_are_those_of_the_source() -> None:
    """Words in capitals and dots stand for what differs; the longest piece between them is looked for."""
    source, seen = messages_of_the_source(), 0
    for line in (ROOT / "docs/troubleshooting.md").read_text().splitlines():
        for message in re.findall(r"`([^`]+)`", line.split("|")[1] if line.startswith("|") else ""):
            if message.startswith("torchrun:"):
                continue  # torchrun's own words
            piece = max(re.split(r"'?\b[A-Z]+\b'?|\.\.\.", message), key=len).strip(" :;,.(")
            assert piece in source, f"{message!r}: {piece!r} is said nowhere"
            seen += 1
    assert seen > 40


def test_paired_losses_are_those_that_were_measured() -> None:
    """The first table of losslessness.md, in per cent, against its JSON."""
    measured = json.loads((ROOT / "bench/results/compare_138m_decay_h200.json").read_text())["difference"]
    text = (ROOT / "docs/losslessness.md").read_text().replace("−", "-").split("## ")[1]
    told = [[float(x) for x in re.findall(r"([+-][\d.]+) %", line)] for line in text.splitlines()]
    figures = [[entry[key] * 100 for key in ("mean", "low95", "high95")] for entry in measured.values()]
    assert [row for row in told if row] == [pytest.approx(row, abs=5.1e-4) for row in figures]


def test_no_path_of_a_machine_in_any_result() -> None:
    results = list(ROOT.glob("bench/results/*.json"))
    assert len(results) > 20
    for result in results:
        assert not re.search(r'"[^"]*/(root|home|work)/', result.read_text()), result.name
