"""One training step, block by block, for all micro-batches: the vertical schedule.

`StepExecutor` is what the runtime calls. Reading order of a step: its `forward` here, the sweep that it leads
(fuyou.executor.forward), what that leaves (record), then `backward` here and its sweep (backward). Beside them: weights under
the parameters (bound, weights), gradients on their way out (gradients), activations that wait (activations, replay).

A block's weights come in, every micro-batch runs up to the next block, and the weights go, so that they cross the bus once
however many micro-batches there are. All greenlets end before forward returns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_unflatten

from fuyou.blocks import CONSTRUCTED_VALUES, Block, ModelBlocks
from fuyou.errors import ModelError
from fuyou.executor.activations import ActivationStore
from fuyou.executor.backward import BackwardSweep
from fuyou.executor.bound import BoundWeights
from fuyou.executor.device import Device
from fuyou.executor.forward import ForwardSweep
from fuyou.executor.gradients import GradientSums
from fuyou.executor.guards import guard_methods, guard_other_modules
from fuyou.executor.head import ChunkedHead
from fuyou.executor.ops import Op
from fuyou.executor.record import ForwardRecord, MicroBatch, Output, Root, is_float, origin_of
from fuyou.executor.stopwatch import Stopwatch
from fuyou.executor.torch_state import Autocast, TorchState, micro_batch_seed
from fuyou.executor.weights import WeightStream
from fuyou.memory import FreedMemory
from fuyou.plan import Activations
from fuyou.trace import Trace
from optim import OffloadedAdamW, ShardLayout


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
        by_name = {block.name: block for block in blocks.blocks}
        layers: list[nn.Module] = list(model.get_submodule(blocks.path).children())
        layer_blocks: list[Block | None] = [by_name.get(f"{blocks.path}.{index}") for index in range(len(layers))]
        parameters = dict(model.named_parameters())
        self._order = [block.name for block in blocks.blocks]
        self._device, self._seed = device, seed
        self._stopwatch, self._state = Stopwatch(device, trace), TorchState(device.torch_device)
        self._activations: ActivationStore
        self.freed_memory = FreedMemory()
        self._bound = BoundWeights(parameters, layouts, by_name, self._stopwatch, self.freed_memory)
        self._gradients = GradientSums(parameters, layouts, by_name, self._bound, device, self._stopwatch)
        self._forward = ForwardSweep(
            model,
            layers,
            layer_blocks,
            bound=self._bound,
            gradients=self._gradients,
            device=device,
            stopwatch=self._stopwatch,
            state=self._state,
        )
        self._backward = BackwardSweep(
            self._forward,
            layer_blocks,
            bound=self._bound,
            gradients=self._gradients,
            stopwatch=self._stopwatch,
            state=self._state,
        )
        self.anchor = self._forward.anchor
        self._chunked_head = None if loss_chunk_tokens is None else ChunkedHead(model, loss_chunk_tokens)
        for module in model.modules():
            module.__dict__.pop(CONSTRUCTED_VALUES, None)
        guard_other_modules(model, layers, parameters, layouts, self._bound, self._forward.reach_epilogue)
        guard_methods(model, self._zero_grad)

    @property
    def optimizer(self) -> OffloadedAdamW | None:
        """Where gradients go; None: there is nothing to train yet."""
        return self._gradients.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: OffloadedAdamW | None) -> None:
        self._gradients.optimizer = optimizer

    @property
    def adopted_forward(self) -> Callable[..., Any] | None:
        """What micro-batches run instead of the class's forward."""
        return self._forward.adopted_forward

    @adopted_forward.setter
    def adopted_forward(self, forward: Callable[..., Any]) -> None:
        self._forward.adopted_forward = forward

    @property
    def is_inside(self) -> bool:
        """Whether the caller runs as a part of a micro-batch's forward."""
        return self._forward.is_inside

    def _zero_grad(self, set_to_none: bool = True) -> None:
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none)

    def bound_block(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A context in which the parameters of a block, and those that it borrows, hold their weights."""
        return self._bound.block(name)

    def let_weights_go(self) -> None:
        """After a Ctrl-C, which may have come between taking weights and noting it; nothing may be running."""
        self._bound.reset()

    def watch_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take the gradients of those that require one now; what is watched already stays so."""
        self._gradients.watch(parameters)

    def train_adapters(
        self, adapters: Mapping[str, Sequence[ShardLayout]], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Hand over the gradients of these shards too: by block, of parameters that are always in memory."""
        self._gradients.train_adapters(adapters, parameters)

    def use(
        self, weights: WeightStream, activations: ActivationStore, activation_plans: Mapping[str, Activations]
    ) -> None:
        """Work over these from now on, with a plan for each block's activations; nothing may be running or held."""
        assert not self._bound
        assert self._forward.record is None
        self._bound.stream = weights
        self._activations = self._backward.activations = activations
        self._forward.use(activations, activation_plans)

    # --- a training step -------------------------------------------------------------------------------------------

    def forward(self, calls: Sequence[tuple[Mapping[str, Any], float]], *, step: int, first: int) -> ForwardRecord:
        """Run the forward pass of all micro-batches, and the backward pass of what is behind the last layer.

        `calls` are (arguments of model.forward with labels, weight of the loss). `step` and `first` (the number of the
        first micro-batch in the step) choose the random numbers. Call `backward` with the record, or `discard` it.
        """
        record, autocast = self._new_record(calls, first)
        no_autocast = autocast._replace(is_enabled=False)
        with self._running(record.micro_batches, record), self._state.autocast(autocast):
            self._run_layers(record.micro_batches, step, self._backward.visits(epilogue_again=False))
            with self._bound.block("epilogue"), torch.enable_grad():
                self._gradients.open("epilogue", once=record.is_one and self._chunked_head is None)
                for micro_batch in record.micro_batches:
                    with self._loss_in_chunks(micro_batch, no_autocast):
                        self._forward.finish(micro_batch)
                    loss = _loss_of(micro_batch.output)
                    record.losses.append(micro_batch.weight * loss.detach().double())
                    record.output_type = type(micro_batch.output)
                    micro_batch.output = None
                    if not loss.requires_grad:
                        raise ModelError("the loss depends on no trainable parameter: there is nothing to train")
                    with self._stopwatch.computing("epilogue backward"), self._state.autocast(no_autocast):
                        torch.autograd.backward(
                            loss, torch.tensor(micro_batch.weight, dtype=loss.dtype, device=loss.device)
                        )
                    del loss
        return record

    def _loss_in_chunks(self, micro_batch: MicroBatch, autocast: Autocast) -> contextlib.AbstractContextManager[None]:
        if self._chunked_head is None:
            return contextlib.nullcontext()
        return self._chunked_head.running(micro_batch.weight, lambda: self._state.autocast(autocast))

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
        with self._running(record.micro_batches, record), self._state.autocast(autocast):
            self._run_layers(record.micro_batches, step, self._backward.visits(epilogue_again=True))
            with self._bound.block("epilogue"), torch.enable_grad():
                for micro_batch in record.micro_batches:
                    self._forward.finish(micro_batch)
                    leaves, spec = tree_flatten(micro_batch.output)
                    micro_batch.output = None
                    for position, leaf in enumerate(leaves):
                        if is_float(leaf) and leaf.requires_grad:
                            record.roots.append(Root(micro_batch, get_gradient_edge(leaf), origin_of(leaf)))
                            leaves[position] = Output(leaf.detach())
                    outputs.append(tree_unflatten(leaves, spec))
        return record, outputs

    def _new_record(
        self, calls: Sequence[tuple[Mapping[str, Any], float]], first: int
    ) -> tuple[ForwardRecord, Autocast]:
        micro_batches = [MicroBatch(first + i, arguments, weight) for i, (arguments, weight) in enumerate(calls)]
        autocast = self._state.get_autocast()
        return ForwardRecord(micro_batches, type(None), autocast), autocast

    def _run_layers(self, micro_batches: list[MicroBatch], step: int, then: Sequence[str] = ()) -> None:
        """Up to the epilogue; `then` are the shards that will be visited when the forward pass is over."""
        self._bound.stream.announce([*self._forward_visits(), *then])
        for micro_batch in micro_batches:
            seed = micro_batch_seed(self._seed, step, micro_batch.index)
            micro_batch.rng = self._state.seeded(seed)
        self._forward.up_to_epilogue(micro_batches)

    def _forward_visits(self) -> list[str]:
        """The shards that a forward pass asks for, in order."""
        return [shard for name in self._order for shard in self._bound.shards_of(name)]

    def backward(
        self, record: ForwardRecord, scale: float, gradients: Sequence[torch.Tensor | None] | None = None
    ) -> None:
        """Run the rest of the backward pass: gradients of `scale` times the record's loss go to the optimizer.

        With `gradients`, one for each of the record's roots, those of what the roots were used for.
        """
        self.check(record)
        self._forward.record = None
        try:
            with contextlib.ExitStack() as prologue_held, self._device.current(), self.freed_memory.kept():
                self._backward.run(record, scale, gradients, prologue_held)
        except BaseException:
            self._bound.stream.announce(())
            self._drop(record)
            raise

    def check(self, record: ForwardRecord) -> None:
        """ModelError if the record's backward pass ran already, or its activations are gone."""
        if record is not self._forward.record:
            raise ModelError(
                "this loss was used already, or belongs to an earlier forward pass, whose activations are gone: call "
                "loss.backward() once, before the next forward pass and before optimizer.step()"
            )

    def discard(self) -> None:
        """Forget a forward pass whose backward pass never came."""
        if self._forward.record is not None:
            record, self._forward.record = self._forward.record, None
            self._drop(record)
            self._bound.stream.announce(())  # read ahead for its backward pass

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
        micro_batches = [MicroBatch(number, arguments, 1.0) for number, arguments in enumerate(calls)]
        taken: list[Any] = []
        for micro_batch in micro_batches:
            micro_batch.rng = self._state.get_rng()
        with self._running(micro_batches, None), torch.no_grad():
            for micro_batch in micro_batches:
                micro_batch.grad_enabled = False
            self._bound.stream.announce(self._forward_visits(), again=again)
            self._forward.up_to_epilogue(micro_batches)
            with self._bound.block("epilogue"):
                for micro_batch in micro_batches:
                    self._forward.finish(micro_batch)
                    taken.append(take(micro_batch.index, micro_batch.output))
                    micro_batch.output = None
        self._state.set_rng(micro_batches[-1].rng)
        return taken

    def list_ops(self, arguments: Mapping[str, Any]) -> dict[str, tuple[Op, ...]]:
        """Run one micro-batch up to the epilogue and list what each layer that a backward pass would reach computes.

        Forgets a forward pass that waits for its backward pass.
        """
        self.discard()
        record, autocast = self._new_record([(arguments, 1.0)], 0)
        try:
            with (
                self._forward.observing() as ops,
                self._running(record.micro_batches, record),
                self._state.autocast(autocast),
            ):
                self._run_layers(record.micro_batches, step=0)
            return ops
        finally:
            self.discard()

    @contextlib.contextmanager
    def _running(self, micro_batches: Sequence[MicroBatch], record: ForwardRecord | None) -> Iterator[None]:
        """Micro-batches may run inside; `record` is the training step's. What fails leaves nothing held."""
        if self._forward.is_running:
            raise ModelError("the model is running already: a forward pass cannot be started inside another")
        try:
            if record is not None:
                self._forward.record = record
            with self._forward.running(micro_batches, training=record is not None), self.freed_memory.kept():
                yield
        except BaseException:
            # What was read ahead would be older than a step that comes before its next use.
            self._bound.stream.announce(())
            if record is not None:
                self._forward.record = None
                self._drop(record)
            raise

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
        self._gradients.drop()
        self._bound.drop()


def _loss_of(output: Any) -> torch.Tensor:
    loss = output["loss"] if isinstance(output, dict) else getattr(output, "loss", None)
    if loss is None and isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
        loss = output[0]
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ModelError("the model returned no loss although labels were given")
    return loss
