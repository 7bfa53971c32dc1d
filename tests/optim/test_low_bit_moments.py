"""Moments of less than float32 through OffloadedAdamW: the bits of one kernel call over each whole parameter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from io_engine import Store, Transfer
from optim import AdamWScalars, kernels
from tests.optim.harness import (
    SHAPES,
    Gradients,
    LazyDrive,
    PlainAdamW,
    Trainer,
    initial_masters,
    random_gradients,
)

pytestmark = pytest.mark.timeout(60)

LOW_BIT = ("bfloat16", "int8")
SEED = 5
NAMES = [name for shapes in SHAPES.values() for name in shapes if name != "l0.frozen"]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture
def lazy() -> Iterator[LazyDrive]:
    made = LazyDrive()
    yield made
    made.close()


def one_group(parameters: Any) -> list[dict[str, Any]]:
    return [{"params": [parameters[name] for name in NAMES], **OPTIONS}]


class WholeParameters:
    """Each parameter on its own, updated by one kernel call: no records, no chunks, no tiles."""

    def __init__(self, moment_dtype: str, masters: Gradients) -> None:
        self.moment_dtype = moment_dtype
        self.masters = {name: masters[name].copy() for name in NAMES}
        self.moments: dict[str, list[Any]] = {}
        for name, master in self.masters.items():
            zeros = np.zeros_like(master)
            encode = kernels.encode_moments_int8 if moment_dtype == "int8" else kernels.encode_moments_bfloat16
            self.moments[name] = list(encode(zeros, zeros))
        self.num_updates = dict.fromkeys(NAMES, 0)

    def step(self, gradients: Gradients) -> None:
        update = kernels.adamw_float32_int8 if self.moment_dtype == "int8" else kernels.adamw_float32_bfloat16
        for name, gradient in gradients.items():
            self.num_updates[name] += 1
            step = self.num_updates[name]
            scalars = AdamWScalars.at_step(
                lr=OPTIONS["lr"],  # type: ignore[arg-type]
                beta1=0.9,
                beta2=0.99,
                eps=1e-8,
                weight_decay=0.1,
                step=step,
            )
            key = kernels.stochastic_key(SEED, step, name)
            assert update(self.masters[name], *self.moments[name], gradient, scalars, 1.0, key, 0) == 0

    def state_of(self, name: str) -> tuple[Any, Any, Any]:
        decode = kernels.decode_moments_int8 if self.moment_dtype == "int8" else kernels.decode_moments_bfloat16
        return (self.masters[name], *decode(*self.moments[name]))


def check(trainer: Trainer, expected: WholeParameters) -> None:
    for name in NAMES:
        state = trainer.optimizer.state_of(name)
        values = (state.master, state.exp_avg, state.exp_avg_sq)
        for value, wanted in zip(values, expected.state_of(name), strict=True):
            assert np.array_equal(value.flatten().numpy(), wanted), name
        assert state.step == expected.num_updates[name]
    assert trainer.store.verify() == []


@pytest.mark.parametrize("moment_dtype", LOW_BIT)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("window", "resident"), [("backward", ()), ("mixed", ("layers.0",)), ("forward", ("layers.1",))]
)
def test_same_bits_as_one_call_a_parameter(
    window: Literal["backward", "mixed", "forward"],
    resident: tuple[str, ...],
    dtype: str,
    moment_dtype: str,
    lazy: LazyDrive,
    tmp_path: Path,
) -> None:
    """Whatever the window and place, over a resume; parameters without a gradient keep their states."""
    expected = WholeParameters(moment_dtype, initial_masters())
    for run in range(2):
        trainer = Trainer(
            tmp_path / "s",
            lazy,
            window=window,
            resident=resident,
            dtype=dtype,
            moment_dtype=moment_dtype,
            groups=one_group,
            seed=SEED,
        )
        for step in range(3 * run, 3 * run + 3):
            gradients = random_gradients(step)
            if step == 1:
                del gradients["l1.weight"], gradients["norm"]
            trainer.train(gradients)
            expected.step(gradients)
        check(trainer, expected)
        trainer.close()


@pytest.mark.parametrize("moment_dtype", LOW_BIT)
def test_an_update_made_again_rounds_as_if_it_were_the_first(
    moment_dtype: str, lazy: LazyDrive, tmp_path: Path
) -> None:
    """The random bits belong to step and element, not to the attempt."""
    outcomes = []
    for window in ("backward", "forward"):
        trainer = Trainer(
            tmp_path / window, lazy, window=window, moment_dtype=moment_dtype, max_grad_norm=0.5, max_clipped_share=1.0
        )
        for step in range(3):
            trainer.train(random_gradients(step))
        outcomes.append({name: trainer.optimizer.state_of(name) for name in NAMES})
        trainer.close()
    for name in NAMES:
        early, late = (outcome[name] for outcome in outcomes)
        assert torch.equal(early.master, late.master)
        assert torch.equal(early.exp_avg, late.exp_avg)
        assert torch.equal(early.exp_avg_sq, late.exp_avg_sq)


@pytest.mark.parametrize("moment_dtype", ["float32", *LOW_BIT])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_may_be_edited(dtype: str, moment_dtype: str, lazy: LazyDrive, tmp_path: Path) -> None:
    """One parameter's values change, committed; every other bit of its shard stays; training goes on from them."""
    trainer = Trainer(
        tmp_path / "s", lazy, window="backward", resident=("layers.1",), dtype=dtype, moment_dtype=moment_dtype
    )
    trainer.train(random_gradients(0))
    before = {name: trainer.optimizer.state_of(name) for name in NAMES}
    generator = torch.Generator().manual_seed(1)
    master = torch.randn((80, 130), generator=generator).bfloat16().float()
    exp_avg_sq = torch.rand((80, 130), generator=generator)
    trainer.optimizer.set_state("l1.weight", master=master, exp_avg_sq=exp_avg_sq)
    assert trainer.store.step == 1
    assert trainer.store.verify() == []
    for _ in range(2):  # now, and after opening the store again
        for name in NAMES:
            state = trainer.optimizer.state_of(name)
            assert state.step == 1
            if name != "l1.weight":
                assert torch.equal(state.master, before[name].master)
                assert torch.equal(state.exp_avg, before[name].exp_avg)
                assert torch.equal(state.exp_avg_sq, before[name].exp_avg_sq)
                continue
            assert torch.equal(state.master, master)
            assert torch.allclose(state.exp_avg, before[name].exp_avg, rtol=0, atol=1e-4)
            assert torch.allclose(
                state.exp_avg_sq, exp_avg_sq, rtol=0.01, atol=2e-2 if moment_dtype == "int8" else 1e-6
            )
        trainer.close()
        trainer = Trainer(tmp_path / "s", lazy, window="backward", dtype=dtype, moment_dtype=moment_dtype)
    trainer.train(random_gradients(1))
    after = trainer.optimizer.state_of("l1.weight")
    assert not torch.equal(after.master, master)
    assert torch.allclose(after.master, master, atol=0.1)
    trainer.close()


