"""docs/troubleshooting.md speaks of messages that the program has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEADINGS = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)


def texts_of(path: Path) -> Iterator[str]:
    """The strings in a module, with … for what is put into them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.fixture(scope="module", name="texts")
def _texts() -> list[str]:
    folders = ("fuyou", "io_engine", "optim")
    return [text for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) for text in texts_of(path)]


def test_there_are_messages() -> None:
    assert len(HEADINGS) > 20


@pytest.mark.parametrize("heading", HEADINGS)
def test_the_program_has_this_message(heading: str, texts: list[str]) -> None:
    pattern = re.compile(".*".join(re.escape(part) for part in heading.split("…")), re.DOTALL)
    assert any(pattern.search(text) for text in texts)
