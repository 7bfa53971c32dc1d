"""What stands around an OffloadedAdamW in its tests: store, weights, gradients, a lazy drive, plain torch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from io_engine import (
    Buffer,
    BufferPool,
    ByteArray,
    Engine,
    Extent,
    ExtentSpec,
    MockEngine,
    Store,
    Transfer,
)
from optim import OffloadedAdamW, ShardGradient, ShardLayout, UpdateJob, Waiting
from tests.reference import round_half_up_to_bfloat16, sum_in_order, sum_of_squares

CHUNK = 4096
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "prologue": {"embed": (97, 64)},
    "layers.0": {"l0.weight": (80, 130), "l0.bias": (130,), "l0.frozen": (33,)},
    "layers.1": {"l1.weight": (80, 130), "l1.bias": (130,)},
    "epilogue": {"norm": (100,)},
}
FROZEN = {"l0.frozen"}
Gradients = dict[str, NDArray[np.float32]]
GARBAGE = 0xEE


class GarbagePool(BufferPool):
    """Overwrites what is released, at once: who still needs it gets garbage every time."""

    mappings: list[Any]

    def _map(self, num_bytes: int) -> Any:
        mapping = super()._map(num_bytes)
        self.__dict__.setdefault("mappings", []).append(mapping)
        return mapping

    def _take_back(self, mapping: Any) -> None:
        mapping.view(mapping.num_bytes).fill(GARBAGE)
        super()._take_back(mapping)


class LazyDrive(MockEngine):
    """Virtual time in which writes never end before a read, and nothing ends until everybody waits for it."""

    def __init__(self) -> None:
        # Newest first: the weights, asked for before the states, come after them.
        super().__init__(read_bytes_per_second=1e15, write_bytes_per_second=1e3, order="lifo")
        self.num_submitted = 0
        self.failures: list[tuple[str, Extent, OSError]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._drive, daemon=True)
        self._thread.start()

    def _drive(self) -> None:
        seen, quiet = (-1, -1), 0
        while not self._stop.wait(0.001):
            now = (self.num_submitted, self.num_under_way)
            quiet = quiet + 1 if now == seen and now[1] else 0
            seen = now
            if quiet >= 4:
                self.run_all()

    def fail(self, kind: str, extent: Extent, error: OSError) -> None:
        """Make the next transfer of `kind` that touches `extent` fail."""
        self.failures.append((kind, extent, error))

    def _submit(self, kind: Literal["read", "write"], extent: Extent, array: ByteArray) -> Transfer:
        self.num_submitted += 1
        for failure in self.failures:
            wanted, place, error = failure
            begin = extent.offset_bytes - place.offset_bytes
            if kind == wanted and extent.path == place.path and 0 <= begin < place.num_bytes:
                self.failures.remove(failure)
                self.fail_next(kind, extent.path, error)
                break
        return super()._submit(kind, extent, array)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        super().close()


def initial_masters(seed: int = 0) -> Gradients:
    """Values that bfloat16 holds exactly, by parameter."""
    random = np.random.default_rng(seed)
    values = {}
    for shapes in SHAPES.values():
        for name, shape in shapes.items():
            value = torch.from_numpy(random.normal(0, 0.1, int(np.prod(shape))).astype(np.float32))
            values[name] = value.bfloat16().float().numpy()
    return values


def random_gradients(seed: int, names: Sequence[str] | None = None, scale: float = 0.01) -> Gradients:
    """A gradient of each trainable parameter (or those named), flat."""
    random = np.random.default_rng(seed)
    gradients = {}
    for shapes in SHAPES.values():
        for name, shape in shapes.items():
            values = (random.normal(0, scale, int(np.prod(shape)))).astype(np.float32)
            if name not in FROZEN and (names is None or name in names):
                gradients[name] = values
    return gradients


def layouts(dtype: str, chunk_elements: int = CHUNK, moment_dtype: str = "float32") -> dict[str, ShardLayout]:
    return {name: ShardLayout.of(name, shapes, dtype, chunk_elements, moment_dtype) for name, shapes in SHAPES.items()}


def _groups(parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Two groups that differ in every hyperparameter."""
    first = [p for name, p in parameters.items() if name in ("embed", "l0.weight", "norm")]
    second = [p for name, p in parameters.items() if name in ("l0.bias", "l1.weight", "l1.bias")]
    return [
        {"params": first, "lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1},
        {"params": second, "lr": 3e-3, "betas": (0.8, 0.999), "eps": 1e-6, "weight_decay": 0.0},
    ]


class PlainAdamW:
    """torch.optim.AdamW(fused=True) on padded float32 masters, clipped by the norm's own definition."""

    def __init__(self, masters: Gradients, max_grad_norm: float | None = None) -> None:
        self.max_grad_norm = max_grad_norm
        self.sizes = {name: value.size for name, value in masters.items()}
        self.masters = {name: _padded(value) for name, value in masters.items()}
        self.optimizer = torch.optim.AdamW(_groups(self.masters), fused=True)

    def step(self, *gradients: Gradients) -> float:
        """One step of the sum of the gradients; returns the norm before clipping."""
        total: Gradients = {}
        for part in gradients:
            for name, gradient in part.items():
                total[name] = total[name] + gradient if name in total else gradient.copy()
        norm = float(np.sqrt(sum_in_order([sum_of_squares(total[name]) for name in sorted(total)])))
        coefficient = 1.0 if self.max_grad_norm is None else self.max_grad_norm / (norm + 1e-6)
        for name, master in self.masters.items():
            master.grad = None
            if name in total:
                scaled = total[name] * np.float32(coefficient) if coefficient < 1.0 else total[name]
                master.grad = _padded(scaled)
        self.optimizer.step()
        return norm

    def state_of(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        master, size = self.masters[name], self.sizes[name]
        state = self.optimizer.state.get(master, {})
        zeros = torch.zeros_like(master)
        moments = (state.get("exp_avg", zeros), state.get("exp_avg_sq", zeros))
        return (
            master[:size].clone(),
            moments[0][:size].clone(),
            moments[1][:size].clone(),
            int(state.get("step", 0)),
        )


def _padded(values: NDArray[np.float32]) -> torch.Tensor:
    padded = torch.zeros(-(-values.size // 64) * 64)
    padded[: values.size] = torch.from_numpy(values)
    return padded


class Trainer:
    """Drives an OffloadedAdamW as fuyou's executor does, without a model."""

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        *,
        window: Literal["backward", "mixed", "forward"],
        dtype: str = "bfloat16",
        moment_dtype: str = "float32",
        spilled: Sequence[str] = (),
        resident: Sequence[str] = (),
        num_records: float = 3,
        gradient_bytes: int = 1 << 20,
        max_grad_norm: float | None = None,
        kept: bool | None = None,
        masters: Gradients | None = None,
        num_workers: int = 2,
        groups: Callable[[Mapping[str, Any]], list[dict[str, Any]]] = _groups,
        **hyperparameters: Any,
    ) -> None:
        kept = max_grad_norm is not None if kept is None else kept
        self._threads_before = frozenset(threading.enumerate())
        self.engine, self.dtype = engine, dtype
        self.layouts = layouts(dtype, moment_dtype=moment_dtype)
        self.folder = folder
        opened = Store.exists(folder)
        self.store = Store.open(folder, engine=engine) if opened else Store.create(folder, identity={}, engine=engine)
        self.weights = GarbagePool(1 << 20, name="weights")
        self.gradients = GarbagePool(gradient_bytes, name="gradients")
        record_class_bytes = 65536  # of a bfloat16 record of CHUNK elements, with or without its gradient
        resident_bytes = len(resident) * (1 << 18)
        self.records = GarbagePool(int(num_records * record_class_bytes) + resident_bytes, name="records")
        if not opened:
            self._fill(masters or initial_masters())
        self.resident: dict[str, Buffer] = {
            name: self.records.acquire(self.layouts[name].state_bytes) for name in resident
        }
        self.parameters = {
            name: torch.nn.Parameter(torch.zeros(shape)) for shapes in SHAPES.values() for name, shape in shapes.items()
        }
        self.num_dropped = 0
        self.narrow: Collection[str] = ()
        """Shards whose gradients come in bfloat16."""
        early = {
            "backward": frozenset(SHAPES),
            "mixed": frozenset(("prologue", "layers.1")),
            "forward": frozenset[str](),
        }[window]
        self.seen: dict[str, ByteArray] = {}
        """Weights that the last forward pass would have computed with, where an update came first."""
        self.optimizer = OffloadedAdamW(
            groups(self.parameters),
            names={p: name for name, p in self.parameters.items() if name not in FROZEN},
            shards=list(self.layouts.values()),
            store=self.store,
            engine=engine,
            records=self.records,
            gradients=self.gradients,
            early=early,
            waiting={name: self._waiting(name, early, spilled, kept) for name in self.layouts},
            resident_states=self.resident,
            num_workers=num_workers,
            load_shard=self.load,
            drop_resident_weights=self._drop,
            max_grad_norm=max_grad_norm,
            **hyperparameters,
        )

    @staticmethod
    def _waiting(name: str, early: frozenset[str], spilled: Sequence[str], kept: bool) -> Waiting:
        if name in spilled:
            return "spill"
        return "host" if kept or name not in early else "free"

    def _drop(self) -> None:
        self.num_dropped += 1

    def _fill(self, masters: Gradients) -> None:
        specs = []
        for layout in self.layouts.values():
            specs += [
                ExtentSpec(layout.weight_name, layout.weight_bytes, 2, piece_bytes=layout.weight_piece_bytes),
                ExtentSpec(layout.state_name, layout.state_bytes, 2, piece_bytes=layout.full_record_bytes),
            ]
        self.store.allocate(specs)
        for layout in self.layouts.values():
            with self.weights.acquire(layout.weight_bytes) as buffer:
                array = buffer.array[: layout.weight_bytes]
                array[:] = 0
                for p in layout.parameters:
                    values = masters[p.name].view(np.uint32)
                    if self.dtype == "bfloat16":
                        array.view(np.uint16)[p.start : p.stop] = values >> 16
                    else:
                        array.view(np.uint32)[p.start : p.stop] = values
                self.engine.write(self.store.extent(layout.weight_name, 0), array).wait()
        self.store.commit(step=0, slots={}, checksums={}, state={})

    # --- what fuyou's executor does -------------------------------------------------------------------------

    def _read(self, shard: str) -> tuple[Buffer, ByteArray, Transfer]:
        layout = self.layouts[shard]
        self.optimizer.wait_written(shard)
        buffer = self.weights.acquire(layout.weight_bytes, timeout_seconds=20)
        array = buffer.array[: layout.weight_bytes]
        extent = self.store.extent(layout.weight_name, self.optimizer.slot_of(shard))
        return buffer, array, self.engine.read(extent, array)

    def load(self, shard: str) -> None:
        """A forward pass through the shard: its pending update begins, its weights are looked at."""
        buffer, array, transfer = self._read(shard)
        if not self.optimizer.has_pending_update(shard):
            transfer.wait()
            buffer.release()
            return
        shared = SharedBuffer(buffer)
        job = self.optimizer.start_pending_update(shard, array, [transfer], shared.release)
        self.seen.pop(shard, None)
        with contextlib.suppress(Exception):  # the optimizer tells of it
            job.wait_ready()
            self.seen[shard] = array.copy()
        shared.release()

    def start_update(self, shard: str, buffer: Buffer, array: ByteArray, transfer: Transfer) -> UpdateJob:
        return self.optimizer.start_pending_update(shard, array, [transfer], buffer.release)

    def forward(self) -> None:
        for shard in SHAPES:
            self.load(shard)

    def backward(self, gradients: Gradients, shards: Sequence[str] | None = None) -> None:
        self.optimizer.begin_backward()
        for shard in reversed(shards or list(SHAPES)):
            self.complete(shard, gradients)

    def complete(self, shard: str, gradients: Gradients) -> None:
        """The shard's backward pass: its gradient arrives when it is waited for."""
        gradient = self.optimizer.acquire_gradient(shard, np.uint16 if shard in self.narrow else np.float32)
        self.optimizer.expect_gradient(shard)
        gradient.array.view(np.uint16).fill(0x7FFF)  # NaN
        gradient.arrived |= gradients.keys() & SHAPES[shard].keys()

        def wait() -> None:
            _arrive(gradient, gradients)

        if not self.optimizer.updates_early(shard):
            self.optimizer.gradient_complete(gradient, wait=wait)
            return
        buffer, array, transfer = self._read(shard)
        transfer.wait()
        self.optimizer.gradient_complete(gradient, array, wait=wait, on_done=buffer.release)

    def train(self, *gradients: Gradients) -> None:
        """One step, as a loop of a user's."""
        for number, part in enumerate(gradients):
            if number:
                self.optimizer.accumulate()
            self.forward()
            self.backward(part)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self) -> None:
        """Close, and check that nothing is left."""
        self.optimizer.close()
        for buffer in self.resident.values():
            buffer.release()
        self.resident.clear()
        self.store.close()
        for pool in (self.weights, self.gradients, self.records):
            assert pool.used_bytes == 0, pool.name
            pool.close()
        assert not own_threads(self._threads_before)

    # --- checks ---------------------------------------------------------------------------------------------

    def check(self, plain: PlainAdamW) -> None:
        """Every bit of masters, moments and weights, as the optimizer and as the drive have them."""
        for name in plain.masters:
            state = self.optimizer.state_of(name)
            master, first, second, num_updates = plain.state_of(name)
            assert torch.equal(state.master.flatten(), master), name
            assert torch.equal(state.exp_avg.flatten(), first), name
            assert torch.equal(state.exp_avg_sq.flatten(), second), name
            assert state.step == num_updates, name
            assert state.master.shape == self.parameters[name].shape
        self.check_store(plain)

    def check_store(self, plain: PlainAdamW) -> None:
        """The committed weights alone, by what the manifest says; and every checksum."""
        for layout in self.layouts.values():
            with self.weights.acquire(layout.weight_bytes) as buffer:
                array = buffer.array[: layout.weight_bytes]
                self.engine.read(self.store.extent(layout.weight_name), array).wait()
                self.check_weights(layout, array, plain)
        assert self.store.verify() == []

    def check_weights(self, layout: ShardLayout, array: ByteArray, plain: PlainAdamW) -> None:
        """A weight extent's bytes against the masters."""
        for p in layout.parameters:
            master = plain.state_of(p.name)[0]
            if self.dtype == "bfloat16":
                expected = round_half_up_to_bfloat16(master).view(torch.int16).numpy()
                assert np.array_equal(array.view(np.int16)[p.start : p.stop], expected), p.name
            else:
                assert np.array_equal(array.view(np.float32)[p.start : p.stop], master.numpy()), p.name


class SharedBuffer:
    """Two users: the forward pass and the update in it."""

    def __init__(self, buffer: Buffer) -> None:
        self._buffer, self._lock, self._num_users = buffer, threading.Lock(), 2

    def release(self) -> None:
        with self._lock:
            self._num_users -= 1
            last = self._num_users == 0
        if last:
            self._buffer.release()


def _arrive(gradient: ShardGradient, gradients: Gradients) -> None:
    for p in gradient.layout.parameters:
        if p.name in gradient.arrived:
            values = gradients[p.name]
            gradient.array[p.start : p.stop] = (
                values if gradient.array.dtype == np.float32 else values.view(np.uint32) >> 16
            )


def own_threads(before: frozenset[threading.Thread] = frozenset()) -> list[str]:
    """Names of the optimizer's threads that are alive and were not before."""
    return [t.name for t in threading.enumerate() if t not in before and t.name.startswith("fuyou-")]
