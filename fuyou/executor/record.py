"""What a forward pass leaves for its backward pass: cuts between layers, inputs put away, and who they belong to.

A cut is a tensor whose gradient is caught and handed to the layer that produced it. On both sides of it autograd knows
nothing of the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import greenlet
import torch
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import TreeSpec, tree_flatten

from fuyou.executor.activations import SavedTensor
from fuyou.executor.replay import Recording
from fuyou.executor.torch_state import Autocast
from fuyou.plan import StepShape


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


class Cut(torch.autograd.Function):
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
class SavedInput:
    """A tensor argument of a layer that carries a gradient: its value put away, and where its gradient goes."""

    position: int
    saved: SavedTensor
    edge: GradientEdge
    origin: str
    """"layer": a layer's output itself; "prologue": computed from nothing but prologue; "between": from both, or by code
    between layers."""


@dataclasses.dataclass
class LayerCall:
    """What is needed to compute one layer again for one micro-batch."""

    leaves: list[Any]
    spec: TreeSpec
    inputs: list[SavedInput]
    outputs: CutGradients
    rng: tuple[torch.Tensor, ...]
    autocast: Autocast
    collected: dict[str, int]
    """Entries that the layer added to the active output collector, by key."""
    recording: Recording | None = None

    def saved(self) -> Iterator[SavedTensor]:
        """Everything that waits for this call's backward pass, in the order in which it is needed."""
        yield from (saved_input.saved for saved_input in self.inputs)
        if self.recording is not None:
            yield from self.recording.saved()


class MicroBatch:
    """One micro-batch on its way through the model."""

    def __init__(self, index: int, arguments: Mapping[str, Any], weight: float) -> None:
        self.index = index
        self.arguments = arguments
        self.weight = weight
        self.greenlet: greenlet.greenlet | None = None
        self.next_stop = -1
        """Layer before which it waits; the number of layers: behind the last; -1: at the start."""
        self.calls: dict[int, LayerCall] = {}
        self.into_prologue: list[tuple[GradientEdge, torch.Tensor]] = []
        """Gradients of what the prologue gave to layers, last layer first."""
        self.rng: tuple[torch.Tensor, ...] = ()
        self.grad_enabled = True
        self.autocast: Autocast
        self.output: Any = None
        self.loss: torch.Tensor | None = None


@dataclasses.dataclass
class ForwardRecord:
    """What a forward pass leaves for its backward pass."""

    micro_batches: list[MicroBatch]
    output_type: type
    autocast: Autocast
    losses: list[torch.Tensor] = dataclasses.field(default_factory=list)
    """The micro-batches' losses times their weights, float64, 0-dimensional."""
    needs_prologue: bool = False
    reported_loss: float | None = None
    """What the step's figures say; None if the loss is computed elsewhere."""
    num_tokens: int = 0
    shape: StepShape = dataclasses.field(default_factory=StepShape)
    roots: list[Root] = dataclasses.field(default_factory=list)
    """Of a forward pass whose loss is computed by the caller: the outputs that carry gradients, in order."""

    @property
    def is_one(self) -> bool:
        """Whether it is of one micro-batch."""
        return len(self.micro_batches) == 1


@dataclasses.dataclass(frozen=True)
class Output:
    """The value of an output that carries a gradient, without its graph."""

    value: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Root:
    """An output of model.forward, and where its gradient goes."""

    micro_batch: MicroBatch
    edge: GradientEdge
    origin: str
    """As of a SavedInput; "between" stands for the epilogue too."""


def origin_of(tensor: torch.Tensor) -> str:
    """Where a layer's input comes from; see `SavedInput.origin`."""
    cut = Cut._backward_cls
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


def take_arrived(saved_input: SavedInput, micro_batch: MicroBatch) -> torch.Tensor | None:
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


def is_float(value: object) -> bool:
    """Whether it is a tensor that may carry a gradient."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def float_tensors(tree: Any) -> list[torch.Tensor]:
    """Those among the leaves of nested lists, tuples and dicts."""
    return [value for value in tree_flatten(tree)[0] if is_float(value)]
