"""What a machine can do: measured (`fuyou.measuring`), kept as data that can be edited and shared. Imports no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from fuyou.config import format_bytes
from fuyou.errors import ConfigError
from fuyou.html import table

Directories = Sequence[str | os.PathLike[str]] | str | os.PathLike[str]
"""Of a store: one, or one for each drive."""


class ComputeSample(NamedTuple):
    """Seconds of one decoder layer and one micro-batch."""

    multiplied_parameters: int
    """Multiplications of a token's forward pass: the layer's parameters and attention, as the simulator counts them."""
    num_tokens: int
    forward_seconds: float
    backward_seconds: float
    """The forward pass again, and backward, with adding the gradients to those of earlier micro-batches."""
    host_forward_seconds: float
    host_backward_seconds: float
    """With outputs of products kept in host memory instead of computed again."""
    ssd_forward_seconds: float
    ssd_backward_seconds: float
    """With these in scratch files, of which compute waits for each."""


@dataclasses.dataclass(frozen=True)
class HardwareProfile:
    """Rates of one machine and of the drives of one store together."""

    device: str
    num_cores: int
    compute_flops_per_second: float
    """bfloat16 matrix products of a decoder layer's shape, on the device."""
    adam_parameters_per_second: float
    """Updates with all workers together, float32 moments."""
    read_bytes_per_second: float
    write_bytes_per_second: float
    mixed_bytes_per_second: float
    host_memory_bytes: int
    io_reason: str = ""
    link_bytes_per_second: float = 0.0
    """Between host and device, each way; 0: not known, or no device."""
    gpu_memory_bytes: int | None = None
    num_drives: int = 1
    """Whose rates together are those above."""
    seconds_per_block: float = 1e-3
    """What a block costs in a token step however small it is: Python, starts of kernels, the switch to the schedule."""
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    """Where a number comes from, by field, if it was not measured here."""
    compute_samples: tuple[ComputeSample, ...] = ()
    """Layers of two sizes, each with micro-batches of several; none: everything takes its operations' share of
    `compute_flops_per_second`."""
    update_parameters_per_second: dict[str, float] = dataclasses.field(default_factory=dict)
    """By the data type of the moments: norm, Adam and checksums; what is not named has `adam_parameters_per_second`."""
    gradient_parameters_per_second: float = 0.0
    """Of an embedding and one micro-batch: its gradient made and added to those of earlier ones."""
    speeds_together: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """By what is busy at once of "cpu" (updates), "gpu" (compute) and "io" ("cpu+io"), each one's share of its own speed;
    "gpu_small" that of the smaller measured layer's compute."""
    commit_seconds: float = 0.0
    """What makes a step durable, beside its bytes."""
    measured_at: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of what the figures depend on; with others it is measured again."""
    refined: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """By `run_key`, factors to lanes' seconds that runs have found."""

    def with_drives(self, num_drives: int) -> HardwareProfile:
        """The same machine with so many drives of the kind that it has; their rates add up. ConfigError below 1."""
        if num_drives < 1:
            raise ConfigError(f"{num_drives} drives: a machine needs at least 1")
        share = num_drives / self.num_drives
        return dataclasses.replace(
            self,
            num_drives=num_drives,
            read_bytes_per_second=self.read_bytes_per_second * share,
            write_bytes_per_second=self.write_bytes_per_second * share,
            mixed_bytes_per_second=self.mixed_bytes_per_second * share,
        )

    def scaled(self, factors: Mapping[str, float]) -> HardwareProfile:
        """The same machine with lanes whose work takes so many times as long: "gpu", "cpu", "ssd_read", "ssd_write", links."""
        gpu, cpu = factors.get("gpu", 1.0), factors.get("cpu", 1.0)
        read, write = factors.get("ssd_read", 1.0), factors.get("ssd_write", 1.0)
        return dataclasses.replace(
            self,
            compute_flops_per_second=self.compute_flops_per_second / gpu,
            compute_samples=tuple(
                ComputeSample(s.multiplied_parameters, s.num_tokens, *(gpu * seconds for seconds in s[2:]))
                for s in self.compute_samples
            ),
            gradient_parameters_per_second=self.gradient_parameters_per_second / gpu,
            adam_parameters_per_second=self.adam_parameters_per_second / cpu,
            update_parameters_per_second={k: rate / cpu for k, rate in self.update_parameters_per_second.items()},
            read_bytes_per_second=self.read_bytes_per_second / read,
            write_bytes_per_second=self.write_bytes_per_second / write,
            # Of a mixture, as many bytes of each: the slower direction holds up the other.
            mixed_bytes_per_second=self.mixed_bytes_per_second / max(read, write),
            link_bytes_per_second=self.link_bytes_per_second / max(factors.get("h2d", 1.0), factors.get("d2h", 1.0)),
        )

    def refined_for(self, key: str) -> HardwareProfile:
        """With what earlier runs of this `run_key` have found."""
        factors = self.refined.get(key)
        return self if factors is None else self.scaled(factors)

    def _repr_html_(self) -> str:
        """A table with units and sources, for notebooks."""
        rows = []
        for name, value in self.to_json().items():
            if name in ("sources", "io_reason", "refined", "compute_samples") or not value:
                continue
            if isinstance(value, dict):
                text = ", ".join(f"{key} {_with_unit(name, part)}" for key, part in value.items())
            else:
                text = _with_unit(name, value)
            source = self.sources.get(name)
            rows.append((name, f"{text} ({source})" if source else text))
        return table([f"hardware of {self.device}", self.io_reason], rows)

    def to_json(self) -> dict[str, Any]:
        """The profile as JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> HardwareProfile:
        """The profile that `to_json` described; ConfigError names a field that is unknown or missing."""
        try:
            samples = tuple(ComputeSample(*sample) for sample in data.get("compute_samples", ()))
            return cls(**{**data, "compute_samples": samples})
        except TypeError as error:
            raise ConfigError(f"hardware profile: {error}") from None


def _with_unit(name: str, value: Any) -> str:
    """A field's value, in the unit that the end of its name says."""
    if name.endswith("_bytes_per_second"):
        return f"{value / 1e9:.3g} GB/s"
    if name.endswith("_bytes"):
        return format_bytes(value)
    if name.endswith("_flops_per_second"):
        return f"{value / 1e12:.3g} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.3g} GFLOP/s"
    if name.endswith("_parameters_per_second"):
        return f"{value / 1e6:,.0f} million/s"
    if name.endswith(("_seconds", "seconds_per_block")):
        return f"{1e3 * value:.3g} ms"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_with_unit(name, part)}" for key, part in value.items()) + ")"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def available_host_bytes() -> int:
    """Memory that can be taken now: what the kernel calls available, or what the cgroup leaves, if less."""
    available = psutil.virtual_memory().available
    for limit_file, usage_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit, usage = Path(limit_file).read_text().strip(), Path(usage_file).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            available = min(available, max(0, int(limit) - int(usage)))
    return int(available)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_profile(profile: HardwareProfile, drives: Sequence[Path], device: str, compute_dtype: str) -> None:
    """Leave the profile for `cached_hardware`; a cache that cannot be written costs a measurement the next time."""
    cache = _cache_file(drives, device, compute_dtype)
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(profile.to_json(), indent=1))
        partial.replace(cache)


