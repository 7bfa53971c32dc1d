"""Gradients on their way from the backward pass to their updates: summed, measured, held or spilled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from io_engine import BudgetError, Buffer, BufferPool, ByteArray, Engine, Extent, Store
from optim.kernels import widen_gradient
from optim.layout import ParameterSlot, ShardLayout
from optim.norm import TILE_ELEMENTS, parameter_sum, tile_sums
from optim.updater import Recorder, ShardUpdater

Waiting = Literal["host", "spill", "free"]
"""Where a shard's gradient is kept until a step takes it: host memory, a scratch file, or nowhere once its update that
began in the backward pass is through; it can then neither be clipped nor added to."""

_PIECE_ELEMENTS = 32 * TILE_ELEMENTS
"""Elements that one worker measures at a time, 8 MiB of float32, so that workers share a large parameter evenly."""

_PATIENCE_SECONDS = 0.5
"""How long to wait for a buffer before looking whether one can come at all."""


def check_waiting(shards: Iterable[str], early: frozenset[str], waiting: Mapping[str, Waiting]) -> None:
    """ValueError for a way of waiting that there is not, or not for a shard without early updates."""
    for name in shards:
        if waiting[name] not in ("host", "spill", "free") or (waiting[name] == "free" and name not in early):
            raise ValueError(
                f"waiting[{name!r}] = {waiting[name]!r}: choose 'host' or 'spill', or 'free' for a shard with early updates"
            )


class ShardGradient:
    """The gradient of one shard while it is being summed: flat, host memory, padding undefined.

    float32; or, until something is added to it, uint16 the bits of bfloat16, in the first half of the same memory. `arrived`
    names the parameters that have a gradient; the others' elements are undefined.
    """

    def __init__(self, layout: ShardLayout, buffer: Buffer, dtype: type[np.generic] = np.float32) -> None:
        self.layout = layout
        self.buffer = buffer
        self.array = self._as(dtype)
        self.arrived: set[str] = set()

    def widen(self) -> None:
        """Make it float32, with the same values; nobody may be using the array."""
        if self.array.dtype == np.float32:
            return
        narrow, self.array = self.array, self._as(np.float32)
        # From the end, through memory of its own: a piece comes to lie on itself and on what is behind it.
        for start in reversed(range(0, narrow.size, _PIECE_ELEMENTS)):
            self.array[start : start + _PIECE_ELEMENTS] = widen_gradient(narrow[start : start + _PIECE_ELEMENTS])

    def _as(self, dtype: type[np.generic]) -> npt.NDArray[Any]:
        return self.buffer.array[: self.layout.num_elements * np.dtype(dtype).itemsize].view(dtype)


class HeldGradient:
    """A whole gradient, from its arrival to the end of its update: in memory, spilled to `extent`, or both for a while."""

    def __init__(self, gradient: ShardGradient, sums: dict[str, float]) -> None:
        self.layout = gradient.layout
        self.arrived = frozenset(gradient.arrived)
        self.sums = sums
        """Sum of squares of each parameter's gradient, as `optim.norm` defines it."""
        self.extent: Extent | None = None
        self.dtype: type[np.generic] = gradient.array.dtype.type
        """np.uint16 for bits of bfloat16."""
        self._gradient: ShardGradient | None = gradient
        self._buffer = gradient.buffer
        self._lock = threading.Lock()
        self._num_users = 1

    @property
    def spilled_bytes(self) -> int:
        """What it takes in a scratch file."""
        return sum(self.layout.gradient_range(self.layout.num_chunks - 1, self.dtype))

    @property
    def array(self) -> npt.NDArray[Any] | None:
        """The gradient in host memory for a new user; None once `release` was called."""
        return None if self._gradient is None else self._gradient.array

    @property
    def bytes_to_spill(self) -> ByteArray:
        """Its memory, in whole pages, padding included; before `release`."""
        return self._buffer.array[: self.spilled_bytes]

    def use(self) -> Callable[[], None]:
        """Keep the memory, if there is any yet, until the function that is returned is called, once."""
        if self._gradient is None:
            return _nothing
        with self._lock:
            self._num_users += 1
        return self._drop_user

    def release(self) -> None:
        """Give the memory up; the buffer goes back when its last user is through. Idempotent."""
        with self._lock:
            gradient, self._gradient = self._gradient, None
        if gradient is not None:
            self._drop_user()

    def take_back(self) -> None:
        """Give the memory up for users too, when none of them can be at work any more. Idempotent."""
        with self._lock:
            self._gradient, given_back = None, self._num_users <= 0
            self._num_users = 0
        if not given_back:
            self._buffer.release()

    def _drop_user(self) -> None:
        with self._lock:
            self._num_users -= 1
            last = self._num_users == 0
        if last:
            self._buffer.release()


