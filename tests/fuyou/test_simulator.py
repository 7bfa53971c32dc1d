"""The play of tasks on lanes by hand, and steps whose length can be worked out."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from typing import Any

import pytest

from fuyou.hardware import ComputeSample, HardwareProfile
from fuyou.plan import BlockPlan
from fuyou.planner import traffic
from fuyou.simulator import (
    RECORD_PARAMETERS,
    Buffers,
    SimulatedSpan,
    Task,
    compute_seconds,
    lane_speeds,
    play,
    simulate_step,
)
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
    # What one micro-batch leaves in bfloat16, and what several leave in float32.
    assert step.lane_seconds["d2h"] == pytest.approx(20 * 10 * MEGA / 1e10, rel=0.01)
    step = simulate_step(kept, GPU, num_tokens=1000, num_micro_batches=2)
    assert step.lane_seconds["d2h"] == pytest.approx(40 * 10 * MEGA / 1e10, rel=0.01)


@pytest.mark.parametrize(("num_micro_batches", "least", "most"), [(1, 0.07, 0.21), (2, 0.19, 0.41)])
def test_a_spilled_gradient_is_written_and_read_back_only_if_late(
    num_micro_batches: int, least: float, most: float
) -> None:
    """In float32, or in bfloat16 if it is one micro-batch's."""
    spilled = blocks(10, gradient="spill")
    early = simulate_step(spilled, GPU, num_tokens=10**6, num_micro_batches=num_micro_batches).lane_seconds
    late = simulate_step(
        blocks(10, gradient="spill", update_window="forward"),
        GPU,
        num_tokens=10**6,
        num_micro_batches=num_micro_batches,
    ).lane_seconds
    # 0.1 and 0.2 s at full speed, up to twice that while something is written, as the other reads are in either case.
    assert least <= late["ssd_read"] - early["ssd_read"] <= most


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


# A layer of a million parameters and one of a hundred million: forward, backward; with activations in memory, in files.
SAMPLES = (
    ComputeSample(MEGA, 10, 1.0, 5.0, 1.5, 3.0, 2.0, 4.0),
    ComputeSample(MEGA, 20, 3.0, 9.0, 3.5, 5.0, 4.0, 6.0),
    ComputeSample(100 * MEGA, 10, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0),
    ComputeSample(100 * MEGA, 20, 2.0, 4.0, 2.0, 2.0, 2.0, 2.0),
)


