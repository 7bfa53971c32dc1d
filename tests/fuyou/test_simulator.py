"""The play of tasks on lanes by hand, and steps whose length can be worked out."""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import Any

import pytest

from fuyou.hardware import HardwareProfile
from fuyou.plan import BlockPlan
from fuyou.simulator import RECORD_PARAMETERS, SimulatedSpan, Task, lane_speeds, play, simulate_step
from optim import DEFAULT_CHUNK_ELEMENTS

MEGA = 10**6
GPU = HardwareProfile(
    device="cuda",
    num_cores=16,
    compute_flops_per_second=1e12,
    adam_parameters_per_second=1e9,
    read_bytes_per_second=2e9,
    write_bytes_per_second=1e9,
    mixed_bytes_per_second=1.5e9,
    host_memory_bytes=2**36,
    link_bytes_per_second=1e10,
)


def full_speed(busy: frozenset[str]) -> dict[str, float]:
    return dict.fromkeys(busy, 1.0)


def times(spans: list[SimulatedSpan]) -> list[tuple[float, float]]:
    return [(s.started_seconds, s.ended_seconds) for s in spans]


def block(name: str, **changes: Any) -> BlockPlan:
    """10M parameters, bfloat16, nothing in memory, an early update."""
    plan = BlockPlan(
        name=name,
        kind="layer",
        num_parameters=10 * MEGA,
        trainable=True,
        weight_bytes=20 * MEGA,
        state_bytes=100 * MEGA,
        gradient_bytes=40 * MEGA,
        weights_in_host=False,
        states_in_host=False,
        update_window="backward",
        gradient="free",
    )
    return dataclasses.replace(plan, **changes)


def blocks(count: int, **changes: Any) -> list[BlockPlan]:
    return [block(f"layers.{i}", **changes) for i in range(count)]


def test_lanes_work_one_task_at_a_time_in_the_order_of_readiness() -> None:
    tasks = [
        Task("a", "first", 2.0),
        Task("a", "second", 1.0),
        Task("b", "beside", 1.5),
        Task("b", "behind both", 1.0, (1, 2)),
        Task("a", "nothing to do", 0.0, (3,)),
    ]
    assert times(play(tasks, full_speed)) == [(0, 2), (2, 3), (0, 1.5), (3, 4), (4, 4)]


def test_shared_lanes_slow_each_other_only_while_both_are_busy() -> None:
    """Read 2 s, write 1 s, each at half speed together: the write ends after 2 s with the read at 1 s, then 1 s more."""

    def half(busy: frozenset[str]) -> dict[str, float]:
        return dict.fromkeys(busy, 0.5 if len(busy) == 2 else 1.0)

    assert times(play([Task("r", "", 2.0), Task("w", "", 1.0)], half)) == [(0, 3), (0, 2)]


def test_speeds_of_a_drive_and_of_cores() -> None:
    speeds = lane_speeds(GPU)
    assert speeds(frozenset({"ssd_read"})) == {"ssd_read": 1.0}
    assert speeds(frozenset({"ssd_read", "ssd_write", "gpu", "cpu"})) == {
        "ssd_read": 0.5,
        "ssd_write": 0.5,
        "gpu": 1.0,
        "cpu": 1.0,
    }
    assert lane_speeds(dataclasses.replace(GPU, device="cpu"))(frozenset({"gpu", "cpu"}))["gpu"] == pytest.approx(1 / 2)


def test_compute_alone() -> None:
    """Everything else is much faster: 8 operations a parameter and token."""
    step = simulate_step(blocks(20), GPU, num_tokens=100_000)
    assert step.seconds == pytest.approx(20 * 8 * 10 * MEGA * 1e5 / 1e12, rel=0.01)
    assert step.limiting_lane == "gpu"
    assert step.lane_seconds["gpu"] == pytest.approx(step.seconds, rel=0.01)


@pytest.mark.parametrize("window", ["backward", "forward"])
def test_the_drive_alone(window: str) -> None:
    """No compute: 14 B read and 12 written a parameter, at the mixed rate while both go on."""
    step = simulate_step(blocks(40, update_window=window, gradient="host"), GPU, num_tokens=0)
    moved = 26 * 400 * MEGA
    # Not slower than one after the other, not faster than everything at the mixed rate or reads and writes alone.
    assert moved / 1.5e9 * 0.98 <= step.seconds <= 1.01 * (14 * 400 * MEGA / 2e9 + 12 * 400 * MEGA / 1e9)
    assert step.limiting_lane in ("ssd_read", "ssd_write")


