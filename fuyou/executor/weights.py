"""Weights on their way in: read ahead in the order in which blocks will be visited, handed out, given back.

A shard whose optimizer step is still to come gets it on the way: the read is the update's read, and the block computes
with what the update leaves. Shards that the plan keeps on the device need neither the drive nor host memory from one visit
to the next, unless an update comes between.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch

from fuyou.executor.device import Device, Ready, nothing_to_wait_for
from fuyou.quantising import QuantisedLayout
from io_engine import BudgetError, Buffer, BufferPool, Engine, InterruptsDeferred, Store, Transfer
from optim import OffloadedAdamW, ShardLayout, UpdateJob

NUM_ON_DEVICE = 3
"""Blocks whose weights have room on the device from the beginning."""

_TRY_SECONDS = 0.5
"""How long a wait for a buffer leaves a Ctrl-C unheard."""
_PATIENCE_SECONDS = 300.0
"""How long to wait for a buffer at all."""


class LoadedShard:
    """A shard's weights in host memory, shared by whoever holds a reference."""

    def __init__(self, layout: ShardLayout, buffer: Buffer) -> None:
        self.layout = layout
        self.buffer: Buffer | None = buffer
        """None: the device alone has the weights."""
        self.transfer: Transfer | None = None
        self.job: UpdateJob | None = None
        self.num_references = 0
        self.num_computing = 0
        """Of the references, those that need the weights on the device."""
        self.prefetched = False
        """Read ahead, not yet asked for; this keeps it as a reference would."""
        self.on_device: torch.Tensor | None = None
        """What is stored, in the device's memory."""
        self.device_weights: torch.Tensor | None = None
        """The same, dequantised if it must be."""
        self.uploaded: Ready = nothing_to_wait_for

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """The weights' whole extent in host memory, as it is stored."""
        assert self.buffer is not None
        return self.buffer.array[: self.layout.weight_bytes]

    def wait(self) -> None:
        """Block until the weights can be computed with."""
        if self.transfer is not None:
            self.transfer.wait()
        if self.job is not None:
            self.job.wait_ready()

    def is_whole(self) -> bool:
        """Whether the weights have arrived, and an update on their way in is through, both without a failure."""
        arrived = self.transfer is None or (self.transfer.done() and self.transfer.error is None)
        return arrived and (self.job is None or (self.job.done.is_set() and self.job.error is None))

    def host_tensor(self) -> torch.Tensor:
        """The weights as a flat tensor of the compute dtype that shares the buffer's memory; a copy of quantised ones, and
        of those that the device alone has.
        """
        if self.buffer is None:
            assert self.on_device is not None
            stored = self.on_device.cpu()
        else:
            stored = self.stored_tensor()
        return self.layout.dequantise(stored) if isinstance(self.layout, QuantisedLayout) else stored

    def stored_tensor(self) -> torch.Tensor:
        """The buffer's memory as it is stored: bytes of quantised weights, else a flat tensor of the compute dtype."""
        if isinstance(self.layout, QuantisedLayout):
            return torch.from_numpy(self.array)
        if self.layout.compute_dtype == "bfloat16":
            return torch.from_numpy(self.array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(self.array.view(np.float32))


class WeightStream:
    """Hands out shards in the announced order, reading up to `prefetch_depth` of those ahead that are not in memory.

    `resident` shards are read once and stay in host memory; those in `on_device` stay on the device for as long as they are
    not updated: frozen ones from their first visit on, others from the forward pass to the backward pass, unless that one
    updates them (in host memory, where it needs them anyway). What is given back right before its own next visit stays
    until then, as if it had been read ahead. All buffers come from `pool`.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        store: Store,
        pool: BufferPool,
        layouts: Mapping[str, ShardLayout],
        resident: frozenset[str],
        on_device: frozenset[str] = frozenset(),
        prefetch_depth: int,
        device: Device,
    ) -> None:
        self._engine, self._store, self._pool, self._device = engine, store, pool, device
        self._layouts = dict(layouts)
        self._resident = resident
        self._on_device = on_device if device.has_own_memory else frozenset[str]()
        self._prefetch_depth = prefetch_depth
        self._loaded: dict[str, LoadedShard] = {}
        self._visits: deque[str] = deque()
        self._lock = threading.RLock()
        self._has_freed = False
        """Whether a buffer has come back since the last attempt to read ahead."""
        self.optimizer: OffloadedAdamW | None = None
        sizes = sorted((layout.weight_bytes for layout in layouts.values()), reverse=True)
        # One is computed with while the next is on its way, and what borrows has two.
        device.reserve_weights(sizes[:NUM_ON_DEVICE])

    def announce(self, visits: Iterable[str], *, again: bool = False) -> None:
        """The shards that will be acquired next, in order; replaces what was announced before.

        What was read ahead and comes soon in this order, too, is not read again: announce nothing first where it may be
        older than the last step. With `again` the same order will probably follow once more: its beginning is read ahead
        at its end.
        """
        # Ctrl-C comes when it is noted whose each buffer is, and what reads into it; so in `acquire`.
        with InterruptsDeferred(), self._lock:
            order = list(visits)
            self._visits = deque([*order, *order[: self._prefetch_depth]] if again else order)
            soon = self._soon()
            for shard in list(self._loaded.values()):
                if shard.prefetched and shard.layout.name not in soon:
                    self._drop_prefetched(shard.layout.name)
                elif not self._stays_on_device(shard.layout.name):
                    self._leave_device(shard)
            self._prefetch()

    def read_ahead(self) -> None:
        """Use buffers that updates have given back since the last call here; from the thread that issues compute."""
        if self._has_freed:
            with InterruptsDeferred(), self._lock:
                self._prefetch()

    def _soon(self) -> list[str]:
        """The shards of the next visits that are not in memory for good, as many as are read ahead."""
        visits = (name for name in dict.fromkeys(self._visits) if not self._is_kept(name))
        return list(itertools.islice(visits, self._prefetch_depth))

    def _is_kept(self, name: str) -> bool:
        shard = self._loaded.get(name)
        return shard is not None and (name in self._resident or shard.on_device is not None)

    def acquire(self, name: str) -> LoadedShard:
        """The shard's weights, ready to compute with; blocks until they are. `release` it after use."""
        with self._lock:
            loaded = self._loaded.get(name)
            if loaded is not None and self.optimizer is not None and self.optimizer.has_pending_update(name):
                self._leave_device(loaded)
                loaded = self._loaded.get(name)
            is_there = loaded is not None and (loaded.prefetched or loaded.on_device is not None)
        # Outside the lock: the update that is waited for gives its buffer back through `end_use`.
        if self.optimizer is not None and loaded is not None and name in self._resident:
            # Not for the drive: the write that may still be under way reads the same memory, as compute does.
            self.optimizer.wait_updated(name)
        elif self.optimizer is not None and not is_there:
            self.optimizer.wait_written(name)
        with self._lock:
            if name in self._visits:
                while (skipped := self._visits.popleft()) != name:
                    self._drop_prefetched(skipped)
        shard: LoadedShard | None = None
        try:
            give_up_seconds = time.monotonic() + _PATIENCE_SECONDS
            while shard is None:
                with InterruptsDeferred():
                    shard = self._refer_to(name, is_last_try=time.monotonic() > give_up_seconds)
            shard.wait()
            if shard.on_device is None:
                shard.on_device, shard.uploaded = self._device.upload_weights(shard.stored_tensor())
            if shard.device_weights is None:
                layout, stored = shard.layout, shard.on_device
                shard.device_weights = layout.dequantise(stored) if isinstance(layout, QuantisedLayout) else stored
        except BaseException:
            if shard is not None:
                with self._lock:
                    shard.num_references -= 1
                    # Interrupted: the read may be under way, and the buffer must not go back before its end.
                    self._forget(shard)
            raise
        shard.num_computing += 1
        return shard

    def _refer_to(self, name: str, *, is_last_try: bool) -> LoadedShard | None:
        """The shard, its read begun, with one more reference; None after a while without a free buffer.

        TimeoutError instead of None on the last try.
        """
        with self._lock:
            shard = self._loaded.get(name) or self._start(name, block=True)
            if shard is not None:
                shard.num_references += 1
                shard.prefetched = False
                if name in self._resident:
                    self._update_resident(shard)
                self._prefetch()
                return shard
        # Not under the lock: buffers come back through `end_use`, which needs it.
        try:
            self._pool.acquire(self._layouts[name].weight_bytes, timeout_seconds=_TRY_SECONDS).release()
        except TimeoutError:
            if is_last_try:
                raise
        return None

    def release(self, shard: LoadedShard) -> None:
        """Give back what `acquire` gave; the last reference frees the buffer. From the thread that issues compute."""
        with InterruptsDeferred():
            self._let_device_go(shard)
            self.end_use(shard)

    def reset(self) -> None:
        """Let go of everything, whoever was to give it back: a Ctrl-C may have come in between.

        For when nobody computes with weights and no update works on them. From the thread that issues compute.
        """
        with self._lock:
            self._visits.clear()
            for shard in list(self._loaded.values()):
                shard.num_references = shard.num_computing = 0
                if shard.on_device is not None:
                    self._device.release_weights(shard.on_device)
                    shard.on_device = shard.device_weights = None
                self._forget(shard)

    def end_use(self, shard: LoadedShard) -> None:
        """Give the reference of an update or a read back; the last one frees the buffer. From any thread."""
        with self._lock:
            shard.num_references -= 1
            self._free_if_unused(shard)

    def _let_device_go(self, shard: LoadedShard) -> None:
        shard.num_computing -= 1
        if shard.num_computing == 0:
            shard.device_weights = None
            with self._lock:
                if self._loaded.get(shard.layout.name) is not shard or not self._stays_on_device(shard.layout.name):
                    self._leave_device(shard)

    def _stays_on_device(self, name: str) -> bool:
        """Whether the weights that compute has used are those of the next visit, and the plan keeps them for it."""
        if name not in self._on_device:
            return False
        optimizer = self.optimizer
        if optimizer is None or not optimizer.trains(name):
            return True
        return name in self._visits and not optimizer.updates_early(name)

    def _leave_device(self, shard: LoadedShard) -> None:
        """Give the device's memory up, unless compute uses it; from the thread that issues compute."""
        if shard.num_computing or shard.on_device is None:
            return
        self._device.release_weights(shard.on_device)
        shard.on_device = None
        if shard.buffer is None and self._loaded.get(shard.layout.name) is shard:
            del self._loaded[shard.layout.name]

    def hand_over(self, shard: LoadedShard) -> None:
        """The holder's reference goes to an update that writes into the weights: nobody else may get this buffer.

        The update's end calls `end_use`. From the thread that issues compute.
        """
        self._let_device_go(shard)
        with self._lock:
            if shard.layout.name not in self._resident and self._loaded.get(shard.layout.name) is shard:
                del self._loaded[shard.layout.name]

    def forget_resident(self) -> None:
        """Weights kept in memory are not those of the store any more: read them again at the next use."""
        with self._lock:
            self._drop_prefetched()
            for shard in list(self._loaded.values()):
                if self.optimizer is None or self.optimizer.trains(shard.layout.name):
                    self._leave_device(shard)
            for name in self._resident & self._loaded.keys():
                self._forget(self._loaded[name])

    @contextlib.contextmanager
    def look(self, name: str) -> Iterator[torch.Tensor]:
        """The shard's weights as a flat tensor in host memory, valid inside; what was not in memory before does not stay."""
        with self._lock:
            was_there = name in self._loaded
        shard = self.acquire(name)
        try:
            yield shard.host_tensor()
        finally:
            self.release(shard)
            with self._lock:
                if not was_there and self._loaded.get(name) is shard and shard.num_references == 0:
                    self._forget(shard)

    @property
    def resident(self) -> frozenset[str]:
        """The shards that stay in host memory once they are there."""
        return self._resident

    @property
    def prefetch_depth(self) -> int:
        """How many shards are read ahead."""
        return self._prefetch_depth

    def keep(self, resident: frozenset[str], prefetch_depth: int) -> None:
        """Keep these shards in host memory from here on, and read so far ahead; buffers of the others go back.

        Between passes, and when every step taken has been committed: what goes is read again at its next use.
        """
        with InterruptsDeferred(), self._lock:
            self._drop_prefetched()
            dropped = [self._loaded[name] for name in self._resident - resident if name in self._loaded]
            self._resident, self._prefetch_depth = resident, prefetch_depth
            for shard in dropped:
                self._forget(shard)

    def close(self) -> None:
        """Let go of everything read ahead or kept in memory; blocks until reads under way have ended."""
        with self._lock:
            self._visits.clear()
            for shard in list(self._loaded.values()):
                self._leave_device(shard)
            shards = [s for s in self._loaded.values() if s.prefetched or s.layout.name in self._resident]
        for shard in shards:
            if shard.transfer is not None:
                # Only its end matters, nobody needs the bytes. Not under the lock: see `_forget`.
                with contextlib.suppress(Exception):
                    shard.transfer.wait()
        with self._lock:
            for shard in shards:
                self._forget(shard)

    def _free_if_unused(self, shard: LoadedShard) -> None:
        name = shard.layout.name
        current = self._loaded.get(name) is shard
        if shard.num_references > 0 or shard.prefetched or (current and name in self._resident):
            return
        if current and shard.on_device is None:
            if self._visits and self._visits[0] == name and shard.is_whole():
                shard.prefetched = True
                return
            del self._loaded[name]
        shard.uploaded()
        if shard.buffer is not None:
            shard.buffer.release()
            self._has_freed = True
            # What they refer to is another shard's memory from here on.
            shard.buffer = shard.transfer = shard.job = None

    def _drop_prefetched(self, name: str | None = None) -> None:
        """Let go of what was read ahead and not asked for: of one shard, or of all."""
        for shard in list(self._loaded.values()):
            if shard.prefetched and name in (None, shard.layout.name):
                if shard.layout.name in self._resident:
                    shard.prefetched = False
                else:
                    self._forget(shard)

    def _forget(self, shard: LoadedShard) -> None:
        """Nobody gets this shard any more; its buffer goes back when its users and its read are done.

        The read is not waited for: I/O threads may be waiting for the lock, in `end_use`.
        """
        shard.prefetched = False
        self._leave_device(shard)
        if self._loaded.get(shard.layout.name) is shard:
            del self._loaded[shard.layout.name]
        if shard.transfer is None or shard.transfer.done():
            self._free_if_unused(shard)
        else:
            shard.num_references += 1
            shard.transfer.add_done_callback(lambda _transfer: self.end_use(shard))

    def _prefetch(self) -> None:
        """Start reads for the next shards, as far as buffers are free, and updates, in the order of visits; never blocks.

        Weights that stayed in memory take no buffer: their pending updates begin however far off the visits are. But
        behind one that must be read first, and cannot be yet, none begins: compute will wait for that one sooner.
        """
        self._has_freed = False  # before the attempts: what comes back in between is tried again
        soon, may_read, may_update = set(self._soon()), True, True
        for name in dict.fromkeys(self._visits):
            shard = self._loaded.get(name)
            is_pending = self.optimizer is not None and self.optimizer.has_pending_update(name)
            if shard is not None:
                if is_pending and may_update and name in self._resident:
                    self._update_resident(shard)
            elif may_read and name in soon and (may_update or not is_pending):
                may_read = self._start(name, block=False) is not None
                may_update = may_update and (may_read or not is_pending)
            elif is_pending:
                may_update = False

    def _start(self, name: str, *, block: bool) -> LoadedShard | None:
        layout, optimizer = self._layouts[name], self.optimizer
        # `acquire` has waited for the last step's weights; those of a step in the making go to the other slot.
        if optimizer is not None and not block and not optimizer.is_written(name):
            return None
        # Without an optimizer, or where nothing is trained, the committed slot is the latest.
        slot = optimizer.slot_of(name) if optimizer is not None and optimizer.trains(name) else None
        buffer = self._acquire_buffer(layout, block=block)
        if buffer is None:
            return None
        shard = LoadedShard(layout, buffer)
        shard.prefetched = not block
        extent = self._store.extent(layout.weight_name, slot)
        shard.transfer = self._engine.read(extent, shard.array)
        self._loaded[name] = shard
        if optimizer is not None and optimizer.has_pending_update(name):
            shard.num_references += 1
            shard.job = optimizer.start_pending_update(name, shard.array, [shard.transfer], lambda: self.end_use(shard))
        return shard

    def _acquire_buffer(self, layout: ShardLayout, *, block: bool) -> Buffer | None:
        """None if there is none now; with `block`, what was read ahead of its turn makes room: it can be read again."""
        try:
            return self._pool.acquire(layout.weight_bytes, block=False)
        except BudgetError:
            if not block:
                return None
            if layout.weight_bytes > self._pool.budget_bytes:
                raise
        self._drop_prefetched()
        with contextlib.suppress(BudgetError):
            return self._pool.acquire(layout.weight_bytes, block=False)
        return None

    def _update_resident(self, shard: LoadedShard) -> None:
        """Begin the pending update of weights that stayed in memory."""
        optimizer, name = self.optimizer, shard.layout.name
        if optimizer is not None and optimizer.has_pending_update(name):
            self._leave_device(shard)
            shard.num_references += 1
            transfers = [shard.transfer] if shard.transfer is not None else []
            shard.job = optimizer.start_pending_update(name, shard.array, transfers, lambda: self.end_use(shard))
