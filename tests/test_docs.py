"""docs/troubleshooting.md speaks of messages that the program has, and of the exit codes that they end with."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from fuyou import cli

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = re.findall(
    r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE | re.DOTALL
)
HEADINGS = [
    (heading, section)
    for section, content in SECTIONS
    for heading in re.findall(r"^### `(.*)`$", content, re.MULTILINE)
]
EXIT_CODES = {
    "ConfigError": cli.EXIT_USAGE,
    "ValueError": cli.EXIT_USAGE,  # what a recipe's own checks raise
    "PlanError": cli.EXIT_DOES_NOT_FIT,
    **dict.fromkeys(("DataError", "ModelError", "StoreError", "StoreLockedError", "OSError"), cli.EXIT_FAILED),
}


def modules() -> Iterator[ast.Module]:
    for folder in ("fuyou", "io_engine", "optim"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield ast.parse(path.read_text())


def texts_in(tree: ast.AST) -> Iterator[str]:
    """The strings below a node, with … for what is put into them; no docstrings, which nobody prints."""
    described = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in described:
            yield node.value


@pytest.fixture(scope="module", name="texts")
def _texts() -> list[str]:
    return [text for module in modules() for text in texts_in(module)]


@pytest.fixture(scope="module", name="raised")
def _raised() -> list[tuple[str, str]]:
    """What is raised, by the name of its class, with each text in it."""
    return [
        (node.exc.func.id, text)
        for module in modules()
        for node in ast.walk(module)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
        for text in texts_in(node.exc)
    ]


def found(heading: str, texts: Iterable[str]) -> bool:
    pattern = re.compile(".*".join(re.escape(part) for part in heading.split("…")), re.DOTALL)
    return any(pattern.search(text) for text in texts)


def test_there_are_messages() -> None:
    assert len(HEADINGS) > 20


@pytest.mark.parametrize("heading", [heading for heading, _ in HEADINGS])
def test_the_program_has_this_message(heading: str, texts: list[str]) -> None:
    assert found(heading, texts)


def test_only_messages_are_found() -> None:
    module = ast.parse('def f():\n    """says no"""\n    print(f"says {1} yes")\n')
    texts = list(texts_in(module))
    assert found("says … yes", texts)
    assert not found("says no", texts)
    assert not found("says … no", texts)


@pytest.mark.parametrize(("heading", "section"), [pair for pair in HEADINGS if "exit code" in pair[1]])
def test_a_section_names_the_exit_codes_of_its_messages(
    heading: str, section: str, raised: list[tuple[str, str]]
) -> None:
    named = {int(number) for number in re.findall(r"\b\d\b", section.split("exit code")[1])}
    codes = {EXIT_CODES[name] for name, text in raised if found(heading, [text])}
    assert codes <= named


def test_exit_codes_are_found(raised: list[tuple[str, str]]) -> None:
    """Of most messages that have one: a text may be put together before it is raised."""
    pairs = [heading for heading, section in HEADINGS if "exit code" in section]
    assert sum(any(found(heading, [text]) for _, text in raised) for heading in pairs) > len(pairs) / 2
