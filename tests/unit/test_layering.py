"""The floors of the house: every import goes down, none goes in a circle, and heavy packages stay where they belong.

What starts with an underscore stays in its file.

The checker reads source with ast, so imports inside functions count as well; planted faults show that it sees them.
"""

import ast
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "infir2"

# Lowest first. A module may import from its own floor and from those before it; the first four are for everybody.
FLOORS = [
    "errors", "durable", "config", "types", "kernels", "fp8", "model", "parallel", "data", "train", "checkpoint",
    "rollout", "reward", "evaluate", "rl", "serve", "report", "launch", "benchmark", "stages", "cli", "__main__",
]  # fmt: skip
# What a floor must not import although it lies lower: parallelism and FP8 act on the model from outside, and
# kernels, fp8 and model run where pydantic is missing.
FORBIDDEN = {
    "kernels": {"config"},
    "fp8": {"config"},
    "model": {"config", "fp8", "parallel"},
}
BANNED_NAMES = {"utils", "common", "core", "base", "manager"}
WITHOUT_TORCH = {
    "infir2", "infir2.cli", "infir2.config", "infir2.errors",
    "infir2.rollout.sequence", "infir2.rollout.blocks", "infir2.rollout.scheduler",
}  # fmt: skip


@dataclass(frozen=True)
class Import:
    """One import statement's target, as a dotted name."""

    target: str
    line: int
    in_function: bool


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    imports: tuple[Import, ...]
    has_docstring: bool


def read_package(root: Path) -> dict[str, Module]:
    """Every module under a package folder by its dotted name."""
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        package = parts[:-1]
        name = ".".join(package if parts[-1] == "__init__" else parts)
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        modules[name] = Module(name, path, tuple(_imports(tree, package)), bool(ast.get_docstring(tree)))
    return modules


