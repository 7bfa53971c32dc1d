"""What stands behind `model.fuyou`: the store, the pools, the plan, and the model's calls led through the executor."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fuyou.adapters import (
    ResidentAdapters,
    adapter_layouts,
    configs_json,
    gradient_pool_bytes,
    host_bytes,
    prepare,
    record_pool_bytes,
)
from fuyou.base_store import SHARED
from fuyou.blocks import PROLOGUE, Block, ModelBlocks
from fuyou.building import is_placeholder
from fuyou.caches import can_be_split, join, split
from fuyou.calls import (
    Loss,
    LossWithoutOptimizer,
    Outputs,
    QueuedLoss,
    batch_rows,
    check_tokens,
    joined_outputs,
    loss_output,
    num_rows,
    num_tokens,
    shape_of,
    split_batch,
    summed_as_called,
    sync_gradients,
)
from fuyou.config import OffloadConfig, format_bytes
from fuyou.errors import ConfigError, DataError, ModelError, PlanError
from fuyou.executor.activations import ActivationStore
from fuyou.executor.device import Device, make_device
from fuyou.executor.ops import Op
from fuyou.executor.record import ForwardRecord, Output
from fuyou.executor.step import StepExecutor
from fuyou.executor.weights import WeightStream
from fuyou.exporting import NamesOnly, ReadBlock, compare_state_dict, export_checkpoint
from fuyou.generate_calls import plan_calls
from fuyou.generation_plan import CacheShape, Demand, Fit, GenerationPlan, Room, fit_generation
from fuyou.hardware import available_host_bytes, cached_hardware, keep_refinement, num_cores
from fuyou.memory import MemoryMeter
from fuyou.merging import merged_blocks, restore_adapters
from fuyou.plan import Activations, Plan, StepShape
from fuyou.plan_search import pooled_bytes
from fuyou.planner import fitting_micro_batch, least_memory, simulate_plan, with_best_windows
from fuyou.planning import key_of, plan_for, plan_inputs, shard_sizes
from fuyou.prediction_check import PredictionCheck
from fuyou.quantising import QuantisedLayout
from fuyou.simulator import SimulatedStep
from fuyou.streamed_adamw import StreamedAdamW
from fuyou.trace import Span, Trace, TracingEngine
from fuyou.trace_files import save_traces
from io_engine import (
    Buffer,
    BufferPool,
    Engine,
    ExtentSpec,
    Store,
)
from optim import ShardLayout

COMPUTE_MEMORY_SHARE = 0.8
"""Of the host memory that is free beside the pools, what a micro-batch in compute may take."""
MOST_PREDICTIONS = 256
"""Kept, by batch."""


class Runtime:
    """`model.fuyou`. Everything here belongs to one model and one store, until `close`."""

    def __init__(
        self,
        model: nn.Module,
        blocks: ModelBlocks,
        layouts: Mapping[str, ShardLayout],
        config: OffloadConfig,
        *,
        store: Store,
        base: Store | None,
        engine: Engine,
        trace: Trace,
        device: str,
        seed: int,
        micro_batch_size: int | None,
        loss_chunk_tokens: int | None,
        num_threads: int,
        resumed: str,
    ) -> None:
        self.config = config
        self.store = store
        self.base = base
        """The store that holds the weights, open for reading only, if it is another one."""
        self.trace = trace
        self.resumed = resumed
        self.blocks = blocks
        self.layouts = dict(layouts)
        self.optimizer: StreamedAdamW | None = None
        self.outputs_mode = False
        """Whether calls with labels return outputs that carry gradients, too. What a training call of the model returns:

        * with labels, the loss alone ("loss mode"): logits are gone part by part, micro-batches of an accumulated step run
          together, and one micro-batch's logits exist at a time, or those of loss_chunk_tokens tokens;
        * without labels, or if this is True, the model's ordinary output ("outputs mode"), for losses computed outside of
          it: every floating-point tensor in it (logits, hidden_states and the like if asked for, the loss if there are
          labels) carries its gradient. Call backward() once, before the next forward pass that is not under no_grad; each
          call is a pass over the weights of its own, and several before optimizer.step() add up. A batch of more than
          micro_batch_size rows is split and joined again along dimension 0; a scalar (loss, aux_loss) is the mean of its
          parts', by label tokens, or by rows without labels. Do not write into hidden_states."""
        self.checkpoint_to_load: str | None = None
        """A checkpoint of the store's to which `model.load_state_dict` goes back first: the weights it will be given."""
        self.prefill_micro_batch_size: int | None = None
        """Texts that run through a block at once while `generate` reads their prompts; None: as many as memory allows."""
        self._is_generation_planned = False
        """Whether calls of `generate` follow a plan that was made before the model was opened."""
        self._model = model
        self._parameters = dict(model.named_parameters())
        """The streamed ones, under the names that they have without adapters around them."""
        self._engine = TracingEngine(engine, trace)
        self._device_name = device
        self._seed = seed
        self._micro_batch_size = micro_batch_size
        self._is_micro_batch_chosen = False
        # Now, since peft may put a module of another kind in its place.
        self._vocabulary_size: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        self._added: dict[str, nn.Parameter] = {}
        """Parameters that were put into the model after it was made, as far as they have been seen."""
        self._adapter_bytes = 0
        self._adapted: frozenset[str] = frozenset()
        """Blocks in which adapters are trained."""
        self._expected: StepShape | None = None
        self._hardware = cached_hardware(config.store_directories, device, config.compute_dtype)
        self.plan = self._make_plan(clipping=False)
        self._device: Device = make_device(device, trace)
        self._queued: list[list[tuple[Mapping[str, Any], float]]] = []
        """By call, micro-batches that wait for the last call of their step."""
        self._queued_scales: list[float] = []
        self._queued_since = -1
        """The optimizer's num_steps_called when the queue was empty: only its micro-batches go into one step."""
        self._micro_batches_of_step = (-1, 0)
        self.closed = False
        """Whether `close` or `abandon` was called."""
        self._metrics: dict[str, Any] = {}
        self._step_started = time.perf_counter()
        self._step_loss: float | None = 0.0
        """None if a loss of this step was computed outside of the model."""
        self._step_tokens = 0
        self._step_shape = StepShape()
        self._is_disturbed = False
        """Whether this step's figures are not those of training alone."""
        self._check = PredictionCheck(device, num_cores())
        self._counted = (0, 0)
        self._pools: list[BufferPool] = []
        self._weights: WeightStream
        self._resident_states: dict[str, Buffer] = {}
        self._adapters: ResidentAdapters | None = None
        self._predictions: dict[StepShape, SimulatedStep] = {}
        """By batch: lengths of rows differ from step to step, and many come again."""
        self._last_shape = StepShape()
        self._interrupted: str | None = None
        self._gradients_since = -1
        self._executor = StepExecutor(
            model,
            blocks,
            layouts,
            device=self._device,
            trace=trace,
            seed=seed,
            loss_chunk_tokens=loss_chunk_tokens,
        )
        # On the CPU sums depend on how many threads make them: the run's own number, until it is closed.
        self._num_threads_before = torch.get_num_threads()
        if device == "cpu":
            torch.set_num_threads(num_threads)
        self._build_pools()
        self._take_over_model()
        self._meter = MemoryMeter()
        if device == "cpu":  # temporaries of a GPU's compute are not here
            self._executor.freed_memory.limit_bytes = self._meter.start_bytes + self.plan.host_memory_bytes

    # --- what users call -----------------------------------------------------------------------------------------

    @property
    def committed_step(self) -> int:
        """The last step that a crash cannot take back."""
        return self.store.step

    @property
    def bytes_moved(self) -> tuple[int, int]:
        """Bytes read from and written to the store's drives since the model was opened, by the engine's counters."""
        return self._engine.bytes_read, self._engine.bytes_written

    def expect(self, shape: StepShape) -> None:
        """Let the plan of training be made for such steps, which are not known before the first batch; before AdamW."""
        self._expected = shape

    def follow_generation_plan(self, plan: GenerationPlan) -> None:
        """Generate as it was planned before the model was opened with the weights' share of memory.

        Calls of `generate` are not planned any more: keeping to the plan's texts and lengths is the caller's affair.
        """
        self.prefill_micro_batch_size = plan.micro_batch_size
        self._is_generation_planned = True

    def flush(self) -> None:
        """Block until every optimizer step taken is committed."""
        self._check_usable()
        if self.optimizer is not None:
            with self._uninterrupted("flush()"):
                self.optimizer.flush()

    def close(self) -> None:
        """Flush, then release the store and all memory. Idempotent; the model cannot be used afterwards.

        After a Ctrl-C in the middle of a step nothing is flushed: the store stays at its committed step.
        """
        if self.closed:
            return
        try:
            if self.cut_short is None:
                self.flush()
                self._save_traces()
                self._learn()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close without finishing pending updates; the store stays at its committed step. Idempotent."""
        if self.closed:
            return
        self.closed = True
        # From the last line up. Pools before the engine: a read that nobody waits for any more keeps its own memory.
        with contextlib.ExitStack() as stack:
            stack.callback(torch.set_num_threads, self._num_threads_before)
            stack.callback(self._engine.close)
            stack.callback(self.store.close)
            if self.base is not None:
                stack.callback(self.base.close)
            for pool in self._pools:
                stack.callback(pool.close, force=True)
            stack.callback(self._meter.close)
            stack.callback(self._drop_resident_states)
            if self._adapters is not None:
                stack.callback(self._adapters.close)
            stack.callback(self._weights.close)
            if self.optimizer is not None:
                stack.callback(self.optimizer.close)
            stack.callback(self._executor.discard)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            self.close()
            return
        try:
            if self.plan.durability == "checkpoint" and self.cut_short is None:
                # What went wrong was not the step: those taken are whole, and the drive may lack many of them.
                with contextlib.suppress(Exception):
                    self.flush()
        finally:
            self.abandon()

    def step_metrics(self) -> dict[str, Any]:
        """Figures of the last optimizer step, as in a line of metrics.jsonl; empty before the first."""
        return dict(self._metrics) | ({"committed_step": self.committed_step} if self._metrics else {})

    def choose_activations(self, activations: Mapping[str, Activations]) -> None:
        """Follow other plans for the activations of these blocks from the next forward pass on; changes no bit."""
        blocks = tuple(
            dataclasses.replace(b, activations=activations.get(b.name, b.activations)) for b in self.plan.blocks
        )
        self.plan = dataclasses.replace(self.plan, blocks=blocks)
        self._executor.discard()
        self._executor.use(self._weights, self._activations, {b.name: b.activations for b in blocks})

    def take_spans(self) -> tuple[Span, ...]:
        """What was traced since the last optimizer step, or the last call of this."""
        self._device.collect_spans()
        now = time.perf_counter()
        return self.trace.end_step(0, now, now).spans

    def list_ops(self, **batch: Any) -> dict[str, tuple[Op, ...]]:
        """What each decoder layer computes for one micro-batch: the numbers that `BlockPlan.activations` may name.

        `batch` are arguments of the model's forward, of which the first micro_batch_size rows are used; the model is run in
        the mode (train or eval) that it is in. The numbers hold for every batch as long as the model takes the same path;
        where a later micro-batch runs another operation under a number, that one is computed again. Layers that no
        gradient reaches are left out. Blocks while one forward pass runs.
        """
        self._check_usable()
        with self._uninterrupted("list_ops()"), self._weights_of_last_step(), torch.enable_grad():
            arguments = self._on_device(batch)
            self._check_tokens(arguments)
            return self._executor.list_ops(batch_rows(arguments, self._micro_batch_size)[0] | {"use_cache": False})

    def infer_each(self, calls: Sequence[Mapping[str, Any]], take: Callable[[int, Any], Any]) -> list[Any]:
        """Run model.forward without gradients for each of the calls' arguments, each weight read once for all of them.

        Returns what `take` makes of each call's number and output; one output is in memory at a time, if `take` keeps
        nothing of it. Of the weights as they are after the last step. The model must be in evaluation mode, where no
        random numbers are drawn. Blocks.
        """
        self._check_usable()
        self._see_added_parameters()
        if self._model.training:
            raise ModelError(
                "infer_each in training mode would give every call the same dropout: call model.eval() first"
            )
        arguments = [self._on_device(call) for call in calls]
        for call in arguments:
            self._check_tokens(call)
        with self._weights_of_last_step():
            return self._executor.infer(arguments, take)

    def adopt_forward(self) -> None:
        """Compute with the `forward` that somebody has put on the model since, as trl's SFTTrainer does; in outputs mode.

        Such a function may call the base model and read the head's weights, which are there only while the engine runs
        it. accelerate's autocast around our own forward alone is none.
        """
        given = self._model.__dict__["forward"]
        if self._model.__dict__.get("_original_forward", given) is self._own_forward or given is self._own_forward:
            return
        self._executor.adopted_forward = given
        self.outputs_mode = True
        object.__setattr__(self._model, "forward", self._own_forward)

    def adopt_forward_later(self) -> None:
        """`adopt_forward` whenever model.eval() or model.train() is called: a trainer does so before it evaluates."""

        def train(mode: bool = True) -> Any:
            self.adopt_forward()
            return type(self._model).train(self._model, mode)

        object.__setattr__(self._model, "train", train)

    def export(self, folder: str, *, merge: bool = False) -> None:
        """Write the current weights as a plain transformers checkpoint, block by block; flushes first.

        Without the adapters that peft may have put around them; with `merge`, these are merged into the weights. The store
        and the model stay as they are.
        """
        self._see_added_parameters()
        read: ReadBlock = self._block_on_host
        if merge:
            merged = merged_blocks(self._model, self.blocks, self._parameters, self._executor.bound_block)

            def read(block: Block) -> contextlib.AbstractContextManager[dict[str, torch.Tensor]]:
                return contextlib.nullcontext(merged(block))

        with self._weights_of_last_step():
            export_checkpoint(self._model, self.blocks, read, folder)

    def changed_adapter(self) -> str | None:
        """The name of an adapter's parameter that somebody has given other values than the optimizer has; None for none."""
        return None if self._adapters is None else self._adapters.differing()

    def restore_checkpoint(self, name: str) -> None:
        """Go back to one of the store's checkpoints: weights, adapters and their states; blocks.

        The optimizer is over then; to train on from there make another one with fuyou.AdamW. StoreError if there is no
        such checkpoint, StoreCorruptError if it is damaged: everything stays as it is then.
        """
        self._check_usable()
        self._executor.discard()
        self.flush()
        self.store.restore(name)
        # Another optimizer counts anew.
        self._queued.clear()
        self._queued_scales.clear()
        self._queued_since = self._gradients_since = -1
        self._micro_batches_of_step = (-1, 0)
        optimizer, self.optimizer = self.optimizer, None
        if optimizer is not None:
            optimizer.close()
            self._weights.optimizer = self._executor.optimizer = None
        self._weights.forget_resident()
        self._drop_resident_states()
        adapters, self._adapters = self._adapters, None
        if adapters is not None:
            for shard in adapters.layouts:
                adapters.load(shard, None)
            adapters.close()

    def restore_adapters(self) -> Any:
        """The model with the adapters that the store's run has trained, frozen; the model itself if there are none."""
        self._check_usable()
        return restore_adapters(self._model, self.store, self._engine)

    # --- the optimizer ---------------------------------------------------------------------------------------------

    def make_optimizer(
        self, groups: Iterable[Any], *, max_grad_norm: float | None, **hyperparameters: Any
    ) -> StreamedAdamW:
        """Lay out the states of what requires gradients now, make the plan final, and build the optimizer."""
        self._check_usable()
        if self.optimizer is not None:
            raise ConfigError("this model has an optimizer already: use it, or open the model again")
        self._see_added_parameters()
        known = {**self._parameters, **self._added}
        adapters = adapter_layouts(self._model, self.blocks, self._added, self._parameters)
        adapter_shards = [layout for layouts in adapters.values() for layout in layouts]
        if self.store.state.get("adapters") is not None and not adapter_shards:
            raise ConfigError(
                "the run in this store trains adapters, and this model has none that require a gradient: call "
                "peft.get_peft_model with the run's config before fuyou.AdamW, or begin a new run in another directory"
            )
        self._adapter_bytes = host_bytes(adapter_shards)
        self._adapted = frozenset(adapters)
        plan = self._make_plan(clipping=max_grad_norm is not None)
        trained = [b.name for b in plan.blocks if b.trainable]
        if trained and (self.base is not None or self.store.state.get(SHARED)):
            raise ConfigError(
                f"{trained[0]} is to be trained, but the weights in {(self.base or self.store).directories[0]} are a base, which "
                "nobody writes: freeze it (lora.modules_to_save trains copies beside it), or begin a run with weights of its own "
                "(without base) in another directory"
            )
        for name in trained:
            if isinstance(self.layouts[name], QuantisedLayout):
                raise ConfigError(
                    f"{name} is to be trained, but its weights are quantised in this store: freeze it (lora.modules_to_save "
                    'trains copies beside it), or begin a run with frozen_dtype="bfloat16" in another directory'
                )
        if not trained and not adapters:
            raise ConfigError("no parameter requires a gradient: there is nothing to train")
        self._lay_out_states(trained)
        # Also of those that were frozen when the model was made.
        self._executor.watch_gradients(self._parameters)
        if adapters:
            self._adapters = ResidentAdapters(
                adapter_shards, self._added, configs_json(self._model), store=self.store, engine=self._engine
            )
            self._executor.train_adapters(adapters, self._added)
        self.plan = plan
        self._build_pools(adapter_shards)
        self._resident_states = {
            b.name: self._records.acquire(self.layouts[b.name].state_bytes) for b in plan.blocks if b.states_in_host
        }
        try:
            optimizer = StreamedAdamW(
                groups,
                names={p: name for name, p in known.items() if p.requires_grad},
                shards=[*(self.layouts[name] for name in trained), *adapter_shards],
                store=self.store,
                engine=self._engine,
                records=self._records,
                gradients=self._gradients,
                early=frozenset(b.name for b in plan.blocks if b.trainable and b.update_window == "backward"),
                waiting={b.name: b.gradient for b in plan.blocks if b.trainable}
                | {layout.name: "host" for layout in adapter_shards},
                max_clipped_share=plan.max_clipped_share,
                resident_states=self._resident_states | (self._adapters.states if self._adapters is not None else {}),
                num_workers=plan.num_update_workers,
                record=self.trace.record,
                load_shard=self._load_shard,
                drop_resident_weights=self._weights.forget_resident,
                max_grad_norm=max_grad_norm,
                seed=self._seed,
                commit_every_steps=plan.commit_every_steps if plan.durability == "checkpoint" else None,
                **hyperparameters,
            )
        except BaseException:
            self._drop_resident_states()
            if self._adapters is not None:
                self._adapters.close()
            raise
        if self._adapters is not None:
            optimizer.after_edit = functools.partial(self._adapters.reload, optimizer=optimizer)
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        self.optimizer = optimizer
        self._weights.optimizer = optimizer
        self._executor.optimizer = optimizer
        self._step_started = time.perf_counter()
        self._check = PredictionCheck(self._device_name, num_cores())
        self._counted = (self._engine.bytes_read, self._engine.bytes_written)
        self._meter.take_peak()
        return optimizer

    def _drop_resident_states(self) -> None:
        while self._resident_states:
            self._resident_states.popitem()[1].release()

    def guard_wrapper(self, wrapper: nn.Module) -> None:
        """What peft has put around the model must not look for gradients in `p.grad`, nor merge into placeholders."""
        object.__setattr__(wrapper, "zero_grad", self._model.zero_grad)

        def refused(*_args: Any, **_kwargs: Any) -> Any:
            raise ModelError(
                "the base's weights are on the drive, so that adapters cannot be merged into them in memory: "
                "model.fuyou.export(folder, merge=True) writes the merged model"
            )

        for module in (wrapper, getattr(wrapper, "base_model", None)):
            for name in ("merge_and_unload", "merge_adapter"):
                if hasattr(module, name):
                    object.__setattr__(module, name, refused)

    def _lay_out_states(self, trained: list[str]) -> None:
        present = set(self.store.names())
        missing = [self.layouts[name] for name in trained if self.layouts[name].state_name not in present]
        if not missing:
            return
        specs = [
            ExtentSpec(layout.state_name, layout.state_bytes, 2, piece_bytes=layout.full_record_bytes)
            for layout in missing
        ]
        self.store.allocate(specs, second_slots_for=[layout.weight_name for layout in missing])

    def _make_plan(self, *, clipping: bool) -> Plan:
        trainable = {name for name, p in self._parameters.items() if p.requires_grad}
        inputs = plan_inputs(
            shard_sizes(self.blocks, self.layouts, trainable.__contains__, self._adapted),
            self.config,
            device=self._device_name,
            clipping=clipping,
            micro_batch_size=self._micro_batch_size,
            hardware=self._hardware,
            adapter_bytes=self._adapter_bytes,
            shape=self._expected,
        )
        self._shards = inputs.shards
        # With what earlier runs of this model have found.
        self._refined_hardware, self._run_key = inputs.hardware, key_of(inputs.shards, self.config.moment_dtype)
        return plan_for(inputs, self.config)

    def _see_added_parameters(self) -> None:
        """Take notice of what peft has put into the model; ModelError for what cannot be computed with, or comes too late."""
        base = self._parameters
        seen = {id(p) for p in (*base.values(), *self._added.values())}
        added = {name: p for name, p in self._model.named_parameters() if id(p) not in seen}
        if self.optimizer is not None and torch.is_grad_enabled():
            # Those that need no gradient, as trl's adapter of reference, may come at any time.
            trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            late = [n for n, p in (self._added | added).items() if p.requires_grad and id(p) not in trained]
            if late:
                raise ModelError(
                    f"{len(late)} parameters (first {late[0]}) require gradients but were added to the model after fuyou.AdamW was "
                    "made: they would not be trained. Add adapters first"
                )
        if added:
            with self._weights_of_last_step():
                prepare(self._model, self.blocks, added, base, self._executor.bound_block)
            self._added |= added

    def _build_pools(self, adapters: Sequence[ShardLayout] = ()) -> None:
        if self._pools:
            self._weights.close()
        for old in self._pools:
            old.close()
        register = unregister = None
        if self._device_name != "cpu":
            runtime = torch.cuda.cudart()

            def register(address: int, num_bytes: int) -> None:
                torch.cuda.check_error(int(runtime.cudaHostRegister(address, num_bytes, 0)))

            def unregister(address: int) -> None:
                torch.cuda.check_error(int(runtime.cudaHostUnregister(address)))

        def pool(name: str, budget_bytes: int) -> BufferPool:
            made = BufferPool(max(4096, budget_bytes), name=name, register=register, unregister=unregister)
            self._pools.append(made)
            return made

        self._pools = []
        plan = self.plan
        weights = pool("weights", plan.weight_pool_bytes)
        self._gradients = pool("gradients", plan.gradient_pool_bytes + gradient_pool_bytes(adapters))
        self._records = pool("records", max(plan.record_pool_bytes, record_pool_bytes(adapters)))
        activations = pool("activations", plan.activation_pool_bytes)
        self._weights = WeightStream(
            engine=self._engine,
            store=self.base or self.store,
            pool=weights,
            layouts=self.layouts,
            resident=frozenset(b.name for b in plan.blocks if b.weights_in_host),
            on_device=frozenset(b.name for b in plan.blocks if b.weights_on_device),
            prefetch_depth=plan.prefetch_depth,
            device=self._device,
        )
        self._activations = ActivationStore(
            pool=activations, engine=self._engine, scratch=self.store.scratch, device=self._device
        )
        self._executor.use(self._weights, self._activations, {b.name: b.activations for b in plan.blocks})

    def _load_shard(self, name: str) -> None:
        """Bring a shard in as a forward pass would; an update that is pending for it begins."""
        if self._adapters is not None and name in self._adapters.layouts:
            assert self.optimizer is not None
            self._adapters.start_update(name, self.optimizer)
            return
        self._weights.release(self._weights.acquire(name))

    # --- the model's calls -------------------------------------------------------------------------------------------

    def _take_over_model(self) -> None:
        model = self._model
        plain = type(model).forward
        self._signature = inspect.signature(plain)

        @functools.wraps(plain.__get__(model))
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._executor.is_inside:  # called by a forward that was adopted
                return plain(model, *args, **kwargs)
            return self._forward(*args, **kwargs)

        def to(*args: Any, **kwargs: Any) -> nn.Module:
            device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
            wanted = None if device is None else torch.device(device)
            if dtype not in (None, model.dtype) or (
                wanted is not None and wanted.type != self._device.torch_device.type
            ):
                raise ModelError(
                    f"a streamed model cannot be moved to {device or dtype}: choose device and compute_dtype in OffloadConfig"
                )
            return model

        def save_pretrained(save_directory: str, *_args: Any, **_kwargs: Any) -> None:
            self.export(save_directory)

        def state_dict(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("destination") is not None:
                # Asked by a model that peft has put around this one, and that wants its adapters.
                collected = type(model).state_dict(model, *args, **kwargs)
                for name in [name for name, value in collected.items() if value.numel() > 1 and is_placeholder(value)]:
                    del collected[name]
                return collected
            return NamesOnly([name for name, _ in model.named_parameters(remove_duplicate=False)])

        def load_state_dict(state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False) -> Any:
            name, self.checkpoint_to_load = self.checkpoint_to_load, None
            if name is not None:
                self.restore_checkpoint(name)
            with self._weights_of_last_step():
                return compare_state_dict(model, self.blocks, self._block_on_host, state_dict, strict=strict)

        replacements: dict[str, Callable[..., Any]] = {
            "forward": forward,
            "to": to,
            "save_pretrained": save_pretrained,
            "state_dict": state_dict,
            "load_state_dict": load_state_dict,
        }
        for name, function in replacements.items():
            object.__setattr__(model, name, function)
        object.__setattr__(model, "fuyou", self)
        if hasattr(type(model), "_prepare_cache_for_generation"):
            itemsize = next(model.parameters()).element_size()
            plan_calls(
                model, itemsize, not self._device.has_own_memory,
                lambda: None if self._is_generation_planned else self._room_for_generation,
            )  # fmt: skip
        self._own_forward = forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        self._check_usable()
        self._see_added_parameters()
        arguments: dict[str, Any] = {}
        adopted = self._executor.adopted_forward is not None
        bound = self._signature.bind(self._model, *args, **({} if adopted else kwargs))
        if adopted:  # it may have parameters that the class's forward has not
            arguments |= kwargs
        for name, value in bound.arguments.items():
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= value
            elif name != "self":
                arguments[name] = value
        arguments = self._on_device(arguments)
        self._check_tokens(arguments)
        if not torch.is_grad_enabled():
            return self._infer(arguments)
        if self.optimizer is None:
            output = self._infer(arguments)
            if isinstance(getattr(output, "loss", None), torch.Tensor):
                output.loss = LossWithoutOptimizer.apply(self._executor.anchor, output.loss)  # type: ignore[no-untyped-call]
            return output
        with self._uninterrupted("a forward pass"):
            return self._train(arguments)

    def _on_device(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: value.to(self._device.torch_device) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }

    def _check_tokens(self, arguments: Mapping[str, Any]) -> None:
        # Looking at values would wait for a device.
        check_tokens(arguments, self._vocabulary_size, look_at_values=self._device_name == "cpu")

    def _train(self, arguments: dict[str, Any]) -> Any:
        assert self.optimizer is not None
        if torch.is_autocast_enabled(self._device.torch_device.type) and (
            torch.get_autocast_dtype(self._device.torch_device.type) == torch.float16
        ):
            raise ConfigError("float16 autocast needs a gradient scaler, which is not supported: use bfloat16")
        arguments["use_cache"] = False
        self._choose_micro_batch(arguments)
        if self.outputs_mode or arguments.get("labels") is None:
            return self._train_on_outputs(arguments)
        arguments.pop("return_dict", None)
        calls = [(part, weight) for part, weight in split_batch(arguments, self._micro_batch_size) if weight]
        if not calls:
            raise DataError(
                f"no label tokens in a batch of {len(arguments['labels'])} rows: every label is -100 (or the rows have one "
                "token), so there is no loss; check the prompt masking and max_length"
            )
        if self._queued_since != self.optimizer.num_steps_called:  # they belong to a step that was given up
            self._queued.clear()
            self._queued_scales.clear()
            self._queued_since = self.optimizer.num_steps_called
        if not sync_gradients():
            self._queued.append(calls)
            zero = QueuedLoss.apply(self._executor.anchor, self._queued_scales)  # type: ignore[no-untyped-call]
            return loss_output(type(None), zero)
        queued, self._queued = [*self._queued, calls], []
        calls = [call for calls_of_one in queued for call in calls_of_one]
        step, first = self._begin_pass([call for call, _ in calls])
        record = self._executor.forward(calls, step=step, first=first)
        value = summed_as_called(record.losses, [len(calls_of_one) for calls_of_one in queued])
        loss = Loss.apply(self._executor.anchor, self._backward, record, value)  # type: ignore[no-untyped-call]
        record.reported_loss = float(sum(record.losses))
        record.num_tokens = sum(num_tokens(call) for call, _ in calls)
        record.shape = shape_of(call for call, _ in calls)
        return loss_output(record.output_type, loss)

    def _train_on_outputs(self, arguments: dict[str, Any]) -> Any:
        """See `outputs_mode`."""
        parts = batch_rows(arguments, self._micro_batch_size)
        if arguments.get("labels") is not None:
            weights = [weight for _, weight in split_batch(arguments, self._micro_batch_size)]
        else:
            weights = [num_rows(part) / num_rows(arguments) for part in parts]
        step, first = self._begin_pass(parts)
        record, outputs = self._executor.forward_outputs(parts, step=step, first=first)
        flat = [tree_flatten(output) for output in outputs]
        values = [leaf.value for leaves, _ in flat for leaf in leaves if isinstance(leaf, Output)]
        if not values:
            raise ModelError("the model's outputs depend on no trainable parameter: there is nothing to train")
        carrying = iter(Outputs.apply(self._executor.anchor, self._backward_outputs, record, values))  # type: ignore[no-untyped-call]
        del values
        joined = joined_outputs(
            [[next(carrying) if isinstance(leaf, Output) else leaf for leaf in leaves] for leaves, _ in flat], weights
        )
        output = tree_unflatten(joined, flat[0][1])
        loss = getattr(output, "loss", None)
        record.reported_loss = float(loss.detach()) if isinstance(loss, torch.Tensor) else None
        record.num_tokens = sum(map(num_tokens, parts))
        record.shape = shape_of(parts)
        return output

    def _fit_plan(self, calls: Sequence[Mapping[str, Any]]) -> None:
        """Choose the windows of updates for steps of such calls, if the plan was made without knowing any."""
        if self._expected is not None or self.config.plan is not None or self._refined_hardware is None:
            return
        assert self.optimizer is not None
        self._expected = shape = shape_of(calls)
        self.plan = with_best_windows(self.plan, self._refined_hardware, shape)
        self.optimizer.set_early(
            frozenset(b.name for b in self.plan.blocks if b.trainable and b.update_window == "backward")
        )

    def _choose_micro_batch(self, arguments: Mapping[str, Any]) -> None:
        """Split a new run's batches, if they were not to be of a given size and do not find room; fixed from then on.

        The larger micro-batches are, the less a token's compute takes, so that memory alone decides.
        """
        if self._micro_batch_size is not None or self.store.step or self._is_micro_batch_chosen:
            return
        self._is_micro_batch_chosen = True
        plan, rows = self.plan, num_rows(arguments)
        if plan.gpu_memory_bytes is not None:
            room = plan.gpu_memory_bytes - least_memory(self._shards).device
        else:
            # Pools take their memory when it is first used.
            pooled = plan.pool_bytes - sum(pool.used_bytes for pool in self._pools)
            room = int(COMPUTE_MEMORY_SHARE * (available_host_bytes() - max(0, pooled)))
        length = shape_of([arguments]).sequence_length
        size = fitting_micro_batch(
            self._shards,
            self.config.compute_dtype,
            num_rows=rows,
            sequence_length=length,
            room_bytes=room,
            loss_chunk_tokens=self.config.loss_chunk_tokens,
        )
        if size == rows:
            return
        self._micro_batch_size = size
        reason = (
            f"of {rows} rows of {length} tokens: {format_bytes(max(0, room))} are free for a micro-batch in compute"
        )
        self.plan = dataclasses.replace(
            plan, micro_batch_size=size, reasons={**plan.reasons, "micro_batch_size": reason}
        )
        numerics: Any = self.store.state["numerics"]
        state = {**self.store.state, "numerics": {**numerics, "micro_batch_size": size}}
        self.store.commit(step=self.store.step, slots={}, checksums={}, state=state)

    def _begin_pass(self, calls: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
        """Get ready for a forward pass with gradients; its step, and the number in it of the first micro-batch."""
        assert self.optimizer is not None
        self.optimizer.raise_if_broken()
        self._executor.discard()
        if self._gradients_wait():
            self.optimizer.accumulate()
        self._fit_plan(calls)
        step = self.optimizer.step_count
        first = self._micro_batches_of_step[1] if self._micro_batches_of_step[0] == step else 0
        self._micro_batches_of_step = (step, first + len(calls))
        return step, first

    def _count(self, record: ForwardRecord) -> None:
        """A backward pass begins: note it in its step's figures; a loss that is not finite makes the step a skipped one.

        Not earlier: a forward pass that nobody calls backward() for belongs to no step.
        """
        assert self.optimizer is not None
        if not self._gradients_wait():
            self._step_loss, self._step_tokens, self._step_shape = 0.0, 0, StepShape()
        loss = record.reported_loss
        self._step_loss = None if loss is None or self._step_loss is None else self._step_loss + loss
        self._step_tokens += record.num_tokens
        self._step_shape = self._step_shape.plus(record.shape)
        self._gradients_since = self.optimizer.num_steps_called
        if self._step_loss is not None and not math.isfinite(self._step_loss):
            self.optimizer.refuse_step(f"the loss is {self._step_loss}")

    def _backward_outputs(self, record: ForwardRecord, gradients: Sequence[torch.Tensor | None]) -> None:
        with self._uninterrupted("a backward pass"):
            self._executor.check(record)
            self._check_prologue_fits(record)
            self._count(record)
            self._executor.backward(record, 1.0, gradients)

    def _backward(self, record: ForwardRecord, scale: float) -> None:
        scales, self._queued_scales = self._queued_scales, []
        if any(s != scale for s in scales):
            raise ModelError(
                f"the losses of one accumulated step were scaled differently before backward() ({[*scales, scale]}): scale them all "
                "alike"
            )
        with self._uninterrupted("a backward pass"):
            self._executor.check(record)
            self._check_prologue_fits(record)
            self._count(record)
            self._executor.backward(record, scale)

    def _check_prologue_fits(self, record: ForwardRecord) -> None:
        """PlanError where layers use what runs before them directly and memory for one block does not do.

        Its weights and gradient are then needed during the whole backward pass, which would wait for memory forever.
        """
        if not record.needs_prologue or PROLOGUE not in self.layouts:
            return
        trainable = {b.name for b in self.plan.blocks if b.trainable}
        sizes = shard_sizes(
            self.blocks, self.layouts, lambda name: any(name in self._trained(block) for block in trainable)
        )
        least = least_memory(sizes)
        prologue = self.layouts[PROLOGUE]
        weights = least.weights + pooled_bytes(prologue.weight_bytes)
        weights += sum(pooled_bytes(b.weight_bytes) for b in self.plan.blocks if b.weights_in_host)
        gradients = least.gradients + (pooled_bytes(prologue.gradient_bytes) if PROLOGUE in trainable else 0)
        gradients += sum(
            pooled_bytes(b.gradient_bytes) for b in self.plan.blocks if b.trainable and b.gradient == "host"
        )
        short = max(0, weights - self.plan.weight_pool_bytes) + max(0, gradients - self.plan.gradient_pool_bytes)
        if short:
            self._executor.discard()
            raise PlanError(
                f"the layers of this model use what runs before them directly, so that both must be in memory: "
                f"{format_bytes(short)} are short of host_memory = {format_bytes(self.plan.host_memory_bytes)}. Set "
                f"host_memory to {format_bytes(2 * short + self.plan.host_memory_bytes)} or more"
            )

    def _trained(self, block: str) -> frozenset[str]:
        return frozenset(p.name for p in self.layouts[block].parameters)

    def _infer(self, arguments: dict[str, Any]) -> Any:
        with self._weights_of_last_step():
            if arguments.get("labels") is None:
                # Generation calls with a cache, once a token. Weights that a step may change are not read ahead for it.
                again = arguments.get("past_key_values") is not None and not self._gradients_wait()
                size = self.prefill_micro_batch_size
                if size is not None and size < num_rows(arguments) and can_be_split(arguments):
                    return self._prefill(arguments, size, again=again)
                return self._executor.infer([arguments], again=again)[0]
            parts = split_batch(arguments, self._micro_batch_size)
            if len(parts) == 1 or self._executor.adopted_forward is not None:
                return self._executor.infer([arguments])[0]
            calls = [part if weight else {**part, "labels": None} for part, weight in parts]
            if self._model.training:  # each part has dropout of its own
                outputs = [self._executor.infer([call])[0] for call in calls]
            else:
                outputs = self._executor.infer(calls)
            counted = [w * float(o.loss) for o, (_, w) in zip(outputs, parts, strict=True) if w]
            loss, logits = sum(counted) if counted else math.nan, torch.cat([output.logits for output in outputs])
            return type(outputs[0])(loss=torch.tensor(loss, device=logits.device), logits=logits)

    def _prefill(self, arguments: dict[str, Any], rows_at_once: int, *, again: bool) -> Any:
        """Read prompts into a cache in vertical micro-batches."""
        calls = split(arguments, rows_at_once)
        outputs = self._executor.infer(calls, again=again)
        cache = arguments["past_key_values"]
        join(cache, [call["past_key_values"] for call in calls])
        return type(outputs[0])(logits=torch.cat([output.logits for output in outputs]), past_key_values=cache)

    @contextlib.contextmanager
    def _room_for_generation(
        self, demand: Demand, cache: CacheShape, tier: Literal["device", "host"] | None
    ) -> Iterator[Fit]:
        """Inside, weights leave as much of host memory free as keys and values and what computes with them take."""
        self._check_usable()
        plan, (weights, *others) = self.plan, self._pools
        gpu_memory_bytes = plan.gpu_memory_bytes
        if gpu_memory_bytes is not None:
            gpu_memory_bytes -= sum(b.weight_bytes for b in plan.blocks if b.weights_on_device)
        # States, and gradients that wait for a step.
        free_bytes = plan.host_memory_bytes - sum(pool.used_bytes for pool in others)
        fit = fit_generation(
            shard_sizes(self.blocks, self.layouts, lambda _name: False),
            cache,
            demand,
            Room(self._device_name, num_cores(), free_bytes, gpu_memory_bytes),
            vocabulary_size=self._vocabulary_size,
            compute_dtype=self.config.compute_dtype,
            cache_tier=tier,
        )
        with contextlib.ExitStack() as stack:
            if self.prefill_micro_batch_size is None:
                self.prefill_micro_batch_size = fit.micro_batch_size
                stack.callback(setattr, self, "prefill_micro_batch_size", None)
            left_bytes = free_bytes - plan.overhead_bytes - fit.reserve_bytes
            if left_bytes < weights.budget_bytes:
                for pool in others:
                    pool.trim()
                stack.callback(weights.limit, weights.budget_bytes)
                stack.enter_context(self._weights_within(left_bytes, fit.weights))
                weights.limit(max(left_bytes, fit.weights.weight_pool_bytes))
            yield fit

    @contextlib.contextmanager
    def _weights_within(self, room_bytes: int, planned: Plan) -> Iterator[None]:
        """Inside, no more weights stay in host memory than there is room for, beside those under way."""
        resident, depth = self._weights.resident, self._weights.prefetch_depth
        sizes = {name: pooled_bytes(layout.weight_bytes) for name, layout in self.layouts.items()}
        largest = max(sizes.values()) + max(pooled_bytes(shard.borrowed_bytes) for shard in self._shards)
        room_bytes -= (depth + 1) * largest
        if sum(sizes[name] for name in resident) <= room_bytes:
            yield
            return
        room_bytes = sum(sizes[b.name] for b in planned.blocks if b.weights_in_host)
        kept: list[str] = []
        for name in sizes:
            if name in resident and sizes[name] <= room_bytes:
                kept.append(name)
                room_bytes -= sizes[name]
        with self._weights_of_last_step():
            pass  # what goes can be read again
        try:
            self._weights.keep(frozenset(kept), min(depth, planned.prefetch_depth))
            yield
        finally:
            self._weights.keep(resident, depth)

    @contextlib.contextmanager
    def _weights_of_last_step(self) -> Iterator[None]:
        """Everything taken is committed, and what is read in here are those weights: for whatever does not train.

        Between a backward pass and its step, early updates have run already. On the drive they are
        in the other slot, where nobody looks; in memory they must not be seen.
        """
        self._is_disturbed = True
        self.flush()
        ahead = self.optimizer is not None and self.optimizer.has_guesses
        if ahead:
            assert self.optimizer is not None
            for name in self.layouts:
                self.optimizer.wait_written(name)
            self._weights.forget_resident()
        try:
            yield
        except Exception:
            raise
        except BaseException:
            # No update is at work, so that weights in memory are read again at most.
            self._executor.let_weights_go()
            raise
        finally:
            if ahead:
                self._weights.forget_resident()

    def _gradients_wait(self) -> bool:
        """Whether a backward pass has run that no step or zero_grad has followed."""
        return self.optimizer is not None and self._gradients_since == self.optimizer.num_steps_called

    # --- around a step -----------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        # A forward pass without its backward pass, and what was read ahead for that, would be older than this step.
        self._executor.discard()
        self._weights.announce(())
        waiting = sum(map(len, self._queued))
        if waiting and self._queued_since == optimizer.num_steps_called:
            raise RuntimeError(
                f"optimizer.step() while {waiting} micro-batches wait for the last one of their step: accelerate's "
                "sync_gradients is False, so their losses are not computed yet. Step after the last micro-batch of a step "
                "(accelerator.accumulate() does so); after a loop that was interrupted, call optimizer.zero_grad() and "
                "GradientState()._set_sync_gradients(True)"
            )

    def _after_step(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        if self._adapters is not None:
            with self._uninterrupted("optimizer.step()"):
                self._adapters.finish_updates(optimizer)
        result = optimizer.last_step
        if result is None or result.step == self._metrics.get("step"):
            return
        now = time.perf_counter()
        self._device.collect_spans()
        trace = self.trace.end_step(result.step, self._step_started, now)
        read, written = self._engine.bytes_read, self._engine.bytes_written
        predicted = self._predicted(self._step_shape)
        self._metrics = {
            "step": result.step,
            "committed_step": self.committed_step,
            "loss": self._step_loss,
            "grad_norm": result.grad_norm,
            "clipped": result.clipped,
            "skipped": result.skipped,
            "update_window": result.window,
            "num_redone": result.num_redone,
            "learning_rate": float(optimizer.param_groups[0]["lr"]),
            "num_tokens": self._step_tokens,
            "seconds": now - self._step_started,
            "predicted_seconds": None if predicted is None else predicted.seconds,
            "predicted_lane_seconds": None if predicted is None else predicted.lane_seconds,
            "bytes_read": read - self._counted[0],
            "bytes_written": written - self._counted[1],
            "bytes_spilled": result.bytes_spilled + 2 * self._activations.bytes_spilled,
            "peak_gpu_bytes": self._device.peak_bytes(),
            "peak_host_bytes": self._meter.take_peak(),
            "limiting_lane": trace.limiting_lane(),
            "lane_seconds": trace.lane_seconds(),
        }
        is_plain = not (result.clipped or result.skipped or result.num_redone or self._is_disturbed)
        if predicted is not None and is_plain:
            warnings = self._check.add(
                predicted.seconds,
                predicted.lane_seconds,
                self._metrics["seconds"],
                self._metrics["lane_seconds"],
                bytes_read=self._metrics["bytes_read"],
                bytes_written=self._metrics["bytes_written"],
            )
            if warnings:
                self._metrics["warnings"] = warnings
        self._activations.bytes_spilled = 0
        self._counted = (read, written)
        self._is_disturbed = False
        self._last_shape = self._step_shape
        self._step_started, self._step_loss, self._step_tokens = now, 0.0, 0

    def _predicted(self, shape: StepShape) -> SimulatedStep | None:
        """What the plan expects of a step with such a batch."""
        if self._refined_hardware is None or not shape.num_tokens:
            return None
        shape = shape.about()
        if shape not in self._predictions:
            if len(self._predictions) >= MOST_PREDICTIONS:
                self._predictions.clear()
            self._predictions[shape] = simulate_plan(
                self.plan,
                self._refined_hardware,
                shape.num_tokens,
                shape.sequence_length,
                num_micro_batches=shape.num_micro_batches,
            )
        return self._predictions[shape]

    def predicted_step(self) -> SimulatedStep | None:
        """What the plan expects of a step with a batch as the last one's; None where nothing is measured or taken."""
        return self._predicted(self._last_shape) if self._metrics else None

    def _learn(self) -> None:
        """Keep for later runs of this model by what its lanes differ from the measured profile; never a reason to fail."""
        found = self._check.factors()
        if not found or self._hardware is None:
            return
        before = self._hardware.refined.get(self._run_key, {})
        factors = {lane: before.get(lane, 1.0) * found.get(lane, 1.0) for lane in before.keys() | found.keys()}
        keep_refinement(
            self.config.store_directories, self._device_name, self.config.compute_dtype, self._run_key, factors
        )

    def _save_traces(self) -> None:
        """Leave the last steps' lanes beside the store, for `fuyou trace`; never a reason to fail."""
        if self.trace.steps:
            with contextlib.suppress(OSError):
                save_traces(self.config.store_directories[0], self.trace.steps, self.predicted_step())

    @contextlib.contextmanager
    def _block_on_host(self, block: Block) -> Iterator[dict[str, torch.Tensor]]:
        with self._weights.look(block.name) as flat:
            yield {p.name: flat[p.start : p.stop].view(p.shape) for p in self.layouts[block.name].parameters}

    @property
    def cut_short(self) -> str | None:
        """What Ctrl-C has interrupted in its middle, so that memory and store may disagree; None if nothing was."""
        return self._interrupted or (None if self.optimizer is None else self.optimizer.cut_short)

    def _check_usable(self) -> None:
        if self.closed:
            raise ModelError("this model is closed: open it again with fuyou.from_pretrained(..., store=...)")
        cut_short = self.cut_short
        if cut_short is not None:
            raise ModelError(
                f"{cut_short} was interrupted before its end, so that this model cannot go on: close it (model.fuyou.close()) "
                f"and open it again; the store is whole and stands at step {self.committed_step}"
            )

    @contextlib.contextmanager
    def _uninterrupted(self, what: str) -> Iterator[None]:
        """Remembers a KeyboardInterrupt inside, which may hit between any two changes that belong together."""
        self._check_usable()
        try:
            yield
        except Exception:
            raise
        except BaseException:
            self._interrupted = what
            raise
