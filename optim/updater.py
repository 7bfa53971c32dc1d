"""The pipeline under the out-of-core optimizer: read record k+1 | update record k | write record k-1.

One thread walks the submitted jobs in order, chunk by chunk. A record is read from the shard's current slot,
updated in place, and written to the other slot; the weights are updated in place in the caller's buffer and
written from there. On the drive nothing is ever written over the data it was computed from, so that a job can
be given up at any moment; what stays in host memory alone (write-back) cannot. Calls submitted between jobs
(commits) are barriers: they run when every job before them has ended, writes included, and nothing behind them
begins before they return. With nothing left to do, the first records of a job that is yet to come are read.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from io_engine import (
    BudgetError,
    Buffer,
    BufferPool,
    Engine,
    Extent,
    Transfer,
    combine_checksums,
    piece_digest,
)
from optim.layout import ShardLayout
from optim.states import ParameterUpdate, update_part

TILE_ELEMENTS = 256 * 1024
"""Elements that one worker updates at a time, a multiple of a block of int8 moments: 3 MiB of traffic with float32
moments, so that workers share a record evenly."""

Recorder = Callable[[str, str, float, float, int], None]
"""(lane, name, started_seconds, ended_seconds, num_bytes): where spans go that a trace may show."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclasses.dataclass
class ResidentState:
    """A shard's states kept in host memory; the drive gets every step (write-through) or some of them (write-back)."""

    buffer: Buffer
    filled: bool = False
    """Whether the buffer holds the current slot's contents."""


@dataclasses.dataclass(frozen=True)
class UpdateInputs:
    """What an update works on; the job lets go of all of it before `on_done`."""

    weights: npt.NDArray[np.uint8]
    """The shard's whole weight extent, updated in place."""
    gradient: npt.NDArray[Any] | None
    """The shard's gradient in host memory; None if it was spilled to `gradient_extent`."""
    gradient_extent: Extent | None
    gradient_dtype: type[np.generic]
    """np.uint16 for bits of bfloat16."""
    updates: Mapping[str, ParameterUpdate]
    """By parameter; those without an entry keep their weights and states."""
    gradient_scale: float
    state_from: Extent
    state_to: Extent | None
    """None: weights and states stay in host memory, and nothing is written; needs `resident_state`."""
    weight_to: Extent | None
    resident_state: ResidentState | None = None
    wait_before: Sequence[Transfer] = ()
    """What must have arrived before `weights` can be updated."""
    on_gradient_used: Callable[[], None] | None = None
    """Called once, from any thread, when `gradient` is not in use any more, whether it went well or not: before the writes of
    what was computed from it have ended."""
    on_done: Callable[[], None] | None = None
    """Called once, behind it, when nothing here is in use any more."""


class UpdateJob:
    """One optimizer step of one shard, from submission until its new slot is written.

    The caller owns `weights` and `gradient` again once `done` is set (or `on_done` called); from
    `weights_ready` on, `weights` holds the new weights and may be read, not written.
    """

    def __init__(self, layout: ShardLayout, inputs: UpdateInputs) -> None:
        self.layout = layout
        self.weights_ready = threading.Event()
        self.done = threading.Event()
        self.error: BaseException | None = None
        self.refused_parameter: str | None = None
        """First parameter whose update gave NaN or infinity; the step must then not be committed."""
        self._inputs: UpdateInputs | None = inputs
        self._on_gradient_used = inputs.on_gradient_used
        self._lock = threading.Lock()
        self._num_open = 1  # one for the pipeline itself, so that `done` waits for the last chunk
        self._weight_digests: list[int] = []
        self._state_digests: list[int] = []

    def wait_ready(self) -> None:
        """Block until `weights` holds the new weights; raises what went wrong."""
        self.weights_ready.wait()
        self._raise()

    def wait(self) -> None:
        """Block until the new slot is written (not yet durable); raises what went wrong."""
        self.done.wait()
        self._raise()

    def checksums(self) -> dict[str, str]:
        """Checksum by extent name of what was written; valid once done, if anything was."""
        return {
            self.layout.weight_name: combine_checksums(self._weight_digests),
            self.layout.state_name: combine_checksums(self._state_digests),
        }

    @property
    def inputs(self) -> UpdateInputs:
        """For the pipeline: what to work on; gone once done."""
        assert self._inputs is not None
        return self._inputs

    def add_digests(self, state_digest: int, weight_digest: int) -> None:
        """For the pipeline: the next chunk's checksums."""
        self._state_digests.append(state_digest)
        self._weight_digests.append(weight_digest)

    def fail(self, error: BaseException) -> None:
        """For the pipeline: the new slot is worthless. The first error stays."""
        with self._lock:
            # Without the frames, which would keep arrays of released buffers alive.
            self.error = self.error or error.with_traceback(None)
        self.weights_ready.set()

    def gradient_used(self) -> None:
        """For the pipeline: nothing is computed from the gradient any more. Idempotent."""
        with self._lock:
            call, self._on_gradient_used = self._on_gradient_used, None
        if call is not None:
            call()

    def open_one(self) -> None:
        """For the pipeline: one more write that `done` waits for."""
        with self._lock:
            self._num_open += 1

    def close_one(self) -> None:
        """For the pipeline: a write, or the pipeline's own work, has ended."""
        with self._lock:
            self._num_open -= 1
            last = self._num_open == 0
        if not last:
            return
        on_done = self.inputs.on_done
        # Views keep a pool's memory mapped after the pool has given it up, so none outlives the work.
        self._inputs = None
        self.weights_ready.set()
        try:
            self.gradient_used()
            if on_done is not None:
                on_done()
        except BaseException as error:  # whoever waits must wake up, and hear of it
            self.fail(error)
        finally:
            self.done.set()

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error.with_traceback(None)


