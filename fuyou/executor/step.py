"""One training step, block by block, for all micro-batches: the vertical schedule.

Each micro-batch's unmodified `model.forward` runs in a greenlet of its own that stops before every decoder layer and
once more behind the last one. The schedule (`StepExecutor`) brings a block's weights in, lets every micro-batch run up
to the next stop, and lets the weights go, so that they cross the bus once however many micro-batches there are.

Layers run without a graph; their inputs are kept, and the backward pass computes each layer again with one, except for
what the plan lets wait (fuyou.executor.replay). What runs before the first layer, between layers and behind the last
keeps its ordinary graph. Both kinds are joined at cuts: a cut is a tensor whose gradient is caught and handed to the
layer that produced it.

All greenlets end before forward returns: on CUDA the backward pass runs on autograd's own thread, where the greenlets
of another thread cannot be entered.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import greenlet
import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fuyou.blocks import CONSTRUCTED_VALUES, Block, ModelBlocks
from fuyou.building import StreamedParameter, placeholder
from fuyou.errors import ModelError
from fuyou.executor.activations import ActivationStore, SavedTensor
from fuyou.executor.device import Device
from fuyou.executor.head import ChunkedHead
from fuyou.executor.ops import Op, all_recomputed, check_activations
from fuyou.executor.replay import Recording, RecordMode, ReplayMode
from fuyou.executor.weights import LoadedShard, WeightStream
from fuyou.plan import Activations
from fuyou.trace import WAIT_LANE, Trace
from optim import OffloadedAdamW, ShardGradient, ShardLayout

LEAST_WAIT_SECONDS = 1e-3
"""Shorter waits are left out of traces."""


def micro_batch_seed(seed: int, step: int, micro_batch: int) -> int:
    """Seed of torch's generators for one micro-batch of one step, so that runs repeat whatever ran in between.

    The first eight bytes, little-endian, of sha256("fuyou:{seed}:{step}:{micro_batch}"), without the sign bit.
    """
    digest = hashlib.sha256(f"fuyou:{seed}:{step}:{micro_batch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") & (2**63 - 1)


class CutGradients:
    """The gradients of one layer's outputs for one micro-batch, as they arrive."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor | None] = []

    def add(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Add one backward pass's contribution."""
        if not self.gradients:
            self.gradients = list(gradients)
            return
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                present = self.gradients[index]
                self.gradients[index] = gradient if present is None else present + gradient

    def take(self, index: int) -> torch.Tensor | None:
        """What has arrived for one output, which is forgotten here."""
        if not self.gradients:
            return None
        taken, self.gradients[index] = self.gradients[index], None
        return taken


class _Cut(torch.autograd.Function):
    """Turns tensors without a graph into tensors whose gradients are caught in a CutGradients."""

    @staticmethod
    def forward(ctx: Any, _anchor: torch.Tensor, caught: CutGradients, *values: torch.Tensor) -> Any:
        ctx.caught = caught
        ctx.set_materialize_grads(False)
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        ctx.caught.add(gradients)
        return (None, None, *(None for _ in gradients))


@dataclasses.dataclass
class _SavedInput:
    """A tensor argument of a layer that carries a gradient: its value put away, and where its gradient goes."""

    position: int
    saved: SavedTensor
    edge: GradientEdge
    origin: str
    """"layer": a layer's output itself; "prologue": computed from nothing but prologue; "between": from both, or by code
    between layers."""


@dataclasses.dataclass
class _LayerCall:
    """What is needed to compute one layer again for one micro-batch."""

    leaves: list[Any]
    spec: TreeSpec
    inputs: list[_SavedInput]
    outputs: CutGradients
    rng: tuple[torch.Tensor, ...]
    autocast: tuple[bool, torch.dtype]
    collected: dict[str, int]
    """Entries that the layer added to the active output collector, by key."""
    recording: Recording | None = None

    def saved(self) -> Iterator[SavedTensor]:
        """Everything that waits for this call's backward pass, in the order in which it is needed."""
        yield from (saved_input.saved for saved_input in self.inputs)
        if self.recording is not None:
            yield from self.recording.saved()


class _MicroBatch:
    """One micro-batch on its way through the model."""

    def __init__(self, index: int, arguments: Mapping[str, Any], weight: float) -> None:
        self.index = index
        self.arguments = arguments
        self.weight = weight
        self.greenlet: greenlet.greenlet | None = None
        self.next_stop = -1
        """Layer before which it waits; the number of layers: behind the last; -1: at the start."""
        self.calls: dict[int, _LayerCall] = {}
        self.into_prologue: list[tuple[GradientEdge, torch.Tensor]] = []
        """Gradients of what the prologue gave to layers, last layer first."""
        self.rng: tuple[torch.Tensor, ...] = ()
        self.grad_enabled = True
        self.autocast: tuple[bool, torch.dtype]
        self.output: Any = None
        self.loss: torch.Tensor | None = None


@dataclasses.dataclass
class ForwardRecord:
    """What a forward pass leaves for its backward pass."""

    micro_batches: list[_MicroBatch]
    loss: torch.Tensor
    """Weighted sum of the micro-batches' losses, float64, 0-dimensional."""
    output_type: type
    autocast: tuple[bool, torch.dtype]
    needs_prologue: bool = False
    reported_loss: float | None = None
    """What the step's figures say; None if the loss is computed elsewhere."""
    num_tokens: int = 0
    roots: list[_Root] = dataclasses.field(default_factory=list)
    """Of a forward pass whose loss is computed by the caller: the outputs that carry gradients, in order."""


@dataclasses.dataclass(frozen=True)
class Output:
    """The value of an output that carries a gradient, without its graph."""

    value: torch.Tensor


@dataclasses.dataclass(frozen=True)
class _Root:
    """An output of model.forward, and where its gradient goes."""

    micro_batch: _MicroBatch
    edge: GradientEdge
    origin: str
    """As of a _SavedInput; "between" stands for the epilogue too."""


@dataclasses.dataclass(frozen=True)
class _WeightView:
    """What a graph keeps instead of a view of weights, whose memory is not theirs for long."""

    shard: str
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class _OpenGradient:
    """A shard's gradient while it is being summed on the device."""

    def __init__(self, gradient: ShardGradient, flat: torch.Tensor) -> None:
        self.gradient, self.flat = gradient, flat


class StepExecutor:
    """Runs forward and backward passes of one model over a WeightStream."""

    def __init__(
        self,
        model: nn.Module,
        blocks: ModelBlocks,
        layouts: Mapping[str, ShardLayout],
        *,
        device: Device,
        trace: Trace,
        seed: int,
        loss_chunk_tokens: int | None = None,
    ) -> None:
        self._model = model
        self._blocks = {block.name: block for block in blocks.blocks}
        self._order = [block.name for block in blocks.blocks]
        self._layers: list[nn.Module] = list(model.get_submodule(blocks.path).children())
        self._layer_blocks: list[Block | None] = [
            self._blocks.get(f"{blocks.path}.{index}") for index in range(len(self._layers))
        ]
        self._layouts = dict(layouts)
        self._device, self._trace = device, trace
        self._weights: WeightStream
        self._activations: ActivationStore
        self._activation_plans: dict[str, Activations] = {}
        self._ops: dict[str, tuple[Op, ...]] = {}
        """Operations of each block that was recorded, as its first micro-batch had them."""
        self._observes = False
        self._seed = seed
        self.optimizer: OffloadedAdamW | None = None
        self.anchor = torch.ones((), device=device.torch_device, requires_grad=True)
        self._parameters = dict(model.named_parameters())
        self._slots = {slot.name: (name, slot) for name, layout in self._layouts.items() for slot in layout.parameters}
        self._adapters: dict[str, tuple[ShardLayout, ...]] = {}
        """By block, shards of trained parameters in its modules that are not streamed."""
        self._bound: dict[str, tuple[LoadedShard, int]] = {}
        self._open: dict[str, _OpenGradient] = {}
        self._current: _MicroBatch | None = None
        self._record: ForwardRecord | None = None
        self._hub: greenlet.greenlet | None = None
        self.adopted_forward: Callable[..., Any] | None = None
        """What micro-batches run instead of the class's forward."""
        self._training = False
        self._chunked_head = None if loss_chunk_tokens is None else ChunkedHead(model, loss_chunk_tokens)
        self._patch_layers()
        for module in model.modules():
            module.__dict__.pop(CONSTRUCTED_VALUES, None)
        self._guard_other_modules()
        self._guard_model()
        self._watched: set[str] = set()
        self.watch_gradients(self._parameters)

    def bound_block(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A context in which the parameters of a block, and those that it borrows, hold their weights."""
        return self._bound_block(name)

    def watch_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take the gradients of those that require one now; what is watched already stays so."""
        for name, parameter in parameters.items():
            if parameter.requires_grad and name not in self._watched:
                parameter.register_post_accumulate_grad_hook(functools.partial(self._on_gradient, name))
                self._watched.add(name)

    def train_adapters(
        self, adapters: Mapping[str, Sequence[ShardLayout]], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Hand over the gradients of these shards too: by block, of parameters that are always in memory."""
        self._adapters = {block: tuple(layouts) for block, layouts in adapters.items()}
        for layout in (layout for layouts in adapters.values() for layout in layouts):
            self._layouts[layout.name] = layout
            for slot in layout.parameters:
                self._slots[slot.name] = (layout.name, slot)
        self.watch_gradients(parameters)

    def use(
        self, weights: WeightStream, activations: ActivationStore, activation_plans: Mapping[str, Activations]
    ) -> None:
        """Work over these from now on, with a plan for each block's activations; nothing may be running or held."""
        assert not self._bound
        assert self._record is None
        self._weights, self._activations = weights, activations
        self._activation_plans = {name: plan for name, plan in activation_plans.items() if not all_recomputed(plan)}
        self._ops.clear()

    # --- a training step -------------------------------------------------------------------------------------------

    def forward(self, calls: Sequence[tuple[Mapping[str, Any], float]], *, step: int, first: int) -> ForwardRecord:
        """Run the forward pass of all micro-batches, and the backward pass of what is behind the last layer.

        `calls` are (arguments of model.forward with labels, weight of the loss). `step` and `first` (the number of the
        first micro-batch in the step) choose the random numbers. Call `backward` with the record, or `discard` it.
        """
        record, autocast = self._new_record(calls, first)
        losses = torch.zeros((), dtype=torch.float64, device=self._device.torch_device)
        with self._running(record.micro_batches, record), self._autocast(autocast):
            self._run_layers(record.micro_batches, step, self._backward_visits(epilogue_again=False))
            with self._bound_block("epilogue"), torch.enable_grad():
                self._open_gradients("epilogue")
                for micro_batch in record.micro_batches:
                    with self._loss_in_chunks(micro_batch, autocast[1]):
                        self._finish(micro_batch)
                    loss = _loss_of(micro_batch.output)
                    losses += micro_batch.weight * loss.detach().double()
                    record.output_type = type(micro_batch.output)
                    micro_batch.output = None
                    if not loss.requires_grad:
                        raise ModelError("the loss depends on no trainable parameter: there is nothing to train")
                    with self._span("epilogue backward"), self._autocast((False, autocast[1])):
                        torch.autograd.backward(
                            loss, torch.tensor(micro_batch.weight, dtype=loss.dtype, device=loss.device)
                        )
                    del loss
        record.loss = losses
        return record

    def _loss_in_chunks(
        self, micro_batch: _MicroBatch, autocast_dtype: torch.dtype
    ) -> contextlib.AbstractContextManager[None]:
        if self._chunked_head is None:
            return contextlib.nullcontext()
        return self._chunked_head.running(micro_batch.weight, lambda: self._autocast((False, autocast_dtype)))

    def forward_outputs(
        self, calls: Sequence[Mapping[str, Any]], *, step: int, first: int
    ) -> tuple[ForwardRecord, list[Any]]:
        """Run the forward pass of all micro-batches for a loss that the caller computes.

        Returns the record, and each micro-batch's output of model.forward with an Output in the place of every tensor that
        carries a gradient, in the order of `record.roots`. The graph behind the last layer is kept. Call `backward` with
        the record and a gradient for each root, or `discard` it.
        """
        record, autocast = self._new_record([(arguments, 1.0) for arguments in calls], first)
        outputs: list[Any] = []
        with self._running(record.micro_batches, record), self._autocast(autocast):
            self._run_layers(record.micro_batches, step, self._backward_visits(epilogue_again=True))
            with self._bound_block("epilogue"), torch.enable_grad():
                for micro_batch in record.micro_batches:
                    self._finish(micro_batch)
                    leaves, spec = tree_flatten(micro_batch.output)
                    micro_batch.output = None
                    for position, leaf in enumerate(leaves):
                        if _is_float(leaf) and leaf.requires_grad:
                            record.roots.append(_Root(micro_batch, get_gradient_edge(leaf), _origin(leaf)))
                            leaves[position] = Output(leaf.detach())
                    outputs.append(tree_unflatten(leaves, spec))
        return record, outputs

    def _new_record(
        self, calls: Sequence[tuple[Mapping[str, Any], float]], first: int
    ) -> tuple[ForwardRecord, tuple[bool, torch.dtype]]:
        micro_batches = [_MicroBatch(first + i, arguments, weight) for i, (arguments, weight) in enumerate(calls)]
        autocast = self._get_autocast()
        return ForwardRecord(micro_batches, torch.zeros(()), type(None), autocast), autocast

    def _run_layers(self, micro_batches: list[_MicroBatch], step: int, then: Sequence[str] = ()) -> None:
        """Up to the epilogue; `then` are the shards that will be visited when the forward pass is over."""
        self._weights.announce([*self._visits(self._order), *then])
        for micro_batch in micro_batches:
            self._seed_micro_batch(micro_batch, step)
        self._run_up_to_epilogue(micro_batches)

    def backward(
        self, record: ForwardRecord, scale: float, gradients: Sequence[torch.Tensor | None] | None = None
    ) -> None:
        """Run the rest of the backward pass: gradients of `scale` times the record's loss go to the optimizer.

        With `gradients`, one for each of the record's roots, those of what the roots were used for.
        """
        self.check(record)
        assert self.optimizer is not None
        self._record = None
        self._training = True
        try:
            with contextlib.ExitStack() as prologue_held, self._device.current():
                self._run_backward(record, scale, gradients, prologue_held)
        except BaseException:
            self._weights.announce(())
            self._drop(record)
            raise
        finally:
            self._training = False

    def _run_backward(
        self,
        record: ForwardRecord,
        scale: float,
        gradients: Sequence[torch.Tensor | None] | None,
        prologue_held: contextlib.ExitStack,
    ) -> None:
        assert self.optimizer is not None
        self.optimizer.begin_backward()
        if scale != 1.0:
            self._scale(record, scale)
        layers = [i for i in reversed(range(len(self._layers))) if self._has_backward(i, record)]
        prologue = self._has_trained("prologue")
        self._weights.announce(self._backward_visits(epilogue_again=gradients is not None, layers=layers))
        self._activations.announce(
            saved
            for index in layers
            for micro_batch in record.micro_batches
            if (call := micro_batch.calls.get(index)) is not None
            for saved in call.saved()
        )
        if gradients is None:
            self._complete("epilogue")
        else:
            self._epilogue_backward(record, gradients)
        if record.needs_prologue:
            prologue_held.enter_context(self._bound_block("prologue"))
            self._open_gradients("prologue")
        for index in layers:
            self._layer_backward(index, record)
        if prologue or any(micro_batch.into_prologue for micro_batch in record.micro_batches):
            prologue_held.enter_context(self._bound_block("prologue"))
            self._open_gradients("prologue")
            with self._span("prologue backward"):
                for micro_batch in record.micro_batches:
                    edges = [edge for edge, _ in micro_batch.into_prologue]
                    gradients = [gradient for _, gradient in micro_batch.into_prologue]
                    micro_batch.into_prologue.clear()
                    if edges:
                        # All at once: each inner node then gets its whole gradient, summed as plain autograd does.
                        torch.autograd.backward(edges, gradients)
            self._complete("prologue")
        self._activations.finish()

    def _backward_visits(self, *, epilogue_again: bool, layers: Sequence[int] | None = None) -> list[str]:
        """The shards that a backward pass asks for, in order, as far as that is known.

        `epilogue_again`: it runs the epilogue's backward pass. `layers` are those that it reaches, last first; None: not
        known yet, those above the first that is trained.
        """
        assert self.optimizer is not None
        prologue = ["prologue"] if self._has_trained("prologue") else []
        if layers is None:
            trained = [i for i, block in enumerate(self._layer_blocks) if block and self._has_trained(block.name)]
            first = 0 if prologue else min(trained, default=len(self._layers))
            layers = range(len(self._layers) - 1, first - 1, -1)
        names = [block.name for i in layers if (block := self._layer_blocks[i]) is not None]
        # Early updates take the weights that backward has read; the epilogue's were let go.
        epilogue = ["epilogue"] if self.optimizer.updates_early("epilogue") else []
        if epilogue_again:
            epilogue = self._visits(["epilogue"])
        return [*epilogue, *self._visits([*names, *prologue])]

    def _has_trained(self, block: str) -> bool:
        """Whether something in the block is trained: weights that are streamed, or adapters."""
        assert self.optimizer is not None
        return self.optimizer.trains(block) or block in self._adapters

    def check(self, record: ForwardRecord) -> None:
        """ModelError if the record's backward pass ran already, or its activations are gone."""
        if record is not self._record:
            raise ModelError(
                "this loss was used already, or belongs to an earlier forward pass, whose activations are gone: call "
                "loss.backward() once, before the next forward pass and before optimizer.step()"
            )

    def discard(self) -> None:
        """Forget a forward pass whose backward pass never came."""
        if self._record is not None:
            record, self._record = self._record, None
            self._drop(record)
            self._weights.announce(())  # read ahead for its backward pass

    def infer(
        self,
        calls: Sequence[Mapping[str, Any]],
        take: Callable[[int, Any], Any] = lambda _number, output: output,
        *,
        again: bool = False,
    ) -> list[Any]:
        """Run model.forward without gradients for each of the calls' arguments, all of them block by block together.

        Returns what `take` makes of each call's number and output; whatever it lets go of is freed before the next call's
        epilogue. Each call draws from the caller's generators as they are now. A training forward pass that waits for its
        backward pass goes on waiting. `again`: see `WeightStream.announce`.
        """
        micro_batches = [_MicroBatch(number, arguments, 1.0) for number, arguments in enumerate(calls)]
        taken: list[Any] = []
        for micro_batch in micro_batches:
            micro_batch.rng = self._get_rng()
        with self._running(micro_batches, None), torch.no_grad():
            for micro_batch in micro_batches:
                micro_batch.grad_enabled = False
            self._weights.announce(self._visits(self._order), again=again)
            self._run_up_to_epilogue(micro_batches)
            with self._bound_block("epilogue"):
                for micro_batch in micro_batches:
                    self._finish(micro_batch)
                    taken.append(take(micro_batch.index, micro_batch.output))
                    micro_batch.output = None
        self._set_rng(micro_batches[-1].rng)
        return taken

    def list_ops(self, arguments: Mapping[str, Any]) -> dict[str, tuple[Op, ...]]:
        """Run one micro-batch up to the epilogue and list what each layer that a backward pass would reach computes.

        Forgets a forward pass that waits for its backward pass.
        """
        self.discard()
        record, autocast = self._new_record([(arguments, 1.0)], 0)
        known, self._ops, self._observes = self._ops, {}, True
        try:
            with self._running(record.micro_batches, record), self._autocast(autocast):
                self._run_layers(record.micro_batches, step=0)
            return self._ops
        finally:
            self._ops, self._observes = known, False
            self.discard()

    # --- the schedule ----------------------------------------------------------------------------------------------

    def _visits(self, block_names: Sequence[str]) -> list[str]:
        """Shards in the order in which the blocks will ask for them."""
        visits: list[str] = []
        for name in block_names:
            block = self._blocks[name]
            visits += [shard for shard in (*block.borrows, name) if shard in self._layouts]
        return visits

    def _run_up_to_epilogue(self, micro_batches: list[_MicroBatch]) -> None:
        with self._bound_block("prologue"):
            for micro_batch in micro_batches:
                self._start(micro_batch)
        for index in range(len(self._layers)):
            block = self._layer_blocks[index]
            with self._bound_block(block.name) if block is not None else contextlib.nullcontext():
                for micro_batch in micro_batches:
                    # A model may skip a layer for a micro-batch (layer drop): then it waits at a later one.
                    if micro_batch.next_stop == index:
                        self._resume(micro_batch, f"layer {index} forward")

    def _has_backward(self, index: int, record: ForwardRecord) -> bool:
        """Whether a layer is trained, or a gradient passes through it to a trained one below."""
        assert self.optimizer is not None
        block = self._layer_blocks[index]
        trained = block is not None and (self.optimizer.trains(block.name) or block.name in self._adapters)
        return trained or any(index in micro_batch.calls for micro_batch in record.micro_batches)

    def _layer_backward(self, index: int, record: ForwardRecord) -> None:
        block = self._layer_blocks[index]
        with self._bound_block(block.name) if block is not None else contextlib.nullcontext():
            if block is not None:
                self._open_gradients(block.name)
            for micro_batch in record.micro_batches:
                call = micro_batch.calls.get(index)
                if call is not None:
                    with self._span(f"layer {index} backward"):
                        self._call_backward(index, micro_batch, call)
                    del micro_batch.calls[index]
            if block is not None:
                self._complete(block.name)

    def _epilogue_backward(self, record: ForwardRecord, gradients: Sequence[torch.Tensor | None]) -> None:
        """Run the backward pass of what is behind the last layer, given the gradients of the outputs."""
        with self._bound_block("epilogue"), self._span("epilogue backward"):
            self._open_gradients("epilogue")
            for micro_batch in record.micro_batches:
                roots: list[tuple[GradientEdge, torch.Tensor]] = []
                for root, gradient in zip(record.roots, gradients, strict=True):
                    if gradient is not None and root.micro_batch is micro_batch:
                        # What only the prologue made waits for the prologue's turn.
                        (micro_batch.into_prologue if root.origin == "prologue" else roots).append(
                            (root.edge, gradient)
                        )
                if roots:
                    torch.autograd.backward(
                        [edge for edge, _ in roots],
                        [gradient for _, gradient in roots],
                        # Layers may have used what was computed between them, too.
                        retain_graph=record.needs_prologue,
                    )
            record.roots.clear()
            self._complete("epilogue")

    def _call_backward(self, index: int, micro_batch: _MicroBatch, call: _LayerCall) -> None:
        """Compute the layer again with a graph, run its backward pass, pass the inputs' gradients on."""
        if all(gradient is None for gradient in call.outputs.gradients):  # nothing above depends on it
            for saved in call.saved():
                self._activations.free(saved)
            return
        leaves: list[tuple[_SavedInput, torch.Tensor]] = []
        earlier: list[tuple[torch.Tensor, torch.Tensor]] = []
        for saved_input in call.inputs:
            with self._waiting(f"the input of layer {index}"):
                leaf = self._activations.load(saved_input.saved).requires_grad_()
            leaves.append((saved_input, leaf))
            arrived = _take_arrived(saved_input, micro_batch)
            if arrived is not None:
                # Other users' gradients come before this layer's, one after the other, as plain autograd sums them.
                with torch.enable_grad():
                    used = leaf.view_as(leaf)
                earlier.append((used, arrived))
            else:
                used = leaf
            call.leaves[saved_input.position] = used
        outer_rng = self._get_rng()
        collector, token = _activate_collector(call.collected)
        try:
            self._set_rng(call.rng)
            args, kwargs = tree_unflatten(call.leaves, call.spec)
            with torch.enable_grad(), self._autocast(call.autocast):
                if call.recording is None:
                    result = self._plain_forwards[index](*args, **kwargs)
                else:
                    with ReplayMode(
                        call.recording, self._activations, layer=f"layer {index}", set_rng=self._set_rng
                    ) as replay:
                        result = self._plain_forwards[index](*args, **kwargs)
                    replay.finish()
            outputs = _float_tensors(result) + _collected(collector, call.collected)
            if len(outputs) != len(call.outputs.gradients) and call.outputs.gradients:
                raise ModelError(
                    f"layer {index} gave {len(outputs)} outputs when computed again and {len(call.outputs.gradients)} at "
                    "first: it is not a function of its inputs, and cannot be recomputed"
                )
            pairs = [
                (output, gradient)
                for output, gradient in zip(outputs, call.outputs.gradients, strict=False)
                if gradient is not None and output.requires_grad
            ]
            pairs += earlier
            if pairs:
                torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
            del result, outputs, pairs, earlier, args, kwargs
        finally:
            _deactivate_collector(token)
            self._set_rng(outer_rng)
        call.leaves.clear()
        call.outputs.gradients.clear()
        if call.recording is not None:
            call.recording.free()
        for saved_input, leaf in leaves:
            gradient, leaf.grad = leaf.grad, None
            self._activations.free(saved_input.saved)
            if gradient is None:
                continue
            if saved_input.origin == "layer":
                torch.autograd.backward([saved_input.edge], [gradient])
            elif saved_input.origin == "prologue":
                micro_batch.into_prologue.append((saved_input.edge, gradient))
            else:
                # The layer below needs its part now; code between layers may have used what others use too.
                torch.autograd.backward([saved_input.edge], [gradient], retain_graph=True)

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

    @property
    def is_inside(self) -> bool:
        """Whether the caller runs as a part of a micro-batch's forward."""
        return self._current is not None and self._current.greenlet is greenlet.getcurrent()

    def _enter_layer(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        micro_batch = self._current
        if micro_batch is None or micro_batch.greenlet is not greenlet.getcurrent():
            raise ModelError(
                "a decoder layer was called outside of the model's own forward: its weights are on the drive. Call the "
                "whole model (model(...)), not a part of it"
            )
        self._stop(micro_batch, index)
        if self._training:
            result = self._run_layer(micro_batch, index, args, kwargs)
        else:
            result = self._plain_forwards[index](*args, **kwargs)
        if index == len(self._layers) - 1:
            self._stop(micro_batch, len(self._layers))
        return result

    def _stop(self, micro_batch: _MicroBatch, where: int) -> None:
        """Back to the schedule, until it has bound what comes next."""
        if where <= micro_batch.next_stop:
            raise ModelError(
                f"layer {where} was called after layer {micro_batch.next_stop}: only models that run their layers once, in "
                "order, can be streamed"
            )
        micro_batch.next_stop = where
        assert self._hub is not None
        self._hub.switch()

    def _run_layer(self, micro_batch: _MicroBatch, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        block = self._layer_blocks[index]
        leaves, spec = tree_flatten((args, kwargs))
        inputs: list[_SavedInput] = []
        kept = list(leaves)
        call = _LayerCall(kept, spec, inputs, CutGradients(), self._get_rng(), self._get_autocast(), {})
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
                origin = _origin(leaf)
                key = f"{index}/{micro_batch.index}/{position}"
                inputs.append(_SavedInput(position, self._activations.save(key, leaf), edge, origin))
                kept[position] = None
                if origin == "between" and self._record is not None:
                    self._record.needs_prologue = True
        trainable = block is not None and (
            block.name in self._adapters or any(self._parameters[name].requires_grad for name in block.parameters)
        )
        recorder = self._recorder(micro_batch, index, call) if inputs or trainable else None
        collector = _active_collector()
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
            given = [v for v in with_graph if isinstance(v, torch.Tensor)] + _collected(collector, call.collected)
            self._finish_recording(recorder, index, inputs, given)
        del result, with_graph
        if not inputs and not trainable:  # nothing below needs a gradient
            _replace_collected(collector, call.collected, [v.detach() for v in _collected(collector, call.collected)])
            del micro_batch.calls[index]
            return tree_unflatten(flat, result_spec)
        floats = [i for i, value in enumerate(flat) if _is_float(value)]
        collected = _collected(collector, call.collected)
        values = [*(flat[i] for i in floats), *(v.detach() for v in collected)]
        cuts = list(_Cut.apply(self.anchor, call.outputs, *values))  # type: ignore[no-untyped-call]
        for i in floats:
            flat[i] = cuts.pop(0)
        _replace_collected(collector, call.collected, cuts)
        return tree_unflatten(flat, result_spec)

    def _recorder(self, micro_batch: _MicroBatch, index: int, call: _LayerCall) -> RecordMode | None:
        """What watches a layer's first run where the plan lets some of it wait, or someone asks what it does."""
        block = self._layer_blocks[index]
        plan = self._activation_plans.get(block.name) if block is not None else None
        if block is None or (plan is None and not self._observes):
            return None
        call.recording = Recording(self._activations)
        return RecordMode(
            call.recording,
            self._activations,
            key=f"{index}/{micro_batch.index}/op",
            activations="recompute" if plan is None or self._observes else plan,
            known=self._ops.get(block.name),
            get_rng=self._get_rng,
        )

    def _finish_recording(
        self, recorder: RecordMode, index: int, inputs: Sequence[_SavedInput], given: Sequence[torch.Tensor]
    ) -> None:
        block = self._layer_blocks[index]
        assert block is not None
        below = {saved_input.edge.node for saved_input in inputs}
        recorder.finish(given, lambda node: node not in below)
        if block.name not in self._ops:
            ops = recorder.ops()
            check_activations(block.name, self._activation_plans.get(block.name, "recompute"), ops)
            self._ops[block.name] = ops

    def _start(self, micro_batch: _MicroBatch) -> None:
        def run() -> None:
            micro_batch.output = self._plain_forward(**micro_batch.arguments)

        micro_batch.greenlet = greenlet.greenlet(run)
        # transformers keeps the collector of router logits and the like in a context variable.
        micro_batch.greenlet.gr_context = contextvars.copy_context()
        self._resume(micro_batch, "prologue forward")

    def _finish(self, micro_batch: _MicroBatch) -> None:
        self._resume(micro_batch, "epilogue forward")
        if micro_batch.greenlet is not None and not micro_batch.greenlet.dead:
            raise ModelError("the model ran more decoder layers after its last one: it cannot be streamed")
        micro_batch.greenlet = None

    def _resume(self, micro_batch: _MicroBatch, what: str) -> None:
        """Let a micro-batch run to its next stop, with the thread's torch state as it left it."""
        assert micro_batch.greenlet is not None
        outer_rng, outer_grad, outer_autocast = self._get_rng(), torch.is_grad_enabled(), self._get_autocast()
        self._set_rng(micro_batch.rng)
        torch.set_grad_enabled(micro_batch.grad_enabled)
        if micro_batch.next_stop >= 0:
            self._set_autocast(micro_batch.autocast)
        self._current = micro_batch
        try:
            with self._span(what), self._weights_not_kept():
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
            micro_batch.rng, micro_batch.grad_enabled = self._get_rng(), torch.is_grad_enabled()
            micro_batch.autocast = self._get_autocast()
            self._set_autocast(outer_autocast)
            torch.set_grad_enabled(outer_grad)
            self._set_rng(outer_rng)

    def _weights_not_kept(self) -> contextlib.AbstractContextManager[Any]:
        """Graphs made inside hold no memory of weights, which are bound anew, elsewhere, for the backward pass.

        Autograd would keep views of them (a linear layer's transposed weight), and use what has come into that memory since.
        """
        if not self._training:
            return contextlib.nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _WeightView:
        address = tensor.untyped_storage().data_ptr()
        for name, (shard, _count) in self._bound.items():
            weights = shard.device_weights
            if (
                weights is not None
                and weights.untyped_storage().data_ptr() == address
                and weights.dtype == tensor.dtype
            ):
                return _WeightView(name, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        return tensor

    def _unpack(self, packed: torch.Tensor | _WeightView) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        if packed.shard not in self._bound:
            raise ModelError(
                f"weights of {packed.shard} are needed in the backward pass while they are on the drive: this model uses them "
                "outside of the block that owns them, which cannot be streamed"
            )
        weights = self._bound[packed.shard][0].device_weights
        assert weights is not None
        return weights.as_strided(packed.shape, packed.stride, packed.offset)

    @contextlib.contextmanager
    def _running(self, micro_batches: Sequence[_MicroBatch], record: ForwardRecord | None) -> Iterator[None]:
        """Greenlets may run inside; `record` is the training step's. Whatever happens, all of them end."""
        if self._hub is not None:
            raise ModelError("the model is running already: a forward pass cannot be started inside another")
        self._plain_forward = self.adopted_forward or type(self._model).forward.__get__(self._model)
        try:
            self._hub, self._training = greenlet.getcurrent(), record is not None
            if record is not None:
                self._record = record
            with self._device.current():
                yield
        except BaseException:
            self._end(micro_batches)
            self._weights.announce(())  # what was read ahead would be older than a step that comes before its next use
            if record is not None:
                self._record = None
                self._drop(record)
            raise
        finally:
            self._end(micro_batches)
            self._hub, self._current, self._training = None, None, False

    def _end(self, micro_batches: Sequence[_MicroBatch]) -> None:
        """End greenlets that wait; what they have in `with` blocks is left, and must not change the caller's modes."""
        grad_enabled, autocast = torch.is_grad_enabled(), self._get_autocast()
        for micro_batch in micro_batches:
            if micro_batch.greenlet is not None and not micro_batch.greenlet.dead:
                micro_batch.greenlet.throw(greenlet.GreenletExit)
            micro_batch.greenlet = None
        torch.set_grad_enabled(grad_enabled)
        self._set_autocast(autocast)

    # --- weights and gradients -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _bound_block(self, name: str) -> Iterator[None]:
        """The block's parameters, and those that it borrows, hold their weights inside this context."""
        block = self._blocks[name]
        shards = [shard for shard in (*block.borrows, name) if shard in self._layouts]
        bound: list[str] = []
        try:
            for shard in shards:
                self._bind(shard)
                bound.append(shard)
            yield
        finally:
            for shard in bound:
                self._unbind(shard)

    def let_weights_go(self) -> None:
        """After a Ctrl-C, which may have come between taking weights and noting it; nothing may be running."""
        while self._bound:
            shard, _count = self._bound.popitem()[1]
            self._placeholders(shard.layout)
        self._weights.reset()

    def _bind(self, name: str) -> None:
        if name in self._bound:
            shard, count = self._bound[name]
            self._bound[name] = (shard, count + 1)
            return
        with self._waiting(f"weights of {name}"):
            shard = self._weights.acquire(name)
        assert shard.device_weights is not None
        for slot in shard.layout.parameters:
            self._parameters[slot.name].data = shard.device_weights[slot.start : slot.stop].view(slot.shape)
        self._bound[name] = (shard, 1)

    def _unbind(self, name: str) -> None:
        if name not in self._bound:  # handed over to the optimizer
            return
        shard, count = self._bound[name]
        if count > 1:
            self._bound[name] = (shard, count - 1)
            return
        self._placeholders(shard.layout)
        del self._bound[name]
        self._weights.release(shard)

    def _placeholders(self, layout: ShardLayout) -> None:
        for slot in layout.parameters:
            parameter = self._parameters[slot.name]
            parameter.data = placeholder(slot.shape, parameter.dtype, parameter.device)

    def _open_gradients(self, block_name: str) -> None:
        """Make room to sum the gradients of a block's trainable parameters, borrowed ones included."""
        assert self.optimizer is not None
        block = self._blocks[block_name]
        for shard in (block_name, *block.borrows, *(layout.name for layout in self._adapters.get(block_name, ()))):
            if shard not in self._layouts or shard in self._open or not self.optimizer.trains(shard):
                continue
            with self._waiting(f"memory for the gradient of {shard}"):
                gradient = self.optimizer.acquire_gradient(shard)
            host = torch.from_numpy(gradient.array)
            self._open[shard] = _OpenGradient(gradient, self._device.gradient_sum(host))

    def _on_gradient(self, name: str, parameter: torch.Tensor) -> None:
        """A parameter's gradient is whole for one micro-batch: add it to the float32 sum and free it."""
        shard, slot = self._slots[name]
        open_ = self._open.get(shard)
        assert isinstance(parameter, StreamedParameter)
        gradient = parameter.take_gradient()
        assert gradient is not None
        if open_ is None or (shard not in self._bound and name in self._parameters):
            raise ModelError(
                f"{name} got a gradient while its weights were on the drive: this model uses it outside of the block that "
                "owns it, which cannot be streamed"
            )
        total = open_.flat[slot.start : slot.stop].view(slot.shape)
        if name in open_.gradient.arrived:
            total.add_(gradient)
        else:
            total.copy_(gradient)
            open_.gradient.arrived.add(name)

    def _complete(self, name: str) -> None:
        """All micro-batches are through: the shard's gradient and its weights go to the optimizer."""
        assert self.optimizer is not None
        for layout in self._adapters.get(name, ()):
            self._complete(layout.name)
        if name not in self._open:
            return
        early = self.optimizer.updates_early(name)
        if early and name not in self._bound:
            self._bind(name)  # before anything is taken from `_open`: if it fails, `_drop` gives the gradient back
        open_ = self._open.pop(name)
        wait = self._device.download(open_.flat, torch.from_numpy(open_.gradient.array))
        if not early:
            self.optimizer.gradient_complete(open_.gradient, wait=wait)
            return
        shard, _count = self._bound.pop(name)
        self._placeholders(shard.layout)
        self._weights.hand_over(shard)

        def arrived() -> None:
            # The update writes into the memory that the weights were uploaded from.
            shard.uploaded()
            wait()

        self.optimizer.gradient_complete(
            open_.gradient, shard.array, wait=arrived, on_done=lambda: self._weights.end_use(shard)
        )

    def _scale(self, record: ForwardRecord, scale: float) -> None:
        """Apply the factor that backward() was called with to what the forward pass has computed already."""
        for name, open_ in self._open.items():
            for slot in self._layouts[name].parameters:
                if slot.name in open_.gradient.arrived:
                    open_.flat[slot.start : slot.stop] *= scale
        for micro_batch in record.micro_batches:
            for call in micro_batch.calls.values():
                call.outputs.gradients = [g if g is None else g * scale for g in call.outputs.gradients]

    def _drop(self, record: ForwardRecord) -> None:
        """Give back everything that a forward or backward pass holds."""
        self._activations.finish()
        for micro_batch in record.micro_batches:
            for call in micro_batch.calls.values():
                for saved in call.saved():
                    self._activations.free(saved)
            micro_batch.calls.clear()
            micro_batch.into_prologue.clear()
        record.roots.clear()
        for open_ in self._open.values():
            open_.gradient.buffer.release()
        self._open.clear()
        for name in list(self._bound):
            shard, _count = self._bound.pop(name)
            self._placeholders(shard.layout)
            self._weights.release(shard)

    def _guard_other_modules(self) -> None:
        """Make the use of a module outside the layers whose weights are not there an error, never a wrong result."""
        inside = {module for layer in self._layers for module in layer.modules()}
        names = {id(p): name for name, p in self._parameters.items()}

        def check(module: nn.Module, _args: Any, *, shards: frozenset[str]) -> None:
            missing = shards - self._bound.keys()
            micro_batch = self._current
            if missing and micro_batch is not None and micro_batch.greenlet is greenlet.getcurrent():
                # The last layers were skipped for this micro-batch: here is where the epilogue begins.
                if missing == {"epilogue"} and micro_batch.next_stop < len(self._layers):
                    self._stop(micro_batch, len(self._layers))
                missing = shards - self._bound.keys()
            if missing:
                raise ModelError(
                    f"{type(module).__name__} was called while its weights (block {', '.join(sorted(missing))}) were on the "
                    "drive: call the whole model (model(...)); if that was done, this model's order of computation cannot "
                    "be streamed"
                )

        for module in self._model.modules():
            own = [p for p in module._parameters.values() if p is not None]
            if own and module not in inside:
                shards = frozenset(self._slots[names[id(p)]][0] for p in own)
                module.register_forward_pre_hook(functools.partial(check, shards=shards))

    def _guard_model(self) -> None:
        """Methods that would work on placeholders as if they were weights, or wrap the layers, say what to do instead."""

        def zero_grad(set_to_none: bool = True) -> None:
            if self.optimizer is not None:
                self.optimizer.zero_grad(set_to_none)

        def refuse(message: str) -> Callable[..., Any]:
            def refused(*_args: Any, **_kwargs: Any) -> Any:
                raise ModelError(message)

            return refused

        def apply(function: Callable[[torch.Tensor], torch.Tensor], *_args: Any, **_kwargs: Any) -> nn.Module:
            like = next(iter(self._parameters.values()))
            probe = torch.zeros(1, dtype=like.dtype, device=like.device)
            # What wraps the model may be "moved" to where it is.
            if function(probe) is not probe:
                raise ModelError(
                    "the dtype and device of a streamed model cannot be changed: choose device and compute_dtype in OffloadConfig"
                )
            return self._model

        replacements = {
            "zero_grad": zero_grad,
            "_apply": apply,
            "gradient_checkpointing_enable": refuse(
                "gradient checkpointing: a streamed model computes its layers again in the backward pass already; leave it off"
            ),
        }
        for name, function in replacements.items():
            object.__setattr__(self._model, name, function)

    # --- torch's state ---------------------------------------------------------------------------------------------

    def _seed_micro_batch(self, micro_batch: _MicroBatch, step: int) -> None:
        outer = self._get_rng()
        torch.manual_seed(micro_batch_seed(self._seed, step, micro_batch.index))
        micro_batch.rng = self._get_rng()
        self._set_rng(outer)

    def _get_rng(self) -> tuple[torch.Tensor, ...]:
        if self._device.torch_device.type == "cuda":
            return torch.get_rng_state(), torch.cuda.get_rng_state(self._device.torch_device)
        return (torch.get_rng_state(),)

    def _set_rng(self, state: tuple[torch.Tensor, ...]) -> None:
        torch.set_rng_state(state[0])
        if len(state) > 1:
            torch.cuda.set_rng_state(state[1], self._device.torch_device)

    def _get_autocast(self) -> tuple[bool, torch.dtype]:
        device_type = self._device.torch_device.type
        return torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)

    def _set_autocast(self, autocast: tuple[bool, torch.dtype]) -> None:
        device_type = self._device.torch_device.type
        torch.set_autocast_enabled(device_type, autocast[0])
        torch.set_autocast_dtype(device_type, autocast[1])

    def _autocast(self, autocast: tuple[bool, torch.dtype]) -> torch.autocast:
        # Without the cache: it would return casts of weights that have been replaced since.
        enabled, dtype = autocast
        return torch.autocast(self._device.torch_device.type, dtype=dtype, enabled=enabled, cache_enabled=False)

    @contextlib.contextmanager
    def _span(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        with self._device.timing(name) as measured:
            yield
        if not measured:
            self._trace.record("gpu", name, started, time.perf_counter())

    @contextlib.contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        """Whatever compute loses inside, it loses to waiting for `what`."""
        started = time.perf_counter()
        yield
        ended = time.perf_counter()
        if ended - started >= LEAST_WAIT_SECONDS:
            self._trace.record(WAIT_LANE, what, started, ended)


def _drop(_saved: torch.Tensor) -> None:
    return None


def _dropped(_nothing: None) -> torch.Tensor:
    raise AssertionError("the graph of a layer's first forward pass is never used")


def _origin(tensor: torch.Tensor) -> str:
    """Where a layer's input comes from; see `_SavedInput.origin`."""
    cut = _Cut._backward_cls
    if isinstance(tensor.grad_fn, cut):
        return "layer"
    seen: set[Any] = set()
    waiting = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, cut):
            return "between"
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return "prologue"


def _take_arrived(saved_input: _SavedInput, micro_batch: _MicroBatch) -> torch.Tensor | None:
    """The gradient that a layer's input has got from elsewhere so far, which is forgotten there."""
    edge = saved_input.edge
    if saved_input.origin == "layer":
        caught: CutGradients = edge.node.caught  # type: ignore[attr-defined]
        return caught.take(edge.output_nr)
    for position, (other, gradient) in enumerate(micro_batch.into_prologue):
        if saved_input.origin == "prologue" and other.node is edge.node and other.output_nr == edge.output_nr:
            del micro_batch.into_prologue[position]
            return gradient
    return None


def _is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _float_tensors(tree: Any) -> list[torch.Tensor]:
    return [value for value in tree_flatten(tree)[0] if _is_float(value)]


def _loss_of(output: Any) -> torch.Tensor:
    loss = output["loss"] if isinstance(output, dict) else getattr(output, "loss", None)
    if loss is None and isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
        loss = output[0]
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ModelError("the model returned no loss although labels were given")
    return loss


# transformers collects router logits and the like through hooks into a dict of lists held by a private context
# variable; without it (older versions) models return them in their outputs.


def _collector_variable() -> Any:
    try:
        from transformers.utils.output_capturing import _active_collector as variable
    except ImportError:
        return None
    return variable


def _active_collector() -> dict[str, list[Any]] | None:
    variable = _collector_variable()
    found = variable.get() if variable is not None else None
    return {k: v for k, v in found.items() if isinstance(v, list)} if found is not None else None


def _activate_collector(collected: Mapping[str, int]) -> tuple[dict[str, list[Any]] | None, Any]:
    """A collector of our own for a layer's recomputation, and what `_deactivate_collector` takes."""
    variable = _collector_variable()
    if variable is None:
        return None, None
    collector: dict[str, list[Any]] = {key: [] for key in collected}
    return collector, variable.set(collector if collected else None)


def _deactivate_collector(token: Any) -> None:
    variable = _collector_variable()
    if variable is not None and token is not None:
        variable.reset(token)


def _collected(collector: dict[str, list[Any]] | None, counts: Mapping[str, int]) -> list[torch.Tensor]:
    """The float tensors among the last `counts[key]` entries of each key."""
    if not collector:
        return []
    return [v for key, n in counts.items() for v in collector[key][len(collector[key]) - n :] if _is_float(v)]


def _replace_collected(
    collector: dict[str, list[Any]] | None, counts: Mapping[str, int], values: list[torch.Tensor]
) -> None:
    for key, n in counts.items() if collector else ():
        entries = collector[key]  # type: ignore[index]
        for i in range(len(entries) - n, len(entries)):
            if _is_float(entries[i]):
                entries[i] = values.pop(0)
