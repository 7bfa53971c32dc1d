"""The pipeline under the out-of-core optimizer: read record k+1 | update record k | write record k-1.

One thread walks the submitted jobs in order, chunk by chunk. A record is read from the shard's current slot, updated
in place, and written to the other slot; the weights are updated in place in the caller's buffer and written from
there. Nothing is ever written over the data it was computed from, so that a job can be given up at any moment.
Calls submitted between jobs (commits) are barriers: they run when everything before them is on its way out of memory
and acknowledged, and nothing behind them is written before they return.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from io_engine import Buffer, BufferPool, Engine, Extent, Transfer, combine_checksums, piece_digest
from optim.kernels import AdamWScalars, adamw_float32, adamw_split
from optim.layout import ShardLayout

TILE_ELEMENTS = 256 * 1024
"""Elements that one worker updates at a time: 3 MiB of traffic, so that workers share a record evenly."""

Recorder = Callable[[str, str, float, float, int], None]
"""(lane, name, started_seconds, ended_seconds, num_bytes): where spans go that a trace may show."""


class UpdateJob:
    """One optimizer step of one shard, from submission until its new slot is written.

    The caller owns `weights` (uint8, the shard's whole weight extent) and `gradient` (float32, in host memory; None if
    it was spilled to `gradient_extent`) again once `done` is set; from `weights_ready` on, `weights` holds the new
    weights and may be read, not written.
    """

    def __init__(
        self,
        layout: ShardLayout,
        *,
        weights: npt.NDArray[np.uint8],
        gradient: npt.NDArray[np.float32] | None,
        gradient_extent: Extent | None,
        scalars: Mapping[str, AdamWScalars],
        gradient_scale: float,
        state_from: Extent,
        state_to: Extent,
        weight_to: Extent,
        resident_state: ResidentState | None = None,
        wait_before: Sequence[Transfer] = (),
        on_done: Callable[[UpdateJob], None] | None = None,
    ) -> None:
        self.layout = layout
        self.weights = weights
        self.gradient = gradient
        self.gradient_extent = gradient_extent
        self.scalars = scalars
        self.gradient_scale = gradient_scale
        self.state_from, self.state_to, self.weight_to = state_from, state_to, weight_to
        self.resident_state = resident_state
        self.wait_before = wait_before
        self.weights_ready = threading.Event()
        self.done = threading.Event()
        self.error: BaseException | None = None
        self.refused_parameter: str | None = None
        """First parameter whose update gave NaN or infinity; the step must then not be committed."""
        self._on_done = on_done
        self._lock = threading.Lock()
        self._num_writes_open = 1  # one for the pipeline itself, so that `done` waits for the last chunk
        self._digests: dict[str, list[int]] = {"weight": [], "state": []}

    def wait_ready(self) -> None:
        """Block until `weights` holds the new weights; raises what went wrong."""
        self.weights_ready.wait()
        self._raise()

    def wait(self) -> None:
        """Block until the new slot is written (not yet durable); raises what went wrong."""
        self.done.wait()
        self._raise()

    def checksums(self) -> dict[str, str]:
        """Checksum by extent name of what was written; valid once done."""
        return {
            self.layout.weight_name: combine_checksums(self._digests["weight"]),
            self.layout.state_name: combine_checksums(self._digests["state"]),
        }

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self.error = self.error or error
        self.weights_ready.set()

    def _open_writes(self, count: int) -> None:
        with self._lock:
            self._num_writes_open += count

    def _close_write(self) -> None:
        with self._lock:
            self._num_writes_open -= 1
            last = self._num_writes_open == 0
        if last:
            self.weights_ready.set()
            if self._on_done is not None:
                self._on_done(self)
            self.done.set()


@dataclasses.dataclass
class ResidentState:
    """A shard's states kept in host memory; the drive still gets every step (write-through)."""

    buffer: Buffer
    filled: bool = False
    """Whether the buffer holds the current slot's contents."""


@dataclasses.dataclass
class _Chunk:
    job: UpdateJob
    index: int
    record: npt.NDArray[np.uint8]
    buffer: Buffer | None
    gradient: npt.NDArray[np.float32]
    transfers: list[Transfer]
    last: bool


class _Barrier:
    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call
        self.done = threading.Event()
        self.error: BaseException | None = None

    def wait(self) -> None:
        self.done.wait()
        if self.error is not None:
            raise self.error


