"""Record what a layer computes, and compute it again without what was kept.

A layer's first run passes through `RecordMode`, below autograd: every operation comes by, in order, and the outputs that
the plan names are put away. When the layer is computed again for its backward pass, `ReplayMode` hands those outputs back
instead of computing them. Autograd, above, builds the same graph in both runs, so that any choice gives the same bits.

An operation is computed again only if the backward pass needs it: if autograd saves memory that it wrote, or something
else that is computed again reads it. What nothing needs gets memory of the right shape, never filled.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_iter, tree_unflatten

from fuyou.errors import ModelError
from fuyou.executor.activations import ActivationStore, SavedTensor, stretch_elements
from fuyou.executor.ops import RECOMPUTE, Op, place_of
from fuyou.plan import Activations
from io_engine.buffers import size_class_bytes

RngState = tuple[torch.Tensor, ...]

_NOT_COUNTED: Final = ("aten.detach.default", "prim.device.default")
"""How often these run depends on what autograd keeps, which is not the same in both runs."""

_ALWAYS_KEPT: Final = (
    "aten.topk.",
    "aten.sort.",
    "aten.argsort.",
    "aten.argmax.",
    "aten.argmin.",
    "aten.nonzero",
    "aten._unique2.",
    "aten.unique_",
    "aten.bincount.",
    "aten.histc.",
    "aten.multinomial.",
)
"""Decisions, such as a router's: small, and a rounding in what they are made from must not turn out another one."""

_UNFILLED: Final = ("aten.empty", "aten.new_empty")
_READS_SHAPES_ONLY: Final = (
    "aten.empty_like.",
    "aten.new_",
    "aten.zeros_like.",
    "aten.ones_like.",
    "aten.full_like.",
    "aten.rand_like.",
    "aten.randn_like.",
)


@dataclasses.dataclass(frozen=True)
class _Traits:
    """What an operation's schema says."""

    name: str
    counted: bool
    random: bool
    written: tuple[int | str, ...]
    """Arguments that it writes to, by position or keyword."""
    returns_self: bool
    """It writes to its first argument and returns that."""
    returns_view: bool
    reads_shapes_only: bool
    always_kept: bool

    @property
    def is_free(self) -> bool:
        """It computes nothing: it makes a view, or memory that is not filled."""
        return self.returns_view or self.name.startswith(_UNFILLED)

    @property
    def refusal(self) -> str | None:
        """Why its outputs have no place to choose, or None."""
        if self.written:
            return "it writes into its argument"
        if self.is_free:
            return "it computes nothing"
        return None