def test_compute_between_what_was_measured() -> None:
    measured = dataclasses.replace(GPU, compute_samples=SAMPLES)

    def seconds(parameters: int, tokens: float, what: str = "forward", activations: str = "recompute") -> float:
        return compute_seconds(measured, parameters, tokens, what=what, activations=activations)

    assert [seconds(MEGA, n) for n in (10, 15, 20, 40)] == pytest.approx([1, 2, 3, 6])
    assert seconds(MEGA, 3) == 1  # weights are read however few tokens there are
    assert seconds(MEGA, 10, "backward") == 5
    assert seconds(MEGA, 10, "backward alone") == 4  # without computing again
    assert [seconds(MEGA, 10, "backward", place) for place in ("keep", "host", "ssd")] == [3, 3, 4]
    assert [seconds(MEGA, 10, "forward", place) for place in ("keep", "host", "ssd")] == [1.5, 1.5, 2]
    assert seconds(100 * MEGA, 20) == pytest.approx(2)
    # Halfway between the sizes by their logarithms, each parameter takes halfway between their times.
    assert seconds(10 * MEGA, 10) == pytest.approx(10 * (1 + 0.01) / 2)
    assert seconds(1000 * MEGA, 10) == pytest.approx(10.0)
    assert seconds(MEGA // 10, 10) == pytest.approx(0.1)
    assert seconds(0, 10) == seconds(MEGA, 0) == 0


def test_activations_that_wait_where_that_takes_less_time() -> None:
    measured = dataclasses.replace(GPU, compute_samples=SAMPLES)
    layers = blocks(2, num_parameters=MEGA, trainable=False, weights_in_host=True)
    for activations, seconds in (("recompute", 12), ("host", 9), ("ssd", 12), ({3: "host"}, 12)):
        step = simulate_step([dataclasses.replace(b, activations=activations) for b in layers], measured, num_tokens=10)
        assert step.lane_seconds["gpu"] == pytest.approx(seconds, rel=0.01)


def test_micro_batches_are_slower_than_one_of_all() -> None:
    """A layer of a million parameters, 20 tokens: 3 + 9 s at once, twice 1 + 5 s as two micro-batches."""
    measured = dataclasses.replace(GPU, compute_samples=SAMPLES)
    layers = blocks(2, num_parameters=MEGA, trainable=False, weights_in_host=True)
    for num_micro_batches, seconds in ((1, 24), (2, 24), (4, 48)):
        step = simulate_step(layers, measured, num_tokens=20, num_micro_batches=num_micro_batches)
        assert step.lane_seconds["gpu"] == pytest.approx(seconds, rel=0.01)


def test_an_embeddings_gradient_is_as_large_as_it_is() -> None:
    measured = dataclasses.replace(GPU, compute_samples=SAMPLES, gradient_parameters_per_second=1e7)
    embedding = block("prologue", kind="prologue")
    step = simulate_step([embedding], measured, num_tokens=8, num_micro_batches=4)
    assert step.lane_seconds["gpu"] == pytest.approx(4.0)


def test_updates_at_the_rate_of_their_moments() -> None:
    measured = dataclasses.replace(GPU, update_parameters_per_second={"int8": 1e7})
    steps = {m: simulate_step(blocks(4), measured, num_tokens=1, moment_dtype=m) for m in ("int8", "float32")}
    assert steps["int8"].lane_seconds["cpu"] == pytest.approx(4.0)
    assert steps["float32"].lane_seconds["cpu"] == pytest.approx(0.04)


def test_measured_shares_of_what_runs_together() -> None:
    together = {"cpu+gpu": {"cpu": 0.9, "gpu": 0.6}, "cpu+gpu+io": {"cpu": 0.8, "gpu": 0.5, "io": 0.7}}
    on_cpu = lane_speeds(dataclasses.replace(GPU, device="cpu", speeds_together=together))
    assert on_cpu(frozenset({"gpu", "cpu"})) == {"gpu": 0.6, "cpu": 0.9}
    # Reads and writes share the drive (a half here), and what the others leave of it.
    assert on_cpu(frozenset({"gpu", "cpu", "ssd_read", "ssd_write"})) == pytest.approx(
        {"gpu": 0.5, "cpu": 0.8, "ssd_read": 0.35, "ssd_write": 0.35}
    )
    assert on_cpu(frozenset({"gpu", "ssd_read"})) == {"gpu": 1.0, "ssd_read": 1.0}  # not measured
    # Small layers lose more; between the measured sizes by their logarithms.
    small = {"cpu+gpu": {"cpu": 0.9, "gpu": 0.6, "gpu_small": 0.2}}
    machine = dataclasses.replace(GPU, device="cpu", speeds_together=small, compute_samples=SAMPLES)
    for size, share in ((MEGA, 0.2), (10 * MEGA, 0.4), (100 * MEGA, 0.6), (0, 0.6)):
        assert lane_speeds(machine, size)(frozenset({"gpu", "cpu"}))["gpu"] == pytest.approx(share)
    # A GPU's compute takes nothing from the host's cores.
    beside_gpu = lane_speeds(dataclasses.replace(GPU, speeds_together={"cpu+io": {"cpu": 0.8, "io": 0.9}}))
    assert beside_gpu(frozenset({"gpu", "cpu", "ssd_write"})) == pytest.approx(
        {"gpu": 1.0, "cpu": 0.8, "ssd_write": 0.9}
    )


def test_a_commit_holds_up_the_next_updates() -> None:
    """Nothing but updates and commits takes time: they follow one another."""
    slow = dataclasses.replace(GPU, adam_parameters_per_second=1e7, commit_seconds=0.5)
    fast = {"read_bytes_per_second": 1e15, "write_bytes_per_second": 1e15, "mixed_bytes_per_second": 2e15}
    quick = dataclasses.replace(slow, **fast)
    assert simulate_step(blocks(4), quick, num_tokens=0).seconds == pytest.approx(4.5, rel=0.01)
    assert simulate_step(blocks(4), quick, num_tokens=0, commit_every_steps=5).seconds == pytest.approx(4.1, rel=0.01)


def test_a_scaled_machine() -> None:
    measured = dataclasses.replace(
        GPU, compute_samples=SAMPLES, update_parameters_per_second={"float32": 1e8}, refined={"a run": {"gpu": 2.0}}
    )
    twice = measured.scaled({"gpu": 2.0, "ssd_write": 2.0})
    assert compute_seconds(twice, MEGA, 20, what="backward") == 18
    assert (twice.read_bytes_per_second, twice.write_bytes_per_second) == (2e9, 0.5e9)
    assert twice.update_parameters_per_second == {"float32": 1e8}
    assert compute_seconds(measured.refined_for("a run"), MEGA, 20, what="forward") == 6
    assert measured.refined_for("another run") == measured
    assert HardwareProfile.from_json(json.loads(json.dumps(measured.to_json()))) == measured


def test_one_buffer_for_weights_makes_updates_follow_one_another() -> None:
    """A block's weights are written from the buffer that they were read into, and the next block's need that buffer."""
    # A drive that writes while it reads, each at its own rate.
    instant = dataclasses.replace(
        GPU, adam_parameters_per_second=1e15, link_bytes_per_second=0.0, mixed_bytes_per_second=3e9
    )
    one_record = blocks(6, num_parameters=2 * MEGA, weight_bytes=4 * MEGA, state_bytes=20 * MEGA)
    ample = simulate_step(one_record, instant, num_tokens=0)
    one = simulate_step(one_record, instant, num_tokens=0, buffers=Buffers(weights=1))
    # Forward: six times 4 MB read. Backward: each reads 4 and 20 MB, then writes 24; one after the other.
    # The reads at 2 GB/s, the writes at 1; nothing is read while something is written.
    alone = 6 * (4 + 4 + 20) / 2000 + 6 * 24 / 1000
    assert one.seconds == pytest.approx(alone, rel=0.01)
    assert ample.seconds < 0.95 * one.seconds
    assert simulate_step(one_record, instant, num_tokens=0, buffers=Buffers(weights=30)) == ample


@pytest.mark.parametrize("window", ["backward", "forward"])
def test_an_epilogues_weights_are_read_once(window: str) -> None:
    """Its backward pass follows its forward pass, and an early update finds them still there."""
    both_ways = dataclasses.replace(GPU, mixed_bytes_per_second=3e9)  # nothing is slower beside something else
    model = [*blocks(4, update_window=window), block("epilogue", kind="epilogue", update_window=window)]
    read_seconds = simulate_step(model, both_ways, num_tokens=0).lane_seconds["ssd_read"]
    assert read_seconds == pytest.approx((9 * 20 + 5 * 100) * MEGA / 2e9, rel=0.01)  # once more would be 3 %
    assert read_seconds == pytest.approx(traffic(model)[0] / 2e9, rel=0.01)


def test_an_early_update_of_the_epilogue_keeps_the_buffer_of_its_weights() -> None:
    """The only one: what the backward pass reads next comes when they have been written."""
    small = {"num_parameters": 2 * MEGA, "weight_bytes": 4 * MEGA, "state_bytes": 20 * MEGA}
    early = [*blocks(2, **small), block("epilogue", kind="epilogue", **small)]
    frozen = [*early[:-1], dataclasses.replace(early[-1], trainable=False)]

    def read_again_seconds(model: list[BlockPlan]) -> float:
        """From the end of the epilogue's compute, which takes no time, to the next read of a layer's weights."""
        spans = simulate_step(model, GPU, num_tokens=0, buffers=Buffers(weights=1)).spans
        read_seconds = next(s.ended_seconds for s in spans if s.name == "epilogue weights")
        layer = [s.started_seconds for s in spans if s.name == "layers.1 weights"]
        return min(seconds for seconds in layer if seconds >= read_seconds) - read_seconds

    assert read_again_seconds(early) >= 20 * MEGA / 2e9 + 24 * MEGA / 1e9 - 1e-9
    assert read_again_seconds(frozen) == pytest.approx(4 * MEGA / 1e10)  # it must have come to the GPU


def test_one_buffer_for_gradients_makes_compute_wait_for_updates() -> None:
    """Without clipping a gradient's memory is free when its update's last record is computed, written or not."""
    slow = dataclasses.replace(GPU, adam_parameters_per_second=2e6)
    slow_writes = dataclasses.replace(GPU, write_bytes_per_second=1e8, mixed_bytes_per_second=2.1e9)
    free = blocks(4, num_parameters=2 * MEGA, gradient="free")
    tokens = 20_000
    one = simulate_step(free, slow, num_tokens=tokens, buffers=Buffers(gradients=1))
    ample = simulate_step(free, slow, num_tokens=tokens)
    # Forward passes of 0.08 s, one backward of 0.24 s, four updates of 1 s, beside which others' compute need not be waited for.
    assert ample.seconds == pytest.approx(4 * 0.08 + 0.24 + 4 * 1.0, rel=0.05)
    assert one.seconds > ample.seconds + 3 * 0.2
    # Writes of 1.2 s each go on beside the next block's compute.
    written = simulate_step(free, slow_writes, num_tokens=tokens, buffers=Buffers(gradients=1))
    assert written.seconds == pytest.approx(simulate_step(free, slow_writes, num_tokens=tokens).seconds, rel=0.05)
