"""The vertical step against plain torch: scaling, failures, misuse, frozen parts, other ways to call a model."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import greenlet
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import fuyou
import fuyou.runtime
from fuyou.executor.device import Ready
from fuyou.executor.torch_state import micro_batch_seed
from fuyou.executor.weights import NUM_ON_DEVICE
from fuyou.plan import BlockPlan
from optim import OffloadedAdamW
from tests import reference
from tests.reference import ReferenceTrainer
from tests.tiny_models import Batch, tiny_batches, tiny_model_config

OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Pair:
    """A streamed model, and the plain one with the same weights; gradients clipped at 0.5 unless said."""

    def __init__(
        self,
        folder: Path,
        name: str = "llama",
        *,
        changes: dict[str, Any] | None = None,
        max_grad_norm: float | None = 0.5,
        freeze: Callable[[str], bool] = lambda _name: False,
        host_memory: str = "96MiB",
        micro_batch_size: int | None = 2,
        trainable: list[str] | None = None,
        activations: Any = "recompute",
        edit: Callable[[BlockPlan], BlockPlan] | None = None,
        dtype: str = "float32",
    ) -> None:
        self.config = tiny_model_config(name)
        for key, value in (changes or {}).items():
            setattr(self.config, key, value)
        offload = fuyou.OffloadConfig(
            store=folder / "store",
            device="cpu",
            compute_dtype=dtype,
            micro_batch_size=micro_batch_size,
            host_memory=host_memory,
            durability="step",  # whatever another test has measured
        )
        if edit is not None or activations != "recompute":
            edit = edit or (lambda b: dataclasses.replace(b, activations=activations) if b.kind == "layer" else b)
            plan = fuyou.plan_model(
                self.config,
                offload=offload,
                batch_size=2,
                sequence_length=24,
                max_grad_norm=max_grad_norm,
                trainable=trainable,
            )
            blocks = map(edit, plan.blocks)
            offload = dataclasses.replace(offload, plan=dataclasses.replace(plan, blocks=tuple(blocks)))
        self.model = fuyou.from_config(self.config, offload=offload, seed=7, trainable=trainable)
        self.model.save_pretrained(folder / "start")
        implementation = self.config._attn_implementation
        self.plain = AutoModelForCausalLM.from_pretrained(
            folder / "start", dtype=getattr(torch, dtype), attn_implementation=implementation
        )
        for own in (self.model, self.plain):
            for parameter_name, parameter in own.named_parameters():
                if freeze(parameter_name):
                    parameter.requires_grad_(False)
        if trainable is not None:
            streamed = dict(self.model.named_parameters())
            for parameter_name, parameter in self.plain.named_parameters():
                parameter.requires_grad_(streamed[parameter_name].requires_grad)
        self.reference = ReferenceTrainer(
            self.plain, compute_dtype=dtype, max_grad_norm=max_grad_norm, seed=7, **OPTIONS
        )
        self.optimizer = fuyou.AdamW(self.model, max_grad_norm=max_grad_norm, **OPTIONS)

    def batch(self, num_micro_batches: int = 3, seed: int = 3) -> list[Batch]:
        return tiny_batches(self.config, 1, num_micro_batches, seed=seed)[0]

    def step(self, batch: dict[str, Any], scale: float = 1.0) -> tuple[float, float]:
        loss = self.model(**batch).loss
        (loss * scale).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.model.fuyou.step_metrics()["loss"], self.optimizer.last_step.grad_norm

    def assert_equal(self) -> None:
        for name, master in self.reference.masters().items():
            assert torch.equal(self.optimizer.state_of(name).master.flatten(), master.flatten()), name

    def assert_nothing_held(self) -> None:
        """No weight bound, no gradient and no activation in memory, no greenlet waiting."""
        executor = self.model.fuyou._executor
        assert not executor._bound
        assert not executor._gradients
        assert not executor._forward.is_running
        pools = {pool.name: pool.used_bytes for pool in self.model.fuyou._pools}
        assert pools["activations"] == 0
        self.optimizer.zero_grad()
        assert pools["gradients"] == 0 or self.optimizer._pending


@pytest.fixture(name="make")
def _make(tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(*args: Any, **kwargs: Any) -> Pair:
        made.append(Pair(tmp_path / str(len(made)), *args, **kwargs))
        return made[-1]

    yield make
    for pair in made:
        pair.model.fuyou.abandon()
    made.clear()
    gc.collect()


def joined(batch: list[Batch]) -> Batch:
    return {key: torch.cat([m[key] for m in batch]) for key in batch[0]}


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("scale", [0.25, 8.0])
def test_scaled_loss(make: Callable[..., Pair], scale: float, max_grad_norm: float | None) -> None:
    """(loss * scale).backward(), a power of two: the bits of plain torch with the same scale."""
    pair = make("llama_tied", max_grad_norm=max_grad_norm)
    batch = pair.batch()
    weights = [scale * weight for weight in reference.target_weights(batch)]
    expected_norm = pair.reference.step(batch, weights)[1]
    assert pair.step(joined(batch), scale)[1] == expected_norm
    pair.assert_equal()


def test_scale_that_rounds(make: Callable[..., Pair]) -> None:
    """One third: equal up to rounding."""
    pair = make()
    batch = pair.batch()
    expected = pair.reference.step(batch, [w / 3 for w in reference.target_weights(batch)])[1]
    assert pair.step(joined(batch), 1 / 3)[1] == pytest.approx(expected, rel=1e-5)


def test_forward_without_backward_is_forgotten(make: Callable[..., Pair]) -> None:
    """As in plain torch, where its graph is freed."""
    pair = make(changes={"attention_dropout": 0.0})
    batch = pair.batch()
    pair.model(**joined(pair.batch(seed=8)))
    expected = pair.reference.step(batch)
    assert pair.step(joined(batch))[1] == expected[1]
    pair.assert_equal()


def test_no_greenlet_outlives_its_pass(make: Callable[..., Pair]) -> None:
    """On CUDA the backward pass runs on another thread, where they could not be entered; also after an error."""
    pair = make()
    batch = joined(pair.batch())
    inside: list[int] = []
    layer = pair.model.model.layers[1]
    hook = layer.register_forward_pre_hook(lambda *_: inside.append(num_greenlets()))

    def num_greenlets() -> int:
        return sum(type(o) is greenlet.greenlet and bool(o) and not o.dead for o in gc.get_objects())

    greenlet.getcurrent()  # the thread's own, which comes into being when it is first asked for
    before = num_greenlets()
    loss = pair.model(**batch).loss
    assert max(inside) == before + 3  # one for each micro-batch
    assert num_greenlets() == before
    loss.backward()
    assert num_greenlets() == before
    hook.remove()
    hook = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pair.model(**batch)
    hook.remove()
    assert num_greenlets() == before


def test_older_or_used_losses_are_refused(make: Callable[..., Pair]) -> None:
    """Their activations are gone; plain torch would keep two graphs."""
    pair = make(changes={"attention_dropout": 0.0})
    batch = pair.batch()
    first = pair.model(**joined(pair.batch(seed=8))).loss
    second = pair.model(**joined(batch)).loss
    with pytest.raises(fuyou.ModelError, match="earlier forward pass"):
        first.backward()
    second.backward()
    with pytest.raises(fuyou.ModelError, match="used already"):
        second.backward()
    pair.optimizer.step()
    pair.reference.step(batch)
    pair.assert_equal()


class Broken(RuntimeError):
    """Raised in the middle of a model."""


@contextlib.contextmanager
def failing(module: torch.nn.Module, at_call: int) -> Iterator[None]:
    """The `at_call`-th call of a module raises."""
    calls = 0

    def hook(*_args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at_call:
            raise Broken

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(("host_memory", "activations"), [("96MiB", "recompute"), ("3MiB", "host")])
@pytest.mark.parametrize(
    ("where", "at_call"),
    [
        ("model.embed_tokens", 2),
        pytest.param("model.layers.0.self_attn.q_proj", 1, marks=pytest.mark.slow),
        ("model.layers.1.mlp", 2),  # second micro-batch
        ("model.layers.2.mlp", 5),  # when computed again in backward
        pytest.param("model.layers.0.mlp", 6, marks=pytest.mark.slow),
        pytest.param("model.norm", 3, marks=pytest.mark.slow),
        ("lm_head", 1),
    ],
)
def test_exceptions_leave_nothing_held(
    make: Callable[..., Pair], where: str, at_call: int, host_memory: str, activations: str
) -> None:
    """The error of the model's own comes through; the next step is as if nothing had happened."""
    pair = make(changes={"attention_dropout": 0.0}, host_memory=host_memory, activations=activations)
    batch = pair.batch()
    with pytest.raises(Broken), failing(pair.model.get_submodule(where), at_call):
        pair.step(joined(batch))
    pair.optimizer.zero_grad()
    pair.assert_nothing_held()
    assert torch.is_grad_enabled()
    for seed in (3, 4):
        expected = pair.reference.step(pair.batch(seed=seed))
        assert pair.step(joined(pair.batch(seed=seed)))[1] == expected[1]
    pair.assert_equal()


