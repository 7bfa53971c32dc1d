"""Tables and pictures of lanes as HTML, for notebooks."""

from __future__ import annotations

import html
import math
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
    # Notebooks align both to the right.
    head = "".join(f"<th style='text-align:left'>{html.escape(header)}</th>" for header in headers)
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
    """Lanes one below the other under an axis of `seconds`, each with its spans (start, end, name) and its busy share."""
    shares_x = _LABEL_WIDTH + _WIDTH + 8
    height = (1 + len(spans)) * _ROW_HEIGHT
    axis = [f"<text x='{shares_x}' y='15'>busy</text>"]
    for tick in _ticks(seconds):
        x = _LABEL_WIDTH + tick / seconds * _WIDTH
        axis.append(f"<text x='{x:.1f}' y='15' text-anchor='middle'>{tick:g} s</text>")
        axis.append(f"<path d='M{x:.1f} {_ROW_HEIGHT - 4}V{height}' stroke='currentColor' stroke-opacity='0.25'/>")
    rows = [f"<g class='axis'>{''.join(axis)}</g>"]
    for number, lane in enumerate(lane for lane in COLOURS if lane in spans):
        top = (1 + number) * _ROW_HEIGHT
        rows.append(f"<text x='0' y='{top + 15}'>{html.escape(lane)}</text>")
        if seconds and lane in busy:
            rows.append(f"<text x='{shares_x}' y='{top + 15}'>{busy[lane] / seconds:.0%}</text>")
        for start, end, name in _merged(spans[lane], _LEAST_GAP * seconds / _WIDTH):
            x, width = _LABEL_WIDTH + start / seconds * _WIDTH, max(_LEAST_GAP, (end - start) / seconds * _WIDTH)
            rows.append(
                f"<rect x='{x:.1f}' y='{top + 2}' width='{width:.1f}' height='{_ROW_HEIGHT - 4}' fill='{COLOURS[lane]}'>"
                f"<title>{html.escape(name)}: {start:.3f} s to {end:.3f} s</title></rect>"
            )
    return (
        f"<div><b>{html.escape(title)}</b>: {seconds:.3f} s</div>"
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{_LABEL_WIDTH + _WIDTH + 60}' height='{height}' "
        f"font-family='monospace' font-size='12' fill='currentColor'>{''.join(rows)}</svg>"
    )


def _ticks(seconds: float) -> list[float]:
    """Round numbers from 0 on, at most ten of them, none so near the end that its label would run into the shares'."""
    if seconds <= 0:
        return []
    step = 10.0 ** math.floor(math.log10(seconds / 10))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if seconds / (step * factor) <= 9)
    return [round(n * step, 12) for n in range(10) if n * step <= 0.97 * seconds]


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