class ShardUpdater:
    """Runs update jobs and barriers in the order of submission on a thread of its own.

    `records` holds the ring of record buffers (`record_buffer_bytes` each); `num_workers` threads share the
    arithmetic. After the first failure every later job and barrier fails with the same error: nothing is committed on
    top of a step that is not whole.
    """

    READ_AHEAD = 2

    def __init__(
        self, engine: Engine, records: BufferPool, *, num_workers: int, record: Recorder | None = None
    ) -> None:
        self._engine = engine
        self._records = records
        self._num_workers = max(1, num_workers)
        self._workers = ThreadPoolExecutor(self._num_workers, thread_name_prefix="fuyou-adam")
        self._record = record or (lambda *_: None)
        self._queue: collections.deque[UpdateJob | _Barrier] = collections.deque()
        self._wake = threading.Condition()
        self._closing = False
        self._broken: BaseException | None = None
        self._unfinished: list[UpdateJob] = []
        self._chunks: Iterator[tuple[UpdateJob, int]] = iter(())
        self._thread = threading.Thread(target=self._run, name="fuyou-optimizer", daemon=True)
        self._thread.start()

    # --- the caller's side -------------------------------------------------------------------------------------

    def submit(self, job: UpdateJob) -> None:
        """Queue a job; returns at once."""
        self._put(job)

    def submit_barrier(self, call: Callable[[], None]) -> _Barrier:
        """Queue `call` behind everything submitted so far; its `wait()` raises what `call` raised."""
        barrier = _Barrier(call)
        self._put(barrier)
        return barrier

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """`[function(item) for item in items]` on the workers; blocks."""
        if self._num_workers == 1 or len(items) < 2:
            return [function(item) for item in items]
        return list(self._workers.map(function, items))

    @property
    def error(self) -> BaseException | None:
        """The failure after which nothing more is committed, or None."""
        return self._broken

    def close(self) -> None:
        """Finish what is queued, stop the threads. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join()
        self._workers.shutdown()

    def _put(self, item: UpdateJob | _Barrier) -> None:
        with self._wake:
            if self._closing:
                raise RuntimeError("the optimizer is closed: open the model again to go on training")
            self._queue.append(item)
            self._wake.notify_all()

    # --- the pipeline's side -----------------------------------------------------------------------------------

    def _run(self) -> None:
        reading: collections.deque[_Chunk] = collections.deque()
        while True:
            self._start_reads(reading)
            if reading:
                self._update(reading.popleft())
                continue
            with self._wake:
                while not self._queue and not self._closing:
                    self._wake.wait()
                if not self._queue:
                    return
                barrier = self._queue[0] if isinstance(self._queue[0], _Barrier) else None
                if barrier is not None:
                    self._queue.popleft()
            if barrier is not None:
                self._run_barrier(barrier)

    def _run_barrier(self, barrier: _Barrier) -> None:
        for job in self._unfinished:
            job.done.wait()
            if job.error is not None:
                self._broken = self._broken or job.error
        self._unfinished.clear()
        try:
            if self._broken is not None:
                raise self._broken
            barrier.call()
        except BaseException as error:  # handed to whoever waits, on the thread that can act on it
            self._broken = self._broken or error
            barrier.error = error
        barrier.done.set()

    def _next_chunk(self) -> tuple[UpdateJob, int] | None:
        """The next record of the jobs at the head of the queue; None at a barrier or when there is none."""
        while True:
            chunk = next(self._chunks, None)
            if chunk is not None:
                return chunk
            with self._wake:
                if not self._queue or isinstance(self._queue[0], _Barrier):
                    return None
                job = self._queue.popleft()
            assert isinstance(job, UpdateJob)
            self._unfinished.append(job)
            if self._broken is not None:
                job._fail(self._broken)
                job._close_write()
                continue
            self._chunks = iter([(job, index) for index in range(job.layout.num_chunks)])

    def _start_reads(self, reading: collections.deque[_Chunk]) -> None:
        """Keep up to READ_AHEAD records on their way into memory."""
        while len(reading) < self.READ_AHEAD:
            following = self._next_chunk()
            if following is None:
                return
            job, index = following
            # Waiting here for a buffer cannot lock up: buffers that are not in `reading` are being written and come
            # back by themselves; those in `reading` are at most READ_AHEAD - 1, and the ring has more.
            reading.append(self._start_chunk(job, index))

    def _start_chunk(self, job: UpdateJob, index: int) -> _Chunk:
        layout = job.layout
        offset, num_bytes = layout.state_range(index)
        start, stop = layout.chunk_range(index)
        transfers: list[Transfer] = list(job.wait_before) if index == 0 else []
        gradient_offset, gradient_bytes = layout.gradient_range(index)
        buffer: Buffer | None = None
        resident = job.resident_state
        spilled = gradient_bytes if job.gradient is None else 0
        try:
            if resident is not None:
                record = resident.buffer.array[offset : offset + num_bytes]
                if spilled:
                    buffer = self._records.acquire(spilled)
            else:
                buffer = self._records.acquire(num_bytes + spilled)
                record = buffer.array[:num_bytes]
            if resident is None or not resident.filled:
                transfers.append(self._engine.read(job.state_from.sub(offset, num_bytes), record))
            if job.gradient is not None:
                gradient = job.gradient[start:stop]
            else:
                assert buffer is not None and job.gradient_extent is not None
                staging = buffer.array[-spilled:]
                transfers.append(
                    self._engine.read(job.gradient_extent.sub(gradient_offset, gradient_bytes), staging)
                )
                gradient = staging.view(np.float32)[: stop - start]
        except BaseException as error:
            job._fail(error)
            record, gradient = np.empty(0, np.uint8), np.empty(0, np.float32)
        return _Chunk(job, index, record, buffer, gradient, transfers, index == layout.num_chunks - 1)

    def _update(self, chunk: _Chunk) -> None:
        job = chunk.job
        writes: list[Transfer] = []
        for transfer in chunk.transfers:
            # Every one is waited for, whatever the others did: the record goes back to the ring below, and nothing
            # may still be reading into it then.
            try:
                transfer.wait()
            except BaseException as error:
                job._fail(error)
        try:
            if job.error is None:
                self._compute(chunk)
                writes = self._start_writes(chunk)
        except BaseException as error:
            job._fail(error)
        self._broken = self._broken or job.error
        if chunk.last and job.error is None:
            if job.resident_state is not None:
                job.resident_state.filled = True
            job.weights_ready.set()
        # The record goes back to the ring when its last byte is on the drive, not before: a read into it would
        # change what is still being written.
        open_writes = _Countdown(len(writes), chunk.buffer)
        for transfer in writes:
            transfer.add_done_callback(lambda t: self._written(job, t, open_writes))
        if not writes:
            open_writes.release_now()
        if chunk.last:
            job._close_write()

    def _written(self, job: UpdateJob, transfer: Transfer, open_writes: _Countdown) -> None:
        try:
            transfer.wait()
        except BaseException as error:
            job._fail(error)
        open_writes.one_done()
        job._close_write()

    def _start_writes(self, chunk: _Chunk) -> list[Transfer]:
        job, layout = chunk.job, chunk.job.layout
        offset, num_bytes = layout.weight_range(chunk.index)
        weights = job.weights[offset : offset + num_bytes]
        state_offset, state_bytes = layout.state_range(chunk.index)
        started = time.perf_counter()
        # Hashed here, while the chunk is still in cache.
        state_digest, weight_digest = self.map(piece_digest, [chunk.record, weights])
        job._digests["state"].append(state_digest)
        job._digests["weight"].append(weight_digest)
        self._record("cpu", f"checksum {layout.name}", started, time.perf_counter(), num_bytes + state_bytes)
        writes = []
        for extent, array in (
            (job.state_to.sub(state_offset, state_bytes), chunk.record),
            (job.weight_to.sub(offset, num_bytes), weights),
        ):
            job._open_writes(1)
            try:
                writes.append(self._engine.write(extent, array))
            except BaseException:
                job._close_write()
                raise
        return writes

    def _compute(self, chunk: _Chunk) -> None:
        job, layout = chunk.job, chunk.job.layout
        started = time.perf_counter()
        begin, end = layout.chunk_range(chunk.index)
        views = layout.views(chunk.record, chunk.index)
        weight_type = np.uint16 if layout.compute_dtype == "bfloat16" else np.float32
        weights = job.weights.view(weight_type)

        def update(tile: tuple[str, int, int]) -> int:
            name, a, b = tile
            local = slice(a - begin, b - begin)
            gradient, scalars = chunk.gradient[local], job.scalars[name]
            if views.low is None:
                return adamw_float32(
                    weights[a:b], views.m[local], views.v[local], gradient, scalars, job.gradient_scale
                )
            return adamw_split(
                weights[a:b],
                views.low[local],
                views.m[local],
                views.v[local],
                gradient,
                scalars,
                job.gradient_scale,
            )

        tiles = [
            (p.name, a, min(a + TILE_ELEMENTS, p.stop, end))
            for p in layout.parameters
            if p.name in job.scalars and p.start < end and p.stop > begin
            for a in range(max(p.start, begin), min(p.stop, end), TILE_ELEMENTS)
        ]
        for tile, num_refused in zip(tiles, self.map(update, tiles), strict=True):
            if num_refused and job.refused_parameter is None:
                job.refused_parameter = tile[0]
        self._record("cpu", f"adam {layout.name}", started, time.perf_counter(), chunk.record.nbytes)


class _Countdown:
    """Releases a buffer when the last of `count` writes from it has ended."""

    def __init__(self, count: int, buffer: Buffer | None) -> None:
        self._count, self._buffer, self._lock = count, buffer, threading.Lock()

    def one_done(self) -> None:
        with self._lock:
            self._count -= 1
            last = self._count == 0
        if last:
            self.release_now()

    def release_now(self) -> None:
        if self._buffer is not None:
            self._buffer.release()
