"""What the command line shows of a run: a live line on a terminal, lines in a pipe, JSON, or nothing."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from fuyou.config import counted, format_bytes
from fuyou.live_view import RunView
from fuyou.metrics import to_json_line
from fuyou.terminal import shown, wrapped

NUM_STEPS_AVERAGED = 20
"""Steps that the expected remaining time is taken from."""


@dataclasses.dataclass(frozen=True)
class RunStart:
    """What is known when training begins."""

    model: str
    resumed: str
    plan: str
    step: int
    """Steps taken already."""
    stop_step: int
    """The step after which this invocation stops."""
    max_steps: int
    save_steps: int | None
    """Steps from checkpoint to checkpoint; None: none is kept."""


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One optimizer step."""

    step: int
    max_steps: int
    metrics: Mapping[str, Any]
    """A line of metrics.jsonl."""
    remaining_seconds: float | None

    def rate(self, name: str) -> float | None:
        """metrics[name] per second of the step."""
        amount, seconds = self.metrics.get(name), self.metrics.get("seconds")
        return amount / seconds if amount is not None and seconds else None


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """What one invocation did."""

    step: int
    max_steps: int
    num_steps: int
    seconds: float
    num_tokens: int
    bytes_read: int
    """From the store's drives, from the model's opening to the end: also what evaluation, the last commit and the export
    take, which no step counts."""
    bytes_written: int
    """Likewise; with the weights of a store that this invocation filled."""
    first_loss: float | None
    last_loss: float | None
    eval_loss_before: float | None
    eval_loss_after: float | None
    peak_gpu_bytes: int
    peak_host_bytes: int
    limiting_lane: str | None
    """The lane that limited most steps."""
    exported_to: str | None
    metrics_file: str
    store: str

    @property
    def finished(self) -> bool:
        """Whether the run has taken all its steps."""
        return self.step >= self.max_steps


class Reporter(Protocol):
    """Receives what happens in a run, in order, on one thread."""

    def note(self, text: str) -> None:
        """Something people should know."""
        ...

    def start(self, start: RunStart) -> None:
        """Training begins."""
        ...

    def step(self, report: StepReport) -> None:
        """A step was taken."""
        ...

    def evaluation(self, step: int, loss: float) -> None:
        """Held-out rows were evaluated."""
        ...

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Prompts were answered; each sample has `prompt` and `completion`."""
        ...

    def end(self, summary: RunSummary) -> None:
        """Training ended as it should."""
        ...

    def close(self) -> None:
        """Nothing follows, whatever happened. Idempotent."""
        ...


class QuietReporter:
    """Says nothing."""

    def note(self, text: str) -> None:
        """See `Reporter`."""

    def start(self, start: RunStart) -> None:
        """See `Reporter`."""

    def step(self, report: StepReport) -> None:
        """See `Reporter`."""

    def evaluation(self, step: int, loss: float) -> None:
        """See `Reporter`."""

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """See `Reporter`."""

    def end(self, summary: RunSummary) -> None:
        """See `Reporter`."""

    def close(self) -> None:
        """See `Reporter`."""


class JsonReporter(QuietReporter):
    """One JSON object a line: {"event": "note" | "start" | "step" | "evaluation" | "samples" | "end", ...}."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def _write(self, event: str, values: Mapping[str, Any]) -> None:
        self._file.write(to_json_line({"event": event, **values}) + "\n")
        self._file.flush()

    def note(self, text: str) -> None:
        """See `Reporter`."""
        self._write("note", {"text": text})

    def start(self, start: RunStart) -> None:
        """See `Reporter`."""
        self._write("start", dataclasses.asdict(start))

    def step(self, report: StepReport) -> None:
        """See `Reporter`."""
        self._write("step", {"remaining_seconds": report.remaining_seconds, **report.metrics})

    def evaluation(self, step: int, loss: float) -> None:
        """See `Reporter`."""
        self._write("evaluation", {"step": step, "loss": loss})

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """See `Reporter`."""
        self._write("samples", {"step": step, "samples": samples})

    def end(self, summary: RunSummary) -> None:
        """See `Reporter`."""
        self._write("end", {**dataclasses.asdict(summary), "finished": summary.finished})


