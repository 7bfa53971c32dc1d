"""Losses computed outside of the model against plain torch, whole batch in one micro-batch: equal bits."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.trainer_pt_utils import LabelSmoother

import fuyou
from fuyou.executor.torch_state import TorchState, micro_batch_seed
from tests.fuyou.test_step import Pair
from tests.tiny_models import tiny_batches

Tensor = torch.Tensor
Loss = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(name="make")
def _make(tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(*args: Any, **kwargs: Any) -> Pair:
        made.append(Pair(tmp_path / str(len(made)), *args, **{"micro_batch_size": None} | kwargs))
        return made[-1]

    yield make
    for pair in made:
        pair.model.fuyou.abandon()
    made.clear()
    gc.collect()


def rows(pair: Pair, num_rows: int = 4, seed: int = 3) -> dict[str, Tensor]:
    return tiny_batches(pair.config, 1, 1, batch_size=num_rows, seed=seed)[0][0]


def expected_norm(pair: Pair, loss: Loss, batches: list[dict[str, Tensor]]) -> float:
    """One step of plain torch with a loss of (model, batch)."""
    pair.reference.model = lambda **batch: SimpleNamespace(loss=loss(pair.plain, batch))  # type: ignore[assignment]
    return pair.reference.step(batches, weights=[1.0] * len(batches))[1]


def found_norm(pair: Pair, loss: Loss, batches: list[dict[str, Tensor]]) -> float:
    """The same with the streamed model."""
    for batch in batches:
        loss(pair.model, batch).backward()
    pair.optimizer.step()
    pair.optimizer.zero_grad()
    assert pair.optimizer.last_step is not None
    return pair.optimizer.last_step.grad_norm


def without_labels(batch: dict[str, Tensor]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != "labels"} | {"use_cache": False}


def label_smoothing(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """As Trainer does with label_smoothing_factor."""
    output = model(**without_labels(batch))
    return LabelSmoother(epsilon=0.1)(output, batch["labels"], shift_labels=True)


def log_probabilities(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    labels = batch["labels"][:, 1:]
    chosen = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return (chosen * (labels != -100)).sum(-1)


def preference(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """DPO: a pass with gradients, one without in between, which does not disturb it."""
    policy = log_probabilities(model(**without_labels(batch)).logits, batch)
    with torch.no_grad():
        torch.manual_seed(99)
        reference = log_probabilities(model(**without_labels(batch)).logits, batch)
    margin = (policy - reference).view(2, -1)
    return -F.logsigmoid(0.5 * (margin[0] - margin[1])).mean()


def hidden_states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The embedding's output, a middle layer's and the last one: what the layers above use as well."""
    output = model(**without_labels(batch), output_hidden_states=True)
    first, second, *_, last = output.hidden_states
    return first.pow(2).mean() + second.sin().mean() + (last * 0.3).tanh().mean() + output.logits.pow(2).mean()