@pytest.mark.parametrize("training", [True, False])
def test_interrupts_leave_nothing_held(make: Callable[..., Pair], training: bool) -> None:
    """Ctrl-C between two layers is no Exception."""
    pair = make()

    def interrupt(*_args: Any) -> None:
        raise KeyboardInterrupt

    pair.model.model.layers[1].register_forward_pre_hook(interrupt)
    call: Callable[..., Any] = pair.step if training else _evaluate(pair)
    with pytest.raises(KeyboardInterrupt):
        call(joined(pair.batch()))
    pair.assert_nothing_held()
    assert torch.is_grad_enabled()


def _evaluate(pair: Pair) -> Callable[..., Any]:
    def call(batch: dict[str, Any]) -> Any:
        with torch.no_grad():
            return pair.model(**batch)

    return call


def test_parts_of_the_model_are_refused(make: Callable[..., Pair]) -> None:
    """Their weights are on the drive."""
    pair = make()
    ids = torch.ones(1, 4, dtype=torch.long)
    hidden = torch.zeros(1, 4, 64)
    calls: list[Callable[[], Any]] = [
        lambda: pair.model.model(input_ids=ids),
        lambda: pair.model.model.layers[0](hidden),
        lambda: pair.model.lm_head(hidden),
        lambda: pair.model.get_input_embeddings()(ids),
        lambda: pair.model.model.layers[0].mlp(hidden),
    ]
    for call in calls[:-1]:
        with pytest.raises(fuyou.ModelError, match="on the drive"):
            call()
    # Inside of layers nothing is checked for speed: the result cannot pass for one.
    assert torch.isnan(calls[-1]()).all()
    pair.assert_nothing_held()


