"""`OffloadedAdamW`: a torch optimizer whose masters and moments live in a store, a shard per model block.

The update of one shard may run in one of two windows; both give the same bits:

* Early, in the backward pass: as soon as the shard's gradient is whole, while that pass goes on with the next
  block. It is a guess until `step()` accepts it, which a clipped gradient, or another learning rate, makes
  wrong. The slot that it read is untouched then, and the update is made again, late, from the gradient that
  was kept: in host memory or in the store's scratch files. Where guesses went wrong often, none are made.
* Late, on the way to the next forward pass (or a flush), when that comes to the shard. The weights read for
  the update are the ones that forward computes with, so this window costs no extra traffic either.

In both the other slot is written, and the step becomes the committed one when its last shard is written.

With `commit_every_steps` the drive gets only some steps (write-back): every shard's weights and states stay in
host memory, where all updates happen, and late ones only, since there is no old slot to go back to. The update
of every so many steps is written as above; `flush` writes what memory alone has, in the same way, without one.

Threads: the caller's (one at a time); the intake's (optim.gradients), which also submits early updates; the
pipeline's (optim.updater), which also commits; the engine's, which end writes.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from io_engine import Buffer, BufferPool, Engine, Store, Transfer
from optim import kernels, norm
from optim.gradients import GradientIntake, HeldGradient, ShardGradient, Waiting, check_waiting
from optim.hyperparameters import check_group, check_max_grad_norm
from optim.kernels import AdamWScalars, stochastic_key
from optim.layout import ParameterSlot, ShardLayout
from optim.norm import clip_coefficient, global_norm
from optim.states import ParameterState, ParameterUpdate, StateFiles, checked_value
from optim.steps import (
    Commit,
    EarlyUpdate,
    NonFiniteUpdateError,
    PendingUpdate,
    StepCounts,
    StepResult,
    check_write_back,
)
from optim.updater import Barrier, Recorder, ResidentState, ShardUpdater, UpdateInputs, UpdateJob, check_room

CLIPPING_HISTORY: Final = 16
"""Steps over which the share of clipped ones is taken."""


class OffloadedAdamW(torch.optim.Optimizer):
    """AdamW over a store. Built by `fuyou.AdamW`; used like `torch.optim.AdamW`.

    `shards` are the trainable shards in the order of the forward pass; `names` gives every trainable
    parameter's name. `gradients` and `records` are the pools that bound its memory. Updates of the shards
    `early` begin in the backward pass, unless more than `max_clipped_share` of the last steps were clipped;
    `waiting` says where each shard's gradient is kept until the step, "free" only with early ones and no
    clipping. `resident_states` are buffers of `state_bytes` for shards whose states stay in host memory; the
    caller releases them after `close`. `seed` chooses the random bits that round moments of less than float32.
    Parameter groups may differ in lr, betas, eps and weight_decay. `max_grad_norm` clips the global norm as
    `torch.nn.utils.clip_grad_norm_` does. `commit_every_steps`: how many steps pass from commit to commit; None: each
    is committed. With a number every shard needs a resident state, none may be early, and the caller must keep all their
    weights in memory.

    `load_shard(name)` brings a shard's weights into memory as a forward pass would, which begins its pending
    update; `drop_resident_weights()` forgets weights kept in host memory, which are then read again.

    ValueError for hyperparameters or parameters that it cannot use, BudgetError if `records` cannot hold one
    record. After a failure in the background every call raises it; the store stays at its committed step.
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
        early: frozenset[str],
        waiting: Mapping[str, Waiting],
        max_clipped_share: float = 0.25,
        resident_states: Mapping[str, Buffer] | None = None,
        num_workers: int = 1,
        record: Recorder | None = None,
        load_shard: Callable[[str], None],
        drop_resident_weights: Callable[[], None],
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        decoupled_weight_decay: bool = True,
        max_grad_norm: float | None = None,
        seed: int = 0,
        commit_every_steps: int | None = None,
    ) -> None:
        self._resident = {name: ResidentState(buffer) for name, buffer in (resident_states or {}).items()}
        self._names = dict(names)
        self._shards = {shard.name: shard for shard in shards}
        self._early, self._waiting = early, dict(waiting)
        self._max_clipped_share = max_clipped_share
        check_waiting(self._shards, early, waiting)
        self._commit_every_steps = commit_every_steps
        if commit_every_steps is not None:
            check_write_back(commit_every_steps, self._shards, early, self._resident)
        check_max_grad_norm(max_grad_norm, all_kept="free" not in self._waiting.values())
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "decoupled_weight_decay": decoupled_weight_decay,
            },
        )
        check_room(records, shards, self._waiting, self._resident.keys())
        formats = {
            (shard.moment_dtype, narrow) for shard in shards for narrow in {False, shard.compute_dtype == "bfloat16"}
        }
        for moment_dtype, narrow_gradients in formats:
            kernels.warm_up(moment_dtype, narrow_gradients=narrow_gradients)
        norm.warm_up()
        self._max_grad_norm = max_grad_norm
        self._seed = seed
        self._record = record or (lambda *_: None)
        self._store, self._engine, self._records = store, engine, records
        self._load_shard = load_shard
        self._drop_resident_weights = drop_resident_weights
        self._states = StateFiles(store, engine, records)
        self._slots = {name: store.active_slot(shard.weight_name) for name, shard in self._shards.items()}
        self._jobs: dict[str, UpdateJob] = {}
        """Latest job of each shard."""
        self._barriers: list[Barrier] = []
        self._next_extra: dict[str, Any] = {}
        # Accepted updates that have not begun, and their commit.
        self._pending: dict[str, PendingUpdate] = {}
        self._pending_commit: Commit | None = None
        # What memory alone has: shards updated since they were last written, and the state of the last step.
        self._unwritten: set[str] = set()
        self._unwritten_state: dict[str, Any] | None = None
        # Since the last step: shards whose gradient was handed over with their weights, and what has begun of them.
        self._given: set[str] = set()
        self._guesses: dict[str, EarlyUpdate] = {}
        self._clipped: collections.deque[bool] = collections.deque(maxlen=CLIPPING_HISTORY)
        self._is_guessing = True
        self._refusal: str | None = None

        saved: Mapping[str, Any] = store.state.get("optimizer", {})
        written = store.checksums.keys()
        untrained = [s for s in shards if s.state_name not in written]
        self._counts = StepCounts(saved, (slot.name for shard in untrained for slot in shard.parameters))
        self.extra: dict[str, Any] = dict(saved.get("extra", {}))
        self.last_step: StepResult | None = None

        self._closed = False
        self._updater = ShardUpdater(engine, records, num_workers=num_workers, record=self._record)
        self._intake = GradientIntake(
            engine=engine,
            store=store,
            gradients=gradients,
            records=records,
            updater=self._updater,
            waiting=self._waiting,
            record=self._record,
        )

    # --- what users call -----------------------------------------------------------------------------------

    @property
    def max_grad_norm(self) -> float | None:
        """Limit of the global gradient norm; None: no clipping. May be changed where all gradients are kept."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        check_max_grad_norm(value, all_kept="free" not in self._waiting.values())
        self._max_grad_norm = value

    @property
    def step_count(self) -> int:
        """Steps taken, those included that were skipped."""
        return self._counts.step

    @property
    def num_skipped(self) -> int:
        """Steps that changed nothing, because of a gradient that was not finite or by `refuse_step`."""
        return self._counts.num_skipped

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override, unused-ignore]
        """Make one optimizer step of the gradients that backward left.

        Returning is not commit: updates may still run until the next forward pass uses their block. Does
        nothing if no backward pass ran since the last step. A gradient that is not finite makes a skipped
        step. Raises what went wrong in the background since the last call; ValueError or RuntimeError, with
        nothing changed, for hyperparameters that cannot be used or that changed too early.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_step()
        return loss

    def _take_step(self) -> None:
        self._check_open()
        self._finish_arrivals()
        self.raise_if_broken()
        self._start_pending()
        held = self._held
        if not held:
            # Of backward passes that gave no gradient at all.
            self._given, self._refusal = set(), None
            return
        grad_norm = self.grad_norm()
        skipped, scale, updates, redone = self._refusal, 1.0, {}, frozenset[str]()
        if skipped is None and not math.isfinite(grad_norm):
            skipped = f"the gradient norm is {grad_norm}"
        if skipped is None:
            scale = clip_coefficient(grad_norm, self._max_grad_norm)
            updates = self._updates_of_step(held)
            redone = self._wrong_guesses(updates, scale)
        if redone or skipped is not None:
            # They write where the right ones will, and may have failed.
            self._wait_for_guesses()
            self.raise_if_broken()
        window: Literal["backward", "forward"] = "backward" if self._guesses else "forward"
        bytes_spilled = self._intake.bytes_spilled
        with self._whole_or_broken(f"step {self.step_count + 1}"):
            # The count of steps goes on if it is skipped, so that data and random numbers do not repeat.
            self._counts.step += 1
            if skipped is None:
                self._clipped.append(scale < 1.0)
                self._accept(updates, scale, redone)
                bytes_spilled += sum(p.held.spilled_bytes for p in self._pending.values() if p.held and p.held.extent)
            else:
                self._counts.num_skipped += 1
                self._void()
                self._end_step({}, {})
            self.last_step = StepResult(
                self.step_count, grad_norm, scale < 1.0, skipped, window, len(redone), bytes_spilled
            )

    def refuse_step(self, reason: str) -> None:
        """Let the next `step()` change nothing, for this reason; `zero_grad` takes it back."""
        self._refusal = reason

    def grad_norm(self) -> float:
        """Global norm of the gradients that wait for `step()`, 0.0 for none; blocks until they are here."""
        self._finish_arrivals()
        return global_norm({name: value for held in self._held.values() for name, value in held.sums.items()})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients that no `step()` has taken; those that one has taken are not touched."""
        self._finish_arrivals()
        if self._held or self._given:
            self._wait_for_guesses()
            with self._whole_or_broken("zero_grad()"):
                self._void()
        self._refusal = None

    def accumulate(self) -> None:
        """Let the next backward pass add to the gradients that wait for `step()`; call it before its forward pass.

        What was guessed from them is void, and there are no early updates until that step. Blocks until weights and
        states in memory are those of the last step again. RuntimeError where gradients were not kept.
        """
        self._check_open()
        self._finish_arrivals()
        self.raise_if_broken()
        if not self._held:
            self._given.clear()  # of backward passes that gave no gradient at all: there is nothing to add to
            return
        if any(self._waiting[shard] == "free" for shard in self._given):
            raise RuntimeError(
                "a second forward pass with gradients before optimizer.step(): the first one's gradients are given back "
                "already, since they would take host memory that this run does not have or was not given. Give the whole "
                "batch to one forward pass (micro_batch_size splits it), use accelerate's accumulate(), or set "
                "max_grad_norm, which keeps them; to evaluate, use torch.no_grad()"
            )
        self._wait_for_guesses()
        self.raise_if_broken()
        with self._whole_or_broken("accumulate()"):
            self._forget_in_memory(self._guesses)
            self._guesses, self._given, self._is_guessing = {}, set(), False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; ValueError for parameters that are not trained and for unusable hyperparameters."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            foreign = sum(p not in self._names for p in group["params"])
            if foreign:
                raise ValueError(
                    f"{foreign} of {len(group['params'])} parameters in a group are not trained: "
                    "pass those of model.parameters() that required gradients when the optimizer was "
                    "made"
                )
            check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the hyperparameters; ValueError if there are states, which live in the store."""
        if state_dict.get("state"):
            raise ValueError(
                f"this state_dict holds states of {len(state_dict['state'])} parameters, but an offloaded "
                "optimizer has them in its store: open the model with that store to resume, and load only "
                "what state_dict() of this class gave"
            )
        for group in state_dict["param_groups"]:
            check_group(group)
        super().load_state_dict(state_dict)

    def commit_extra(self, extra: Mapping[str, Any]) -> None:
        """Store `extra` with the commit of the step that is taken next; `extra` gives it back on resume.

        It must be JSON (else TypeError or ValueError), and is copied.
        """
        self._next_extra = json.loads(json.dumps(dict(extra), allow_nan=False))

    def state_of(self, name: str) -> ParameterState:
        """Copies of one parameter's master and moments as of the last step; flushes first.

        KeyError for a name that is not trained.
        """
        shard, slot = self._find(name)
        self.flush()
        values = self._states.read(shard, slot, self._slots[shard.name])
        master, exp_avg, exp_avg_sq = (torch.from_numpy(value).reshape(slot.shape) for value in values)
        return ParameterState(master, exp_avg, exp_avg_sq, step=self._counts.of(name))

    def set_state(
        self,
        name: str,
        *,
        master: torch.Tensor | None = None,
        exp_avg: torch.Tensor | None = None,
        exp_avg_sq: torch.Tensor | None = None,
    ) -> None:
        """Replace one parameter's master or moments (float32, the parameter's shape) and commit; flushes first, blocks.

        Moments of less than float32 are rounded to the nearest. KeyError for a name that is not trained, ValueError for
        values that cannot be stored, RuntimeError while gradients wait for `step()`; nothing is changed then.
        """
        shard, slot = self._find(name)
        given = {"master": master, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        values = {field: checked_value(value, field, slot) for field, value in given.items() if value is not None}
        self.flush()
        if self._held:
            raise RuntimeError("gradients wait for optimizer.step(): call step() or zero_grad() before editing states")
        target = 1 - self._slots[shard.name]
        checksums = self._states.rewrite(shard, slot, 1 - target, target, values)
        state: dict[str, Any] = self._store.state
        optimizer: dict[str, Any] = state.get("optimizer", {})
        with self._whole_or_broken(f"the change of {name}"):
            self._store.commit(
                step=self._store.step,
                slots=dict.fromkeys(checksums, target),
                checksums=checksums,
                # With the counts: from here on this shard counts as written, and what it missed is told by them alone.
                state=state | {"optimizer": optimizer | self._counts.to_json()},
            )
            self._slots[shard.name] = target
            self._forget_in_memory([shard.name])

    def flush(self) -> None:
        """Block until every step taken is committed; raises what went wrong."""
        self._check_open()
        self._finish_arrivals()
        self.raise_if_broken()
        self._start_pending()
        if self._unwritten_state is not None:
            with self._whole_or_broken("flush()"):
                self._queue_commit(self._unwritten_state, {}, {}, written=True)
            self._start_pending()
        for barrier in self._barriers:
            barrier.wait()
        self._barriers.clear()
        self.raise_if_broken()

    def close(self) -> None:
        """Stop the threads, give all buffers back. Idempotent.

        What has begun is finished, a commit included; updates that have not begun are given up (`flush` first
        to keep them).
        """
        self._closed = True
        self._intake.close()
        self._updater.close()
        for held in self._intake.take_all().values():
            held.take_back()
        while self._pending:
            # A submission that was interrupted may have counted a user that never came to work.
            held_gradient = self._pending.popitem()[1].held
            if held_gradient is not None:
                held_gradient.take_back()

    # --- what the executor calls ---------------------------------------------------------------------------

    def raise_if_broken(self) -> None:
        """Raise the background failure after which nothing more is committed, if there was one."""
        error = self._updater.error or self._intake.error
        if error is not None:
            raise error.with_traceback(None)

    def slot_of(self, shard: str) -> int:
        """Slot that holds, or will hold, the shard's latest weights; `wait_written` first.

        RuntimeError if host memory alone has them: whoever asks has lost them.
        """
        if shard in self._unwritten:
            raise RuntimeError(
                f"the latest weights of {shard} were in host memory alone and are not there any more; the store stands at "
                f"step {self._store.step}: open the model again to go on from there"
            )
        return self._slots.get(shard, 0)

    def is_written(self, shard: str) -> bool:
        """Whether the shard's weights can be read now and no step in the making is about to replace them."""
        if shard in self._given:
            return False
        job = self._jobs.get(shard)
        return job is None or job.done.is_set()

    def wait_written(self, shard: str) -> None:
        """Block until the shard's latest weights can be read; raises what went wrong with them.

        Where an update has begun that no step() has accepted, those are in the slot that it left alone; it is
        through then, so that buffers in which it ran can be forgotten.
        """
        if shard in self._given:
            self._finish_arrivals()
            self._wait_for_guesses()
            self.raise_if_broken()
            return
        job = self._jobs.get(shard)
        if job is not None:
            job.wait()

    def wait_updated(self, shard: str) -> None:
        """As `wait_written`, for who has the shard's weights in memory: the new ones may still be on their way to the drive.

        They may be read there, and given back as the weights of a further update: that one writes into them behind the
        commit of this step, which waits for its writes.
        """
        job = self._jobs.get(shard)
        if shard in self._given or job is None:
            self.wait_written(shard)
        else:
            job.wait_ready()

    def has_pending_update(self, shard: str) -> bool:
        """Whether the shard's weights on the drive are still those before the last step."""
        return shard in self._pending

    def start_pending_update(
        self,
        shard: str,
        weights: npt.NDArray[np.uint8],
        wait_before: Sequence[Transfer],
        on_done: Callable[[], None],
    ) -> UpdateJob:
        """Begin the shard's update in `weights` (its whole extent, on its way in by `wait_before`).

        Returns at once. `weights` may be read after `job.wait_ready()` and reused after `on_done` was called.
        """
        commit = self._pending_commit
        assert commit is not None
        with self._whole_or_broken(f"the update of {shard}"):
            pending = self._pending[shard]
            job = self._submit(
                self._shards[shard],
                pending.held,
                weights,
                pending.updates,
                pending.gradient_scale,
                wait_before,
                on_done,
                written=commit.written,
            )
            if pending.held is not None:
                pending.held.release()
            del self._pending[shard]
            commit.jobs[shard] = job
            if commit.written:
                self._slots[shard] = 1 - self._slots[shard]
                self._unwritten.discard(shard)
            else:
                self._unwritten.add(shard)
            if not self._pending:
                self._pending_commit = None
                self._submit_commit(commit)
        return job

    def acquire_gradient(self, shard: str, dtype: type[np.generic] = np.float32) -> ShardGradient:
        """An empty buffer in which to sum one backward pass's gradient; blocks while the pool is used up.

        `dtype` np.uint16: the bits of bfloat16, for what needs no sum, one micro-batch's gradient. What an earlier
        backward pass left since the last step is added when this one is complete.
        RuntimeError for a second backward pass without `accumulate` before, BudgetError if no buffer can become
        free.
        """
        self._check_open()
        self.raise_if_broken()
        if shard in self._given:
            raise RuntimeError(
                "a second backward pass before optimizer.step(), and its forward pass saw nothing of it: call "
                "optimizer.accumulate() before that forward pass"
            )
        if self.updates_early(shard):
            # Here, where the caller can act on it, and not in the background when the update begins.
            for group in self.param_groups:
                check_group(group)
        return self._intake.acquire(
            self._shards[shard], dtype, lambda: all(job.done.is_set() for job in list(self._jobs.values()))
        )

    def expect_gradient(self, shard: str) -> None:
        """The next gradient that is complete may be this shard's: its first states are read meanwhile, if it `updates_early`."""
        # A shard whose update has not begun keeps the last step's commit out of the queue, and states may still be on their way.
        if shard in self._shards and self.updates_early(shard) and shard not in self._resident and not self._pending:
            layout, slot = self._shards[shard], self._slots[shard]
            # The store answers between commits, for which the caller need not wait.
            self._updater.expect(layout, lambda: self._store.extent(layout.state_name, slot))

    def begin_backward(self) -> None:
        """Before a backward pass, with no block in memory: blocks until updates of shards that forward skipped have begun.

        Nothing of this step may be written before the last one's commit is in the queue.
        """
        self._start_pending()

    @property
    def has_guesses(self) -> bool:
        """Whether gradients were handed over whose early updates no step has accepted."""
        return bool(self._given)

    def set_early(self, early: frozenset[str]) -> None:
        """Update these shards early from the next backward pass on; ValueError where a gradient would have no place."""
        check_waiting(self._shards, early, self._waiting)
        self._early = early

    def updates_early(self, shard: str) -> bool:
        """Whether the shard's update begins when its gradient is whole: `gradient_complete` then takes its weights."""
        return self._is_guessing and shard in self._early

    def gradient_complete(
        self,
        gradient: ShardGradient,
        weights: npt.NDArray[np.uint8] | None = None,
        *,
        wait: Callable[[], None],
        on_done: Callable[[], None] | None = None,
    ) -> None:
        """The shard's backward pass is over: hand over its gradient; returns at once.

        `wait` blocks until the gradient has arrived in host memory. If the shard `updates_early`, `weights`
        is the whole weight extent in host memory, of which nothing else makes use any more: the update
        happens in it, and `on_done` is called, from any thread, when it may be reused.
        """
        self._check_open()
        shard = gradient.layout.name
        with self._whole_or_broken(f"the gradient of {shard}"):
            former = self._jobs.get(shard)

            def arrived() -> None:
                wait()
                # Its gradient may be the one that lies where this one is spilled to.
                if former is not None:
                    former.weights_ready.wait()

            if not self.updates_early(shard):
                self._intake.submit(gradient, wait=arrived, then=None, on_unused=None)
                return
            assert weights is not None
            assert on_done is not None
            assert not self._pending
            given_weights, given_back = weights, on_done
            self._given.add(shard)
            self._intake.submit(
                gradient,
                wait=arrived,
                then=lambda held: self._guess(held, given_weights, given_back),
                on_unused=on_done,
            )

    def trains(self, shard: str) -> bool:
        """Whether the shard has parameters to update."""
        return shard in self._shards

    # --- inside: one step ----------------------------------------------------------------------------------

    @property
    def _held(self) -> dict[str, HeldGradient]:
        """By shard, the gradients that wait for `step()`; complete after `_finish_arrivals`."""
        return self._intake.held

    def _finish_arrivals(self) -> None:
        self._intake.finish()
        self._updater.expect_nothing()

    def _guess(self, held: HeldGradient, weights: npt.NDArray[np.uint8], on_done: Callable[[], None]) -> None:
        """Begin an update that `step()` may accept; on the intake's thread."""
        updates = self._updates(held, self._groups_by_name())
        if not updates:
            on_done()
            return
        job = self._submit(held.layout, held, weights, updates, 1.0, (), on_done, written=True)
        self._guesses[held.layout.name] = EarlyUpdate(job, updates)

    def _submit(
        self,
        layout: ShardLayout,
        held: HeldGradient | None,
        weights: npt.NDArray[np.uint8],
        updates: Mapping[str, ParameterUpdate],
        gradient_scale: float,
        wait_before: Sequence[Transfer],
        on_done: Callable[[], None],
        *,
        written: bool,
    ) -> UpdateJob:
        """Queue an update, which keeps the gradient's memory to its end."""
        slot = self._slots[layout.name]
        gradient: npt.NDArray[Any] | None = np.empty(0, np.float32)
        give_up = None
        if held is not None:
            gradient, give_up = held.array, held.use()
        job = UpdateJob(
            layout,
            UpdateInputs(
                weights=weights,
                gradient=gradient,
                gradient_extent=held.extent if held is not None and gradient is None else None,
                gradient_dtype=np.float32 if held is None else held.dtype,
                updates=updates,
                gradient_scale=gradient_scale,
                state_from=self._store.extent(layout.state_name, slot),
                state_to=self._store.extent(layout.state_name, 1 - slot) if written else None,
                weight_to=self._store.extent(layout.weight_name, 1 - slot) if written else None,
                resident_state=self._resident.get(layout.name),
                wait_before=wait_before,
                on_gradient_used=give_up,
                on_done=on_done,
            ),
        )
        self._updater.submit(job)
        self._jobs[layout.name] = job
        return job

    def _updates_of_step(self, held: Mapping[str, HeldGradient]) -> dict[str, dict[str, ParameterUpdate]]:
        """By shard, what this step's updates are made with; changes nothing."""
        for group in self.param_groups:
            check_group(group)
        groups = self._groups_by_name()
        return {shard: self._updates(h, groups) for shard, h in held.items()}

    def _wrong_guesses(self, updates: Mapping[str, dict[str, ParameterUpdate]], scale: float) -> frozenset[str]:
        """Shards whose update must be made again; RuntimeError if a gradient for that was not kept."""
        wrong = frozenset(name for name, g in self._guesses.items() if scale != 1.0 or g.updates != updates[name])
        if any(self._waiting[name] == "free" for name in wrong):
            raise RuntimeError(
                "lr, betas, eps or weight_decay changed between backward() and step(), when updates had "
                "begun: change them after step(), as torch's schedulers do, or call zero_grad() and "
                "repeat the backward pass"
            )
        return wrong

    def _accept(self, updates: Mapping[str, dict[str, ParameterUpdate]], scale: float, redone: frozenset[str]) -> None:
        """The gradients held become this step: accept the guesses that were right, leave the rest to the next forward."""
        held = self._intake.take_all()
        right = {name: guess.job for name, guess in self._guesses.items() if name not in redone}
        self._forget_in_memory(redone)
        self._begin_step()
        parameters = (slot.name for shard in self._shards.values() for slot in shard.parameters)
        self._counts.count_update(parameters, frozenset[str]().union(*updates.values()))
        for name in right:
            self._slots[name] = 1 - self._slots[name]
        pending = {
            name: PendingUpdate(h, updates[name], scale)
            for name, h in held.items()
            if name not in right and updates[name]
        }
        for name in held.keys() - pending.keys():  # taken up already, or without a parameter in any group
            held[name].release()
        self._end_step(pending, right)

    def _wait_for_guesses(self) -> None:
        """Block until updates that no step has accepted are through, well or not."""
        for guess in self._guesses.values():
            guess.job.done.wait()

    def _void(self) -> None:
        """Give up the gradients held and what was guessed from them; slots stay as they were."""
        for held in self._intake.take_all().values():
            held.release()
        self._forget_in_memory(self._guesses)
        self._begin_step()

    def _forget_in_memory(self, shards: Iterable[str]) -> None:
        """States and weights of these shards in memory are not those of the last step: they are read again."""
        for name in shards:
            if name in self._resident:
                self._resident[name].filled = False
        if shards:
            self._drop_resident_weights()

    def _begin_step(self) -> None:
        """Nothing waits any more; whether the next step's updates may be guessed."""
        self._guesses, self._given = {}, set()
        self._refusal = None
        self._is_guessing = sum(self._clipped) <= self._max_clipped_share * len(self._clipped)

    def _start_pending(self) -> None:
        """Begin every update that no forward pass has begun."""
        for name in list(self._pending):
            self._load_shard(name)
        if self._pending_commit is not None:
            raise RuntimeError(
                f"step {self.step_count} was accepted, but loading {', '.join(self._pending)} did not "
                f"begin its update; the store stands at step {self._store.step}: open the model again to go "
                "on from there"
            )

    # --- inside: commits -----------------------------------------------------------------------------------

    def _state_to_commit(self) -> dict[str, Any]:
        extra, self._next_extra = self._next_extra, {}
        return self._counts.to_json() | {"extra": extra, "commit_every_steps": self._commit_every_steps or 1}

    def _end_step(self, pending: dict[str, PendingUpdate], jobs: dict[str, UpdateJob]) -> None:
        """The step taken is made of these updates, those that have begun among `jobs`: queue its commit behind them."""
        every = self._commit_every_steps
        written = every is None or self.step_count % every == 0
        self._queue_commit(self._state_to_commit(), pending, jobs, written=written)

    def _queue_commit(
        self, state: dict[str, Any], pending: dict[str, PendingUpdate], jobs: dict[str, UpdateJob], *, written: bool
    ) -> None:
        if written:
            # A step is committed as a whole: also what earlier steps left in memory and this one does not update.
            pending |= {name: PendingUpdate(None, {}, 1.0) for name in self._unwritten - pending.keys()}
        self._unwritten_state = None if written else state
        commit = Commit(self.step_count, state, frozenset(jobs) | frozenset(pending), jobs, written)
        if pending:
            self._pending, self._pending_commit = pending, commit
        else:
            self._submit_commit(commit)

    def _submit_commit(self, commit: Commit) -> None:
        # The slots as they are now: a later step may flip them again before the barrier runs.
        slots = {name: self._slots[name] for name in commit.shards}
        barrier = self._updater.submit_barrier(lambda: self._commit(commit, slots))
        self._barriers = [b for b in self._barriers if not b.done.is_set() or b.error is not None]
        self._barriers.append(barrier)

    def _commit(self, commit: Commit, slots: Mapping[str, int]) -> None:
        """On the pipeline's thread, when every update and write of the step has ended."""
        assert commit.jobs.keys() == commit.shards
        started = time.perf_counter()
        for job in commit.jobs.values():
            if job.refused_parameter is not None:
                raise NonFiniteUpdateError(
                    f"step {commit.step} would make {job.refused_parameter} NaN, infinite or too large for "
                    f"{job.layout.compute_dtype}; the store stays at step {self._store.step}. Lower the "
                    "learning rate and resume"
                )
        if not commit.written:
            return
        checksums: dict[str, str] = {}
        extents: dict[str, int] = {}
        for name, job in commit.jobs.items():
            checksums.update(job.checksums())
            extents[job.layout.weight_name] = extents[job.layout.state_name] = slots[name]
        self._store.commit(
            step=commit.step,
            slots=extents,
            checksums=checksums,
            state={**self._store.state, "optimizer": commit.state},
        )
        self._record("ssd_write", "commit", started, time.perf_counter(), 0)

    @contextlib.contextmanager
    def _whole_or_broken(self, what: str) -> Iterator[None]:
        """What ends in its middle, by Ctrl-C say, must never be committed: from then on nothing is."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, Exception):
                self._updater.fail(error)
            else:
                self._updater.fail(
                    RuntimeError(
                        f"{what} was interrupted ({type(error).__name__}) while it was being taken over; the "
                        f"store stands at step {self._store.step}: open the model again to go on from there"
                    )
                )
            raise

    # --- inside: small things ------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the optimizer is closed: open the model again to go on training")

    def _updates(self, held: HeldGradient, groups: Mapping[str, Mapping[str, Any]]) -> dict[str, ParameterUpdate]:
        """What the next update of a shard is made with, by parameter with a gradient and a group."""
        updates = {}
        for p in held.layout.parameters:
            group = groups.get(p.name)
            if group is None or p.name not in held.arrived:
                continue
            beta1, beta2 = group["betas"]
            step = self._counts.of(p.name) + 1
            scalars = AdamWScalars.at_step(
                lr=float(group["lr"]),
                beta1=float(beta1),
                beta2=float(beta2),
                eps=float(group["eps"]),
                weight_decay=float(group["weight_decay"]),
                step=step,
                decoupled=bool(group["decoupled_weight_decay"]),
            )
            updates[p.name] = ParameterUpdate(scalars, stochastic_key(self._seed, step, p.name))
        return updates

    def _groups_by_name(self) -> dict[str, dict[str, Any]]:
        return {self._names[p]: group for group in self.param_groups for p in group["params"]}

    def _find(self, name: str) -> tuple[ShardLayout, ParameterSlot]:
        for shard in self._shards.values():
            for slot in shard.parameters:
                if slot.name == name:
                    return shard, slot
        raise KeyError(f"{name!r} is not a trainable parameter of this model")
