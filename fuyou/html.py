"""Tables and pictures of lanes as HTML, for notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fuyou.config import format_bytes

COLOURS = {
    "gpu": "#4c72b0",
    "h2d": "#55a868",
    "d2h": "#8172b2",
    "ssd_read": "#64b5cd",
    "ssd_write": "#c44e52",
    "cpu": "#ccb974",
    "wait": "#8c8c8c",
}
"""Of the lanes, in the order of every picture."""

_WIDTH, _LABEL_WIDTH, _ROW_HEIGHT = 900, 90, 22
_LEAST_GAP = 0.5
"""Pixels; spans that lie closer are drawn as one, so that thousands of transfers make no thousands of rectangles."""


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; every cell is shown as its text."""
    head = "".join(f"<th>{html.escape(header)}</th>" for header in headers)
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align:left'>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class StoreContents(dict[str, Any]):
    """What `fuyou.inspect_store` found: plain JSON, shown as tables in a notebook."""

    def _repr_html_(self) -> str:
        facts = [
            ("directories", ", ".join(self["directories"])),
            *([("base", ", ".join(self["base"]["directories"]))] if self.get("base") else []),
            ("committed step", self["step"]),
            ("parameters", f"{self['num_parameters']:,}"),
            ("on the drive", format_bytes(self["size_bytes"])),
            ("checkpoints", ", ".join(c["name"] for c in self["checkpoints"]) or "none"),
            ("notes", "; ".join(self["notes"]) or "none"),
        ]
        shards = (
            (s["name"], f"{s['num_parameters']:,}", format_bytes(s["weight_bytes"]), format_bytes(s["state_bytes"]))
            for s in self["shards"]
        )
        return table(["store", ""], facts) + table(["shard", "parameters", "weights", "master and moments"], shards)


def lanes_picture(
    title: str, seconds: float, spans: Mapping[str, Sequence[tuple[float, float, str]]], busy: Mapping[str, float]
) -> str:
    """Lanes one below the other on an axis of `seconds`, each with its spans (start, end, name) and its busy share."""
    rows = []
    for number, lane in enumerate(lane for lane in COLOURS if lane in spans):
        top = number * _ROW_HEIGHT
        share = busy.get(lane, 0.0) / seconds if seconds else 0.0
        rows.append(f"<text x='0' y='{top + 15}'>{html.escape(lane)}</text>")
        rows.append(f"<text x='{_LABEL_WIDTH + _WIDTH + 8}' y='{top + 15}'>{share:.0%}</text>")
        for start, end, name in _merged(spans[lane], _LEAST_GAP * seconds / _WIDTH):
            x, width = _LABEL_WIDTH + start / seconds * _WIDTH, max(_LEAST_GAP, (end - start) / seconds * _WIDTH)
            rows.append(
                f"<rect x='{x:.1f}' y='{top + 2}' width='{width:.1f}' height='{_ROW_HEIGHT - 4}' fill='{COLOURS[lane]}'>"
                f"<title>{html.escape(name)}: {start:.3f} s to {end:.3f} s</title></rect>"
            )
    height = len(spans) * _ROW_HEIGHT
    return (
        f"<div><b>{html.escape(title)}</b>: {seconds:.3f} s</div>"
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{_LABEL_WIDTH + _WIDTH + 60}' height='{height}' "
        f"font-family='monospace' font-size='12' fill='currentColor'>{''.join(rows)}</svg>"
    )


def _merged(spans: Sequence[tuple[float, float, str]], least_gap: float) -> list[tuple[float, float, str]]:
    merged: list[tuple[float, float, str]] = []
    for start, end, name in sorted(spans):
        if merged and start - merged[-1][1] < least_gap:
            before = merged[-1]
            merged[-1] = (
                before[0],
                max(before[1], end),
                before[2] if before[2].endswith(", ...") else f"{before[2]}, ...",
            )
        else:
            merged.append((start, end, name))
    return merged
