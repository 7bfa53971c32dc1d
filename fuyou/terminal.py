"""Text for a terminal: lines wrapped between words, no escape codes where none are understood. Files get text as it is."""

from __future__ import annotations

import os
import re
import textwrap
from typing import TextIO

_DUMB = ("dumb", "unknown")


def width_of(file: TextIO) -> int | None:
    """Columns of the terminal that `file` is, COLUMNS before what it says itself; None: it is no terminal."""
    if not file.isatty():
        return None
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    try:
        return os.get_terminal_size(file.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def has_escapes(file: TextIO) -> bool:
    """Whether `file` is a terminal on which a line can be written over."""
    return file.isatty() and os.environ.get("TERM", "").lower() not in _DUMB


def wrapped(line: str, width: int, indent: int | None = None) -> list[str]:
    """A line as several between words, those after the first indented: right of its label, or a bit more than it is."""
    if len(line) <= width:
        return [line]
    if indent is None:
        label = re.match(r" +\S+( \S+)*  +", line)
        margin = len(line) - len(line.lstrip(" "))
        indent = len(label[0]) if label else margin and margin + 2
    if width - indent < 10:
        indent = 0
    lines = textwrap.wrap(line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
    return lines or [""]


def fitted(text: str, file: TextIO, indent: int | None = None) -> str:
    """`text` as it is for a file, its lines wrapped for a terminal."""
    width = width_of(file)
    if width is None:
        return text
    return "\n".join(part for line in text.split("\n") for part in wrapped(line, width, indent))


def shown(text: str) -> str:
    """A model's text for a terminal: what would move the cursor or change the terminal is shown as \\x1b and the like."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)