class LineReporter(QuietReporter):
    """Plain lines, one for every `logging_steps` steps and for the last."""

    def __init__(self, file: TextIO, *, logging_steps: int = 1) -> None:
        self._file, self._logging_steps = file, logging_steps
        self._stop_step = 0

    def _write(self, text: str) -> None:
        self._file.write(text + "\n")
        self._file.flush()

    def note(self, text: str) -> None:
        """See `Reporter`."""
        self._write(text)

    def start(self, start: RunStart) -> None:
        """See `Reporter`."""
        self._stop_step = start.stop_step
        self._write(f"{start.model}: {start.resumed}")
        self._write(start.plan)

    def step(self, report: StepReport) -> None:
        """See `Reporter`."""
        skipped = report.metrics.get("skipped")
        if skipped or report.step % self._logging_steps == 0 or report.step == self._stop_step:
            self._write(f"step {report.step}/{report.max_steps}  {step_text(report)}")

    def evaluation(self, step: int, loss: float) -> None:
        """See `Reporter`."""
        self._write(f"step {step}: held-out loss {loss:.4f}")

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """See `Reporter`."""
        self._write("\n".join(sample_lines(step, samples)))

    def end(self, summary: RunSummary) -> None:
        """See `Reporter`."""
        self._write("\n".join(f"{name:<16}{value}" for name, value in summary_lines(summary)))