def test_models_are_not_reentrant(make: Callable[..., Pair]) -> None:
    """A hook that calls the model again."""
    pair = make()
    batch = joined(pair.batch(1))

    def again(*_args: Any) -> None:
        with torch.no_grad():
            pair.model.fuyou._executor.infer(batch)

    handle = pair.model.model.norm.register_forward_pre_hook(again)
    with pytest.raises(fuyou.ModelError, match="running already"):
        pair.model(**batch)
    handle.remove()


def test_methods_that_would_work_on_placeholders_are_refused(make: Callable[..., Pair]) -> None:
    """One sentence each."""
    pair = make()
    for call in (
        pair.model.half,
        pair.model.double,
        lambda: pair.model.load_state_dict({}),
        pair.model.gradient_checkpointing_enable,
        lambda: list(pair.model.state_dict().values()),
        lambda: torch.save(pair.model.state_dict(), io.BytesIO()),
    ):
        with pytest.raises(fuyou.ModelError):
            call()
    pair.model.zero_grad()
    with pytest.raises(fuyou.ModelError, match="cannot be set"):
        next(pair.model.parameters()).grad = torch.zeros(1)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_hidden_states_and_attentions_may_be_asked_for(make: Callable[..., Pair], name: str) -> None:
    """Also in training, where the outputs hold the loss alone."""
    pair = make(name)
    batch = pair.batch()
    expected = pair.reference.step(batch)
    assert pair.step(joined(batch) | {"output_hidden_states": True}) == expected
    pair.assert_equal()
    with torch.no_grad():
        wanted = pair.plain.eval()(**batch[0], output_hidden_states=True)
        found = pair.model.eval()(**batch[0], output_hidden_states=True)
    assert len(found.hidden_states) == len(wanted.hidden_states)
    for ours, theirs in zip(found.hidden_states, wanted.hidden_states, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("activations", ["recompute", "keep", "ssd"])
def test_autocast_around_the_call(make: Callable[..., Pair], activations: str) -> None:
    """bfloat16 autocast over float32 weights: the gradients of plain torch."""
    pair = make(max_grad_norm=1e6, activations=activations)
    batch = pair.batch()
    norms = []
    weights = reference.target_weights(batch)
    losses = []
    for index, (micro_batch, weight) in enumerate(zip(batch, weights, strict=True)):
        torch.manual_seed(micro_batch_seed(7, 0, index))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = pair.plain(**micro_batch, use_cache=False).loss
        losses.append(weight * float(loss.detach()))
        torch.autograd.backward(loss, torch.tensor(weight, dtype=loss.dtype))
    for _name, parameter in sorted(pair.plain.named_parameters()):
        norms.append(reference.sum_of_squares(parameter.grad.flatten().numpy()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pair.model(**joined(batch)).loss
    loss.backward()
    pair.optimizer.step()
    assert pair.model.fuyou.step_metrics()["loss"] == reference.sum_in_order(losses)
    assert pair.optimizer.last_step.grad_norm == reference.sum_in_order(norms) ** 0.5
    assert not torch.is_autocast_enabled("cpu")


def test_float16_autocast_is_refused(make: Callable[..., Pair]) -> None:
    """It needs a scaler."""
    pair = make()
    with pytest.raises(fuyou.ConfigError, match="float16"), torch.autocast("cpu", dtype=torch.float16):
        pair.model(**joined(pair.batch()))


def test_other_arguments(make: Callable[..., Pair]) -> None:
    """No mask; positions given; embeddings instead of ids."""
    pair = make(changes={"attention_dropout": 0.0})
    ids = torch.randint(3, 128, (4, 10), generator=torch.Generator().manual_seed(0))
    embeddings = torch.randn(4, 10, 64, generator=torch.Generator().manual_seed(1))
    variants: list[dict[str, torch.Tensor]] = [
        {"input_ids": ids, "labels": ids},
        {"input_ids": ids, "labels": ids, "position_ids": torch.arange(5, 15).expand(4, 10)},
        {"inputs_embeds": embeddings, "labels": ids},
    ]
    for variant in variants:
        batch = [{k: v[:2] for k, v in variant.items()}, {k: v[2:] for k, v in variant.items()}]
        expected = pair.reference.step(batch)
        assert pair.step(variant) == expected
        pair.assert_equal()


def test_embeddings_that_need_a_gradient(make: Callable[..., Pair]) -> None:
    """They are the caller's own leaf, which gets its gradient."""
    pair = make(changes={"attention_dropout": 0.0}, max_grad_norm=1e6)
    ids = torch.randint(3, 128, (2, 10), generator=torch.Generator().manual_seed(0))
    leaves = [torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    pair.plain(inputs_embeds=leaves[0], labels=ids).loss.backward()
    pair.model(inputs_embeds=leaves[1], labels=ids).loss.backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_prologues_with_weights_that_their_backward_pass_reads(make: Callable[..., Pair]) -> None:
    """OPT's projection behind its embedding: its weights have left memory, and other weights have come there, by then."""
    # As large as a layer, so that both take the same kind of buffer.
    pair = make("opt", changes={"vocab_size": 512}, host_memory="3MiB")
    for seed in (3, 4):
        batch = pair.batch(seed=seed)
        assert pair.step(joined(batch)) == pair.reference.step(batch)
    pair.assert_equal()


def test_uneven_micro_batches(make: Callable[..., Pair]) -> None:
    """Seven rows by threes, the middle three without a label."""
    pair = make(micro_batch_size=3, changes={"attention_dropout": 0.0})
    rows = tiny_batches(pair.config, 1, 1, batch_size=7, seed=1)[0][0]
    rows["labels"][3:6] = -100
    expected = pair.reference.step([{k: v[:3] for k, v in rows.items()}, {k: v[6:] for k, v in rows.items()}])
    assert pair.step(rows) == expected
    pair.assert_equal()


def test_no_labels_at_all(make: Callable[..., Pair]) -> None:
    """Said, not NaN."""
    pair = make()
    batch = pair.batch(1)[0]
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(fuyou.DataError, match="no label tokens"):
        pair.model(**batch)


def test_evaluation_keeps_every_row(make: Callable[..., Pair]) -> None:
    """A batch that is split for memory, a part of it without labels: all logits, and the loss over all label tokens."""
    pair = make(micro_batch_size=3, changes={"attention_dropout": 0.0})
    rows = tiny_batches(pair.config, 1, 1, batch_size=7, seed=1)[0][0]
    rows["labels"][3:6] = -100
    with torch.no_grad():
        found, expected = pair.model(**rows), pair.plain(**rows)
        assert torch.allclose(found.logits, expected.logits, atol=1e-6)
        assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
        # As plain transformers has it: no label, no loss.
        rows["labels"][:] = -100
        assert torch.isnan(pair.model(**rows).loss)
        assert torch.isnan(pair.plain(**rows).loss)


@pytest.mark.parametrize("max_grad_norm", [pytest.param(None, marks=pytest.mark.slow), 0.5])
@pytest.mark.parametrize(
    "frozen",
    [
        ("model.embed_tokens", "model.layers.0.", "model.layers.1."),
        ("lm_head", "model.norm"),
        ("model.layers.1.",),
        ("mlp",),
        ("model.embed_tokens",),
    ],
    ids=["lower part", "epilogue", "middle layer", "parts of layers", "embedding"],
)
def test_frozen_parts(make: Callable[..., Pair], frozen: tuple[str, ...], max_grad_norm: float | None) -> None:
    """requires_grad_(False) before the optimizer is made."""
    pair = make(freeze=lambda name: any(part in name for part in frozen), max_grad_norm=max_grad_norm)
    for seed in (3, 4):
        batch = pair.batch(seed=seed)
        assert pair.step(joined(batch)) == pair.reference.step(batch)
    pair.assert_equal()
    spans = {span.name for trace in pair.model.fuyou.trace.steps for span in trace.spans}
    assert ("layer 0 backward" in spans) == ("model.layers.0." not in frozen)


def test_trainable_patterns(make: Callable[..., Pair]) -> None:
    """The same by the names of what is trained."""
    pair = make(trainable=[r"model\.layers\.2\..*", r".*norm.*"])
    assert not pair.model.lm_head.weight.requires_grad
    for seed in (3, 4):
        batch = pair.batch(seed=seed)
        assert pair.step(joined(batch)) == pair.reference.step(batch)
    pair.assert_equal()


def test_layer_drop(make: Callable[..., Pair]) -> None:
    """Layers left out for some micro-batches, the last one too; where all are, sums are made in another order."""
    pair = make("opt", changes={"layerdrop": 0.5})
    for seed in range(4):
        batch = pair.batch(seed=seed)
        assert pair.step(joined(batch)) == pytest.approx(pair.reference.step(batch), rel=1e-6)


def test_random_numbers_of_the_caller_are_left_alone(make: Callable[..., Pair]) -> None:
    """Training draws from generators of its own."""
    pair = make("gpt2")
    torch.manual_seed(11)
    state = torch.get_rng_state()
    pair.step(joined(pair.batch()))
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_between_steps(make: Callable[..., Pair]) -> None:
    """Losses and logits of the weights as they are, dropout on in training mode, and generation."""
    pair = make("gpt2")
    batch = pair.batch()
    assert pair.step(joined(batch)) == pair.reference.step(batch)
    for mode in (False, True):
        pair.model.train(mode)
        pair.plain.train(mode)
        with torch.no_grad():
            torch.manual_seed(0)
            found = pair.model(**batch[0])
            torch.manual_seed(0)
            expected = pair.plain(**batch[0])
        assert torch.equal(found.loss, expected.loss)
        assert torch.equal(found.logits, expected.logits)
    pair.model.eval()
    pair.plain.eval()
    ids = batch[0]["input_ids"][:1, :4]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(pair.model.generate(ids, **options), pair.plain.generate(ids, **options))
    pair.model.train()
    pair.plain.train()
    assert pair.step(joined(batch)) == pair.reference.step(batch)
    pair.assert_equal()


class LateDevice:
    """Memory of its own, and copies that arrive only when they are waited for.

    What CUDA would do wrong now and then for a missing wait, this does every time: until its download has arrived, host
    memory holds nothing of use; whoever writes to memory that is still being copied from, on either side, or gives a
    buffer to somebody else, is found out at the next copy.
    """

    has_own_memory = True

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.num_uploads = self.num_weight_uploads = self.num_downloads = self.most_weights = 0
        self._weights: dict[int, torch.Tensor] = {}
        self._under_way: dict[int, tuple[bool, Callable[[], None]]] = {}
        # The optimizer's threads wait for copies, too.
        self._lock = threading.RLock()

    def upload(self, host: torch.Tensor) -> tuple[torch.Tensor, Ready]:
        self.num_uploads += 1
        device = host.clone()
        text = "the host changed memory that was still being uploaded"
        return device, self._begin(True, host, device.clone(), text, lambda: None)

    def reserve_weights(self, num_bytes: Sequence[int]) -> None:
        assert not self._weights

    def upload_weights(self, host: torch.Tensor) -> tuple[torch.Tensor, Ready]:
        self.num_weight_uploads += 1
        device, ready = self.upload(host)
        self._weights[device.data_ptr()] = device
        self.most_weights = max(self.most_weights, len(self._weights))
        return device, ready

    def release_weights(self, device: torch.Tensor) -> None:
        """Whatever still looks at it sees another block's weights, or nothing of use."""
        _bits(self._weights.pop(device.data_ptr())).fill_(0xFF)

    def download(self, device: torch.Tensor, host: torch.Tensor) -> Ready:
        self.num_downloads += 1
        _bits(host).fill_(0xFF)
        text = "the device changed memory that was still being downloaded"
        source = device.detach()
        return self._begin(False, source, source.clone(), text, lambda: host.copy_(source))

    def _begin(
        self, is_upload: bool, source: torch.Tensor, before: torch.Tensor, text: str, arrive: Callable[[], Any]
    ) -> Ready:
        self.check()
        number = self.num_uploads + self.num_downloads

        def unchanged() -> None:
            assert torch.equal(_bits(before), _bits(source)), text

        self._under_way[number] = (is_upload, unchanged)

        def ready() -> None:
            with self._lock:
                if self._under_way.pop(number, None) is None:
                    return
                unchanged()
                arrive()
                if not is_upload:
                    # Compute, which a download comes behind, has used what was uploaded before.
                    for earlier, (was_upload, _check) in list(self._under_way.items()):
                        if was_upload and earlier < number:
                            del self._under_way[earlier]

        return ready

    def check(self) -> None:
        """Nothing that is still being copied has changed."""
        with self._lock:
            for _is_upload, unchanged in self._under_way.values():
                unchanged()

    def check_all_waited_for(self) -> None:
        """Nothing is still being copied."""
        self.check()
        assert not self._under_way

    def gradient_sum(self, host: torch.Tensor) -> torch.Tensor:
        return torch.full_like(host, float("nan"))

    def current(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        pass

    def timing(self, _name: str) -> contextlib.AbstractContextManager[bool]:
        return contextlib.nullcontext(False)

    def collect_spans(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return 1


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a flat tensor, as a view."""
    return tensor.view(torch.uint8)


DEVICE_SAMPLE = {
    ("llama_tied", "96MiB", None),
    ("llama_tied", "3MiB", 0.5),
    ("gpt2", "3MiB", None),
    ("qwen3_moe", "96MiB", 0.5),
}


@pytest.mark.parametrize(
    ("name", "host_memory", "max_grad_norm"),
    [
        pytest.param(*case, marks=() if case in DEVICE_SAMPLE else pytest.mark.slow)
        for case in itertools.product(("llama_tied", "gpt2", "qwen3_moe"), ("96MiB", "3MiB"), (None, 0.5))
    ],
)
def test_device_with_memory_of_its_own(
    make: Callable[..., Pair],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    host_memory: str,
    max_grad_norm: float | None,
) -> None:
    """Every copy to and from the device is waited for before its bytes are used: the same bits as without copies."""
    device = LateDevice()
    monkeypatch.setattr(fuyou.runtime, "make_device", lambda *_args: device)
    pair = make(name, host_memory=host_memory, max_grad_norm=max_grad_norm)
    for seed in (3, 4, 5):
        batch = pair.batch(seed=seed)
        assert pair.step(joined(batch)) == pair.reference.step(batch)
    pair.assert_equal()
    device.check()
    assert device.num_uploads > 0
    assert device.num_downloads > 0
    # Those that stay in host memory, too, are on the device for their turn alone.
    assert 0 < device.most_weights <= NUM_ON_DEVICE
    assert not device._weights


@pytest.mark.parametrize("has_device", [False, True])
@pytest.mark.parametrize("host_memory", ["96MiB", "3MiB"])
@pytest.mark.parametrize("name", ["llama_tied", "qwen3_moe"])
def test_one_micro_batch_in_bfloat16(
    make: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, name: str, host_memory: str, has_device: bool
) -> None:
    """Its gradients stay in bfloat16, unless something is to be added to them: the bits of sums in float32."""
    if has_device:
        device = LateDevice()
        monkeypatch.setattr(fuyou.runtime, "make_device", lambda *_args: device)
    pair = make(name, host_memory=host_memory, max_grad_norm=0.5, dtype="bfloat16")
    dtypes: dict[str, Any] = {}
    acquire = pair.optimizer.acquire_gradient

    def acquire_gradient(shard: str, dtype: Any) -> Any:
        dtypes[shard] = dtype
        return acquire(shard, dtype)

    monkeypatch.setattr(pair.optimizer, "acquire_gradient", acquire_gradient)
    whole = {"prologue"} if name == "llama_tied" else set()
    for step, num_micro_batches in enumerate((1, 2, 1)):
        batch = pair.batch(num_micro_batches, seed=step)
        assert pair.step(joined(batch)) == pair.reference.step(batch)
        assert {s for s, dtype in dtypes.items() if dtype is np.float32} == (
            whole if num_micro_batches == 1 else set(dtypes)
        )
    batch = pair.batch(1, seed=3)
    assert pair.step(joined(batch), 0.25)[1] == pair.reference.step(batch, [0.25])[1]
    # A pass after the other: what is in memory, or spilled, is added to.
    batch = pair.batch(3, seed=4)
    for micro_batch in batch:
        pair.model(**micro_batch).loss.backward()
    pair.optimizer.step()
    assert pair.optimizer.last_step.grad_norm == pair.reference.step(batch, [1.0] * 3)[1]
    pair.assert_equal()
    if has_device:
        device.check()


def test_a_gradient_of_more_bits_than_its_parameter(make: Callable[..., Pair]) -> None:
    """torch's `grad_dtype`: nothing of it is rounded, also where there is one micro-batch."""
    pair = make(dtype="bfloat16")
    for model in (pair.model, pair.plain):
        parameter = model.get_parameter("model.layers.1.mlp.up_proj.weight")
        parameter.grad_dtype = torch.float32
        parameter.register_hook(lambda gradient: gradient.float() / 3)
    batch = pair.batch(1)
    assert pair.step(joined(batch)) == pair.reference.step(batch)
    pair.assert_equal()


@pytest.mark.parametrize("in_host", [True, False])
@pytest.mark.parametrize("trainable", [None, ["model.layers.1"]])
def test_weights_that_stay_on_the_device(
    make: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, trainable: list[str] | None, in_host: bool
) -> None:
    """Frozen ones for good, late ones from forward to backward: not read, not copied again, and never older than a step."""
    device = LateDevice()
    monkeypatch.setattr(fuyou.runtime, "make_device", lambda *_args: device)

    def edit(block: BlockPlan) -> BlockPlan:
        late = block.trainable and not block.name.endswith("1")
        changes: dict[str, Any] = {"update_window": "forward", "gradient": "host"} if late else {}
        return dataclasses.replace(
            block, weights_on_device=True, weights_in_host=in_host, states_in_host=False, **changes
        )

    pair = make(max_grad_norm=0.5 if trainable is None else 1e9, trainable=trainable, edit=edit)
    plan, runtime = pair.model.fuyou.plan, pair.model.fuyou
    uploads, read = 0, 0
    for seed in (3, 4, 5, 6):
        batch = pair.batch(seed=seed)
        uploads, read = device.num_weight_uploads, runtime.bytes_moved[0]
        pair.model.eval()
        with torch.no_grad():
            assert torch.isfinite(pair.model(**joined(batch)).loss)
        pair.model.train()
        assert pair.step(joined(batch)) == pair.reference.step(batch)
        runtime.flush()
        read = runtime.bytes_moved[0] - read
    pair.assert_equal()
    device.check()
    kept = {b.name for b in plan.blocks if not b.trainable}
    assert {name for name, shard in runtime._weights._loaded.items() if shard.on_device is not None} == kept
    if trainable is not None:
        # The one that is trained comes for evaluation, forward and backward pass; all others were there.
        assert device.num_weight_uploads - uploads == 3
        states = sum(b.state_bytes for b in plan.blocks)
        weights = sum(b.weight_bytes for b in plan.blocks if b.trainable)
        assert read == states + (0 if in_host else 3 * weights)
    else:
        # Late ones once for both passes, the early one for each; each for the evaluation; late ones for the flush.
        assert device.num_weight_uploads - uploads == 2 * len(plan.blocks) + 1 + len(plan.blocks) - 1
    runtime.close()
    assert not device._weights


@pytest.mark.parametrize(
    ("activations", "host_memory"),
    [("keep", "96MiB"), ("host", "96MiB"), pytest.param("host", "3MiB", marks=pytest.mark.slow), ("ssd", "3MiB")],
)
@pytest.mark.parametrize("name", ["gpt2", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_activations_on_a_device_with_memory_of_its_own(
    make: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, name: str, activations: str, host_memory: str
) -> None:
    """No operation writes over what is still on its way to the host, and no buffer changes hands too soon."""
    device = LateDevice()
    monkeypatch.setattr(fuyou.runtime, "make_device", lambda *_args: device)
    pair = make(name, host_memory=host_memory, activations=activations)
    for seed in (3, 4):
        batch = pair.batch(seed=seed)
        assert pair.step(joined(batch)) == pair.reference.step(batch)
    pair.assert_equal()
    device.check()
    pair.model.fuyou.flush()
    pair.assert_nothing_held()


def test_hooks_of_a_step_run_once(make: Callable[..., Pair]) -> None:
    """Also where the class that a streamed model's optimizer comes from has been used by itself, and has torch's hooks."""
    torch.optim.Optimizer._patch_step_function(OffloadedAdamW.__new__(OffloadedAdamW))
    pair = make()
    calls: list[str] = []
    pair.optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    pair.optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    pair.step(joined(pair.batch()))
    assert calls == ["before", "after"]
