"""A run as a terminal shows it: how far, the loss's course, how busy each lane is."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fuyou.config import format_bytes
from fuyou.trace import LANES

SPARKLINE_WIDTH = 32
NUM_LOSSES_KEPT = 100 * SPARKLINE_WIDTH
BAR_WIDTH = 20
_HEIGHTS = "▁▂▃▄▅▆▇█"


class RunView:
    """A renderable of a run, at least 60 columns wide; `add` each step, then show it again."""

    def __init__(self, *, step: int, max_steps: int, save_steps: int | None) -> None:
        self._step, self._max_steps, self._save_steps = step, max_steps, save_steps
        self._losses: deque[float] = deque(maxlen=NUM_LOSSES_KEPT)
        self._metrics: dict[str, Any] = {}
        self._remaining = ""
        self._bytes_written = 0
        self._ended = False

    def end(self) -> None:
        """Leave out what holds only while the run is under way."""
        self._ended = True

    def add(self, step: int, metrics: dict[str, Any], remaining: str) -> None:
        """One step's line of metrics.jsonl; `remaining` is the time left, for people."""
        self._step, self._metrics, self._remaining = step, metrics, remaining
        self._bytes_written += metrics.get("bytes_written") or 0
        if metrics.get("loss") is not None:
            self._losses.append(metrics["loss"])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield self._progress_row()
        if not self._metrics:
            return
        yield self._line(self._loss_parts(plain=options.ascii_only))
        yield self._line(self._rate_parts())
        yield self._lanes()
        if not self._ended:
            yield self._line([self._what_is_safe()])

    def _progress_row(self) -> Table:
        row = Table.grid(padding=(0, 2, 0, 0))
        cells: list[RenderableType] = [
            Text(f"step {self._step}/{self._max_steps}", style="bold"),
            ProgressBar(total=self._max_steps, completed=self._step, width=BAR_WIDTH),
        ]
        if self._metrics.get("seconds"):
            cells.append(Text(f"{self._metrics['seconds']:.3g} s a step"))
        if self._remaining:
            cells.append(Text(f"{self._remaining} left"))
        row.add_row(*cells)
        return row

    def _loss_parts(self, *, plain: bool) -> list[str]:
        metrics = self._metrics
        parts = [f"loss {metrics['loss']:.4f}"] if metrics.get("loss") is not None else []
        if not plain:
            parts.append(sparkline(list(self._losses), SPARKLINE_WIDTH))
        if metrics.get("grad_norm") is not None:
            parts.append(f"norm {metrics['grad_norm']:.3g}{' clipped' if metrics.get('clipped') else ''}")
        if metrics.get("learning_rate") is not None:
            parts.append(f"lr {metrics['learning_rate']:.2e}")
        return parts

    def _rate_parts(self) -> list[str]:
        metrics, seconds = self._metrics, self._metrics.get("seconds")
        parts = [f"{(metrics.get('num_tokens') or 0) / seconds:,.0f} tokens/s"] if seconds else []
        for name, word in (("bytes_read", "read"), ("bytes_written", "written")):
            if seconds and metrics.get(name) is not None:
                parts.append(f"{word} {metrics[name] / seconds / 1e9:.2f} GB/s")
        return [*parts, f"{format_bytes(self._bytes_written)} written so far"]

    def _lanes(self) -> Table:
        table = Table.grid(padding=(0, 2, 0, 0))
        seconds = self._metrics.get("seconds") or 0.0
        for lane in LANES:
            busy = (self._metrics.get("lane_seconds") or {}).get(lane, 0.0)
            if not busy or not seconds:
                continue
            share = min(1.0, busy / seconds)
            limit = "limits the step" if lane == self._metrics.get("limiting_lane") else ""
            bar = ProgressBar(total=1.0, completed=share, width=BAR_WIDTH, finished_style="bar.complete")
            table.add_row(lane, bar, Text(f"{share:4.0%}"), limit)
        return table

    def _what_is_safe(self) -> str:
        committed = self._metrics.get("committed_step")
        text = "" if committed is None else f"step {committed} is committed (Ctrl-C stops, rerun to go on)"
        if self._save_steps is None:
            return text
        following = (self._step // self._save_steps + 1) * self._save_steps
        return f"{text}; next checkpoint: step {following}" if following <= self._max_steps else text

    def _line(self, parts: Sequence[str]) -> Text:
        return Text("  ".join(part for part in parts if part), no_wrap=True, overflow="ellipsis")


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of finite `values` in at most `width` characters, each the mean of as many values."""
    finite = [value for value in values if abs(value) < float("inf")]
    num_columns = min(width, len(finite))
    if num_columns < 2:
        return ""
    edges = [round(i * len(finite) / num_columns) for i in range(num_columns + 1)]
    means = [statistics.fmean(finite[begin:end]) for begin, end in pairwise(edges)]
    lowest, highest = min(means), max(means)
    span = highest - lowest or 1.0
    return "".join(_HEIGHTS[round((mean - lowest) / span * (len(_HEIGHTS) - 1))] for mean in means)