class TerminalReporter(QuietReporter):
    """A live view of the run; notes and evaluations scroll above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._view: RunView | None = None

    def note(self, text: str) -> None:
        """See `Reporter`."""
        lines = (line for part in text.splitlines() for line in wrapped(part, self._console.width))
        self._console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)

    def start(self, start: RunStart) -> None:
        """See `Reporter`."""
        self.note(f"{start.model}: {start.resumed}")
        self.note(start.plan)
        self._view = RunView(step=start.step, max_steps=start.max_steps, save_steps=start.save_steps)
        # Drawn after each step, not by a thread of its own, which would take time from the optimizer's cores.
        self._live = Live(self._view, console=self._console, auto_refresh=False)
        self._live.start(refresh=True)

    def step(self, report: StepReport) -> None:
        """See `Reporter`."""
        assert self._live is not None
        assert self._view is not None
        remaining = "" if report.remaining_seconds is None else duration_text(report.remaining_seconds)
        self._view.add(report.step, dict(report.metrics), remaining)
        self._live.refresh()
        if report.metrics.get("skipped"):
            self.note(f"step {report.step} changed nothing: {report.metrics['skipped']}")

    def evaluation(self, step: int, loss: float) -> None:
        """See `Reporter`."""
        self.note(f"step {step}: held-out loss {loss:.4f}")

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """See `Reporter`."""
        for line in sample_lines(step, samples):
            self.note(shown(line))

    def end(self, summary: RunSummary) -> None:
        """See `Reporter`."""
        self.close()
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in summary_lines(summary):
            table.add_row(name, value)
        self._console.print(table, highlight=False)

    def close(self) -> None:
        """See `Reporter`."""
        if self._live is not None:
            assert self._view is not None
            self._view.end()
            self._live.stop()
            self._live = None


def make_reporter(file: TextIO, *, quiet: bool = False, as_json: bool = False, logging_steps: int = 1) -> Reporter:
    """The reporter that fits where the output goes."""
    if as_json:
        return JsonReporter(file)
    if quiet:
        return QuietReporter()
    console = Console(file=file)
    if console.is_terminal and not console.is_dumb_terminal:
        return TerminalReporter(console)
    return LineReporter(file, logging_steps=logging_steps)


def step_text(report: StepReport) -> str:
    """The figures of a step in one line."""
    metrics = report.metrics
    parts = [f"loss {_figure(metrics.get('loss'), '.4f')}"]
    if metrics.get("grad_norm") is not None:
        parts.append(f"norm {_figure(metrics['grad_norm'], '.3g')}")
    parts.append(f"{_figure(report.rate('num_tokens'), ',.0f')} tokens/s")
    for name, word in (("bytes_read", "read"), ("bytes_written", "written")):
        rate = report.rate(name)
        parts.append(f"{word} {_figure(None if rate is None else rate / 1e9, '.2f')} GB/s")
    if report.remaining_seconds is not None:
        parts.append(f"ETA {duration_text(report.remaining_seconds)}")
    if metrics.get("limiting_lane"):
        parts.append(f"limit {metrics['limiting_lane']}")
    if metrics.get("skipped"):
        parts.append("skipped")
    return "  ".join(parts)


def summary_lines(summary: RunSummary) -> list[tuple[str, str]]:
    """The closing summary as (name, value)."""
    state = "finished" if summary.finished else "stopped as asked; run the same command to continue"
    lines = [("steps", f"{summary.step} of {summary.max_steps}, {state}")]
    if summary.first_loss is not None and summary.last_loss is not None:
        lines.append(("training loss", f"{summary.first_loss:.4f} -> {summary.last_loss:.4f}"))
    if summary.eval_loss_after is not None:
        before = "" if summary.eval_loss_before is None else f"{summary.eval_loss_before:.4f} -> "
        lines.append(("held-out loss", f"{before}{summary.eval_loss_after:.4f}"))
    if summary.num_steps:
        rate = summary.num_tokens / summary.seconds if summary.seconds else 0.0
        lines += [
            (
                "time",
                f"{duration_text(summary.seconds)} for {counted(summary.num_steps, 'step')}, "
                f"{rate:,.0f} tokens/s, "
                f"limited by {summary.limiting_lane}",
            ),
            (
                "drive",
                f"{format_bytes(summary.bytes_read)} read, {format_bytes(summary.bytes_written)} written",
            ),
            (
                "peak memory",
                f"host {format_bytes(summary.peak_host_bytes)}"
                + (f", GPU {format_bytes(summary.peak_gpu_bytes)}" if summary.peak_gpu_bytes else ""),
            ),
        ]
    lines += [("store", summary.store), ("metrics", summary.metrics_file)]
    if summary.exported_to is not None:
        lines.append(("model", f"{summary.exported_to} (loads with plain transformers)"))
    return lines


def duration_text(seconds: float) -> str:
    """Seconds for people: "45 s", "3:07", "2:03:07"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _figure(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


class RunStatistics:
    """Adds up the steps of one invocation."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_tokens = 0
        self.seconds = 0.0
        self.peak_gpu_bytes = self.peak_host_bytes = 0
        self.first_loss: float | None = None
        self.last_loss: float | None = None
        self._recent: deque[float] = deque(maxlen=NUM_STEPS_AVERAGED)
        self._lanes: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Any]) -> None:
        """One step's line of metrics.jsonl."""
        self.num_steps += 1
        self.num_tokens += metrics.get("num_tokens") or 0
        self.seconds += metrics.get("seconds") or 0.0
        self.peak_gpu_bytes = max(self.peak_gpu_bytes, metrics.get("peak_gpu_bytes") or 0)
        self.peak_host_bytes = max(self.peak_host_bytes, metrics.get("peak_host_bytes") or 0)
        self._recent.append(metrics.get("seconds") or 0.0)
        loss = metrics.get("loss")
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.last_loss = loss
        lane = metrics.get("limiting_lane")
        if lane:
            self._lanes[lane] = self._lanes.get(lane, 0) + 1

    def remaining_seconds(self, num_steps_left: int) -> float | None:
        """Expected time of the steps that are left, from the last ones."""
        return num_steps_left * sum(self._recent) / len(self._recent) if self._recent else None

    def summary(
        self,
        *,
        step: int,
        max_steps: int,
        eval_loss_before: float | None,
        eval_loss_after: float | None,
        bytes_moved: tuple[int, int],
        exported_to: Path | None,
        metrics_file: Path,
        store: str,
    ) -> RunSummary:
        """The closing summary; `bytes_moved`: read and written in all."""
        return RunSummary(
            step=step,
            max_steps=max_steps,
            num_steps=self.num_steps,
            seconds=self.seconds,
            num_tokens=self.num_tokens,
            bytes_read=bytes_moved[0],
            bytes_written=bytes_moved[1],
            first_loss=self.first_loss,
            last_loss=self.last_loss,
            eval_loss_before=eval_loss_before,
            eval_loss_after=eval_loss_after,
            peak_gpu_bytes=self.peak_gpu_bytes,
            peak_host_bytes=self.peak_host_bytes,
            limiting_lane=max(self._lanes, key=lambda lane: self._lanes[lane]) if self._lanes else None,
            exported_to=None if exported_to is None else str(exported_to),
            metrics_file=str(metrics_file),
            store=store,
        )


def sample_lines(step: int, samples: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Prompts and answers, one line each."""
    for sample in samples:
        yield f"step {step}: {' '.join(str(sample['prompt']).split())}"
        yield f"  -> {' '.join(str(sample['completion']).split())}"
