"""What a plan means for a run: hours, drive wear, what more of something would be worth. Arithmetic and text; no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from fuyou.config import format_bytes
from fuyou.costs import state_bytes_per_parameter
from fuyou.errors import PlanError
from fuyou.plan import BlockPlan, Plan, StepShape
from fuyou.planner import MEBIBYTE, PlanInputs, compute_bytes, predict_plan, simulate_plan
from fuyou.simulator import SimulatedStep

PICTURE_WIDTH = 54
"""Characters of the lanes' picture; with names and seconds a line has less than 80."""
SHADES = " ░▒▓█"
"""By the share of a character's time in which its lane is busy."""
LEAST_WORTH = 1.01
"""What makes a step shorter by less is named as worth nothing."""


@dataclasses.dataclass(frozen=True)
class Worth:
    """What one change of machine or run would do, by planning and simulating it."""

    change: str
    speedup: float
    """Tokens per second with it, divided by those without."""
    seconds_per_step: float


@dataclasses.dataclass(frozen=True)
class PlanReport:
    """A plan's consequences; None where something needed was not given."""

    plan: Plan
    tokens_per_second: float | None
    num_steps: int | None
    hours: float | None
    """Of the run's `num_steps`."""
    bytes_written_per_step: int | None
    bytes_written: int | None
    """By the whole run."""
    steps_of_drive_life: float | None
    """Until all drives together have taken the writes that they are rated for."""
    worths: tuple[Worth, ...]
    lanes: str
    """A picture of one step: a line for each lane, dark where it is busy."""

    def describe(self, *, explain: bool = False) -> str:
        """The plan and what it means; with `explain` the reason of every decision, and what is decided for each block."""
        lines = [self.plan.describe(reasons=explain)]
        if self.tokens_per_second:
            lines.append(f"  speed          {self.tokens_per_second:,.0f} tokens/s")
        if self.hours is not None:
            lines.append(
                f"  the run        {self.num_steps:,} step{'s' * (self.num_steps != 1)}, about {_duration(self.hours)}"
            )
        if self.bytes_written_per_step is not None:
            run = "" if self.bytes_written is None else f", {format_bytes(self.bytes_written)} by the run"
            life = (
                ""
                if self.steps_of_drive_life is None
                else f"; the drives' endurance is {self.steps_of_drive_life:,.0f} steps"
            )
            lines.append(f"  drive wear     {format_bytes(self.bytes_written_per_step)} a step{run}{life}")
        worths = ", ".join(
            f"{w.change}: {w.speedup:.2f}x" if w.speedup >= LEAST_WORTH else f"{w.change}: nothing" for w in self.worths
        )
        if worths:
            lines.append(f"  would be worth {worths} (tokens per second)")
        if self.lanes:
            lines.append(f"lanes of a step, dark where busy:\n{self.lanes}")
        if explain:
            lines.append("\n".join(_block_lines(self.plan.blocks)))
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The report without its plan as JSON."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "plan"}


def report_plan(
    inputs: PlanInputs, plan: Plan, *, num_steps: int | None = None, endurance_bytes: int | None = None
) -> PlanReport:
    """What a plan that was made from these inputs means; `endurance_bytes` is what one drive is rated for.

    Milliseconds to seconds: every worth is planned anew.
    """
    prediction, hardware, tokens = plan.prediction, inputs.hardware, inputs.num_tokens
    if hardware is not None and tokens:
        # A plan that was given may have been predicted for another batch, or not at all.
        shape = StepShape(tokens, inputs.num_micro_batches, inputs.sequence_length)
        prediction = predict_plan(plan, hardware, shape)
        plan = dataclasses.replace(plan, prediction=prediction)
    written = None if prediction is None else prediction.bytes_written
    life = None
    if endurance_bytes is not None and written:
        life = endurance_bytes * (1 if hardware is None else hardware.num_drives) / written
    timed = prediction if tokens else None
    return PlanReport(
        plan=plan,
        tokens_per_second=None if timed is None or not tokens else tokens / timed.seconds,
        num_steps=num_steps,
        hours=None if timed is None or num_steps is None else num_steps * timed.seconds / 3600,
        bytes_written_per_step=written,
        bytes_written=None if written is None or num_steps is None else written * num_steps,
        steps_of_drive_life=life,
        worths=() if timed is None or not timed.seconds else tuple(_worths(inputs, timed.seconds)),
        lanes=""
        if hardware is None or not tokens
        else lanes_picture(
            simulate_plan(plan, hardware, tokens, inputs.sequence_length, num_micro_batches=inputs.num_micro_batches)
        ),
    )


def _worths(inputs: PlanInputs, seconds: float) -> Iterator[Worth]:
    hardware, tokens = inputs.hardware, inputs.num_tokens
    assert hardware is not None
    assert tokens
    host = 1 << (inputs.host_memory_bytes.bit_length() - 1)  # about as much again
    changes: list[tuple[str, dict[str, Any]]] = [
        (f"+{format_bytes(host)} host memory", {"host_memory_bytes": inputs.host_memory_bytes + host}),
        ("one more drive of this kind", {"hardware": hardware.with_drives(hardware.num_drives + 1)}),
        (
            "twice the rows a step",
            {
                "num_tokens": 2 * tokens,
                # Without a size for them the whole batch is one, however many rows it has.
                "num_micro_batches": inputs.num_micro_batches * (1 if inputs.micro_batch_size is None else 2),
                "boundary_bytes": None if inputs.boundary_bytes is None else 2 * inputs.boundary_bytes,
            },
        ),
        (
            "twice the compute rate",
            {"hardware": hardware.scaled({"gpu": 0.5})},
        ),
    ]
    if inputs.moment_dtype != "int8":
        changes.append(('moment_dtype="int8"', _with_moments(inputs, "int8")))
    for change, values in changes:
        changed = dataclasses.replace(inputs, **values)
        try:
            found = changed.plan().prediction
        except PlanError:
            continue
        assert found is not None
        assert changed.num_tokens
        yield Worth(change, changed.num_tokens / tokens * seconds / found.seconds, found.seconds)