def a_lower_hidden_state_alone(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The layers above it get no gradient."""
    return model(**without_labels(batch), output_hidden_states=True).hidden_states[1].pow(2).mean()


def written_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = model(**without_labels(batch)).logits
    logits /= 0.7
    return -log_probabilities(logits, batch).mean()


def tuple_output(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**without_labels(batch), return_dict=False)[0].pow(2).mean()


LOSSES: dict[str, Loss] = {
    "label_smoothing": label_smoothing,
    "preference": preference,
    "hidden_states": hidden_states,
    "a_lower_hidden_state_alone": a_lower_hidden_state_alone,
    "written_logits": written_logits,
    "tuple_output": tuple_output,
}


@pytest.mark.parametrize(
    ("name", "loss"),
    [("llama_tied", loss) for loss in LOSSES]
    + [
        pytest.param("gpt2", "label_smoothing", marks=pytest.mark.slow),
        ("gpt2", "preference"),
        pytest.param("opt", "hidden_states", marks=pytest.mark.slow),
        ("gemma2", "hidden_states"),
    ],
)
def test_custom_losses_equal_plain_torch(make: Callable[..., Pair], name: str, loss: str) -> None:
    """Norms and masters of two steps; dropout on, clipping that triggers."""
    pair = make(name)
    for seed in (3, 4):
        batch = [rows(pair, seed=seed)]
        assert found_norm(pair, LOSSES[loss], batch) == expected_norm(pair, LOSSES[loss], batch)
        pair.model.fuyou.flush()
        pair.assert_nothing_held()
    pair.assert_equal()


@pytest.mark.parametrize("activations", ["recompute", "keep", "ssd"])
@pytest.mark.parametrize("host_memory", ["3MiB", pytest.param("96MiB", marks=pytest.mark.slow)])
def test_any_plan(make: Callable[..., Pair], host_memory: str, activations: str) -> None:
    """In little memory, and with activations that wait."""
    pair = make("llama_tied", host_memory=host_memory, activations=activations)
    for seed in (3, 4):
        batch = [rows(pair, seed=seed)]
        assert found_norm(pair, preference, batch) == expected_norm(pair, preference, batch)
    pair.assert_equal()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_auxiliary_losses_carry_gradients(make: Callable[..., Pair], name: str) -> None:
    """Of routers, in the output as they are in plain transformers."""

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        output = model(**without_labels(batch))
        return output.aux_loss + output.router_logits[1].pow(2).mean() - log_probabilities(output.logits, batch).mean()

    pair = make(name)
    batch = [rows(pair)]
    assert found_norm(pair, loss, batch) == expected_norm(pair, loss, batch)
    pair.assert_equal()


def test_labels_and_outputs(make: Callable[..., Pair]) -> None:
    """outputs_mode: the loss of the model's own is one of the outputs."""

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        output = model(**batch | {"use_cache": False})
        return output.loss + 0.1 * output.logits.pow(2).mean()

    pair = make("gpt2")
    pair.model.fuyou.outputs_mode = True
    batch = [rows(pair)]
    assert found_norm(pair, loss, batch) == expected_norm(pair, loss, batch)
    assert isinstance(pair.model.fuyou.step_metrics()["loss"], float)
    pair.model.fuyou.outputs_mode = False
    assert pair.model(**batch[0]).get("logits") is None


def test_a_loss_that_nobody_told_us_is_not_made_up(make: Callable[..., Pair]) -> None:
    """The step's figures say None; tokens are counted as ever."""
    pair = make()
    batch = rows(pair)
    found_norm(pair, label_smoothing, [batch])
    metrics = pair.model.fuyou.step_metrics()
    assert metrics["loss"] is None
    assert metrics["num_tokens"] == int(batch["attention_mask"].sum())


def test_passes_before_a_step_add_up(make: Callable[..., Pair]) -> None:
    """Gradient accumulation without a queue. Untied: each pass's gradients are summed on their own first."""
    pair = make("llama")
    for seed in (3, 5):
        batches = [rows(pair, seed=seed), rows(pair, seed=seed + 1)]
        assert found_norm(pair, label_smoothing, batches) == expected_norm(pair, label_smoothing, batches)
    pair.assert_equal()


def test_batches_are_split_and_joined(make: Callable[..., Pair]) -> None:
    """Outputs of five rows by twos, as plain transformers gives them; gradients equal up to the order of sums."""
    pair = make("gpt2", micro_batch_size=2, max_grad_norm=1e6)
    batch = rows(pair, 5)
    parts = [{key: value[start : start + 2] for key, value in batch.items()} for start in (0, 2, 4)]
    logits, last = [], []
    for number, part in enumerate(parts):
        torch.manual_seed(micro_batch_seed(7, 0, number))
        output = pair.plain(**without_labels(part), output_hidden_states=True)
        logits.append(output.logits)
        last.append(output.hidden_states[-1])
    expected = torch.cat(logits)
    (-log_probabilities(expected, batch).mean() + torch.cat(last).pow(2).mean()).backward()
    found = pair.model(**without_labels(batch), output_hidden_states=True)
    assert torch.equal(found.logits, expected)
    assert len(found.hidden_states) == 4
    assert torch.equal(found.hidden_states[-1], torch.cat(last))
    (-log_probabilities(found.logits, batch).mean() + found.hidden_states[-1].pow(2).mean()).backward()
    squares = sum(float(p.grad.double().pow(2).sum()) for p in pair.plain.parameters())
    assert pair.optimizer.grad_norm() == pytest.approx(squares**0.5, rel=1e-5)
    pair.optimizer.step()
    spans = [span.name for span in pair.model.fuyou.trace.steps[-1].spans]
    # One after the other, layer by layer: weights cross the bus once.
    assert spans.index("layer 1 forward") > max(i for i, name in enumerate(spans) if name == "layer 0 forward")


def test_scalars_of_a_split_batch(make: Callable[..., Pair]) -> None:
    """The loss by label tokens, of parts that have any."""
    pair = make(micro_batch_size=2, changes={"attention_dropout": 0.0})
    pair.model.fuyou.outputs_mode = True
    batch = rows(pair, 5)
    batch["labels"][2:4] = -100
    found = pair.model(**batch)
    expected = pair.plain(**batch)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    found.loss.backward()
    expected.loss.backward()
    squares = sum(float(p.grad.double().pow(2).sum()) for p in pair.plain.parameters())
    assert pair.optimizer.grad_norm() == pytest.approx(squares**0.5, rel=1e-5)


def test_evaluation_between_forward_and_backward(make: Callable[..., Pair]) -> None:
    """Also of a loss-mode pass, and of another batch."""
    pair = make(changes={"attention_dropout": 0.0}, host_memory="3MiB")
    for seed in (3, 4):
        batch, other = rows(pair, seed=seed), rows(pair, 2, seed=9)
        expected = pair.reference.step([batch])
        loss = pair.model(**batch).loss
        with torch.no_grad():
            found = pair.model.eval()(**other).logits
        pair.model.train()
        pair.model.fuyou.flush()
        loss.backward()
        pair.optimizer.step()
        pair.optimizer.zero_grad()
        assert pair.optimizer.last_step.grad_norm == expected[1]
        assert found.shape[0] == 2
    pair.assert_equal()


class LiveCasts(TorchDispatchMode):
    """Counts the bfloat16 copies of layers' weights that are in memory at once."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self._shapes = shapes
        self._storages: list[StorageWeakRef] = []
        self.most = 0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].shape in self._shapes:
            self._storages.append(StorageWeakRef(result.untyped_storage()))
            self.most = max(self.most, sum(not storage.expired() for storage in self._storages))
        return result


@pytest.mark.parametrize("training", [True, False])
def test_autocast_of_an_adopted_forward_keeps_no_casts(make: Callable[..., Pair], training: bool) -> None:
    """Autocast keeps its casts of weights until it is left, which would be the whole model's at the last layer."""
    pair = make("llama", micro_batch_size=2)
    model: Any = pair.model
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)  # accelerate's, too, is made once
    model.fuyou.adopt_forward()
    layer = {p.shape for p in model.model.layers[0].parameters() if p.ndim == 2}
    with LiveCasts(layer) as casts, torch.set_grad_enabled(training):
        loss = model(**rows(pair)).loss
    assert 0 < casts.most <= 2
    if training:
        loss.backward()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("fails", [True, False])