def test_early_updates_hide_behind_backward() -> None:
    """Compute of backward is longer than the updates' traffic: the step is compute and the forward pass's reads."""
    step = simulate_step(blocks(40), GPU, num_tokens=20_000)
    compute = 40 * 8 * 10 * MEGA * 2e4 / 1e12
    assert step.seconds == pytest.approx(compute, rel=0.1)


def test_weights_on_the_device_cross_the_link_once_or_never() -> None:
    """Late ones before the forward pass, frozen ones not at all."""
    linked = dataclasses.replace(GPU, link_bytes_per_second=1e9)
    frozen = {"trainable": False, "state_bytes": 0, "gradient_bytes": 0}
    late = {"update_window": "forward", "gradient": "host"}

    def seconds(**changes: Any) -> float:
        return simulate_step(blocks(4, **changes), linked, num_tokens=1000).lane_seconds["h2d"]

    assert seconds(**frozen, weights_on_device=True) == 0 < seconds(**frozen)
    assert 0 < seconds(**late, weights_on_device=True) < 0.7 * seconds(**late)


def test_late_updates_of_weights_in_memory_need_no_turn() -> None:
    """They need no buffer: all of them begin when the backward pass ends, whatever is read ahead."""
    late = blocks(12, update_window="forward", gradient="host", weights_in_host=True)
    beside = simulate_step(late, GPU, num_tokens=8_000, prefetch_depth=1).seconds
    assert beside == pytest.approx(simulate_step(late, GPU, num_tokens=8_000, prefetch_depth=6).seconds)
    read = [dataclasses.replace(b, weights_in_host=False) for b in late]
    assert beside < simulate_step(read, GPU, num_tokens=8_000, prefetch_depth=1).seconds


def test_work_may_wait_for_the_forward_pass() -> None:
    """Where the drive is the limit of backward and idle in forward, late updates of some blocks shorten the step.

    Of some all over the model: weights are read a few blocks ahead only, so that neighbours would wait for each other.
    """
    early = blocks(40)
    mixed = [
        dataclasses.replace(b, update_window="forward", gradient="host") if i % 4 == 2 else b
        for i, b in enumerate(early)
    ]
    assert (
        simulate_step(mixed, GPU, num_tokens=2_200).seconds < 0.95 * simulate_step(early, GPU, num_tokens=2_200).seconds
    )


def test_what_is_kept_in_memory_is_not_read() -> None:
    kept = blocks(10, weights_in_host=True, states_in_host=True)
    step = simulate_step(kept, GPU, num_tokens=1000)
    assert step.lane_seconds["ssd_read"] == 0
    assert step.lane_seconds["ssd_write"] == pytest.approx(12 * 100 * MEGA / 1e9, rel=0.01)
    assert step.lane_seconds["h2d"] == pytest.approx(2 * 20 * 10 * MEGA / 1e10, rel=0.01)
    assert step.lane_seconds["d2h"] == pytest.approx(40 * 10 * MEGA / 1e10, rel=0.01)


def test_a_spilled_gradient_is_written_and_read_back_only_if_late() -> None:
    early = simulate_step(blocks(10, gradient="spill"), GPU, num_tokens=10**6).lane_seconds
    late = simulate_step(blocks(10, gradient="spill", update_window="forward"), GPU, num_tokens=10**6).lane_seconds
    # 0.2 s at full speed, up to twice that while something is written.
    assert 0.19 <= late["ssd_read"] - early["ssd_read"] <= 0.41


def test_the_same_step_every_time_and_in_milliseconds() -> None:
    """100 blocks; spans lie inside the step, none of a lane at the same time as another."""
    started = time.perf_counter()
    step = simulate_step(blocks(100), GPU, num_tokens=4096)
    assert time.perf_counter() - started < 5  # milliseconds, on a machine that does nothing else
    assert step == simulate_step(blocks(100), GPU, num_tokens=4096)
    for lane in step.lane_seconds:
        spans = sorted((s.started_seconds, s.ended_seconds) for s in step.spans if s.lane == lane)
        assert all(0 <= begin < end <= step.seconds + 1e-9 for begin, end in spans)
        assert all(later[0] >= earlier[1] - 1e-9 for earlier, later in itertools.pairwise(spans))


def test_records_are_those_of_the_optimizer() -> None:
    assert RECORD_PARAMETERS == DEFAULT_CHUNK_ELEMENTS