class Barrier:
    """A call in the queue of a `ShardUpdater`."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call
        self.done = threading.Event()
        self.error: BaseException | None = None

    def wait(self) -> None:
        """Block until the call has returned; raises what it raised, or why it did not run."""
        self.done.wait()
        if self.error is not None:
            raise self.error.with_traceback(None)

    def run(self) -> None:
        """For the pipeline: make the call; raises what it raises."""
        call, self._call = self._call, None
        assert call is not None
        call()

    def end(self, error: BaseException | None) -> None:
        """For the pipeline: wake up whoever waits."""
        self.error, self._call = error, None
        self.done.set()


@dataclasses.dataclass
class _Chunk:
    job: UpdateJob
    index: int
    record: npt.NDArray[np.uint8]
    buffer: Buffer | None
    gradient: npt.NDArray[Any]
    """float32, or uint16 the bits of bfloat16."""
    transfers: list[Transfer]


class _Ahead(NamedTuple):
    """A record that is read before its job is there."""

    extent: Extent
    buffer: Buffer
    transfer: Transfer

    def give_up(self) -> None:
        """Blocks until nothing is being read into the buffer any more; whatever went wrong will go wrong for the job, too."""
        with contextlib.suppress(Exception):
            self.transfer.wait()
        self.buffer.release()


class _SharedBuffer:
    """Releases a buffer when the last of those who use it has ended, and calls `then`; made with one user."""

    def __init__(self, buffer: Buffer | None, then: Callable[[], None]) -> None:
        self._num_users, self._buffer, self._lock, self._then = 1, buffer, threading.Lock(), then

    def open_one(self) -> None:
        with self._lock:
            self._num_users += 1

    def close_one(self) -> None:
        with self._lock:
            self._num_users -= 1
            last = self._num_users == 0
        if last and self._buffer is not None:
            self._buffer.release()
            self._then()


class ShardUpdater:
    """Runs update jobs and barriers in the order of submission on a thread of its own.

    `records` gives the buffers of the records on their way, one at least of the largest record (and its piece
    of a spilled gradient); `num_workers` threads share the arithmetic. After the first failure every later
    job and barrier fails with the same error: nothing is committed on top of a step that is not whole.
    """

    READ_AHEAD = 2

    def __init__(
        self, engine: Engine, records: BufferPool, *, num_workers: int, record: Recorder | None = None
    ) -> None:
        self._engine = engine
        self._records = records
        self._num_workers = max(1, num_workers)
        self._workers = concurrent.futures.ThreadPoolExecutor(self._num_workers, "fuyou-adam")
        self._record = record or (lambda *_: None)
        self._queue: collections.deque[UpdateJob | Barrier] = collections.deque()
        self._expected: dict[str, tuple[ShardLayout, Callable[[], Extent]]] = {}
        self._came_back = False
        """Whether a record's buffer did since it was last tried to read ahead."""
        self._wake = threading.Condition()
        self._closing = False
        self._error: BaseException | None = None
        # Of the pipeline's thread alone: jobs since the last barrier, and where it stands in the newest.
        self._unfinished: list[UpdateJob] = []
        self._chunks: Iterator[tuple[UpdateJob, int]] = iter(())
        self._next: tuple[UpdateJob, int] | None = None
        self._ahead: dict[tuple[str, int], _Ahead] = {}
        """By shard and record: at most READ_AHEAD together with those of jobs that are being read."""
        # A daemon: a program that forgot close() must still end; what it loses was never committed.
        self._thread = threading.Thread(target=self._run, name="fuyou-optimizer", daemon=True)
        self._thread.start()

    # --- the caller's side ---------------------------------------------------------------------------------

    def submit(self, job: UpdateJob) -> None:
        """Queue a job; returns at once. RuntimeError after close: the job's `on_done` is then not called."""
        self._put(job)

    def expect(self, layout: ShardLayout, state_from: Callable[[], Extent]) -> None:
        """The shard's states will be updated next, from there: read the first when all that is queued has begun. Returns at once.

        `state_from` is called on the pipeline's thread. Its extent must stay as it is until the shard's job, or
        `expect_nothing`, has been submitted.
        """
        with self._wake:
            self._expected[layout.name] = (layout, state_from)
            self._wake.notify_all()

    def expect_nothing(self) -> None:
        """What was expected and has not been submitted will not come; returns at once."""
        with self._wake:
            if not self._expected:
                return
            self._expected.clear()
        # Records of jobs that did come are taken up before it runs.
        self.submit_barrier(self._give_up_ahead)

    def submit_barrier(self, call: Callable[[], None]) -> Barrier:
        """Queue `call` behind everything submitted so far; returns at once. RuntimeError after close."""
        barrier = Barrier(call)
        self._put(barrier)
        return barrier

    def map(self, function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """`[function(item) for item in items]` on the workers; blocks until all have ended, failed or not."""
        if self._num_workers == 1 or len(items) < 2:
            return [function(item) for item in items]
        futures: list[concurrent.futures.Future[_Result]] = []
        try:
            for item in items:
                futures.append(self._workers.submit(function, item))
        finally:
            # Whatever was raised: no worker may still write into memory that the caller is about to release.
            concurrent.futures.wait(futures)
        return [future.result() for future in futures]

    @property
    def error(self) -> BaseException | None:
        """The failure after which nothing more is committed, or None."""
        return self._error

    def fail(self, error: BaseException) -> None:
        """Let every job and barrier from here on fail with `error`, unless something failed before."""
        with self._wake:
            self._error = self._error or error

    def close(self) -> None:
        """Finish what is queued, writes included, and stop the threads. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join()
        self._workers.shutdown()

    def _put(self, item: UpdateJob | Barrier) -> None:
        with self._wake:
            if self._closing:
                raise RuntimeError("the optimizer is closed: open the model again to go on training")
            self._queue.append(item)
            if isinstance(item, UpdateJob):
                self._expected.pop(item.layout.name, None)
            self._wake.notify_all()

    # --- the pipeline's side -------------------------------------------------------------------------------

    def _run(self) -> None:
        reading: collections.deque[_Chunk] = collections.deque()
        while True:
            self._start_reads(reading)
            if reading:
                self._update(reading.popleft())
                continue
            with self._wake:
                while not (self._queue or self._closing or (self._expected and (not self._ahead or self._came_back))):
                    self._wake.wait()
                if not self._queue:
                    if self._closing:
                        break
                    continue
                barrier = self._queue.popleft() if isinstance(self._queue[0], Barrier) else None
            if isinstance(barrier, Barrier):
                self._run_barrier(barrier)
        self._give_up_ahead()
        # Buffers that are still being written come back before `close` returns.
        for job in self._unfinished:
            job.done.wait()

    def _run_barrier(self, barrier: Barrier) -> None:
        unfinished, self._unfinished = self._unfinished, []
        for job in unfinished:
            job.done.wait()
            if job.error is not None:
                self.fail(job.error)
        error = self._error
        if error is None:
            try:
                barrier.run()
            except BaseException as raised:  # handed to whoever waits, on the thread that can act on it
                # Without the frames, which would keep arrays alive.
                error = raised.with_traceback(None)
                self.fail(error)
        barrier.end(error)

    def _start_reads(self, reading: collections.deque[_Chunk]) -> None:
        """Keep up to READ_AHEAD records on their way into memory."""
        while len(reading) < self.READ_AHEAD:
            self._next = self._next or self._next_chunk()
            if self._next is None:
                self._read_expected(reading)
                return
            # Only with nothing in `reading` does it wait for a buffer: the others are then being written and
            # come back by themselves, so that it cannot lock up however small the pool is.
            chunk = self._start_chunk(*self._next, block=not reading)
            if chunk is None:
                return
            self._next = None
            reading.append(chunk)

    def _read_expected(self, reading: Sequence[_Chunk]) -> None:
        """Start to read the first records of what is expected, if nothing is queued: behind a barrier nothing may be read."""
        with self._wake:
            self._came_back = False
            if self._error is not None:
                self._expected.clear()
            expected = [] if self._queue or self._closing else list(self._expected.values())
        for layout, state_from in expected:
            for index in range(min(layout.num_chunks, self.READ_AHEAD)):
                if (layout.name, index) in self._ahead:
                    continue
                if len(reading) + len(self._ahead) >= self.READ_AHEAD:
                    return
                # As for a job's: with none in memory the buffers of others are being written, and come back.
                block = not reading and not self._ahead
                try:
                    extent = state_from().sub(*layout.state_range(index))
                    buffer = self._records.acquire(extent.num_bytes, block=block)
                    try:
                        transfer = self._engine.read(extent, buffer.array[: extent.num_bytes])
                    except BaseException:
                        buffer.release()
                        raise
                except BaseException as error:
                    if block or not isinstance(error, BudgetError):
                        self.fail(error)
                    return
                self._ahead[layout.name, index] = _Ahead(extent, buffer, transfer)

    def _buffer_came_back(self) -> None:
        with self._wake:
            self._came_back = True
            self._wake.notify_all()

    def _give_up_ahead(self) -> None:
        while self._ahead:
            self._ahead.popitem()[1].give_up()

    def _next_chunk(self) -> tuple[UpdateJob, int] | None:
        """The next record of the jobs at the head of the queue; None at a barrier or when there is none."""
        while True:
            chunk = next(self._chunks, None)
            if chunk is not None:
                return chunk
            with self._wake:
                if not self._queue or isinstance(self._queue[0], Barrier):
                    return None
                job = self._queue.popleft()
            assert isinstance(job, UpdateJob)
            # Of guesses that no step took up no barrier ever asks.
            self._unfinished = [j for j in self._unfinished if not j.done.is_set() or j.error is not None]
            self._unfinished.append(job)
            if self._error is not None:
                job.fail(self._error)
                # The caller gets its buffers back only when nothing is being read into them any more.
                _wait_all(job.inputs.wait_before, job)
                job.close_one()
                continue
            self._chunks = iter([(job, index) for index in range(job.layout.num_chunks)])

    def _start_chunk(self, job: UpdateJob, index: int, *, block: bool) -> _Chunk | None:
        """Start to read a record; None if `block` is False and there is no buffer for it now."""
        layout, inputs = job.layout, job.inputs
        offset, num_bytes = layout.state_range(index)
        start, stop = layout.chunk_range(index)
        gradient_offset, gradient_bytes = layout.gradient_range(index, inputs.gradient_dtype)
        resident = inputs.resident_state
        spilled_bytes = gradient_bytes if inputs.gradient is None else 0
        staged_bytes = spilled_bytes if resident is not None else num_bytes + spilled_bytes
        nothing = np.empty(0, np.uint8)
        chunk = _Chunk(job, index, nothing, None, nothing.view(np.float32), [])
        if index == 0:
            chunk.transfers += inputs.wait_before
        ahead = self._ahead.pop((layout.name, index), None)
        try:
            if ahead is not None:
                chunk.buffer = ahead.buffer
                chunk.transfers.append(ahead.transfer)
                assert staged_bytes == num_bytes
                assert ahead.extent == inputs.state_from.sub(offset, num_bytes)
            elif staged_bytes:
                chunk.buffer = self._acquire(staged_bytes, block=block)
            if resident is not None:
                chunk.record = resident.buffer.array[offset : offset + num_bytes]
            else:
                assert chunk.buffer is not None
                chunk.record = chunk.buffer.array[:num_bytes]
            if ahead is None and (resident is None or not resident.filled):
                chunk.transfers.append(self._engine.read(inputs.state_from.sub(offset, num_bytes), chunk.record))
            if inputs.gradient is not None:
                chunk.gradient = inputs.gradient[start:stop]
            else:
                assert chunk.buffer is not None
                assert inputs.gradient_extent is not None
                staging = chunk.buffer.array[staged_bytes - spilled_bytes : staged_bytes]
                piece = inputs.gradient_extent.sub(gradient_offset, gradient_bytes)
                chunk.transfers.append(self._engine.read(piece, staging))
                chunk.gradient = staging.view(inputs.gradient_dtype)[: stop - start]
        except BaseException as error:
            if isinstance(error, BudgetError) and not block:
                return None
            job.fail(error)
        return chunk

    def _acquire(self, num_bytes: int, *, block: bool) -> Buffer:
        """A buffer of the records' pool; before it is waited for, what was read ahead of other jobs is given up."""
        if block and self._ahead:
            try:
                return self._records.acquire(num_bytes, block=False)
            except BudgetError:
                self._give_up_ahead()
        return self._records.acquire(num_bytes, block=block)

    def _update(self, chunk: _Chunk) -> None:
        job = chunk.job
        last = chunk.index == job.layout.num_chunks - 1
        # Every one is waited for, whatever the others did: the record goes back to the pool below, and
        # nothing may still be reading into it then.
        _wait_all(chunk.transfers, job)
        # The record goes back when its last byte is on the drive, not before: a read into it would change
        # what is still being written.
        shared = _SharedBuffer(chunk.buffer, self._buffer_came_back)
        resident = job.inputs.resident_state
        try:
            if job.error is None:
                self._compute(chunk)
                self._start_writes(chunk, shared)
        except BaseException as error:
            job.fail(error)
        if job.error is not None:
            self.fail(job.error)
        elif last:
            if resident is not None:
                resident.filled = True
            job.weights_ready.set()
        shared.close_one()
        if last:
            # Whoever waits for its memory need not wait for the drive.
            job.gradient_used()
            job.close_one()

    def _start_writes(self, chunk: _Chunk, shared: _SharedBuffer) -> None:
        job, layout, inputs = chunk.job, chunk.job.layout, chunk.job.inputs
        if inputs.state_to is None or inputs.weight_to is None:
            return
        offset, num_bytes = layout.weight_range(chunk.index)
        weights = inputs.weights[offset : offset + num_bytes]
        state_offset, state_bytes = layout.state_range(chunk.index)
        started = time.perf_counter()
        # Hashed here, while the chunk is still in cache.
        state_digest, weight_digest = self.map(piece_digest, [chunk.record, weights])
        job.add_digests(state_digest, weight_digest)
        self._record("cpu", f"checksum {layout.name}", started, time.perf_counter(), num_bytes + state_bytes)

        def written(transfer: Transfer) -> None:
            if transfer.error is not None:
                job.fail(transfer.error)
            shared.close_one()
            job.close_one()

        for extent, array in (
            (inputs.state_to.sub(state_offset, state_bytes), chunk.record),
            (inputs.weight_to.sub(offset, num_bytes), weights),
        ):
            shared.open_one()
            job.open_one()
            try:
                transfer = self._engine.write(extent, array)
            except BaseException:
                shared.close_one()
                job.close_one()
                raise
            transfer.add_done_callback(written)

    def _compute(self, chunk: _Chunk) -> None:
        job, layout, inputs = chunk.job, chunk.job.layout, chunk.job.inputs
        started = time.perf_counter()
        begin, end = layout.chunk_range(chunk.index)
        views = layout.views(chunk.record, chunk.index)
        weights = inputs.weights.view(np.float32 if views.low is None else np.uint16)
        starts = {p.name: p.start for p in layout.parameters}

        def update(tile: tuple[str, int, int]) -> bool:
            name, a, b = tile
            return update_part(
                weights[a:b],
                views.part(a - begin, b - begin),
                chunk.gradient[a - begin : b - begin],
                inputs.updates[name],
                inputs.gradient_scale,
                first_element=a - starts[name],
            )

        tiles = [
            (p.name, a, min(a + TILE_ELEMENTS, p.stop, end))
            for p in layout.parameters
            if p.name in inputs.updates and p.start < end and p.stop > begin
            for a in range(max(p.start, begin), min(p.stop, end), TILE_ELEMENTS)
        ]
        for tile, is_refused in zip(tiles, self.map(update, tiles), strict=True):
            if is_refused and job.refused_parameter is None:
                job.refused_parameter = tile[0]
        self._record("cpu", f"adam {layout.name}", started, time.perf_counter(), chunk.record.nbytes)


def _wait_all(transfers: Sequence[Transfer], job: UpdateJob) -> None:
    """Block until all have ended; the first error becomes the job's."""
    for transfer in transfers:
        try:
            transfer.wait()
        except BaseException as error:
            job.fail(error)


def check_room(
    records: BufferPool, shards: Sequence[ShardLayout], waiting: Mapping[str, str], resident: Iterable[str]
) -> None:
    """BudgetError unless every shard's records fit beside what is kept in the pool."""
    in_memory = set(resident)
    needed_bytes = 0
    for shard in shards:
        staged_bytes = 0 if shard.name in in_memory else shard.full_record_bytes
        if waiting[shard.name] == "spill":
            staged_bytes += shard.gradient_range(0)[1]
        needed_bytes = max(needed_bytes, staged_bytes)
    if needed_bytes:
        records.acquire(needed_bytes, block=False).release()