def _nothing() -> None:
    """What gives up nothing."""


class GradientIntake:
    """Takes whole gradients in, in order, on a thread of its own.

    `held` maps shards to what the backward passes since the last `take_all` left; read it after `finish`.
    After a failure nothing more is taken in, and `finish` raises it: a gradient is missing then.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        store: Store,
        gradients: BufferPool,
        records: BufferPool,
        updater: ShardUpdater,
        waiting: Mapping[str, Waiting],
        record: Recorder,
    ) -> None:
        self._engine, self._store = engine, store
        self._gradients, self._records, self._updater = gradients, records, updater
        self._waiting = waiting
        self._record = record
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fuyou-gradient")
        self._closed = False
        self._extents: dict[str, Extent] = {}
        self._num_submitted = 0  # counted by the thread that submits, and by the one that takes in
        self._num_taken_in = 0
        self.held: dict[str, HeldGradient] = {}
        self.bytes_spilled = 0
        """Bytes written to scratch files, and read to be added to, since the last `take_all`."""
        self.error: BaseException | None = None

    # --- the caller's side ---------------------------------------------------------------------------------

    def acquire(
        self, layout: ShardLayout, dtype: type[np.generic], updates_are_done: Callable[[], bool]
    ) -> ShardGradient:
        """An empty gradient; blocks while the pool is used up.

        BudgetError if it is and no buffer can come back: nothing is being taken in, and
        `updates_are_done()` says that no update holds one. Raises what went wrong in the background.
        """
        while True:
            # Asked before the attempt: what comes back in between, the attempt finds.
            idle = self._num_submitted == self._num_taken_in and updates_are_done()
            self._raise_if_failed()
            if self._updater.error is not None:
                raise self._updater.error.with_traceback(None)
            try:
                if idle:
                    buffer = self._gradients.acquire(layout.gradient_bytes, block=False)
                else:
                    buffer = self._gradients.acquire(layout.gradient_bytes, timeout_seconds=_PATIENCE_SECONDS)
                return ShardGradient(layout, buffer, dtype)
            except TimeoutError:
                continue
            except BudgetError as error:
                raise BudgetError(
                    f"no memory for the gradient of {layout.name}: {error}. All of it holds gradients that "
                    "wait for optimizer.step(); give a larger host_memory, or plan to spill more gradients"
                ) from None

    def submit(
        self,
        gradient: ShardGradient,
        *,
        wait: Callable[[], None],
        then: Callable[[HeldGradient], None] | None,
        on_unused: Callable[[], None] | None,
    ) -> None:
        """Take `gradient` in once `wait()` has returned, call `then`, and keep it as planned; returns at once.

        The buffer is the intake's from here on. `on_unused` is called instead of `then`, or when that raised:
        after a failure, and when no parameter got a gradient.
        """
        self._num_submitted += 1
        try:
            self._thread.submit(self._take_in, gradient, wait, then, on_unused)
        except BaseException:
            self._num_submitted -= 1
            raise

    def finish(self) -> None:
        """Block until everything submitted is taken in; raises what went wrong."""
        if not self._closed:
            # Behind everything else on the only thread, also what an interrupted caller lost track of.
            self._thread.submit(int).result()
        self._raise_if_failed()

    def take_all(self) -> dict[str, HeldGradient]:
        """Everything held, which is the caller's from here on; `finish` first."""
        held, self.held = self.held, {}
        self.bytes_spilled = 0
        return held

    def close(self) -> None:
        """Take in what is submitted, stop the thread; what is held stays for `take_all`. Idempotent."""
        self._closed = True
        self._thread.shutdown()

    def _raise_if_failed(self) -> None:
        if self.error is not None:
            raise self.error.with_traceback(None)

    # --- the thread's side ---------------------------------------------------------------------------------

    def _take_in(
        self,
        gradient: ShardGradient,
        wait: Callable[[], None],
        then: Callable[[HeldGradient], None] | None,
        on_unused: Callable[[], None] | None,
    ) -> None:
        is_mine, was_used = True, False
        try:
            # Waited for even after a failure: the buffer goes back, and nothing may still be copied into it.
            wait()
            self._raise_if_failed()
            layout = gradient.layout
            if not gradient.arrived:
                is_mine = False
                gradient.buffer.release()
                if on_unused is not None:
                    on_unused()
                return
            earlier = self.held.get(layout.name)
            if earlier is not None:
                self._add_earlier(earlier, gradient)
            held = HeldGradient(gradient, self._sums_of_squares(gradient))
            if earlier is not None:
                earlier.release()
            self.held[layout.name], is_mine = held, False
            if then is not None:
                then(held)
                was_used = True
            waiting = self._waiting[layout.name]
            if waiting == "spill":
                self._spill(held)
            elif waiting == "free" and was_used:
                held.release()
        except BaseException as error:  # handed to whoever calls `finish`
            # Without the frames, which would keep arrays of released buffers alive.
            self.error = self.error or error.with_traceback(None)
            if is_mine:
                gradient.buffer.release()
            if on_unused is not None and not was_used:
                on_unused()
        finally:
            self._num_taken_in += 1

    def _add_earlier(self, earlier: HeldGradient, gradient: ShardGradient) -> None:
        """gradient := earlier + gradient, by parameter, where both have one; else whichever there is.

        A spilled one comes through buffers of the records' pool, which return by themselves: all buffers of
        the gradients' pool may be waiting in line behind this one.
        """
        layout = gradient.layout
        gradient.widen()
        for chunk in range(layout.num_chunks):
            start, stop = layout.chunk_range(chunk)
            if earlier.array is not None:
                self._add_range(layout, gradient, earlier.arrived, earlier.array[start:stop], start)
                continue
            assert earlier.extent is not None
            offset, num_bytes = layout.gradient_range(chunk, earlier.dtype)
            with self._records.acquire(num_bytes) as staging:
                array = staging.array[:num_bytes]
                self._engine.read(earlier.extent.sub(offset, num_bytes), array).wait()
                self._add_range(layout, gradient, earlier.arrived, array.view(earlier.dtype)[: stop - start], start)
        if earlier.array is None:
            self.bytes_spilled += earlier.spilled_bytes
        gradient.arrived |= earlier.arrived

    def _add_range(
        self,
        layout: ShardLayout,
        gradient: ShardGradient,
        arrived: frozenset[str],
        values: npt.NDArray[Any],
        begin: int,
    ) -> None:
        """Add `values`, elements `begin` and following of an earlier gradient of the parameters `arrived`."""
        if values.dtype == np.uint16:
            values = widen_gradient(values)
        for p in layout.parameters:
            a, b = max(p.start, begin), min(p.stop, begin + len(values))
            if p.name not in arrived or a >= b:
                continue
            if p.name in gradient.arrived:
                gradient.array[a:b] += values[a - begin : b - begin]
            else:
                gradient.array[a:b] = values[a - begin : b - begin]

    def _sums_of_squares(self, gradient: ShardGradient) -> dict[str, float]:
        started = time.perf_counter()
        pieces: list[tuple[ParameterSlot, int]] = [
            (p, start)
            for p in gradient.layout.parameters
            if p.name in gradient.arrived
            for start in range(p.start, p.stop, _PIECE_ELEMENTS)
        ]
        sums = self._updater.map(
            lambda piece: tile_sums(gradient.array[piece[1] : min(piece[1] + _PIECE_ELEMENTS, piece[0].stop)]),
            pieces,
        )
        tiles: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in gradient.arrived}
        for (p, _start), piece_sums in zip(pieces, sums, strict=True):
            tiles[p.name].append(piece_sums)
        self._record("cpu", f"norm {gradient.layout.name}", started, time.perf_counter(), gradient.array.nbytes)
        return {name: parameter_sum(np.concatenate(t)) if t else 0.0 for name, t in tiles.items()}

    def _spill(self, held: HeldGradient) -> None:
        layout = held.layout
        extent = self._extents.get(layout.name)
        if extent is None:  # asked for once: the store answers only between commits
            extent = self._store.scratch(f"{layout.name}/gradient", layout.gradient_bytes)
            self._extents[layout.name] = extent
        self._engine.write(extent.sub(0, held.spilled_bytes), held.bytes_to_spill).wait()
        self.bytes_spilled += held.spilled_bytes
        held.extent = extent
        held.release()
