"""`OffloadedAdamW`: a torch optimizer whose master weights and moments live in a store, one shard per model block.

A step of one shard may run in one of two windows; both give the same bits:

* "backward": as soon as the shard's gradient is whole, while the backward pass goes on with the next block. Possible
  when no global norm is needed first.
* "forward": after `step()`, when the next forward pass (or a flush) comes to the shard. Gradients wait in host memory
  or in the store's scratch files until then. The weights read for the update are the ones that forward computes with,
  so this window costs no extra traffic either.

In both the other slot is written, and the step becomes the committed one when its last shard is written.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from io_engine import Buffer, BufferPool, Engine, Extent, Store, StoreError
from optim.kernels import AdamWScalars, join_master
from optim.layout import ParameterSlot, ShardLayout
from optim.norm import clip_coefficient, global_norm, parameter_sum, tile_sums
from optim.updater import Recorder, ResidentState, ShardUpdater, UpdateJob


class NonFiniteUpdateError(ArithmeticError):
    """An update gave NaN or infinity (or a weight that bfloat16 cannot hold); the committed step is untouched."""


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
    bytes_spilled: int
    """Gradient bytes written to scratch files, to be read once."""


@dataclasses.dataclass(frozen=True)
class ParameterState:
    """Copies of one parameter's optimizer state, in host memory, in the parameter's shape, float32."""

    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: int
    """Updates that the parameter has had."""


class ShardGradient:
    """The float32 gradient of one shard while it is being summed: flat, host memory, padding undefined.

    `arrived` names the parameters that have a gradient; the others' elements are undefined.
    """

    def __init__(self, layout: ShardLayout, buffer: Buffer) -> None:
        self.layout = layout
        self.buffer = buffer
        self.array: npt.NDArray[np.float32] = buffer.array[: layout.gradient_bytes].view(np.float32)
        self.arrived: set[str] = set()


@dataclasses.dataclass
class _HeldGradient:
    """A whole gradient waiting for `step()` or for its window: in memory, or spilled to `extent`."""

    gradient: ShardGradient | None
    extent: Extent | None
    arrived: set[str]
    sums: dict[str, float]


@dataclasses.dataclass
class _PendingUpdate:
    held: _HeldGradient
    scalars: dict[str, AdamWScalars]
    gradient_scale: float


class OffloadedAdamW(torch.optim.Optimizer):
    """AdamW over a store. Built by `fuyou.AdamW`; used like `torch.optim.AdamW`.

    `shards` are the trainable shards in the order of the forward pass; `names` gives every trainable parameter's name.
    `gradients` and `records` are the pools that bound its memory. Parameter groups may differ in lr, betas, eps and
    weight_decay. `max_grad_norm` clips the global norm as `torch.nn.utils.clip_grad_norm_` does.

    `load_shard(name)` brings a shard's weights into memory as a forward pass would, which begins its pending update;
    `drop_resident_weights()` forgets weights kept in host memory after an update in them was given up.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        *,
        names: Mapping[torch.nn.Parameter, str],
        shards: Sequence[ShardLayout],
        store: Store,
        engine: Engine,
        records: BufferPool,
        gradients: BufferPool,
        window: Literal["backward", "forward"],
        spilled: frozenset[str] = frozenset(),
        resident_states: Mapping[str, Buffer] | None = None,
        num_workers: int = 1,
        record: Recorder | None = None,
        load_shard: Callable[[str], None],
        drop_resident_weights: Callable[[], None],
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = None,
    ) -> None:
        _check_hyperparameters(lr, betas, eps, weight_decay)
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={max_grad_norm!r}: must be above 0, or None for no clipping")
        if window == "backward" and max_grad_norm is not None:
            raise ValueError('max_grad_norm needs window="forward": the norm is known only after the last gradient')
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            _check_hyperparameters(group["lr"], group["betas"], group["eps"], group["weight_decay"])
        self._names = dict(names)
        self._shards = {shard.name: shard for shard in shards}
        self._store, self._engine = store, engine
        self._gradients, self._records = gradients, records
        self.window: Literal["backward", "forward"] = window
        self._max_grad_norm = max_grad_norm
        self._spilled = spilled
        self._resident = {name: ResidentState(buffer) for name, buffer in (resident_states or {}).items()}
        self._record = record or (lambda *_: None)
        self._load_shard = load_shard
        self._drop_resident_weights = drop_resident_weights
        self._updater = ShardUpdater(engine, records, num_workers=num_workers, record=self._record)
        self._arrivals = ThreadPoolExecutor(1, thread_name_prefix="fuyou-gradient")
        self._arriving: list[Future[None]] = []
        self._slots = {name: store.active_slot(shard.weight_name) for name, shard in self._shards.items()}
        self._held: dict[str, _HeldGradient] = {}
        self._jobs: dict[str, UpdateJob] = {}  # latest job of each shard
        self._step_jobs: list[tuple[str, UpdateJob]] = []  # jobs of the step that is being made
        self._pending: dict[str, _PendingUpdate] = {}
        self._pending_commit: dict[str, Any] | None = None
        self._barriers: list[Any] = []
        self._poisoned = False
        self._speculated: dict[str, dict[str, AdamWScalars]] = {}
        self._bytes_spilled = 0
        self._next_extra: dict[str, Any] = {}
        saved = store.state.get("optimizer", {})
        self.step_count: int = int(saved.get("step_count", 0))
        self._num_updates: int = int(saved.get("num_updates", 0))
        self.num_skipped: int = int(saved.get("num_skipped", 0))
        self._missed: dict[str, int] = dict(saved.get("missed", {}))
        self.extra: dict[str, Any] = dict(saved.get("extra", {}))
        self.last_step: StepResult | None = None

    # --- what users call -----------------------------------------------------------------------------------------

    @property
    def max_grad_norm(self) -> float | None:
        """Limit of the global gradient norm; None: no clipping. May be changed where the window is "forward"."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        if value is not None and not value > 0:
            raise ValueError(f"max_grad_norm={value!r}: must be above 0, or None for no clipping")
        if value is not None and self.window == "backward":
            raise ValueError(
                f"max_grad_norm={value!r} cannot be set now: updates run during the backward pass, before the norm is "
                f"known. Give it when the optimizer is made: fuyou.AdamW(model, ..., max_grad_norm={value!r})"
            )
        self._max_grad_norm = value

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one optimizer step of the gradients that backward left; see the module's head for when work is done.

        Returning is not commit: updates may still run until the next forward pass uses their block. Does nothing if
        no backward pass ran since the last step. A gradient that is not finite makes a skipped step. Raises what went
        wrong in the background since the last call.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._finish_arrivals()
        self.raise_if_broken()
        if not self._held:
            return loss
        sums: dict[str, float] = {}
        for held in self._held.values():
            sums.update(held.sums)
        norm = global_norm(sums)
        self.step_count += 1
        skipped, scale = None, 1.0
        if not math.isfinite(norm):
            skipped = f"the gradient norm is {norm}"
            self.num_skipped += 1
        else:
            scale = clip_coefficient(norm, self._max_grad_norm)
        if skipped is None:
            self._accept(scale)
        else:
            self._void()
            # The count of steps goes on, so that data and random numbers do not repeat after a resume.
            self._pending_commit = {"jobs": [], "state": self._commit_state()}
            self._submit_commit()
        self.last_step = StepResult(self.step_count, norm, scale < 1.0, skipped, self._bytes_spilled)
        self._bytes_spilled = 0
        self._held = {}
        self._step_jobs = []
        self._speculated = {}
        self._poisoned = False
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients that no `step()` has taken; those that one has taken are not touched."""
        self._finish_arrivals()
        if self._held:
            self._void()
            self._held, self._step_jobs, self._speculated = {}, [], {}
            self._poisoned, self._bytes_spilled = False, 0

    def commit_extra(self, extra: Mapping[str, Any]) -> None:
        """Store `extra` (JSON) with the commit of the step that is taken next; read it back from `extra` on resume."""
        self._next_extra = dict(extra)

    def state_of(self, name: str) -> ParameterState:
        """Copies of one parameter's master and moments as of the last step; flushes first. KeyError if unknown."""
        shard, slot = self._find(name)
        self.flush()
        shape = slot.shape
        parts: list[npt.NDArray[np.float32]] = [np.empty(slot.num_elements, np.float32) for _ in range(3)]
        weight = self._store.extent(shard.weight_name, self._slots[shard.name])
        state = self._store.extent(shard.state_name, self._slots[shard.name])
        for chunk in range(shard.num_chunks):
            begin, end = shard.chunk_range(chunk)
            a, b = max(begin, slot.start), min(end, slot.stop)
            if a >= b:
                continue
            views = shard.views(self._read_whole(state.sub(*shard.state_range(chunk))), chunk)
            weights = self._read_whole(weight.sub(*shard.weight_range(chunk)))
            here, there = slice(a - begin, b - begin), slice(a - slot.start, b - slot.start)
            if views.low is None:
                parts[0][there] = weights.view(np.float32)[here]
            else:
                join_master(weights.view(np.uint16)[here], views.low[here], parts[0][there])
            parts[1][there], parts[2][there] = views.m[here], views.v[here]
        tensors = [torch.from_numpy(part).reshape(shape) for part in parts]
        return ParameterState(*tensors, step=self._num_updates - self._missed.get(name, 0))

    def flush(self) -> None:
        """Block until every step taken is committed; raises what went wrong."""
        self._finish_arrivals()
        for name in list(self._pending):
            self._load_shard(name)
        for barrier in self._barriers:
            barrier.wait()
        self._barriers.clear()
        self.raise_if_broken()

    def close(self) -> None:
        """Stop the threads without waiting for pending updates (`flush` first to keep them). Idempotent."""
        self._arrivals.shutdown()
        self._updater.close()

    # --- what the executor calls -----------------------------------------------------------------------------------

    def raise_if_broken(self) -> None:
        """Raise the background failure after which nothing more is committed, if there was one."""
        if self._updater.error is not None:
            raise self._updater.error

    def slot_of(self, shard: str) -> int:
        """Slot that holds, or will hold, the shard's latest weights; `wait_written` first."""
        return self._slots.get(shard, 0)

    def is_written(self, shard: str) -> bool:
        """Whether the shard's latest weights can be read now, and no step in the making is about to replace them."""
        job = self._jobs.get(shard)
        return job is None or (job.done.is_set() and all(job is not mine for _, mine in self._step_jobs))

    def wait_written(self, shard: str) -> None:
        """Block until the shard's latest slot can be read."""
        job = self._jobs.get(shard)
        if job is not None:
            job.wait()

    def has_pending_update(self, shard: str) -> bool:
        """Whether the shard's weights on the drive are still those before the last step."""
        return shard in self._pending

    def start_pending_update(
        self,
        shard: str,
        weights: npt.NDArray[np.uint8],
        wait_before: Sequence[Any],
        on_done: Callable[[], None],
    ) -> UpdateJob:
        """Begin the shard's update in `weights` (its whole extent, on its way in by `wait_before`); returns at once.

        `weights` may be read after `job.wait_ready()` and reused after `on_done` was called.
        """
        pending = self._pending.pop(shard)
        job = self._submit(shard, pending.held, weights, pending.scalars, pending.gradient_scale, wait_before, on_done)
        if self._pending_commit is not None:
            self._pending_commit["jobs"].append((shard, job))
        self._slots[shard] = 1 - self._slots[shard]
        if not self._pending:
            self._submit_commit()
        return job

    def acquire_gradient(self, shard: str) -> ShardGradient:
        """An empty buffer in which to sum one backward pass's gradient; blocks while the pool is used up.

        What an earlier backward pass left since the last step is added when this one is complete.
        """
        if self.window == "backward":
            self._finish_arrivals()
            if shard in self._held:
                raise RuntimeError(
                    "a second backward pass before optimizer.step(): the first one's updates have begun already. Give the "
                    "whole batch to one forward pass (micro_batch_size splits it), use accelerate's accumulate(), or plan "
                    'update_window="forward"'
                )
        layout = self._shards[shard]
        return ShardGradient(layout, self._gradients.acquire(layout.gradient_bytes))

    def gradient_complete(
        self,
        gradient: ShardGradient,
        weights: npt.NDArray[np.uint8] | None = None,
        *,
        wait: Callable[[], None],
        on_done: Callable[[], None] | None = None,
    ) -> None:
        """The shard's backward pass is over: hand over its gradient; returns at once.

        `wait` blocks until the gradient has arrived in host memory. Where the window is "backward", `weights` is the
        whole weight extent in host memory, of which nothing else makes use any more: the update happens in it, and
        `on_done` is called, from any thread, when it may be reused.
        """
        self._arriving.append(self._arrivals.submit(self._arrive, gradient, weights, wait, on_done))

    def trains(self, shard: str) -> bool:
        """Whether the shard has parameters to update."""
        return shard in self._shards

    # --- inside ----------------------------------------------------------------------------------------------------

    def _arrive(
        self,
        gradient: ShardGradient,
        weights: npt.NDArray[np.uint8] | None,
        wait: Callable[[], None],
        on_done: Callable[[], None] | None,
    ) -> None:
        wait()
        layout = gradient.layout
        earlier = self._held.pop(layout.name, None)
        if earlier is not None:
            gradient = self._add(earlier, gradient)
        started = time.perf_counter()
        arrived = [p for p in layout.parameters if p.name in gradient.arrived]
        tiles = self._updater.map(lambda p: tile_sums(gradient.array[p.start : p.stop]), arrived)
        sums = {p.name: parameter_sum(t) for p, t in zip(arrived, tiles, strict=True)}
        self._record("cpu", f"norm {layout.name}", started, time.perf_counter(), gradient.array.nbytes)
        held = _HeldGradient(gradient, None, gradient.arrived, sums)
        self._held[layout.name] = held
        if self.window == "backward":
            assert weights is not None and on_done is not None
            self._poisoned = self._poisoned or not all(math.isfinite(s) for s in sums.values())
            if self._poisoned:
                on_done()
                return
            scalars = self._scalars(layout, gradient.arrived, self._num_updates + 1)
            self._speculated[layout.name] = scalars
            job = self._submit(layout.name, held, weights, scalars, 1.0, (), on_done)
            self._step_jobs.append((layout.name, job))
        elif layout.name in self._spilled:
            extent = self._store.scratch(f"{layout.name}/gradient", layout.gradient_bytes)
            self._engine.write(extent, gradient.buffer.array[: layout.gradient_bytes]).wait()
            self._bytes_spilled += layout.gradient_bytes
            held.gradient, held.extent = None, extent
            gradient.buffer.release()

    def _add(self, earlier: _HeldGradient, gradient: ShardGradient) -> ShardGradient:
        """The sum of an earlier backward pass's gradient and this one's, in this order; one buffer goes back."""
        total = earlier.gradient
        if total is None:
            assert earlier.extent is not None
            total = ShardGradient(gradient.layout, self._gradients.acquire(gradient.layout.gradient_bytes))
            self._engine.read(earlier.extent, total.buffer.array[: gradient.layout.gradient_bytes]).wait()
            total.arrived = earlier.arrived
        for p in gradient.layout.parameters:
            if p.name not in gradient.arrived:
                continue
            if p.name in total.arrived:
                total.array[p.start : p.stop] += gradient.array[p.start : p.stop]
            else:
                total.array[p.start : p.stop] = gradient.array[p.start : p.stop]
        total.arrived |= gradient.arrived
        gradient.buffer.release()
        return total

    def _submit(
        self,
        shard: str,
        held: _HeldGradient,
        weights: npt.NDArray[np.uint8],
        scalars: Mapping[str, AdamWScalars],
        gradient_scale: float,
        wait_before: Sequence[Any],
        on_done: Callable[[], None],
    ) -> UpdateJob:
        layout, slot = self._shards[shard], self._slots[shard]
        gradient = held.gradient

        def done(_job: UpdateJob) -> None:
            if gradient is not None:
                gradient.buffer.release()
            on_done()

        held.gradient = None  # the job owns it now
        job = UpdateJob(
            layout,
            weights=weights,
            gradient=None if gradient is None else gradient.array,
            gradient_extent=held.extent,
            scalars=scalars,
            gradient_scale=gradient_scale,
            state_from=self._store.extent(layout.state_name, slot),
            state_to=self._store.extent(layout.state_name, 1 - slot),
            weight_to=self._store.extent(layout.weight_name, 1 - slot),
            resident_state=self._resident.get(shard),
            wait_before=wait_before,
            on_done=done,
        )
        self._jobs[shard] = job
        self._updater.submit(job)
        return job

    def _accept(self, scale: float) -> None:
        """The gradients held become step `step_count`: commit what has run, or leave it to its window."""
        self._num_updates += 1
        arrived: set[str] = set()
        for held in self._held.values():
            arrived |= held.arrived
        for name in self._groups_by_name():
            if name not in arrived:
                self._missed[name] = self._missed.get(name, 0) + 1
        if self.window == "backward":
            for name, scalars in self._speculated.items():
                if scalars != self._scalars(self._shards[name], self._held[name].arrived, self._num_updates):
                    raise RuntimeError(
                        "lr, betas, eps or weight_decay changed between backward() and step(), when updates had begun: "
                        "change them after step(), as torch's schedulers do"
                    )
            for name, _job in self._step_jobs:
                self._slots[name] = 1 - self._slots[name]
            self._pending_commit = {"jobs": list(self._step_jobs), "state": self._commit_state()}
            self._submit_commit()
            return
        # Updates of the step before are under way or done: the forward pass in between, or a flush, began them.
        assert not self._pending
        self._pending = {
            name: _PendingUpdate(held, self._scalars(self._shards[name], held.arrived, self._num_updates), scale)
            for name, held in self._held.items()
        }
        self._pending_commit = {"jobs": [], "state": self._commit_state()}

    def _void(self) -> None:
        """Give up the gradients held and whatever was speculated from them; slots and states stay as they were."""
        for _name, job in self._step_jobs:
            job.wait()
        for name, held in self._held.items():
            if held.gradient is not None:
                held.gradient.buffer.release()
            if name in self._resident and self._step_jobs:
                self._resident[name].filled = False
        if self._step_jobs:
            self._drop_resident_weights()
        for name, _job in self._step_jobs:
            self._jobs.pop(name, None)

    def _commit_state(self) -> dict[str, Any]:
        state = {
            "step_count": self.step_count,
            "num_updates": self._num_updates,
            "num_skipped": self.num_skipped,
            "missed": {name: count for name, count in self._missed.items() if count},
            "extra": self._next_extra,
        }
        self._next_extra = {}
        return state

    def _submit_commit(self) -> None:
        commit, self._pending_commit = self._pending_commit, None
        assert commit is not None
        jobs: list[tuple[str, UpdateJob]] = commit["jobs"]
        # The slots as they are now: a later step may flip them again before the barrier runs.
        slots = {name: self._slots[name] for name, _ in jobs}

        def call() -> None:
            started = time.perf_counter()
            checksums: dict[str, str] = {}
            extents: dict[str, int] = {}
            for name, job in jobs:
                if job.refused_parameter is not None:
                    raise NonFiniteUpdateError(
                        f"step {commit['state']['step_count']} would make {job.refused_parameter} NaN, infinite or too "
                        f"large for bfloat16; the store stays at step {self._store.step}. Lower the learning rate and "
                        "resume"
                    )
                checksums.update(job.checksums())
                layout = self._shards[name]
                extents[layout.weight_name] = extents[layout.state_name] = slots[name]
            self._store.commit(
                step=commit["state"]["step_count"],
                slots=extents,
                checksums=checksums,
                state={**self._store.state, "optimizer": commit["state"]},
            )
            self._record("ssd_write", "commit", started, time.perf_counter(), 0)

        self._barriers = [b for b in self._barriers if not b.done.is_set() or b.error is not None]
        self._barriers.append(self._updater.submit_barrier(call))

    def _finish_arrivals(self, shard: str | None = None) -> None:
        arriving, self._arriving = self._arriving, []
        for future in arriving:
            future.result()

    def _scalars(self, layout: ShardLayout, arrived: set[str], num_updates: int) -> dict[str, AdamWScalars]:
        groups = self._groups_by_name()
        return {
            p.name: AdamWScalars.at_step(
                lr=float(groups[p.name]["lr"]),
                beta1=groups[p.name]["betas"][0],
                beta2=groups[p.name]["betas"][1],
                eps=groups[p.name]["eps"],
                weight_decay=groups[p.name]["weight_decay"],
                step=num_updates - self._missed.get(p.name, 0),
            )
            for p in layout.parameters
            if p.name in arrived and p.name in groups
        }

    def _groups_by_name(self) -> dict[str, dict[str, Any]]:
        return {
            self._names[p]: group for group in self.param_groups for p in group["params"] if p in self._names
        }

    def _find(self, name: str) -> tuple[ShardLayout, ParameterSlot]:
        for shard in self._shards.values():
            for slot in shard.parameters:
                if slot.name == name:
                    return shard, slot
        raise KeyError(f"{name!r} is not a trainable parameter of this model")

    def _read_whole(self, extent: Extent) -> npt.NDArray[np.uint8]:
        with self._records.acquire(extent.num_bytes) as buffer:
            self._engine.read(extent, buffer.array[: extent.num_bytes]).wait()
            return buffer.array[: extent.num_bytes].copy()


def _check_hyperparameters(lr: float, betas: Sequence[float], eps: float, weight_decay: float) -> None:
    for field, value, good in (
        ("lr", lr, lr >= 0),
        ("betas[0]", betas[0], 0 <= betas[0] < 1),
        ("betas[1]", betas[1], 0 <= betas[1] < 1),
        ("eps", eps, eps > 0),
        ("weight_decay", weight_decay, weight_decay >= 0),
    ):
        if not good or not math.isfinite(float(value)):
            raise ValueError(f"{field}={value!r}: out of range")
