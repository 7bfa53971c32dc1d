"""The optimizer of a streamed model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from optim import OffloadedAdamW


class StreamedAdamW(OffloadedAdamW):
    """The optimizer of a streamed model: remembers a call that was cut short, after which nothing may be committed."""

    cut_short: str | None = None
    """Name of the call that did not come to its end."""
    after_edit: Callable[[str], None] | None = None
    """Called with the name of a parameter whose state was edited."""
    num_steps_called = 0
    """Calls of step and zero_grad that have ended, after each of which no gradient waits."""

    def _take_step(self) -> None:
        # Not `step`: torch runs the hooks of steps around every class's own.
        with self._uninterrupted("optimizer.step()"):
            super()._take_step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See `OffloadedAdamW.zero_grad`."""
        with self._uninterrupted("optimizer.zero_grad()"):
            super().zero_grad(set_to_none)

    def set_state(self, name: str, **values: torch.Tensor | None) -> None:
        """See `OffloadedAdamW.set_state`."""
        super().set_state(name, **values)
        if self.after_edit is not None:
            self.after_edit(name)

    @contextlib.contextmanager
    def _uninterrupted(self, what: str) -> Iterator[None]:
        earlier, self.cut_short = self.cut_short, what
        try:
            yield
        except Exception:
            # Errors leave the optimizer as it was, or broken by its own account.
            self.cut_short = earlier
            raise
        self.cut_short = earlier
        self.num_steps_called += 1
