"""What is said of lanes that are off, with which cause, and what a profile learns of them."""

from __future__ import annotations

import pytest

from fuyou.counters import Counters
from fuyou.prediction_check import LEAST_STEPS_LEARNT, NUM_SKIPPED_STEPS, NUM_STEPS_OFF, PredictionCheck

PREDICTED = {"gpu": 1.0, "cpu": 0.5, "ssd_read": 0.8, "ssd_write": 0.6, "h2d": 0.01}
QUIET = Counters(0.0, 0.0, 0.0, 0.0, 0)


def counted(step: int, *, others: float = 0.0, stolen: float = 0.0, throttled: int = 0) -> Counters:
    """After so many steps of 2 s on 2 cores, of which this process takes 1.5 s a second."""
    seconds = 2.0 * step
    return Counters(seconds, (1.5 + others) * seconds, 1.5 * seconds, stolen * seconds, throttled * step)


def run(
    lanes: dict[str, float],
    *,
    steps: int = 20,
    seconds: float = 2.6,
    slower_writes_from: int | None = None,
    **causes: float,
) -> tuple[list[str], PredictionCheck]:
    """Steps predicted with 2 s and PREDICTED, measured with these lanes instead."""
    check = PredictionCheck("cpu", 2)
    check._before.clear()
    check._before.append(QUIET)
    warnings: list[str] = []
    for step in range(1, steps + 1):
        measured = PREDICTED | lanes
        if slower_writes_from is not None and step >= slower_writes_from:
            measured["ssd_write"] *= 2
        warnings += check.add(
            2.0,
            PREDICTED,
            seconds,
            measured,
            bytes_read=10**9,
            bytes_written=10**9,
            counters=counted(step, **causes),  # type: ignore[arg-type]
        )
    return warnings, check


def test_a_lane_that_is_off_is_named_once_with_its_cause() -> None:
    warnings, _ = run({"gpu": 1.5}, others=0.4)
    assert warnings == [
        "compute takes 1.50 times as long as predicted, probably because other processes kept 20% of the 2 cores busy"
    ]


@pytest.mark.parametrize(
    ("causes", "text"),
    [
        ({"throttled": 3}, "because of heat"),
        ({"stolen": 0.3}, "the virtual machine was refused 15% of its cores' time"),
        ({}, "for no reason that the system shows; fuyou plan --measure"),
    ],
)
def test_causes(causes: dict[str, float], text: str) -> None:
    warnings, _ = run({"gpu": 1.5}, **causes)
    assert len(warnings) == 1
    assert text in warnings[0]


def test_a_drive_whose_rate_falls() -> None:
    warnings, check = run({}, slower_writes_from=NUM_SKIPPED_STEPS + NUM_STEPS_OFF + 3)
    assert len(warnings) == 1
    assert warnings[0].startswith("writing to the drive takes 2.00 times as long as predicted")
    assert "1.67 GB/s at first, 0.83 now, after 14 GB written" in warnings[0]
    assert check.factors() == {}  # of a disturbed run nothing is learnt


def test_no_warning_while_the_step_is_as_predicted_or_too_few_steps_are_off() -> None:
    assert run({"gpu": 1.5}, seconds=2.1)[0] == []
    assert run({"gpu": 1.1}, seconds=2.6)[0] == []
    assert run({"gpu": 1.5}, steps=NUM_SKIPPED_STEPS + NUM_STEPS_OFF - 1)[0] == []
    assert len(run({"gpu": 1.5}, steps=NUM_SKIPPED_STEPS + NUM_STEPS_OFF)[0]) == 1


def test_a_lane_that_is_a_small_part_of_the_step_is_not_compared() -> None:
    warnings, check = run({"h2d": 0.1})
    assert warnings == []
    assert "h2d" not in check.factors()


def test_a_machine_that_was_measured_too_slow() -> None:
    warnings, _ = run({"gpu": 0.5, "ssd_read": 0.7}, seconds=1.2)
    assert len(warnings) == 1
    assert "compute takes 0.50 times as long as predicted: the machine was measured while it was slower" in warnings[0]


def test_what_is_learnt() -> None:
    _, check = run({"gpu": 1.3, "cpu": 9.0}, seconds=2.1)
    assert check.factors() == {"gpu": 1.3, "cpu": 3.0, "ssd_read": 1.0, "ssd_write": 1.0}
    _, check = run({"gpu": 1.3}, steps=NUM_SKIPPED_STEPS + LEAST_STEPS_LEARNT - 1)
    assert check.factors() == {}


def test_the_kernels_counters_go_forward() -> None:
    first = Counters.now()
    sum(range(10**6))
    second = Counters.now()
    assert second.at_seconds > first.at_seconds
    assert second.own_seconds >= first.own_seconds
    assert second.busy_seconds >= first.busy_seconds > 0