@pytest.mark.parametrize("moment_dtype", ["float32", *LOW_BIT])
def test_editing_one_value_leaves_the_others(moment_dtype: str, lazy: LazyDrive, tmp_path: Path) -> None:
    """Also moments that have less than float32: what they decode to is encoded as it was."""
    trainer = Trainer(tmp_path / "s", lazy, window="backward", moment_dtype=moment_dtype)
    for step in range(3):
        trainer.train(random_gradients(step))
    for name in ("l1.weight", "embed", "norm"):
        before = trainer.optimizer.state_of(name)
        trainer.optimizer.set_state(name, master=before.master)
        after = trainer.optimizer.state_of(name)
        assert torch.equal(after.master, before.master)
        assert torch.equal(after.exp_avg, before.exp_avg)
        assert torch.equal(after.exp_avg_sq, before.exp_avg_sq)
    trainer.close()


def test_an_edit_commits_how_many_updates_a_parameter_missed(lazy: LazyDrive, tmp_path: Path) -> None:
    """A shard that is trained for the first time later: its checksum is committed with the edit, so its count must be."""
    first = Trainer(tmp_path / "s", lazy, window="backward")
    for step in range(3):
        first.train({name: g for name, g in random_gradients(step).items() if name != "norm"})
    first.close()
    with Store.open(tmp_path / "s", engine=lazy) as store:  # as if the epilogue had been frozen until now
        assert "epilogue/state" not in store.checksums
        state: Any = store.state
        del state["optimizer"]["missed"]["norm"]
        store.commit(step=store.step, slots={}, checksums={}, state=state)
    for _ in range(2):
        trainer = Trainer(tmp_path / "s", lazy, window="backward")
        assert trainer.optimizer.state_of("norm").step == 0
        trainer.optimizer.set_state("norm", exp_avg=torch.zeros(100))
        assert trainer.optimizer.state_of("norm").step == 0
        trainer.close()


@pytest.mark.parametrize("kind", ["read", "write"])
def test_ctrl_c_while_a_state_is_read_or_edited(
    kind: str, lazy: LazyDrive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffer goes back when the transfer has ended, not before."""
    trainer = Trainer(tmp_path / "s", lazy, window="backward")
    trainer.train(random_gradients(0))
    trainer.optimizer.flush()
    transfers: list[Transfer] = []
    real = getattr(lazy, kind)

    def interrupted(extent: Any, array: Any) -> Transfer:
        transfer: Transfer = real(extent, array)
        wait = transfer.wait

        def once(timeout_seconds: float | None = None) -> None:
            if not transfers:
                transfers.append(transfer)
                raise KeyboardInterrupt
            wait(timeout_seconds)

        monkeypatch.setattr(transfer, "wait", once)
        return transfer

    monkeypatch.setattr(lazy, kind, interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.optimizer.set_state("embed", exp_avg=torch.zeros(97, 64))
    assert transfers[0].done()
    monkeypatch.undo()
    trainer.optimizer.set_state("embed", exp_avg=torch.zeros(97, 64))
    assert trainer.store.verify() == []
    trainer.close()


def test_edits_that_cannot_be_stored_are_refused(lazy: LazyDrive, tmp_path: Path) -> None:
    trainer = Trainer(tmp_path / "s", lazy, window="backward")
    plain = PlainAdamW(initial_masters())
    change = trainer.optimizer.set_state
    with pytest.raises(KeyError, match="l9"):
        change("l9", master=torch.zeros(1))
    with pytest.raises(ValueError, match=r"shape \(3,\).*\(100,\)"):
        change("norm", exp_avg=torch.zeros(3))
    with pytest.raises(ValueError, match="NaN"):
        change("norm", exp_avg=torch.full((100,), torch.nan))
    with pytest.raises(ValueError, match="mean of squares"):
        change("norm", exp_avg_sq=torch.full((100,), -1.0))
    with pytest.raises(ValueError, match="too large for bfloat16"):
        change("norm", master=torch.full((100,), 3.4e38))
    trainer.backward(random_gradients(0))
    with pytest.raises(RuntimeError, match="gradients wait"):
        change("norm", master=torch.zeros(100))
    trainer.optimizer.step()
    plain.step(random_gradients(0))
    trainer.check(plain)
    trainer.close()
