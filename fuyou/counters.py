"""What the kernel counts of this process and of the others, to tell whether a measurement was disturbed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from pathlib import Path

import psutil


@dataclasses.dataclass(frozen=True)
class Counters:
    """What the kernel counts, at one moment; seconds of all cores together."""

    at_seconds: float
    busy_seconds: float
    own_seconds: float
    stolen_seconds: float
    """Of a virtual machine: its cores wanted to work and could not."""
    num_throttled: int
    """How often cores were slowed because of heat."""

    @classmethod
    def now(cls) -> Counters:
        """Those of this process and machine; what the kernel does not tell is 0."""
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        stolen = getattr(times, "steal", 0.0)
        # Guests' time is in the user's already.
        counted = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        own = os.times()
        throttled = 0
        for file in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count"):
            with contextlib.suppress(OSError, ValueError):
                throttled += int(file.read_text())
        return cls(time.monotonic(), counted - idle - stolen, own.user + own.system, stolen, throttled)

    def others_share(self, later: Counters, num_cores: int) -> float:
        """Of so many cores' time from here to there, what other processes took."""
        seconds = max(1e-9, later.at_seconds - self.at_seconds) * num_cores
        return (later.busy_seconds - self.busy_seconds - (later.own_seconds - self.own_seconds)) / seconds
