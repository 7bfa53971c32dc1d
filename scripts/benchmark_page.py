"""The parts of docs/benchmarks.md that scripts write; what people wrote around them stays."""

from __future__ import annotations

from pathlib import Path


def write_part(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- /NAME -->`; SystemExit if they are not there once, in order."""
    page = path.read_text()
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise SystemExit(f'{name}: {path} needs one line "{begin}" and behind it one "{end}", to be filled in between')
    head, rest = page.split(begin)
    path.write_text(f"{head}{begin}\n\n{text.strip()}\n\n{end}{rest.split(end)[1]}")
