"""Traces of steps as files: kept beside the store, for Perfetto and Chrome, and as a picture of the lanes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fuyou.errors import ConfigError
from fuyou.html import COLOURS
from fuyou.simulator import SimulatedStep
from fuyou.trace import LANES, WAIT_LANE, StepTrace

TRACE_NAME = "trace.json"
"""In a store's first directory: the last steps of the run that closed it last."""

_SHOWN_LANES = (*LANES, WAIT_LANE)


def save_traces(directory: Path, steps: Iterable[StepTrace], predicted: SimulatedStep | None) -> None:
    """Replace the trace file of a store by these steps and what its plan expected of one; OSError with the path."""
    data = {
        "steps": [step.to_json() for step in steps],
        "predicted": None
        if predicted is None
        else {
            "step": None,
            "seconds": predicted.seconds,
            "spans": [
                {"lane": s.lane, "name": s.name, "start": s.started_seconds, "end": s.ended_seconds, "bytes": 0}
                for s in predicted.spans
            ],
        },
    }
    partial = directory / f"{TRACE_NAME}.tmp"
    partial.write_text(json.dumps(data))
    os.replace(partial, directory / TRACE_NAME)


def load_traces(directory: Path) -> dict[str, Any]:
    """What `save_traces` wrote; ConfigError if there is nothing, or nothing of use."""
    path = directory / TRACE_NAME
    try:
        data = json.loads(path.read_text())
        steps = {int(step["step"]): step for step in data["steps"]}
        return {"steps": steps, "predicted": data["predicted"]}
    except FileNotFoundError:
        raise ConfigError(f"{path}: no trace; a run writes one when it closes its store") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a trace of this version ({error})") from None


def perfetto(step: Mapping[str, Any], predicted: Mapping[str, Any] | None) -> dict[str, Any]:
    """A step as Trace Event JSON (ui.perfetto.dev, chrome://tracing): measured and predicted, a track for each lane.

    Spans of one lane may overlap (several reads at once), which a track cannot show: they go to tracks beside each
    other. Times in microseconds. Format: "Trace Event Format", Google, complete events ("X").
    """
    events: list[dict[str, Any]] = []
    for process, (title, found) in enumerate(((f"step {step['step']}", step), ("predicted", predicted)), start=1):
        if found is None:
            continue
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": title}})
        for number, lane in enumerate(_SHOWN_LANES):
            for row, spans in enumerate(_rows(s for s in found["spans"] if s["lane"] == lane)):
                thread = 100 * number + row
                events.append({"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": lane}})
                events += [
                    {
                        "ph": "X",
                        "name": span["name"],
                        "cat": lane,
                        "pid": process,
                        "tid": thread,
                        "ts": span["start"] * 1e6,
                        "dur": (span["end"] - span["start"]) * 1e6,
                        "args": {"bytes": span["bytes"]},
                    }
                    for span in spans
                ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def draw(step: Mapping[str, Any], predicted: Mapping[str, Any] | None, path: Path) -> None:
    """A picture of the lanes (.png or .svg): predicted above measured, on one axis of seconds.

    ConfigError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            f"{path}: a picture needs matplotlib: pip install 'fuyou[plot]', or name a .json file"
        ) from None
    parts = [(title, found) for title, found in (("predicted", predicted), (f"step {step['step']}", step)) if found]
    figure = Figure(figsize=(12, 2.2 * len(parts) + 0.6), layout="constrained")
    longest = max(found["seconds"] for _, found in parts)
    for axes, (title, found) in zip(figure.subplots(len(parts), 1, squeeze=False)[:, 0], parts, strict=True):
        for number, lane in enumerate(reversed(_SHOWN_LANES)):
            bars = [(s["start"], s["end"] - s["start"]) for s in found["spans"] if s["lane"] == lane]
            axes.broken_barh(bars, (number - 0.4, 0.8), color=COLOURS[lane])
        axes.set(title=f"{title}: {found['seconds']:.3f} s", xlim=(0, longest), ylim=(-0.6, len(_SHOWN_LANES) - 0.4))
        axes.set_yticks(range(len(_SHOWN_LANES)), list(reversed(_SHOWN_LANES)))
    axes.set_xlabel("seconds")
    figure.savefig(path)


def _rows(spans: Iterable[Mapping[str, Any]]) -> Sequence[list[Mapping[str, Any]]]:
    """Spans in as few rows as hold them without overlap, each in the order of time."""
    rows: list[list[Mapping[str, Any]]] = []
    for span in sorted(spans, key=lambda s: (s["start"], s["end"])):
        row = next((row for row in rows if row[-1]["end"] <= span["start"]), None)
        if row is None:
            rows.append([span])
        else:
            row.append(span)
    return rows
