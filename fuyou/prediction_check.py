"""A run's steps beside their prediction: which lane is off, why probably, and what the profile should learn. No torch."""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
from collections import deque
from collections.abc import Mapping

from fuyou.counters import Counters

NUM_SKIPPED_STEPS = 2
"""At first: caches fill, and what is kept in memory is read."""
NUM_STEPS_OFF = 5
"""One after the other, before a lane's difference is worth a warning."""
MOST_DIFFERENCE = 0.2
LEAST_SHARE = 0.1
"""Of a step: what takes less in it is not compared."""
LEAST_STEPS_LEARNT = 8
MOST_FACTOR = 3.0
"""By which a run may change what was measured; what differs by more is no matter of rates."""
LEAST_OTHERS, LEAST_STOLEN = 0.1, 0.05
"""Of the machine's cores, taken by others: a cause."""
FALLEN = 0.8
"""Of a drive's rate in the first steps: its cache is full."""
LANE_NAMES = {
    "gpu": "compute",
    "cpu": "the optimizer's arithmetic",
    "ssd_read": "reading from the drive",
    "ssd_write": "writing to the drive",
    "h2d": "copying to the device",
    "d2h": "copying from the device",
}


@dataclasses.dataclass(frozen=True)
class _Compared:
    """One step: its lanes' seconds, measured by predicted, and its drive's rates."""

    ratios: dict[str, float]
    rates: dict[str, float]


class PredictionCheck:
    """Takes one step after the other; says once for each lane that it is off for several of them."""

    def __init__(self, device: str, num_cores: int) -> None:
        self._device, self._num_cores = device, num_cores
        self._num_seen = 0
        self._last: deque[_Compared] = deque(maxlen=NUM_STEPS_OFF)
        self._before: deque[Counters] = deque([Counters.now()], maxlen=NUM_STEPS_OFF + 1)
        self._ratios: dict[str, list[float]] = {}
        self._first_rates: dict[str, float] = {}
        self._warned: set[str] = set()
        self._has_cause = False
        self._bytes_written = 0

    def add(
        self,
        predicted_seconds: float,
        predicted_lanes: Mapping[str, float],
        measured_seconds: float,
        measured_lanes: Mapping[str, float],
        *,
        bytes_read: int,
        bytes_written: int,
        counters: Counters | None = None,
    ) -> list[str]:
        """A step that did nothing but train, and no part of it twice; returns warnings, at most one for each lane."""
        self._num_seen += 1
        self._bytes_written += bytes_written
        self._before.append(counters or Counters.now())
        if self._num_seen <= NUM_SKIPPED_STEPS or predicted_seconds <= 0 or measured_seconds <= 0:
            return []
        ratios = {
            lane: measured_lanes.get(lane, 0.0) / seconds
            for lane, seconds in predicted_lanes.items()
            if seconds >= LEAST_SHARE * predicted_seconds and measured_lanes.get(lane)
        }
        rates = {
            lane: num_bytes / measured_lanes[lane]
            for lane, num_bytes in (("ssd_read", bytes_read), ("ssd_write", bytes_written))
            if measured_lanes.get(lane) and num_bytes
        }
        for lane, ratio in ratios.items():
            self._ratios.setdefault(lane, []).append(ratio)
        self._last.append(_Compared(ratios | {"step": measured_seconds / predicted_seconds}, rates))
        if len(self._last) < NUM_STEPS_OFF:
            return []
        if not self._first_rates:
            self._first_rates = self._median_rates()
        # A lane that is off is nobody's business as long as the step is not.
        if not self._is_off("step"):
            return []
        off = {lane: self._ratio(lane) for lane in ratios if lane not in self._warned and self._is_off(lane)}
        self._warned |= off.keys()
        return [self._warning(lane, ratio) for lane, ratio in off.items()]

    def factors(self) -> dict[str, float]:
        """By what this run's lanes differ from their prediction; empty if too few steps tell, or something disturbed them."""
        if self._has_cause:
            return {}
        found = {lane: statistics.median(r) for lane, r in self._ratios.items() if len(r) >= LEAST_STEPS_LEARNT}
        return {lane: min(MOST_FACTOR, max(1 / MOST_FACTOR, factor)) for lane, factor in found.items()}

    def _is_off(self, lane: str) -> bool:
        """In each of the last steps, and always in the same direction."""
        ratios = [compared.ratios.get(lane, 1.0) for compared in self._last]
        return all(r > 1 + MOST_DIFFERENCE for r in ratios) or all(r < 1 - MOST_DIFFERENCE for r in ratios)

    def _ratio(self, lane: str) -> float:
        return statistics.median(compared.ratios[lane] for compared in self._last)

    def _median_rates(self) -> dict[str, float]:
        lanes = {lane for compared in self._last for lane in compared.rates}
        return {lane: statistics.median(c.rates[lane] for c in self._last if lane in c.rates) for lane in lanes}

    def _warning(self, lane: str, ratio: float) -> str:
        text = f"{LANE_NAMES.get(lane, lane)} takes {ratio:.2f} times as long as predicted"
        if ratio < 1:
            return f"{text}: the machine was measured while it was slower; fuyou plan --measure measures it again"
        cause = self._cause(lane)
        if cause is None:
            return f"{text}, for no reason that the system shows; fuyou plan --measure measures this machine again"
        self._has_cause = True
        return f"{text}, probably because {cause}"

    def _cause(self, lane: str) -> str | None:
        before, now = self._before[0], self._before[-1]
        seconds = max(1e-9, now.at_seconds - before.at_seconds) * self._num_cores
        others = before.others_share(now, self._num_cores)
        stolen = (now.stolen_seconds - before.stolen_seconds) / seconds
        if lane in ("ssd_read", "ssd_write"):
            first, last = self._first_rates.get(lane, 0.0), self._median_rates().get(lane, 0.0)
            if last < FALLEN * first:
                return (
                    f"the drive became slower ({first / 1e9:.2f} GB/s at first, {last / 1e9:.2f} now, after "
                    f"{self._bytes_written / 1e9:.0f} GB written): its fast cache is full, or something else uses it"
                )
        if now.num_throttled > before.num_throttled:
            return f"the processor was slowed {now.num_throttled - before.num_throttled} times because of heat"
        if lane == "gpu" and self._device != "cpu":
            return _gpu_throttling()
        if others > LEAST_OTHERS:
            return f"other processes kept {others:.0%} of the {self._num_cores} cores busy"
        if stolen > LEAST_STOLEN:
            return f"the virtual machine was refused {stolen:.0%} of its cores' time"
        return None


def _gpu_throttling() -> str | None:
    """Why the GPU's clock is held down, if nvidia-smi knows."""
    reasons = ("hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown", "sw_power_cap")
    query = ",".join(f"clocks_throttle_reasons.{reason}" for reason in reasons)
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    active = [
        r for r, state in zip(reasons, answer.splitlines()[0].split(","), strict=False) if state.strip() == "Active"
    ]
    return f"the GPU holds its clock down ({', '.join(active)})" if active else None
