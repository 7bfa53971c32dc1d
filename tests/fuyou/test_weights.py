"""The stream of weights: what is read when, what stays, what compute waits for."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

import fuyou
from fuyou.executor.device import HostDevice
from fuyou.executor.weights import WeightStream
from fuyou.trace import WAIT_LANE
from io_engine import BufferPool, Extent, MockEngine, Store, Transfer
from optim import OffloadedAdamW, ShardLayout

NAMES = [*"abcdef"]
NUM_ELEMENTS = 2048


class Drive:
    """A store's extents, one file a shard, filled with the shard's number; counts reads."""

    def __init__(self) -> None:
        self.engine = MockEngine()
        self.layouts = {n: ShardLayout.of(n, {f"{n}.w": (NUM_ELEMENTS,)}, "float32", 4096, "float32") for n in NAMES}
        for number, layout in enumerate(self.layouts.values()):
            self.fill(layout, number)

    def fill(self, layout: ShardLayout, value: float) -> None:
        with BufferPool(layout.weight_bytes, name="fill") as pool:
            buffer = pool.acquire(layout.weight_bytes)
            buffer.array.view(np.float32)[:] = value
            self.engine.write(self.extent(layout.weight_name), buffer.array).wait()
            buffer.release()

    def extent(self, name: str, _slot: int | None = None) -> Extent:
        owner = next(layout for layout in self.layouts.values() if layout.weight_name == name)
        return Extent(f"/drive/{owner.name}", 0, owner.weight_bytes)


class Optimizer:
    """Notes what is waited for."""

    def __init__(self) -> None:
        self.waited: list[tuple[str, str]] = []

    def trains(self, _shard: str) -> bool:
        return True

    def slot_of(self, _shard: str) -> int:
        return 0

    def is_written(self, _shard: str) -> bool:
        return True

    def has_pending_update(self, _shard: str) -> bool:
        return False

    def wait_written(self, shard: str) -> None:
        self.waited.append(("written", shard))

    def wait_updated(self, shard: str) -> None:
        self.waited.append(("updated", shard))


class Streamed:
    """A stream over a drive, with room for three blocks."""

    def __init__(self, resident: frozenset[str] = frozenset(), num_buffers: int = 3) -> None:
        self.drive = Drive()
        size = next(iter(self.drive.layouts.values())).weight_bytes
        self.pool = BufferPool(num_buffers * size, name="weights")
        self.stream = WeightStream(
            engine=self.drive.engine,
            store=cast(Store, self.drive),
            pool=self.pool,
            layouts=self.drive.layouts,
            resident=resident,
            prefetch_depth=2,
            device=HostDevice(),
        )
        self.optimizer = Optimizer()
        self.stream.optimizer = cast(OffloadedAdamW, self.optimizer)

    def visit(self, name: str) -> float:
        shard = self.stream.acquire(name)
        value = float(shard.host_tensor()[0])
        self.stream.release(shard)
        return value

    def num_reads(self) -> int:
        layout = self.drive.layouts["a"]
        return self.drive.engine.bytes_read // layout.weight_bytes + self.drive.engine.num_under_way


@pytest.fixture(name="streamed")
def _streamed() -> Iterator[Streamed]:
    made = Streamed()
    yield made
    made.stream.close()
    assert made.pool.used_bytes == 0
    made.pool.close()


def test_backward_is_read_ahead_during_forward(streamed: Streamed) -> None:
    """The last block is not read again for its next visit, the one before it is on its way when that begins."""
    streamed.stream.announce([*"abc", *"cba"])
    assert [streamed.visit(name) for name in "abc"] == [0, 1, 2]
    assert streamed.num_reads() == 4  # a, b, c, and b again
    streamed.stream.announce([*"cba"])
    assert streamed.num_reads() == 4
    assert [streamed.visit(name) for name in "cba"] == [2, 1, 0]
    assert streamed.num_reads() == 5


def test_what_an_update_gives_back_is_read_into_while_compute_goes_on() -> None:
    """Its memory comes back from another thread, at a moment when nobody asks for weights."""
    streamed = Streamed(num_buffers=2)
    stream = streamed.stream
    stream.announce([*"abc"])
    updated = stream.acquire("a")
    stream.hand_over(updated)
    computed = stream.acquire("b")
    stream.read_ahead()
    assert streamed.num_reads() == 2  # "a" is being updated in one, compute has the other
    with ThreadPoolExecutor(1) as other:
        other.submit(stream.end_use, updated).result()
    assert streamed.num_reads() == 2
    stream.read_ahead()
    assert streamed.num_reads() == 3
    stream.release(computed)
    assert streamed.visit("c") == 2
    stream.close()
    assert streamed.pool.used_bytes == 0
    streamed.pool.close()


def test_what_was_read_ahead_for_nothing_is_given_back(streamed: Streamed) -> None:
    streamed.stream.announce([*"abc"])
    streamed.visit("a")
    streamed.stream.announce([*"de"])
    assert [streamed.visit(name) for name in "de"] == [3, 4]
    streamed.stream.announce(())
    assert streamed.pool.used_bytes == 0


def test_nothing_announced_means_read_anew(streamed: Streamed) -> None:
    """As before a step that changes what was read ahead."""
    streamed.stream.announce([*"ab"])
    streamed.drive.engine.run_all()
    streamed.drive.fill(streamed.drive.layouts["a"], 7)
    streamed.stream.announce(())
    streamed.stream.announce([*"ab"])
    assert streamed.visit("a") == 7


def test_states_edited_in_the_store_are_read_anew(streamed: Streamed) -> None:
    streamed.stream.announce([*"ab"])
    streamed.drive.engine.run_all()
    streamed.drive.fill(streamed.drive.layouts["a"], 7)
    streamed.stream.forget_resident()
    assert streamed.visit("a") == 7


def test_what_stays_in_memory_does_not_count_as_read_ahead() -> None:
    streamed = Streamed(resident=frozenset("abc"), num_buffers=5)
    assert [streamed.visit(name) for name in "abc"] == [0, 1, 2]
    streamed.stream.announce([*"abcdef"])
    assert streamed.num_reads() == 5  # d and e, while a, b and c are computed with
    assert [streamed.visit(name) for name in "abcdef"] == [0, 1, 2, 3, 4, 5]
    assert streamed.num_reads() == 6
    streamed.stream.close()
    assert streamed.pool.used_bytes == 0
    streamed.pool.close()


def test_a_block_that_stays_gives_way_where_memory_is_short() -> None:
    streamed = Streamed(num_buffers=1)
    streamed.stream.announce([*"aab"])
    assert streamed.visit("a") == 0
    assert streamed.visit("b") == 1  # though "a" was to be visited again first
    assert streamed.visit("a") == 0
    streamed.stream.close()
    assert streamed.pool.used_bytes == 0
    streamed.pool.close()


def test_weights_in_memory_wait_for_their_update_not_for_the_drive() -> None:
    streamed = Streamed(resident=frozenset("a"))
    for _ in range(2):
        assert [streamed.visit(name) for name in "ab"] == [0, 1]
    assert streamed.optimizer.waited == [("written", "a"), ("written", "b"), ("updated", "a"), ("written", "b")]
    streamed.stream.close()
    streamed.pool.close()


class LateWrites:
    """An engine whose writes end late, or when they are let; memory that changes while it is being written is found out."""

    def __init__(self, engine: Any, late_seconds: float = 0.0) -> None:
        self.engine, self.late_seconds, self.holding = engine, late_seconds, False
        self.num_changed = 0
        self.held: list[tuple[Transfer, Extent, Any, Any]] = []
        self._threads = ThreadPoolExecutor(8)

    def write(self, extent: Extent, array: Any) -> Any:
        transfer = Transfer("write", extent, array, 0.0)
        write = (transfer, extent, array, array.copy())
        if self.holding:
            self.held.append(write)
        else:
            self._threads.submit(self._end, *write)
        return transfer

    def _end(self, transfer: Transfer, extent: Extent, array: Any, before: Any) -> None:
        time.sleep(self.late_seconds)
        self.num_changed += not np.array_equal(array, before)
        self.engine.write(extent, array).wait()
        transfer.mark_done(None, 0.0)

    def let(self) -> None:
        self.holding = False
        held, self.held = self.held, []
        for write in held:
            self._end(*write)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )


class Trained:
    """A small model in training, whose writes are late."""

    def __init__(
        self, folder: Path, window: Any, *, resident: bool = True, late_seconds: float = 0.0, prefetch_depth: int = 2
    ) -> None:
        offload = fuyou.OffloadConfig(store=folder, device="cpu", compute_dtype="float32", host_memory="256MiB")
        plan = fuyou.plan_model(config(), offload=offload, batch_size=1, sequence_length=16, max_grad_norm=1e9)
        assert all(block.weights_in_host for block in plan.blocks)
        blocks = (dataclasses.replace(b, update_window=window, weights_in_host=resident) for b in plan.blocks)
        plan = dataclasses.replace(plan, max_clipped_share=1.0, prefetch_depth=prefetch_depth, blocks=tuple(blocks))
        offload = dataclasses.replace(offload, plan=plan)
        self.model = fuyou.from_config(config(), offload=offload, seed=0)
        self.runtime = self.model.fuyou
        self.optimizer = fuyou.AdamW(self.model, lr=1e-2, max_grad_norm=1e9)
        self.late = LateWrites(self.runtime._engine._engine, late_seconds)
        self.runtime._engine._engine = self.late

    def forward(self, seed: int = 0) -> torch.Tensor:
        ids = torch.randint(0, 64, (1, 16), generator=torch.Generator().manual_seed(seed))
        return self.model(input_ids=ids, labels=ids).loss

    def step(self, seed: int = 0) -> float:
        loss = self.forward(seed)
        loss.backward()
        return self.finish_step(loss)

    def finish_step(self, loss: torch.Tensor) -> float:
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def states(self) -> list[torch.Tensor]:
        names = sorted(name for name, _ in self.model.named_parameters())
        return [value for name in names for value in dataclasses.astuple(self.optimizer.state_of(name))[:3]]


@pytest.mark.parametrize("window", ["backward", "forward"])
def test_forward_begins_before_the_last_step_is_written(tmp_path: Path, window: str) -> None:
    """With weights in host memory: not one write of the step ends, and the next forward pass runs through; same bits."""

    def losses(hold: bool) -> list[float]:
        run = Trained(tmp_path / str(hold), window)
        found = []
        try:
            for _ in range(4):
                run.late.holding = hold and (window == "forward" or bool(found))
                loss = run.forward()
                assert bool(run.late.held) == (hold and bool(found))
                run.late.let()
                run.late.holding = hold and window == "backward"
                loss.backward()
                found.append(run.finish_step(loss))
            run.late.let()
            run.runtime.close()
        finally:
            run.late.let()
            run.runtime.abandon()
        assert run.late.num_changed == 0
        return found

    assert losses(True) == losses(False)


@pytest.mark.parametrize("window", ["backward", "forward"])
@pytest.mark.parametrize("resident", [True, False])
def test_whatever_comes_between_nothing_stale_is_read_and_nothing_written_is_changed(
    tmp_path: Path, resident: bool, window: str
) -> None:
    """Clipped steps, evaluations, passes that are given up or add up, edited states: with late writes, the same bits."""

    def run(trained: Trained) -> tuple[list[float], list[torch.Tensor]]:
        model, optimizer = trained.model, trained.optimizer
        ids, name = torch.arange(16)[None], "model.layers.1.mlp.up_proj.weight"
        found = [trained.step(0), trained.step(1)]
        for seed in range(2, 8):
            optimizer.max_grad_norm = 0.01 if seed % 2 else 1e9
            trained.forward(90)  # given up
            loss = trained.forward(seed)
            with torch.no_grad():
                found.append(float(model(input_ids=ids, labels=ids).loss))
            loss.backward()
            if seed in (3, 4):  # of passes that add up, the second one's loss is computed here
                logits = model(input_ids=ids).logits
                with torch.no_grad():
                    found.append(float(model(input_ids=ids, labels=ids).loss))
                logits.float().logsumexp(-1).mean().backward()
            if seed == 5:
                optimizer.zero_grad()
                continue
            if seed == 7:
                trained.forward(92)  # given up, with weights read ahead for its backward pass
            found.append(trained.finish_step(loss))
            if seed == 7:
                found.append(float(trained.optimizer.state_of(name).master.double().sum()))
            if seed == 6:
                optimizer.set_state(name, master=torch.full((64, 32), 0.01))
                trained.forward(91)
                optimizer.set_state(name, master=torch.full((64, 32), 0.02))
            found.append(trained.step(100 + seed))
        states = trained.states()
        trained.runtime.close()
        assert trained.late.num_changed == 0
        return found, states

    found, states = run(Trained(tmp_path / "late", window, resident=resident, late_seconds=0.004, prefetch_depth=3))
    expected, expected_states = run(Trained(tmp_path / "prompt", "forward", resident=False, prefetch_depth=1))
    assert found == expected
    assert all(torch.equal(state, other) for state, other in zip(states, expected_states, strict=True))


def test_late_updates_in_memory_begin_before_their_visit(tmp_path: Path) -> None:
    """All of them with the forward pass, in the order of their visits, and none behind one that must be read first."""
    run = Trained(tmp_path / "all", "forward", prefetch_depth=1)
    with run.runtime:
        run.step()
        pending: list[str] = []
        announce = run.runtime._weights.announce

        def announced(visits: Any, **options: Any) -> None:
            order = list(visits)
            announce(order, **options)
            pending.extend(name for name in order if run.optimizer.has_pending_update(name))

        run.runtime._weights.announce = announced
        run.step()
        assert pending == []
        weights = run.runtime._weights
        weights._resident = frozenset({"prologue", "model.layers.0", "epilogue"})
        for name in ("model.layers.1", "model.layers.2"):
            weights._forget(weights._loaded[name])
        loss = run.forward()
        # One is read ahead. The next one's turn has not come, and what is behind it waits, too.
        assert list(dict.fromkeys(pending)) == ["model.layers.2", "epilogue"]
        loss.backward()
        run.finish_step(loss)


def test_waits_of_compute_are_named(tmp_path: Path) -> None:
    offload = fuyou.OffloadConfig(store=tmp_path / "s", device="cpu", compute_dtype="float32", host_memory="64MiB")
    model = fuyou.from_config(config(), offload=offload, seed=0)
    optimizer = fuyou.AdamW(model, lr=1e-2)
    acquire = model.fuyou._weights.acquire

    def late(name: str) -> Any:
        time.sleep(0.01 if name.endswith("layers.1") else 0.0)
        return acquire(name)

    model.fuyou._weights.acquire = late
    ids = torch.arange(16)[None]
    with model.fuyou:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        trace = model.fuyou.trace.steps[-1]
        waits = [s for s in trace.spans if s.lane == WAIT_LANE and s.name == "weights of model.layers.1"]
        assert len(waits) == 2
        assert all(s.ended_seconds - s.started_seconds >= 0.01 for s in waits)
        assert WAIT_LANE not in trace.lane_seconds()