def _imports(node: ast.AST, package: list[str], in_function: bool = False) -> list[Import]:
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found += [Import(alias.name, child.lineno, in_function) for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            source = package[: len(package) - child.level + 1] if child.level else []
            prefix = ".".join([*source, *([child.module] if child.module else [])])
            found += [Import(f"{prefix}.{alias.name}", child.lineno, in_function) for alias in child.names]
        inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        found += _imports(child, package, inside)
    return found


def complaints(root: Path) -> list[str]:
    """Every fault of the package as one line; empty when all is well."""
    modules = read_package(root)
    found = []
    for module in modules.values():
        found += _complaints_of(module, modules)
    return found + _circles(modules) + _torch_where_it_must_not_be(modules)


def _complaints_of(module: Module, modules: dict[str, Module]) -> list[str]:
    found, floor = [], _floor(module.name)
    if not module.has_docstring:
        found.append(f"{module.name}: has no docstring that says what it is for")
    if floor is not None and floor not in FLOORS:
        found.append(f"{module.name}: {floor} is not one of the floors")
        return found
    if banned := BANNED_NAMES & set(module.name.split(".")):
        found.append(f"{module.name}: {banned.pop()} says nothing; name it for what it holds")
    for item in module.imports:
        where, target = f"{module.name}:{item.line}", _module_of(item.target, modules)
        outside_triton_file = not _is_triton_file(module.name)
        if item.target.split(".")[0] == "triton" and outside_triton_file and not item.in_function:
            found.append(f"{where}: triton is imported inside functions or in kernels/*_triton.py only")
        if target is None:
            continue
        name = item.target.split(".")[-1]
        if name.startswith("_") and not name.startswith("__"):
            found.append(f"{where}: {name} is private to {target}")
        if _is_triton_file(target) and outside_triton_file and not item.in_function:
            found.append(f"{where}: {target} is imported inside functions only")
        below = _floor(target)
        if below is None:
            continue
        if floor is None:
            found.append(f"{where}: the package itself imports nothing, but imports {target}")
        elif FLOORS.index(below) > FLOORS.index(floor):
            found.append(f"{where}: {floor} is below {below}, but imports {target}")
        elif below in FORBIDDEN.get(floor, ()):
            found.append(f"{where}: {floor} must not import {target}")
    return found


def _floor(name: str) -> str | None:
    """infir2.train.loop -> train; None for the package itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else None


def _is_triton_file(name: str) -> bool:
    return name.startswith("infir2.kernels.") and name.endswith("_triton")


def _module_of(target: str, modules: dict[str, Module]) -> str | None:
    """The module of the package that an import names: the longest part of the dotted name that is one."""
    parts = target.split(".")
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((name for name in names if name in modules), None)


def _graph(modules: dict[str, Module]) -> dict[str, set[str]]:
    return {
        name: {target for item in module.imports if (target := _module_of(item.target, modules)) not in (None, name)}
        for name, module in modules.items()
    }


def _circles(modules: dict[str, Module]) -> list[str]:
    graph, done, found = _graph(modules), set(), []

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append("circle: " + " -> ".join([*trail[trail.index(name) :], name]))
        elif name not in done:
            for target in sorted(graph[name]):
                visit(target, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    return found


def _torch_where_it_must_not_be(modules: dict[str, Module]) -> list[str]:
    """Modules that promise to run without torch, but import it or a module that does (outside functions)."""
    found = []
    for name in sorted(WITHOUT_TORCH & set(modules)):
        waiting, seen = [name], set()
        while waiting:
            current = waiting.pop()
            if current in seen:
                continue
            seen.add(current)
            eager = [item for item in modules[current].imports if not item.in_function]
            if any(item.target.split(".")[0] == "torch" for item in eager):
                found.append(f"{name}: must not need torch, but imports it" + f" through {current}" * (current != name))
            waiting += [target for item in eager if (target := _module_of(item.target, modules))]
    return found


def test_the_package_keeps_to_its_floors() -> None:
    assert len(read_package(PACKAGE)) > 100
    assert complaints(PACKAGE) == []


PLANTED = {
    "upward import": (
        "kernels/planted.py",
        '"""Doc."""\nfrom infir2.stages import doctor\n',
        "kernels is below stages",
    ),
    "upward import in a function": (
        "data/planted.py",
        '"""Doc."""\n\n\ndef late():\n    import infir2.train.metrics\n',
        "data is below train",
    ),
    "relative upward import": ("fp8/planted.py", '"""Doc."""\nfrom ..train import metrics\n', "fp8 is below train"),
    "model knows fp8": (
        "model/planted.py",
        '"""Doc."""\nimport infir2.fp8.planted\n',
        "model must not import infir2.fp8",
    ),
    "kernels read config": ("kernels/planted.py", '"""Doc."""\nfrom infir2 import config\n', "kernels must not import"),
    "circle": (
        "train/planted.py",
        '"""Doc."""\nfrom infir2.train import planted_too\n',
        "circle: infir2.train.planted",
    ),
    "eager triton": (
        "fp8/planted.py",
        '"""Doc."""\nif True:\n    import triton.language as tl\n',
        "triton is imported",
    ),
    "eager triton file": (
        "kernels/planted.py",
        '"""Doc."""\nfrom infir2.kernels.planted_triton import kernel\n',
        "planted_triton is imported inside functions only",
    ),
    "private name": (
        "train/planted.py",
        '"""Doc."""\nfrom infir2.train.planted_too import _late\n',
        "_late is private to infir2.train.planted_too",
    ),
    "empty name": ("train/utils.py", '"""Doc."""\n', "utils says nothing"),
    "no docstring": ("train/planted.py", "X = 1\n", "has no docstring"),
    "unknown floor": ("attic/planted.py", '"""Doc."""\n', "attic is not one of the floors"),
    "torch in the scheduler": ("rollout/scheduler.py", '"""Doc."""\nimport torch\n', "must not need torch"),
    "torch behind the scheduler": (
        "rollout/scheduler.py",
        '"""Doc."""\nfrom infir2.types import Batch\n',
        "must not need torch, but imports it through infir2.types",
    ),
}
COMPANIONS = {
    "fp8/planted.py": '"""Doc."""\n',
    "kernels/planted_triton.py": '"""Doc."""\nimport triton\n',
    "train/planted_too.py": '"""Doc."""\n\n\ndef late():\n    from infir2.train import planted\n',
}


@pytest.mark.parametrize("fault", PLANTED)
def test_the_checker_sees_a_planted_fault(fault: str, tmp_path: Path) -> None:
    copy = tmp_path / "infir2"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    path, source, expected = PLANTED[fault]
    for name, text in {"train/planted.py": '"""Doc."""\n', **COMPANIONS}.items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(text)
    (copy / path).parent.mkdir(exist_ok=True)
    (copy / path).write_text(source)
    found = complaints(copy)
    assert any(expected in line for line in found), found


def test_the_reward_floor_needs_no_torch() -> None:
    code = (
        "import sys, infir2.reward.math, infir2.reward.choice, infir2.reward.tasks, infir2.reward.code, "
        "infir2.reward.shaping, infir2.reward.dispatch\n"
        "assert not {'torch', 'sympy', 'reasoning_gym'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