def test_autocast_of_a_forward_that_ends_early_is_left(make: Callable[..., Pair], fails: bool) -> None:
    """Micro-batches that wait are ended last, behind the step's own autocast: nothing of theirs stays behind."""
    pair = make("llama", micro_batch_size=2)
    model: Any = pair.model
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    model.fuyou.adopt_forward()

    def fail(*_args: Any) -> None:
        assert torch.is_autocast_enabled("cpu")
        raise RuntimeError("in the middle")

    state = TorchState(torch.device("cpu"))
    before = state.get_autocast()
    if fails:
        model.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            model(**rows(pair))
    else:
        assert model.fuyou.list_ops(**rows(pair))
    assert state.get_autocast() == before
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_autocast_cache_enabled()


def test_older_or_used_outputs_are_refused(make: Callable[..., Pair]) -> None:
    """One pass with gradients at a time; one backward pass of each."""
    pair = make()
    batch = without_labels(rows(pair))
    first, second = pair.model(**batch).logits, pair.model(**batch).logits
    with pytest.raises(fuyou.ModelError, match="earlier forward pass"):
        first.sum().backward()
    loss = second.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(fuyou.ModelError, match="used already"):
        loss.backward()
    pair.optimizer.zero_grad()
    pair.assert_nothing_held()


def test_outputs_that_are_forgotten_leave_nothing_held(make: Callable[..., Pair]) -> None:
    """Also after an error in the caller's loss, and when a layer fails while it is computed again."""
    pair = make(changes={"attention_dropout": 0.0})
    batch = rows(pair)

    def fail(*_args: Any) -> None:
        raise RuntimeError("in the middle")

    logits = pair.model(**without_labels(batch)).logits
    handle = pair.model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        logits.sum().backward()
    handle.remove()
    pair.optimizer.zero_grad()
    pair.assert_nothing_held()
    pair.model(**without_labels(batch))
    assert found_norm(pair, label_smoothing, [batch]) == expected_norm(pair, label_smoothing, [batch])
    pair.assert_nothing_held()


def test_frozen_parts(make: Callable[..., Pair]) -> None:
    """The prologue and a layer; then nothing that reaches the output."""
    pair = make(freeze=lambda name: "embed_tokens" in name or "layers.0." in name)
    batch = [rows(pair)]
    assert found_norm(pair, hidden_states, batch) == expected_norm(pair, hidden_states, batch)
    pair.assert_equal()


def test_outputs_without_gradients(make: Callable[..., Pair]) -> None:
    """Under no_grad nothing has changed."""
    pair = make("gpt2")
    batch = without_labels(rows(pair))
    with torch.no_grad():
        found, expected = pair.model.eval()(**batch), pair.plain.eval()(**batch)
    assert torch.equal(found.logits, expected.logits)
    assert not found.logits.requires_grad