def _with_moments(inputs: PlanInputs, moment_dtype: str) -> dict[str, Any]:
    """Other moments, their sizes in proportion (whole sectors and records change them a little)."""
    before = state_bytes_per_parameter(inputs.compute_dtype, inputs.moment_dtype)
    ratio = state_bytes_per_parameter(inputs.compute_dtype, moment_dtype) / before
    shards = tuple(
        dataclasses.replace(s, state_bytes=int(s.state_bytes * ratio), record_bytes=int(s.record_bytes * ratio))
        for s in inputs.shards
    )
    return {"moment_dtype": moment_dtype, "shards": shards}


def nearest_settings(inputs: PlanInputs) -> list[str]:
    """Settings nearest to these that fit, each changing as little as it can; none where these fit."""
    try:
        inputs.plan()
    except PlanError:
        pass
    else:
        return []
    least = inputs.least()
    changes: dict[str, dict[str, Any]] = {}
    host = max(inputs.host_memory_bytes, least.host_memory_bytes)
    gpu = inputs.gpu_memory_bytes
    if gpu is not None:
        computing = 0
        if inputs.shape is not None:
            computing = compute_bytes(inputs.shards, inputs.compute_dtype, inputs.shape, inputs.loss_chunk_tokens)
        gpu = max(gpu, -(-max(least.device * 5 // 4, least.device + computing) // MEBIBYTE) * MEBIBYTE)
    named = [f'host_memory="{host // MEBIBYTE}MiB"'] if host > inputs.host_memory_bytes else []
    named += [f'gpu_memory="{gpu // MEBIBYTE}MiB"'] if gpu is not None and gpu != inputs.gpu_memory_bytes else []
    changes[", ".join(named)] = {"host_memory_bytes": host, "gpu_memory_bytes": gpu}
    if inputs.moment_dtype != "int8":
        smaller = _with_moments(inputs, "int8")
        changes['moment_dtype="int8"'] = smaller
        host = max(inputs.host_memory_bytes, dataclasses.replace(inputs, **smaller).least().host_memory_bytes)
        changes[f'moment_dtype="int8" and host_memory="{host // MEBIBYTE}MiB"'] = {**smaller, "host_memory_bytes": host}
    fitting = []
    for text, values in changes.items():
        try:
            dataclasses.replace(inputs, **values).plan()
        except PlanError:
            continue
        fitting.append(text)
    # With the smaller moments alone it fits already: more memory beside them is no nearer.
    return [text for text in fitting if not any(other != text and text.startswith(other) for other in fitting)]


def lanes_picture(step: SimulatedStep) -> str:
    """A line for each lane that works: `PICTURE_WIDTH` shades from the step's begin to its end, and its busy seconds."""
    if not step.seconds:
        return ""
    cell = step.seconds / PICTURE_WIDTH
    busy = {lane: [0.0] * PICTURE_WIDTH for lane, seconds in step.lane_seconds.items() if seconds}
    for span in step.spans:
        first = min(PICTURE_WIDTH - 1, int(span.started_seconds / cell))
        last = min(PICTURE_WIDTH - 1, int(span.ended_seconds / cell))
        for number in range(first, last + 1):
            inside = min(span.ended_seconds, (number + 1) * cell) - max(span.started_seconds, number * cell)
            busy[span.lane][number] += max(0.0, inside)
    return "\n".join(
        f"  {lane:<10} {''.join(SHADES[min(4, round(4 * seconds / cell))] for seconds in cells)} "
        f"{step.lane_seconds[lane]:.3g} s"
        for lane, cells in busy.items()
    )


def _block_lines(blocks: Sequence[BlockPlan]) -> Iterator[str]:
    """A line for each run of neighbours that are treated alike."""
    yield "blocks:"
    groups: list[tuple[str, list[str]]] = []
    for block in blocks:
        kept = [
            what for what, is_kept in (("weights", block.weights_in_host), ("states", block.states_in_host)) if is_kept
        ]
        text = f"{' and '.join(kept) or 'nothing'} kept in host memory"
        if block.weights_on_device:
            text += ", weights on the GPU"
        if block.trainable:
            text += f", gradient {block.gradient}, update in the {block.update_window} pass"
        else:
            text += ", frozen"
        if block.kind == "layer":
            text += f", activations: {block.activations if isinstance(block.activations, str) else 'by operation'}"
        if groups and groups[-1][0] == text:
            groups[-1][1].append(block.name)
        else:
            groups.append((text, [block.name]))
    for text, names in groups:
        yield f"  {names[0] if len(names) == 1 else f'{names[0]} to {names[-1]}'}: {text}"


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    if hours < 1:
        return f"{hours * 60:.0f} minutes"
    return f"{hours:.1f} hours" if hours < 72 else f"{hours / 24:.1f} days"
