"""The backward sweep: layers are computed again with a graph, last first, and gradients passed from cut to cut.

On CUDA it runs on autograd's own thread, where the greenlets of another thread cannot be entered: none is alive any more,
and random numbers and autocast are set here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_unflatten

from fuyou.blocks import Block
from fuyou.errors import ModelError
from fuyou.executor.activations import ActivationStore
from fuyou.executor.bound import BoundWeights
from fuyou.executor.collector import activate_collector, collected_tensors, deactivate_collector
from fuyou.executor.forward import ForwardSweep
from fuyou.executor.gradients import GradientSums
from fuyou.executor.record import (
    ForwardRecord,
    LayerCall,
    MicroBatch,
    SavedInput,
    float_tensors,
    take_arrived,
)
from fuyou.executor.replay import ReplayMode
from fuyou.executor.stopwatch import Stopwatch
from fuyou.executor.torch_state import TorchState


class BackwardSweep:
    """Leads the gradients of a forward record down to the prologue, and every block's to the optimizer."""

    def __init__(
        self,
        forward: ForwardSweep,
        layer_blocks: Sequence[Block | None],
        *,
        bound: BoundWeights,
        gradients: GradientSums,
        stopwatch: Stopwatch,
        state: TorchState,
    ) -> None:
        self._forward, self._layer_blocks = forward, layer_blocks
        self._bound, self._gradients = bound, gradients
        self._stopwatch, self._state = stopwatch, state
        self.activations: ActivationStore
        """Where what waits for this pass lies."""

    def visits(self, *, epilogue_again: bool, layers: Sequence[int] | None = None) -> list[str]:
        """The shards that a backward pass asks for, in order, as far as that is known.

        `epilogue_again`: it runs the epilogue's backward pass. `layers` are those that it reaches, last first; None: not
        known yet, those above the first that is trained.
        """
        optimizer = self._gradients.optimizer
        assert optimizer is not None
        prologue = ["prologue"] if self._gradients.has_trained("prologue") else []
        if layers is None:
            trained = [
                i for i, block in enumerate(self._layer_blocks) if block and self._gradients.has_trained(block.name)
            ]
            first = 0 if prologue else min(trained, default=len(self._layer_blocks))
            layers = range(len(self._layer_blocks) - 1, first - 1, -1)
        names = [block.name for i in layers if (block := self._layer_blocks[i]) is not None]
        # Early updates take the weights that backward has read; the epilogue's were let go.
        epilogue = ["epilogue"] if optimizer.updates_early("epilogue") else []
        if epilogue_again:
            epilogue = self._bound.shards_of("epilogue")
        return [*epilogue, *(shard for name in (*names, *prologue) for shard in self._bound.shards_of(name))]

    def run(
        self,
        record: ForwardRecord,
        scale: float,
        gradients: Sequence[torch.Tensor | None] | None,
        prologue_held: contextlib.ExitStack,
    ) -> None:
        """Down to the lowest block in which something is trained; see `StepExecutor.backward`.

        `prologue_held` keeps the prologue's weights where layers use what it computed.
        """
        optimizer = self._gradients.optimizer
        assert optimizer is not None
        optimizer.begin_backward()
        if scale != 1.0:
            self._scale(record, scale)
        layers = [i for i in reversed(range(len(self._layer_blocks))) if self._has_backward(i, record)]
        prologue = self._gradients.has_trained("prologue")
        self._bound.stream.announce(self.visits(epilogue_again=gradients is not None, layers=layers))
        self.activations.announce(
            saved
            for index in layers
            for micro_batch in record.micro_batches
            if (call := micro_batch.calls.get(index)) is not None
            for saved in call.saved()
        )
        if gradients is None:
            self._gradients.complete("epilogue")
        else:
            self._epilogue_backward(record, gradients)
        if record.needs_prologue:
            prologue_held.enter_context(self._bound.block("prologue"))
            self._gradients.open("prologue", once=record.is_one)
        for index in layers:
            self._layer_backward(index, record)
        if prologue or any(micro_batch.into_prologue for micro_batch in record.micro_batches):
            prologue_held.enter_context(self._bound.block("prologue"))
            self._gradients.open("prologue", once=record.is_one)
            with self._stopwatch.computing("prologue backward"):
                for micro_batch in record.micro_batches:
                    edges = [edge for edge, _ in micro_batch.into_prologue]
                    gradients = [gradient for _, gradient in micro_batch.into_prologue]
                    micro_batch.into_prologue.clear()
                    if edges:
                        # All at once: each inner node then gets its whole gradient, summed as plain autograd does.
                        torch.autograd.backward(edges, gradients)
            self._gradients.complete("prologue")
        self.activations.finish()

    def _scale(self, record: ForwardRecord, scale: float) -> None:
        """Apply the factor that backward() was called with to what the forward pass has computed already."""
        self._gradients.scale(scale)
        for micro_batch in record.micro_batches:
            for call in micro_batch.calls.values():
                call.outputs.gradients = [g if g is None else g * scale for g in call.outputs.gradients]

    def _has_backward(self, index: int, record: ForwardRecord) -> bool:
        """Whether a layer is trained, or a gradient passes through it to a trained one below."""
        block = self._layer_blocks[index]
        trained = block is not None and self._gradients.has_trained(block.name)
        return trained or any(index in micro_batch.calls for micro_batch in record.micro_batches)

    def _layer_backward(self, index: int, record: ForwardRecord) -> None:
        block = self._layer_blocks[index]
        with self._bound.block(block.name) if block is not None else contextlib.nullcontext():
            if block is not None:
                self._gradients.open(block.name, once=record.is_one)
            for micro_batch in record.micro_batches:
                call = micro_batch.calls.get(index)
                if call is not None:
                    with self._stopwatch.computing(f"layer {index} backward"):
                        self._call_backward(index, micro_batch, call)
                    del micro_batch.calls[index]
            if block is not None:
                self._gradients.complete(block.name)

    def _epilogue_backward(self, record: ForwardRecord, gradients: Sequence[torch.Tensor | None]) -> None:
        """Run the backward pass of what is behind the last layer, given the gradients of the outputs."""
        with self._bound.block("epilogue"), self._stopwatch.computing("epilogue backward"):
            self._gradients.open("epilogue", once=record.is_one)
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
            self._gradients.complete("epilogue")

    def _call_backward(self, index: int, micro_batch: MicroBatch, call: LayerCall) -> None:
        """Compute the layer again with a graph, run its backward pass, pass the inputs' gradients on."""
        if all(gradient is None for gradient in call.outputs.gradients):  # nothing above depends on it
            for saved in call.saved():
                self.activations.free(saved)
            return
        leaves: list[tuple[SavedInput, torch.Tensor]] = []
        earlier: list[tuple[torch.Tensor, torch.Tensor]] = []
        for saved_input in call.inputs:
            with self._stopwatch.waiting(f"the input of layer {index}"):
                leaf = self.activations.load(saved_input.saved).requires_grad_()
            leaves.append((saved_input, leaf))
            arrived = take_arrived(saved_input, micro_batch)
            if arrived is not None:
                # Other users' gradients come before this layer's, one after the other, as plain autograd sums them.
                with torch.enable_grad():
                    used = leaf.view_as(leaf)
                earlier.append((used, arrived))
            else:
                used = leaf
            call.leaves[saved_input.position] = used
        outer_rng = self._state.get_rng()
        collector, token = activate_collector(call.collected)
        try:
            self._state.set_rng(call.rng)
            args, kwargs = tree_unflatten(call.leaves, call.spec)
            with torch.enable_grad(), self._state.autocast(call.autocast):
                if call.recording is None:
                    result = self._forward.layer(index)(*args, **kwargs)
                else:
                    with ReplayMode(
                        call.recording, self.activations, layer=f"layer {index}", set_rng=self._state.set_rng
                    ) as replay:
                        result = self._forward.layer(index)(*args, **kwargs)
                    replay.finish()
            outputs = float_tensors(result) + collected_tensors(collector, call.collected)
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
            deactivate_collector(token)
            self._state.set_rng(outer_rng)
        call.leaves.clear()
        call.outputs.gradients.clear()
        if call.recording is not None:
            call.recording.free()
        for saved_input, leaf in leaves:
            gradient, leaf.grad = leaf.grad, None
            self.activations.free(saved_input.saved)
            if gradient is None:
                continue
            if saved_input.origin == "layer":
                torch.autograd.backward([saved_input.edge], [gradient])
            elif saved_input.origin == "prologue":
                micro_batch.into_prologue.append((saved_input.edge, gradient))
            else:
                # The layer below needs its part now; code between layers may have used what others use too.
                torch.autograd.backward([saved_input.edge], [gradient], retain_graph=True)
