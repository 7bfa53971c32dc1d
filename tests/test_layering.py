"""Who may import whom, read from the source: nothing is imported here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"io_engine", "optim", "fuyou", "scripts", "tests"}
MAY_IMPORT = {
    "io_engine": {"io_engine"},
    "optim": {"optim", "io_engine"},
    "fuyou": {"fuyou", "optim", "io_engine"},
    "scripts": {"fuyou", "optim", "io_engine", "scripts"},
    "tests": {"fuyou", "optim", "io_engine", "tests"},
}
WITHOUT_TORCH = ("fuyou/plan.py", "fuyou/planner.py", "fuyou/costs.py", "fuyou/simulator.py", "fuyou/executor/ops.py")


def imported_modules(source: str, package: str, *, at_import: bool = False) -> Iterator[str]:
    """Full names of what a file of `package` imports, anywhere in it or only when it is imported."""
    tree = ast.parse(source)
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            # `from fuyou import plan` imports a module, too; a name that is none does no harm here.
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports_of(path: Path, *, at_import: bool = False) -> set[str]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return set(imported_modules(path.read_text(encoding="utf-8"), package, at_import=at_import))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_only_what_its_layer_may(folder: str) -> None:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths, f"no Python file in {folder}"
    for path in paths:
        wrong = {name for name in imports_of(path) if name.split(".")[0] in OURS - MAY_IMPORT[folder]}
        assert not wrong, f"{path.relative_to(ROOT)} may not import {sorted(wrong)}"


def test_scripts_are_imported_by_nobody() -> None:
    modules = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    for folder in ("io_engine", "optim", "fuyou", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            wrong = {name for name in imports_of(path) if name.split(".")[0] in modules}
            assert not wrong, f"{path.relative_to(ROOT)} imports the script {sorted(wrong)}"


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_planning_needs_no_torch(name: str) -> None:
    """The file itself never imports torch; what it imports of ours does so at most inside functions."""
    to_read, seen = [ROOT / name], set[Path]()
    while to_read:
        path = to_read.pop()
        seen.add(path)
        names = imports_of(path, at_import=path != ROOT / name)
        wrong = {module for module in names if module.split(".")[0] in ("torch", "transformers")}
        assert not wrong, f"{path.relative_to(ROOT)}, which {name} imports, imports {sorted(wrong)}"
        files = {ROOT / (module.replace(".", "/") + ".py") for module in names if module.startswith("fuyou.")}
        to_read += [file for file in files - seen if file.is_file()]


def test_relative_imports_are_resolved() -> None:
    found = set(imported_modules("from . import plan\nfrom ..optim import adamw\nimport torch.nn", "fuyou.executor"))
    assert found >= {"fuyou.executor.plan", "fuyou.optim.adamw", "torch.nn"}


def test_imports_inside_functions_are_found() -> None:
    source = "import json\ndef f():\n    import torch\n"
    assert set(imported_modules(source, "fuyou")) == {"json", "torch"}
    assert set(imported_modules(source, "fuyou", at_import=True)) == {"json"}