@functools.cache
def _traits(func: Any) -> _Traits:
    schema = func._schema
    written = [
        argument.name if argument.kwarg_only else position
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    returns = [r.alias_info is not None for r in schema.returns]
    name = str(func)
    return _Traits(
        name=name,
        counted=name not in _NOT_COUNTED,
        random=torch.Tag.nondeterministic_seeded in func.tags,
        written=tuple(written),
        returns_self=written == [0] and returns == [True],
        returns_view=any(returns) and not written,
        reads_shapes_only=name.startswith(_READS_SHAPES_ONLY),
        always_kept=name.startswith(_ALWAYS_KEPT),
    )


@dataclasses.dataclass
class _Step:
    """One operation of the first run, and how its outputs come about in the second."""

    func: Any
    reads: tuple[int, ...]
    """Memory that it reads, by the numbers that `RecordMode` gives."""
    writes: tuple[int, ...]
    returns_its_input: bool
    """It returned memory of an argument, a view, although its schema does not say so."""
    rng: RngState | None
    """The generators before it, if it draws from them."""
    spec: TreeSpec
    leaves: list[Any]
    """Of its outputs: a SavedTensor or a _Shape for a tensor, anything else as it is."""
    how: Literal["run", "stored", "unneeded"] = "run"


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What is known of a tensor that is not kept."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def unfilled(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


class Recording:
    """What one layer's first run leaves for its second."""

    def __init__(self, store: ActivationStore) -> None:
        self.steps: list[_Step] = []
        self._store = store

    def saved(self) -> Iterator[SavedTensor]:
        """What was put away, in the order in which the second run asks for it."""
        for step in self.steps:
            yield from _saved_of(step)

    def free(self) -> None:
        """Give up everything that was put away. Idempotent."""
        for saved in self.saved():
            self._store.free(saved)
        self.steps.clear()


def _saved_of(step: _Step) -> Iterator[SavedTensor]:
    return (leaf for leaf in step.leaves if isinstance(leaf, SavedTensor))


def _output_bytes(step: _Step) -> list[int]:
    return [
        stretch_elements(leaf.shape, leaf.stride) * leaf.dtype.itemsize
        for leaf in step.leaves
        if isinstance(leaf, (SavedTensor, _Shape))
    ]


class RecordMode(TorchDispatchMode):
    """Watches a layer's first run and puts away what the plan says. Autograd's pack hook has to call `note_saved`.

    `known` are the layer's operations if it was recorded before: outputs that were not needed then are not put away now,
    and where another operation runs under a number (experts without tokens), it is computed again.
    """

    def __init__(
        self,
        recording: Recording,
        store: ActivationStore,
        *,
        key: str,
        activations: Activations,
        known: Sequence[Op] | None,
        get_rng: Callable[[], RngState],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self._recording, self._store, self._key = recording, store, key
        self._activations, self._known = activations, known
        self._get_rng = get_rng
        # Storages by number: an address is used again as soon as its memory is free.
        self._numbers: dict[int, int] = {}
        self._num_storages = 0
        self._needed: set[int] = set()
        """Storages that autograd saves."""
        self._stored: list[tuple[int, SavedTensor]] = []

    def note_saved(self, tensor: torch.Tensor) -> None:
        """Autograd saves this tensor for the backward pass."""
        self._needed.add(self._number(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and note it."""
        kwargs = kwargs or {}
        traits = _traits(func)
        if not traits.counted:
            return func(*args, **kwargs)
        reads = tuple({self._number(t): None for t in _tensors((args, kwargs))})
        written = _tensors([args[w] if isinstance(w, int) else kwargs[w] for w in _given(traits.written, args, kwargs)])
        writes = {self._number(t): None for t in written}
        self._settle(writes)
        rng = self._get_rng() if traits.random else None
        result = func(*args, **kwargs)
        outputs, spec = tree_flatten(result)
        returns_its_input = False
        for output in _tensors(outputs):
            if not traits.written and not traits.returns_view:
                address = output.untyped_storage().data_ptr()
                if self._numbers.get(address) in reads:
                    returns_its_input = True
                elif address:
                    self._numbers[address] = self._new_number()
            writes[self._number(output)] = None
        step = _Step(
            func=func,
            reads=reads,
            writes=tuple(writes),
            returns_its_input=returns_its_input,
            rng=rng,
            spec=spec,
            leaves=[_shape_of(leaf) for leaf in outputs],
        )
        self._recording.steps.append(step)
        self._put_away(step, traits, outputs)
        return result

    def finish(self, outputs: Sequence[torch.Tensor], is_own_graph: Callable[[Any], bool]) -> None:
        """The layer has given `outputs`; decide what the second run computes.

        `is_own_graph` says whether a node of autograd's graph belongs to this layer.
        """
        steps = self._recording.steps
        if not _knows_what_is_saved(outputs, is_own_graph):
            self._needed.update(number for step in steps for number in step.writes)
        for step, live in zip(steps, _live(steps, self._needed), strict=True):
            if not live:
                for saved in _saved_of(step):
                    self._store.free(saved)
                step.leaves = [_shape_of(leaf) for leaf in step.leaves]
                step.how, step.rng = "unneeded", None
        # What runs after this layer may write into what it has given.
        self._settle({self._number(t): None for t in outputs})

    def ops(self) -> tuple[Op, ...]:
        """The layer's operations; call after `finish`."""
        # As if nothing were stored: what is needed does not depend on the plan.
        is_live = _live([dataclasses.replace(step, how="run") for step in self._recording.steps], self._needed)
        ops = []
        for number, (step, live) in enumerate(zip(self._recording.steps, is_live, strict=True)):
            traits = _traits(step.func)
            reason = traits.refusal
            always_kept = False
            if reason is None and step.returns_its_input:
                reason = "it computes nothing"
            if reason is None and not any(isinstance(leaf, (SavedTensor, _Shape)) for leaf in step.leaves):
                reason = "it returns no tensor; what it returns is kept"
            if reason is None and not live:
                reason = "the backward pass needs nothing of it: it is neither kept nor computed again"
            if reason is None and traits.always_kept:
                reason, always_kept = "always kept on the device: a decision, which must not turn out another one", True
            eligible = reason is None
            sizes = _output_bytes(step)
            ops.append(
                Op(
                    number=number,
                    name=traits.name,
                    output_bytes=sum(sizes),
                    pooled_bytes=sum(size_class_bytes(max(1, num_bytes)) for num_bytes in sizes),
                    eligible=eligible,
                    reason=reason or "computed again",
                    always_kept=always_kept,
                )
            )
        return tuple(ops)

    def _put_away(self, step: _Step, traits: _Traits, outputs: list[Any]) -> None:
        number = len(self._recording.steps) - 1
        if traits.refusal is not None or step.returns_its_input:
            return
        if not any(isinstance(output, torch.Tensor) for output in outputs):
            step.how = "stored"
            return
        place = "keep" if traits.always_kept else place_of(number, traits.name, self._activations)
        if self._known is not None:
            known = self._known[number] if number < len(self._known) else None
            if known is None or known.name != traits.name or not (known.eligible or known.always_kept):
                place = "keep" if traits.always_kept else RECOMPUTE
        if place == RECOMPUTE:
            return
        step.how, step.rng = "stored", None
        for index, output in enumerate(outputs):
            if isinstance(output, torch.Tensor):
                saved = self._store.save(f"{self._key}/{number}/{index}", output, place)
                step.leaves[index] = saved
                self._stored.append((self._number(output), saved))

    def _settle(self, numbers: dict[int, None]) -> None:
        """These storages may be written to from here on: what was put away of them must not change with them."""
        if not numbers or not self._stored:
            return
        for number, saved in self._stored:
            if number in numbers:
                self._store.settle(saved)
        # A copy by now.
        self._stored = [(number, saved) for number, saved in self._stored if number not in numbers]

    def _number(self, tensor: torch.Tensor) -> int:
        address = tensor.untyped_storage().data_ptr()
        if not address:  # of no elements: nothing to need
            return self._new_number()
        number = self._numbers.get(address)
        if number is None:
            number = self._numbers[address] = self._new_number()
        return number

    def _new_number(self) -> int:
        self._num_storages += 1
        return self._num_storages


class ReplayMode(TorchDispatchMode):
    """Runs a recorded layer again: what was put away is handed back, what nothing needs is left out.

    Every operation has to be that of the first run; call `finish` at the end. ModelError otherwise.
    """

    def __init__(
        self, recording: Recording, store: ActivationStore, *, layer: str, set_rng: Callable[[RngState], None]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self._steps, self._store, self._layer = recording.steps, store, layer
        self._set_rng = set_rng
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, or hand back what the first run left."""
        kwargs = kwargs or {}
        traits = _traits(func)
        if not traits.counted:
            return func(*args, **kwargs)
        if self._next == len(self._steps) or self._steps[self._next].func is not func:
            self._refuse(traits.name)
        step = self._steps[self._next]
        self._next += 1
        if step.how == "stored":
            leaves = [self._store.take(leaf) if isinstance(leaf, SavedTensor) else leaf for leaf in step.leaves]
            return tree_unflatten(leaves, step.spec)
        if step.how == "unneeded" and not (traits.is_free or step.returns_its_input):
            if traits.returns_self:
                return args[0]
            leaves = [leaf.unfilled() if isinstance(leaf, _Shape) else leaf for leaf in step.leaves]
            return tree_unflatten(leaves, step.spec)
        if step.rng is not None:
            # What is left out draws nothing.
            self._set_rng(step.rng)
        return func(*args, **kwargs)

    def finish(self) -> None:
        """ModelError unless all of the first run came by."""
        if self._next != len(self._steps):
            self._refuse("nothing more")

    def _refuse(self, found: str) -> None:
        expected = str(self._steps[self._next].func) if self._next < len(self._steps) else "nothing more"
        raise ModelError(
            f"{self._layer} computed {found} as its operation {self._next} when it was computed again, and {expected} at "
            "first: it does not do the same for the same input, so that nothing of it can be kept. Plan "
            'activations="recompute" for this block'
        )


def _live(steps: Sequence[_Step], needed: set[int]) -> list[bool]:
    """Which operations' outputs the second run needs, given what autograd saves."""
    needed = set(needed)
    is_live = [False] * len(steps)
    for number in reversed(range(len(steps))):
        step = steps[number]
        # Without tensors there is only what it leaves elsewhere, or a number that a branch depends on.
        returns_tensors = any(isinstance(leaf, (SavedTensor, _Shape)) for leaf in step.leaves)
        is_live[number] = not returns_tensors or any(written in needed for written in step.writes)
        if is_live[number] and step.how != "stored" and not _traits(step.func).reads_shapes_only:
            needed.update(step.reads)
    return is_live


def _knows_what_is_saved(outputs: Sequence[torch.Tensor], is_own_graph: Callable[[Any], bool]) -> bool:
    """Whether all nodes of a layer's graph are torch's own: functions of others may keep tensors past autograd."""
    waiting = [t.grad_fn for t in outputs]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or not is_own_graph(node):
            continue
        seen.add(node)
        is_python: bool = issubclass(type(node), torch.autograd.function.BackwardCFunction)
        if is_python or "CppNode" in node.name():
            return False
        waiting += [following for following, _ in node.next_functions]
    return True


def _given(written: tuple[int | str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int | str]:
    return [w for w in written if (w < len(args) if isinstance(w, int) else w in kwargs)]


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]


def _shape_of(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return _Shape(leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
    if isinstance(leaf, SavedTensor):
        return _Shape(leaf.shape, leaf.stride, leaf.dtype, leaf.device)
    return leaf
