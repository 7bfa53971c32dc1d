"""The forward sweep: micro-batches run block by block, each in a greenlet that stops before every decoder layer.

Each micro-batch's unmodified `model.forward` runs in a greenlet of its own, which goes back to the schedule before every
layer and once more behind the last one. Layers run without a graph; their inputs are kept, and outputs that the plan lets
wait are recorded (fuyou.executor.replay). What runs before the first layer, between layers and behind the last keeps its
ordinary graph.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import greenlet
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_unflatten

from fuyou.blocks import Block
from fuyou.errors import ModelError
from fuyou.executor.activations import ActivationStore
from fuyou.executor.bound import BoundWeights
from fuyou.executor.collector import active_collector, collected_tensors, replace_collected
from fuyou.executor.device import Device
from fuyou.executor.gradients import GradientSums
from fuyou.executor.ops import Op, all_recomputed, check_activations
from fuyou.executor.record import (
    Cut,
    CutGradients,
    ForwardRecord,
    LayerCall,
    MicroBatch,
    SavedInput,
    is_float,
    origin_of,
)
from fuyou.executor.replay import Recording, RecordMode
from fuyou.executor.stopwatch import Stopwatch
from fuyou.executor.torch_state import TorchState
from fuyou.plan import Activations


class ForwardSweep:
    """Leads micro-batches through the model; all greenlets have ended when `running` is left."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        layer_blocks: Sequence[Block | None],
        *,
        bound: BoundWeights,
        gradients: GradientSums,
        device: Device,
        stopwatch: Stopwatch,
        state: TorchState,
    ) -> None:
        self._model, self._layers, self._layer_blocks = model, layers, layer_blocks
        self._parameters = dict(model.named_parameters())
        self._bound, self._gradients = bound, gradients
        self._device, self._stopwatch, self._state = device, stopwatch, state
        self._activations: ActivationStore
        self._plans: dict[str, Activations] = {}
        self._ops: dict[str, tuple[Op, ...]] = {}
        """Operations of each block that was recorded, as its first micro-batch had them."""
        self._observes = False
        self._current: MicroBatch | None = None
        self._hub: greenlet.greenlet | None = None
        self._training = False
        self.anchor = torch.ones((), device=device.torch_device, requires_grad=True)
        """What ties results of our own autograd functions to a graph."""
        self.adopted_forward: Callable[..., Any] | None = None
        """What micro-batches run instead of the class's forward."""
        self.record: ForwardRecord | None = None
        """Of the training pass that is under way or waits for its backward pass."""
        self._patch_layers()

    def use(self, activations: ActivationStore, plans: Mapping[str, Activations]) -> None:
        """Put away what the blocks' plans name, there, from now on."""
        self._activations = activations
        self._plans = {name: plan for name, plan in plans.items() if not all_recomputed(plan)}
        self._ops.clear()

    @contextlib.contextmanager
    def observing(self) -> Iterator[dict[str, tuple[Op, ...]]]:
        """Inside, all operations are listed, in what this gives, and none is put away."""
        known, self._ops, self._observes = self._ops, {}, True
        try:
            yield self._ops
        finally:
            self._ops, self._observes = known, False

    @property
    def is_running(self) -> bool:
        """Whether `running` was entered and not left."""
        return self._hub is not None

    @property
    def is_inside(self) -> bool:
        """Whether the caller runs as a part of a micro-batch's forward."""
        return self._current is not None and self._current.greenlet is greenlet.getcurrent()

    @contextlib.contextmanager
    def running(self, micro_batches: Sequence[MicroBatch], *, training: bool) -> Iterator[None]:
        """Greenlets may run inside. Whatever happens, all of them end."""
        self._plain_forward = self.adopted_forward or type(self._model).forward.__get__(self._model)
        try:
            self._hub, self._training = greenlet.getcurrent(), training
            with self._device.current():
                yield
        finally:
            try:
                self._end(micro_batches)
            finally:  # also where a Ctrl-C comes at the very end: the model is not running any more
                self._hub, self._current, self._training = None, None, False

    def up_to_epilogue(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Run each block for all micro-batches before the next, prologue and layers."""
        with self._bound.block("prologue"):
            for micro_batch in micro_batches:
                self._start(micro_batch)
        for index in range(len(self._layers)):
            block = self._layer_blocks[index]
            with self._bound.block(block.name) if block is not None else contextlib.nullcontext():
                for micro_batch in micro_batches:
                    # A model may skip a layer for a micro-batch (layer drop): then it waits at a later one.
                    if micro_batch.next_stop == index:
                        self._resume(micro_batch, f"layer {index} forward")

    def _start(self, micro_batch: MicroBatch) -> None:
        def run() -> None:
            micro_batch.output = self._plain_forward(**micro_batch.arguments)

        micro_batch.greenlet = greenlet.greenlet(run)
        # transformers keeps the collector of router logits and the like in a context variable.
        micro_batch.greenlet.gr_context = contextvars.copy_context()
        self._resume(micro_batch, "prologue forward")

    def finish(self, micro_batch: MicroBatch) -> None:
        """Run the epilogue; the model's output is in `micro_batch.output` then."""
        self._resume(micro_batch, "epilogue forward")
        if micro_batch.greenlet is not None and not micro_batch.greenlet.dead:
            raise ModelError("the model ran more decoder layers after its last one: it cannot be streamed")
        micro_batch.greenlet = None

    def reach_epilogue(self) -> None:
        """A micro-batch for which the last layers were skipped has come to the epilogue, whose weights it needs now."""
        if self.is_inside:
            assert self._current is not None
            if self._current.next_stop < len(self._layers):
                self._stop(self._current, len(self._layers))

    def layer(self, index: int) -> Callable[..., Any]:
        """A layer's own forward."""
        return self._plain_forwards[index]

    # --- inside the greenlets --------------------------------------------------------------------------------------

    def _patch_layers(self) -> None:
        """Replace `forward` on each layer object; names, hooks and adapters in it stay as they are."""
        self._plain_forwards: list[Callable[..., Any]] = []
        for index, layer in enumerate(self._layers):
            plain = layer.forward
            self._plain_forwards.append(plain)

            @functools.wraps(plain)
            def forward(*args: Any, _index: int = index, **kwargs: Any) -> Any:
                return self._enter_layer(_index, args, kwargs)

            layer.forward = forward

    def _enter_layer(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        micro_batch = self._current
        if micro_batch is None or micro_batch.greenlet is not greenlet.getcurrent():
            raise ModelError(
                "a decoder layer was called outside of the model's own forward: its weights are on the drive. Call the "
                "whole model (model(...)), not a part of it"
            )
        self._stop(micro_batch, index)
        with self._state.casts_let_go():
            if self._training:
                result = self._run_layer(micro_batch, index, args, kwargs)
            else:
                result = self._plain_forwards[index](*args, **kwargs)
        if index == len(self._layers) - 1:
            self._stop(micro_batch, len(self._layers))
        return result

    def _stop(self, micro_batch: MicroBatch, where: int) -> None:
        """Back to the schedule, until it has bound what comes next."""
        if where <= micro_batch.next_stop:
            raise ModelError(
                f"layer {where} was called after layer {micro_batch.next_stop}: only models that run their layers once, in "
                "order, can be streamed"
            )
        micro_batch.next_stop = where
        assert self._hub is not None
        self._hub.switch()

    def _run_layer(self, micro_batch: MicroBatch, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        block = self._layer_blocks[index]
        leaves, spec = tree_flatten((args, kwargs))
        inputs: list[SavedInput] = []
        kept = list(leaves)
        call = LayerCall(kept, spec, inputs, CutGradients(), self._state.get_rng(), self._state.get_autocast(), {})
        # From the beginning, so that what has been put away is given back if something fails here.
        micro_batch.calls[index] = call
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                if not torch.is_grad_enabled():
                    raise ModelError(
                        f"{type(self._model).__name__} runs its layers under an autograd function of its own (reversible layers, "
                        "for example): it cannot be streamed"
                    )
                edge = get_gradient_edge(leaf)
                origin = origin_of(leaf)
                key = f"{index}/{micro_batch.index}/{position}"
                inputs.append(SavedInput(position, self._activations.save(key, leaf), edge, origin))
                kept[position] = None
                if origin == "between" and self.record is not None:
                    self.record.needs_prologue = True
        trainable = block is not None and (
            self._gradients.has_adapters(block.name)
            or any(self._parameters[name].requires_grad for name in block.parameters)
        )
        recorder = self._recorder(micro_batch, index, call) if inputs or trainable else None
        collector = active_collector()
        before = {key: len(entries) for key, entries in collector.items()} if collector else {}
        # With grad mode on, since kernels and models' own branches may depend on it, but keeping nothing.
        pack = _drop if recorder is None else recorder.note_saved
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(pack, _dropped),
            recorder or contextlib.nullcontext(),
        ):
            result = self._plain_forwards[index](*args, **kwargs)
        flat, result_spec = tree_flatten(result)
        with_graph = flat
        flat = [v.detach() if isinstance(v, torch.Tensor) else v for v in flat]
        call.collected = {
            key: len(entries) - before.get(key, 0)
            for key, entries in (collector or {}).items()
            if len(entries) > before.get(key, 0)
        }
        if recorder is not None:
            given = [v for v in with_graph if isinstance(v, torch.Tensor)] + collected_tensors(
                collector, call.collected
            )
            self._finish_recording(recorder, index, inputs, given)
        del result, with_graph
        if not inputs and not trainable:  # nothing below needs a gradient
            replace_collected(
                collector, call.collected, [v.detach() for v in collected_tensors(collector, call.collected)]
            )
            del micro_batch.calls[index]
            return tree_unflatten(flat, result_spec)
        floats = [i for i, value in enumerate(flat) if is_float(value)]
        collected = collected_tensors(collector, call.collected)
        values = [*(flat[i] for i in floats), *(v.detach() for v in collected)]
        cuts = list(Cut.apply(self.anchor, call.outputs, *values))  # type: ignore[no-untyped-call]
        for i in floats:
            flat[i] = cuts.pop(0)
        replace_collected(collector, call.collected, cuts)
        return tree_unflatten(flat, result_spec)

    def _recorder(self, micro_batch: MicroBatch, index: int, call: LayerCall) -> RecordMode | None:
        """What watches a layer's first run where the plan lets some of it wait, or someone asks what it does."""
        block = self._layer_blocks[index]
        plan = self._plans.get(block.name) if block is not None else None
        if block is None or (plan is None and not self._observes):
            return None
        call.recording = Recording(self._activations)
        return RecordMode(
            call.recording,
            self._activations,
            key=f"{index}/{micro_batch.index}/op",
            activations="recompute" if plan is None or self._observes else plan,
            known=self._ops.get(block.name),
            get_rng=self._state.get_rng,
        )

    def _finish_recording(
        self, recorder: RecordMode, index: int, inputs: Sequence[SavedInput], given: Sequence[torch.Tensor]
    ) -> None:
        block = self._layer_blocks[index]
        assert block is not None
        below = {saved_input.edge.node for saved_input in inputs}
        recorder.finish(given, lambda node: node not in below)
        if block.name not in self._ops:
            ops = recorder.ops()
            check_activations(block.name, self._plans.get(block.name, "recompute"), ops)
            self._ops[block.name] = ops

    def _resume(self, micro_batch: MicroBatch, what: str) -> None:
        """Let a micro-batch run to its next stop, with the thread's torch state as it left it."""
        assert micro_batch.greenlet is not None
        outer_rng, outer_grad, outer_autocast = (
            self._state.get_rng(),
            torch.is_grad_enabled(),
            self._state.get_autocast(),
        )
        self._state.set_rng(micro_batch.rng)
        torch.set_grad_enabled(micro_batch.grad_enabled)
        if micro_batch.next_stop >= 0:
            self._state.set_autocast(micro_batch.autocast)
        self._current = micro_batch
        try:
            kept = self._bound.not_kept() if self._training else contextlib.nullcontext()
            with self._stopwatch.computing(what), kept:
                micro_batch.greenlet.switch()
        except RuntimeError as error:
            if "single memory location" not in str(error):
                raise
            raise ModelError(
                f"{type(self._model).__name__} writes into weights outside of the layer that owns them ({what}), where they are "
                "on the drive: it cannot be streamed"
            ) from error
        finally:
            self._current = None
            micro_batch.rng, micro_batch.grad_enabled = self._state.get_rng(), torch.is_grad_enabled()
            micro_batch.autocast = self._state.get_autocast()
            self._state.set_autocast(outer_autocast)
            torch.set_grad_enabled(outer_grad)
            self._state.set_rng(outer_rng)

    def _end(self, micro_batches: Sequence[MicroBatch]) -> None:
        """End greenlets that wait; what they have in `with` blocks is left, and must not change the caller's modes."""
        grad_enabled, autocast = torch.is_grad_enabled(), self._state.get_autocast()
        for micro_batch in micro_batches:
            if micro_batch.greenlet is not None and not micro_batch.greenlet.dead:
                micro_batch.greenlet.throw(greenlet.GreenletExit)
            micro_batch.greenlet = None
        torch.set_grad_enabled(grad_enabled)
        self._state.set_autocast(autocast)


def _drop(_saved: torch.Tensor) -> None:
    return None


def _dropped(_nothing: None) -> torch.Tensor:
    raise AssertionError("the graph of a layer's first forward pass is never used")
