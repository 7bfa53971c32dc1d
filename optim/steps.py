"""One optimizer step: how far the run is, what the step did, and what is left of it to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
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

    held: HeldGradient
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
