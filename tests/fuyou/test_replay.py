"""Record and replay of one layer against plain autograd: each trap that makes gradients wrong without an error."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fuyou
from fuyou.executor.activations import ActivationStore
from fuyou.executor.device import HostDevice
from fuyou.executor.ops import Op, check_activations, planned_bytes
from fuyou.executor.replay import Recording, RecordMode, ReplayMode
from fuyou.plan import Activations
from io_engine import BufferPool, Extent, MockEngine

Tensor = torch.Tensor
Function = Callable[..., Tensor | tuple[Tensor, ...]]
PLACES = ("keep", "host", "ssd")


@pytest.fixture(name="store")
def _store() -> Iterator[ActivationStore]:
    with BufferPool(1 << 20, name="activations") as pool, MockEngine() as engine:
        extents: dict[str, Extent] = {}

        def scratch(name: str, num_bytes: int) -> Extent:
            return extents.setdefault(name, Extent(f"/drive/{len(extents)}", 0, num_bytes))

        yield ActivationStore(pool=pool, engine=engine, scratch=scratch, device=HostDevice())
        assert pool.used_bytes == 0


def get_rng() -> tuple[Tensor, ...]:
    return (torch.get_rng_state(),)


def set_rng(state: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(state[0])


def drop(_saved: None) -> Tensor:
    raise AssertionError


def fresh(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def backward(outputs: tuple[Tensor, ...], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(5)
    gradients = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    torch.autograd.backward(outputs, gradients)
    return [x.grad for x in inputs]


class Ran(TorchDispatchMode):
    """Names of the operations that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Layer:
    """A function of some tensors, run once to be recorded and once more for its gradients."""

    def __init__(self, function: Function, inputs: Sequence[Tensor], store: ActivationStore) -> None:
        self.function, self.inputs, self.store = function, inputs, store
        self.ran: list[str] = []

    def expected(self) -> list[Tensor | None]:
        leaves = fresh(self.inputs)
        torch.manual_seed(1)
        return backward(as_tuple(self.function(*leaves)), leaves)

    def record(self, activations: Activations, known: Sequence[Op] | None = None) -> tuple[Recording, tuple[Op, ...]]:
        recording = Recording(self.store)
        recorder = RecordMode(recording, self.store, key="0", activations=activations, known=known, get_rng=get_rng)
        leaves = fresh(self.inputs)
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(recorder.note_saved, drop), recorder:
            outputs = as_tuple(self.function(*leaves))
        recorder.finish(outputs, lambda _node: True)
        # Whoever gets the outputs may write into them.
        for output in outputs:
            output.detach().fill_(3.0)
        return recording, recorder.ops()

    def replay(self, recording: Recording) -> list[Tensor | None]:
        leaves = fresh(self.inputs)
        self.store.announce(recording.saved())
        torch.manual_seed(1)
        with Ran() as ran, ReplayMode(recording, self.store, layer="the layer", set_rng=set_rng) as replay:
            outputs = as_tuple(self.function(*leaves))
        replay.finish()
        self.ran = ran.names
        gradients = backward(outputs, leaves)
        recording.free()
        self.store.finish()
        return gradients

    def ops(self) -> tuple[Op, ...]:
        recording, ops = self.record("recompute")
        recording.free()
        return ops

    def check(self, activations: Activations) -> None:
        """The gradients of plain autograd, bit for bit."""
        recording, _ops = self.record(activations)
        found = self.replay(recording)
        for ours, theirs in zip(found, self.expected(), strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


class KeepsItself(torch.autograd.Function):
    """Keeps a tensor where autograd cannot see it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x
        return x.exp()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.x.exp()


def router(x: Tensor, w: Tensor) -> Tensor:
    """As mixtures of experts do: chosen weights are normalised in place, experts write into one sum."""
    weights, chosen = torch.topk(F.softmax(x @ w, dim=-1), 2)
    weights /= weights.sum(dim=-1, keepdim=True)
    total = torch.zeros_like(x)
    for expert in range(w.shape[1]):
        rows, place = torch.where(chosen == expert)
        total.index_add_(0, rows, (x[rows] * (expert + 1)).tanh() * weights[rows, place, None])
    return total


def attention(x: Tensor) -> Tensor:
    """Its outputs are strided, and one of them (log-sum-exp) is seen by nobody but its backward."""
    heads = x.view(2, 5, 3, 4).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads * 2, heads, is_causal=True).transpose(1, 2).reshape(2, 5, 12)


def written_views(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    y[:, 1].mul_(2.0)
    y.add_(1.0)
    return y.sin() @ y


def written_out(x: Tensor) -> Tensor:
    y = x.exp()
    with torch.no_grad():
        scratch = torch.empty_like(y)
        torch.mul(y, 2, out=scratch)
    return y * scratch


def written_by_foreach(x: Tensor, w: Tensor) -> Tensor:
    parts = [x * 3, w + 1]
    torch._foreach_mul_(parts, 2.0)
    return parts[0].sin() @ parts[1].cos()


def random_numbers(x: Tensor) -> Tensor:
    first, second = torch.rand_like(x), torch.bernoulli(torch.full_like(x, 0.5))
    return F.dropout(x * first, 0.5).sin() * second * torch.rand_like(x) + F.dropout(x, 0.1)


def branches(x: Tensor) -> Tensor:
    return x.sin() * 3 if x.sum().item() > 1e9 else (x * 2).cos()


def empty_parts(x: Tensor) -> Tensor:
    nothing = x[:0]
    return x.exp() + (nothing.exp().sum() + (nothing @ x.T).sum())


def several(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    mean, largest = x.mean(dim=0), x.max(dim=1)
    q, r = torch.linalg.qr(x @ w)
    return mean.tanh(), largest.values.exp(), F.layer_norm(q, (4,)) * 2, r.T.contiguous().sin(), (x @ w).T


def ends_in_a_product(x: Tensor, w: Tensor) -> Tensor:
    return x + F.silu(x) @ w


def expanded(x: Tensor) -> Tensor:
    return (x.sum(dim=1, keepdim=True).exp().expand(-1, 7).sin() * torch.ones(7)).contiguous()


def autocast(x: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        return ((x @ w).relu() @ w.T).float().exp() * x


FUNCTIONS: dict[str, tuple[Function, list[Tensor]]] = {
    "router": (router, [normal(6, 4), normal(4, 4)]),
    "attention": (attention, [normal(2, 5, 12)]),
    "written_views": (written_views, [normal(4, 4), normal(4, 4)]),
    "written_out": (written_out, [normal(4, 4)]),
    "written_by_foreach": (written_by_foreach, [normal(4, 4), normal(4, 4)]),
    "random_numbers": (random_numbers, [normal(5, 6)]),
    "branches": (branches, [normal(4, 4)]),
    "empty_parts": (empty_parts, [normal(4, 4)]),
    "several": (several, [normal(6, 4), normal(4, 4)]),
    "ends_in_a_product": (ends_in_a_product, [normal(4, 4), normal(4, 4)]),
    "expanded": (expanded, [normal(4, 4)]),
    "autocast": (autocast, [normal(4, 6), normal(6, 8)]),
    "custom": (lambda x: KeepsItself.apply(x * 2) + 1, [normal(4, 4)]),
    "integers": (lambda x, i: F.embedding(i, x).exp(), [normal(9, 4), torch.tensor([[1, 2], [8, 1]])]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_choice_gives_the_gradients_of_plain_autograd(name: str, store: ActivationStore) -> None:
    """All alike, each operation alone, and at random."""
    layer = Layer(*FUNCTIONS[name], store)
    eligible = [op.number for op in layer.ops() if op.eligible]
    assert eligible
    for place in PLACES:
        layer.check(dict.fromkeys(eligible, place))
        layer.check(place)
    for number in eligible:
        layer.check({number: "keep"})
    choose = random.Random(0)
    for _ in range(4):
        layer.check({number: choose.choice([*PLACES, "recompute"]) for number in eligible})
    assert store.device_bytes == 0


@pytest.mark.parametrize("place", PLACES)
def test_what_is_kept_is_not_computed_again(place: str, store: ActivationStore) -> None:
    """Neither it nor what it was made from and nothing else needs."""
    layer = Layer(lambda x, w: ((x.detach() + 1) @ w.detach()).exp() * x, [normal(4, 4), normal(4, 4)], store)
    names = {op.name: op.number for op in layer.ops()}
    layer.check({names["aten.exp.default"]: place})
    assert "aten.exp.default" not in layer.ran
    assert "aten.mm.default" not in layer.ran
    assert "aten.add.Tensor" not in layer.ran
    assert "aten.mul.Tensor" not in layer.ran  # nothing needs the output's values


def test_what_nothing_needs_is_neither_kept_nor_computed_again(store: ActivationStore) -> None:
    """A layer's last product, which only its output is made from."""
    layer = Layer(*FUNCTIONS["ends_in_a_product"], store)
    ops = layer.ops()
    last = next(op for op in reversed(ops) if op.name == "aten.mm.default")
    assert not last.eligible
    assert "needs nothing" in last.reason
    assert planned_bytes(ops, "host") == {"keep": 0, "host": 0, "ssd": 0}
    recording, _ = layer.record("host", known=ops)
    assert not list(recording.saved())
    layer.replay(recording)
    assert "aten.mm.default" not in layer.ran
    assert "aten.silu.default" in layer.ran


def test_decisions_are_always_kept(store: ActivationStore) -> None:
    """A rounding that turns out otherwise the second time does not choose other experts."""
    noise = torch.zeros(4, 4)
    chosen: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        weights, experts = torch.topk(x + noise, 2)
        chosen.append(experts)
        rows = torch.nonzero(x + noise > 0)[:, 0]
        return weights.exp().sum() + x[rows].sin()

    layer = Layer(function, [torch.tensor([[1.0, 1.1, -0.01, 1.2]] * 4)], store)
    ops = layer.ops()
    assert {op.name for op in ops if op.always_kept} >= {"aten.topk.default", "aten.nonzero.default"}
    assert not any(op.eligible for op in ops if op.always_kept)
    chosen.clear()
    exp = next(op.number for op in ops if op.name == "aten.exp.default")
    recording, _ = layer.record({exp: "keep"})
    noise[:, 0] += 0.15
    noise[:, 2] += 0.02
    layer.replay(recording)
    assert torch.equal(chosen[0], chosen[1])


@pytest.mark.parametrize(
    "second", [lambda x: x.sin().cos(), lambda x: x.sin(), lambda x: (x.sin() @ x).exp()], ids=["other", "less", "more"]
)
def test_another_computation_is_refused(second: Function, store: ActivationStore) -> None:
    """By operation and by count, before any gradient."""
    layer = Layer(lambda x: x.sin() @ x, [normal(4, 4)], store)
    recording, _ = layer.record("keep")
    layer.function = second
    with pytest.raises(fuyou.ModelError, match=r"the layer computed .* operation [12]"):
        layer.replay(recording)
    recording.free()


def test_operations_that_differ_from_the_first_time_are_computed_again(store: ActivationStore) -> None:
    """Numbers are those of the first micro-batch; where another operation has the number, its output is not kept."""
    inputs = [normal(4, 4)]
    ops = Layer(lambda x: (x.exp() @ x).sin(), inputs, store).ops()
    other = Layer(lambda x: (x.sin().exp() @ x).cos(), inputs, store)
    numbers = {op.number: "keep" for op in ops if op.eligible}
    recording, _ = other.record(numbers, known=ops)
    assert not list(recording.saved())
    for found, expected in zip(other.replay(recording), other.expected(), strict=True):
        assert found is not None
        assert expected is not None
        assert torch.equal(found, expected)


def test_operations_are_listed_with_bytes_and_reasons(store: ActivationStore) -> None:
    """Stable numbers; why something has no place to choose."""
    layer = Layer(written_views, [normal(4, 4), normal(4, 4)], store)
    ops = layer.ops()
    assert ops == layer.ops()
    assert [op.number for op in ops] == list(range(len(ops)))
    by_name = {op.name: op for op in ops}
    assert by_name["aten.mm.default"].output_bytes == 64
    assert "writes into" in by_name["aten.add_.Tensor"].reason
    assert "computes nothing" in by_name["aten.select.int"].reason
    assert by_name["aten.sin.default"].eligible
    assert not by_name["aten.sin.default"].is_worth_keeping
    # The first product; nothing needs the last.
    assert planned_bytes(ops, "ssd") == {"keep": 0, "host": 0, "ssd": 64}
    sin = by_name["aten.sin.default"].number
    assert planned_bytes(ops, {0: "keep", sin: "host"}) == {"keep": 64, "host": 4096, "ssd": 0}


def test_plans_that_do_not_fit_the_operations_are_refused(store: ActivationStore) -> None:
    """By number, with the reason."""
    ops = Layer(written_views, [normal(4, 4), normal(4, 4)], store).ops()
    check_activations("block", {0: "keep", 999: "recompute"}, ops)
    with pytest.raises(fuyou.ConfigError, match=f"operation 999, but the block has {len(ops)}"):
        check_activations("block", {999: "keep"}, ops)
    written = next(op.number for op in ops if op.name == "aten.add_.Tensor")
    with pytest.raises(fuyou.ConfigError, match="writes into its argument"):
        check_activations("block", {written: "keep"}, ops)


def test_strides_come_back(store: ActivationStore) -> None:
    """Of outputs that are not contiguous: what follows would take other paths."""
    strides: list[tuple[int, ...]] = []

    def function(x: Tensor) -> Tensor:
        heads = x.view(2, 5, 3, 4).transpose(1, 2)
        out = F.scaled_dot_product_attention(heads, heads, heads)
        strides.append(out.stride())
        return out.transpose(1, 2).reshape(2, 5, 12) * x

    for place in PLACES:
        strides.clear()
        layer = Layer(function, [normal(2, 5, 12)], store)
        layer.check(place)
        assert len(set(strides)) == 1
        assert not any("scaled_dot" in name for name in layer.ran)