def cached_hardware(directories: Directories, device: str, compute_dtype: str = "bfloat16") -> HardwareProfile | None:
    """What `measure_hardware` last found for these directories' file systems and device, or None.

    None, too, if it was measured with another torch, kernel or driver: rates may have changed with them.
    """
    try:
        data = json.loads(_cache_file(drives_of(directories), device, compute_dtype).read_text())
        profile = HardwareProfile.from_json(data)
    except (OSError, ValueError, TypeError):
        return None
    return profile if profile.versions == versions_of(device) else None


def keep_refinement(
    directories: Directories, device: str, compute_dtype: str, key: str, factors: Mapping[str, float]
) -> None:
    """Add what a run has found about its own lanes to the cached profile, if there is one."""
    profile = cached_hardware(directories, device, compute_dtype)
    if profile is not None:
        # The newest stand last; a few models a machine are enough.
        kept = [item for item in profile.refined.items() if item[0] != key][-15:]
        refined = dict([*kept, (key, dict(factors))])
        profile = dataclasses.replace(profile, refined=refined)
        keep_profile(profile, drives_of(directories), device, compute_dtype)


def run_key(num_parameters: int, num_trained: int, num_blocks: int, moment_dtype: str) -> str:
    """By what runs are told apart whose lanes are expected to be as fast on the same machine."""
    return f"{num_parameters} parameters, {num_trained} trained, {num_blocks} blocks, {moment_dtype}"


def versions_of(device: str) -> dict[str, str]:
    """What measured rates depend on beside the machine."""
    found = {"torch": metadata.version("torch"), "kernel": platform.release(), "cpu": platform.processor()}
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found["cpu"] = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    if device != "cpu":
        with contextlib.suppress(OSError):
            found["driver"] = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    return found


def drives_of(directories: Directories) -> list[Path]:
    """One existing directory of each file system, in the order of their device numbers."""
    given = [directories] if isinstance(directories, str | os.PathLike) else directories
    paths = [Path(directory).expanduser().absolute() for directory in given]
    existing = [next(p for p in (path, *path.parents) if p.is_dir()) for path in paths]
    return [path for _, path in sorted({path.stat().st_dev: path for path in existing}.items())]


def _cache_file(drives: Sequence[Path], device: str, compute_dtype: str) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fuyou"
    numbers = "-".join(f"{path.stat().st_dev:x}" for path in drives)
    return root / f"hardware-{device.replace(':', '-')}-{compute_dtype}-{numbers}.json"
