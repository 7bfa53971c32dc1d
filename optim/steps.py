"""One optimizer step: how far the run is, what the step did, and what is left of it to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Mapping
from typing import Any, Literal

from optim.gradients import HeldGradient
from optim.states import ParameterUpdate
from optim.updater import UpdateJob


class StepCounts:
    """Counts that are committed with each step, as JSON, so that a resumed run goes on with them."""

    def __init__(self, saved: Mapping[str, Any], untrained: Iterable[str]) -> None:
        """`untrained`: parameters whose states were never written; they have missed every update so far."""
        self.step = int(saved.get("step_count", 0))
        """Steps taken, those included that changed nothing."""
        self.num_updates = int(saved.get("num_updates", 0))
        """Steps that changed weights."""
        self.num_skipped = int(saved.get("num_skipped", 0))
        self._missed: dict[str, int] = dict(saved.get("missed", {})) | dict.fromkeys(untrained, self.num_updates)

    def of(self, parameter: str) -> int:
        """Updates that a parameter has had: Adam's t."""
        return self.num_updates - self._missed.get(parameter, 0)

    def count_update(self, parameters: Iterable[str], updated: frozenset[str]) -> None:
        """One more step that changes weights: of these parameters those that are `updated`."""
        self.num_updates += 1
        for name in parameters:
            if name not in updated:
                self._missed[name] = self._missed.get(name, 0) + 1

    def to_json(self) -> dict[str, Any]:
        """What the next `StepCounts` is made from."""
        return {
            "step_count": self.step,
            "num_updates": self.num_updates,
            "num_skipped": self.num_skipped,
            "missed": {name: count for name, count in self._missed.items() if count},
        }


def check_write_back(
    commit_every_steps: int, shards: Iterable[str], early: frozenset[str], resident_states: Container[str]
) -> None:
    """ValueError for a run of which the drive gets only some steps and that could lose others on the way."""
    if commit_every_steps < 1:
        raise ValueError(f"commit_every_steps={commit_every_steps}: expected a whole number above zero")
    streamed = [name for name in shards if name not in resident_states]
    if streamed or early:
        raise ValueError(
            f"commit_every_steps={commit_every_steps} needs all states in host memory and all updates late, since the drive "
            f"has no state of the last step to go back to: {len(streamed)} shards have no resident state (first "
            f"{streamed[:1]}), {len(early)} are early (first {sorted(early)[:1]})"
        )


class NonFiniteUpdateError(ArithmeticError):
    """An update gave NaN, infinity or a weight too large for bfloat16; the committed step is untouched."""


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one `step()` did."""

    step: int
    """Number of the step, from 1."""
    grad_norm: float
    """Global norm of the gradient before clipping (`optim.norm`); NaN or infinity if the gradient was."""
    clipped: bool
    skipped: str | None
    """Why the step changed nothing, or None."""
    window: Literal["backward", "forward"]
    """"backward" if some update began in the backward pass, else "forward": none was planned, clipping was frequent lately,
    or a second backward pass added to the first."""
    num_redone: int
    """Shards whose early update was a wrong guess."""
    bytes_spilled: int
    """Gradient bytes written to scratch files and read back, for the gradients of this step."""


@dataclasses.dataclass(frozen=True)
class PendingUpdate:
    """An accepted update that begins when the shard's weights come in."""

    held: HeldGradient | None
    """None: nothing is to be updated; the shard is written as it stands in host memory."""
    updates: dict[str, ParameterUpdate]
    gradient_scale: float


@dataclasses.dataclass(frozen=True)
class EarlyUpdate:
    """An update that has begun before `step()` could accept it."""

    job: UpdateJob
    updates: dict[str, ParameterUpdate]


@dataclasses.dataclass(frozen=True)
class Commit:
    """An accepted step; it is committed when the updates of all `shards` are among `jobs`, and written."""

    step: int
    state: dict[str, Any]
    shards: frozenset[str]
    jobs: dict[str, UpdateJob]
    written: bool
    """Whether it goes to the drive; else it is checked only, and host memory alone has it."""
