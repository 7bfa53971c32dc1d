"""What this machine can do: measured in seconds, kept as data that can be edited and shared."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from fuyou.config import format_bytes
from fuyou.costs import num_update_workers
from fuyou.errors import ConfigError
from fuyou.html import table
from io_engine import probe_directory
from optim.kernels import AdamWScalars, adamw_split

Directories = Sequence[str | os.PathLike[str]] | str | os.PathLike[str]
"""Of a store: one, or one for each drive."""


@dataclasses.dataclass(frozen=True)
class HardwareProfile:
    """Rates of one machine and of the drives of one store together."""

    device: str
    num_cores: int
    compute_flops_per_second: float
    """bfloat16 matrix products of a decoder layer's shape, on the device."""
    adam_parameters_per_second: float
    """With all update workers together."""
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

    def _repr_html_(self) -> str:
        """A table with units and sources, for notebooks."""
        rows = []
        for name, value in self.to_json().items():
            if name in ("sources", "io_reason") or value is None:
                continue
            if name.endswith("_bytes_per_second"):
                text = f"{value / 1e9:.3g} GB/s"
            elif name.endswith("_bytes"):
                text = format_bytes(value)
            elif name.endswith("_per_second"):
                text = f"{value:.3g}/s"
            else:
                text = f"{value:.3g}" if isinstance(value, float) else str(value)
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
            return cls(**data)
        except TypeError as error:
            raise ConfigError(f"hardware profile: {error}") from None


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


def measure_hardware(directories: Directories, device: str, compute_dtype: str = "bfloat16") -> HardwareProfile:
    """Measure compute, Adam and the drives under `directories` (or their nearest existing parents); blocks for seconds.

    Several drives work side by side, so that their rates add up; directories of one file system count once. The result
    is kept for `cached_hardware`.
    """
    paths = _drives(directories)
    drives = [probe_directory(path, num_bytes=128 * 2**20) for path in paths]
    profile = HardwareProfile(
        device=device,
        num_cores=num_cores(),
        compute_flops_per_second=_measure_compute(device, compute_dtype),
        adam_parameters_per_second=_measure_adam(num_update_workers(device, num_cores())),
        read_bytes_per_second=sum(drive.read_bytes_per_second for drive in drives),
        write_bytes_per_second=sum(drive.write_bytes_per_second for drive in drives),
        mixed_bytes_per_second=sum(drive.mixed_bytes_per_second for drive in drives),
        host_memory_bytes=available_host_bytes(),
        io_reason="; ".join(dict.fromkeys(drive.reason for drive in drives)),
        link_bytes_per_second=0.0 if device == "cpu" else _measure_link(device),
        gpu_memory_bytes=None if device == "cpu" else _free_gpu_bytes(device),
        num_drives=len(paths),
        seconds_per_block=_measure_block(paths[0], device, compute_dtype),
    )
    cache = _cache_file(paths, device, compute_dtype)
    # A cache that cannot be written costs a measurement the next time, nothing else.
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(profile.to_json(), indent=1))
        partial.replace(cache)
    return profile


def cached_hardware(directories: Directories, device: str, compute_dtype: str = "bfloat16") -> HardwareProfile | None:
    """What `measure_hardware` last found for these directories' file systems and device, or None."""
    try:
        data = json.loads(_cache_file(_drives(directories), device, compute_dtype).read_text())
        return HardwareProfile.from_json(data)
    except (OSError, ValueError):
        return None


def _drives(directories: Directories) -> list[Path]:
    """One existing directory of each file system, in the order of their device numbers."""
    given = [directories] if isinstance(directories, str | os.PathLike) else directories
    paths = [Path(directory).expanduser().absolute() for directory in given]
    existing = [next(p for p in (path, *path.parents) if p.is_dir()) for path in paths]
    return [path for _, path in sorted({path.stat().st_dev: path for path in existing}.items())]


def _cache_file(drives: Sequence[Path], device: str, compute_dtype: str) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fuyou"
    return (
        root
        / f"hardware-{device.replace(':', '-')}-{compute_dtype}-{'-'.join(f'{path.stat().st_dev:x}' for path in drives)}.json"
    )


def _measure_compute(device: str, compute_dtype: str) -> float:
    """Best of five products of (256 x n) and (n x n) matrices."""
    import torch

    n = 1024 if device == "cpu" else 8192
    dtype = torch.bfloat16 if compute_dtype == "bfloat16" else torch.float32
    a = torch.ones((256 if device == "cpu" else n, n), dtype=dtype, device=device)
    b = torch.ones((n, n), dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        if device != "cpu":
            torch.cuda.synchronize()
        started = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2.0 * a.shape[0] * n * n / best


def _measure_block(directory: Path, device: str, compute_dtype: str) -> float:
    """Of token steps of a streamed model whose layers are next to nothing, all in memory: the median, by its blocks."""
    import torch
    from transformers import LlamaConfig

    import fuyou

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=16,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    seconds: list[float] = []
    with tempfile.TemporaryDirectory(prefix="fuyou-measure-", dir=directory) as folder:
        options: dict[str, Any] = {"device": device, "compute_dtype": compute_dtype, "host_memory": "128MiB"}
        model = fuyou.from_config(config, offload=fuyou.OffloadConfig(store=folder, **options), seed=0, trainable=())
        with model.fuyou as runtime, torch.no_grad():
            model.eval()
            token, cache = torch.zeros((1, 1), dtype=torch.long, device=device), None
            for _ in range(12):
                started = time.perf_counter()
                cache = model(input_ids=token, past_key_values=cache, use_cache=True).past_key_values
                if device != "cpu":
                    torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - started)
            return statistics.median(seconds) / len(runtime.plan.blocks)


def _free_gpu_bytes(device: str) -> int:
    import torch

    return int(torch.cuda.mem_get_info(torch.device(device))[0])


def _measure_link(device: str) -> float:
    """Bytes per second each way while pinned memory is copied both ways at once: best of five times 256 MiB."""
    import torch

    num_bytes = 256 * 2**20
    hosts = [torch.ones(num_bytes, dtype=torch.uint8).pin_memory() for _ in range(2)]
    devices = [torch.ones(num_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
    into, out_of = torch.cuda.Stream(device), torch.cuda.Stream(device)
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        with torch.cuda.stream(into):
            devices[0].copy_(hosts[0], non_blocking=True)
        with torch.cuda.stream(out_of):
            hosts[1].copy_(devices[1], non_blocking=True)
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return num_bytes / best


def _measure_adam(num_workers: int) -> float:
    """Parameters per second: best of three updates of 2M parameters by each of the workers, all at once."""
    n = 2 * 2**20
    scalars = AdamWScalars.at_step(lr=1e-5, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1)

    def update(arrays: tuple[np.ndarray[Any, Any], ...]) -> None:
        high, low, m, v, g = arrays
        adamw_split(high, low, m, v, g, scalars)

    fills: tuple[tuple[float, Any], ...] = (
        (0x3F80, np.uint16),
        (0, np.uint16),
        *((x, np.float32) for x in (0.0, 0.0, 0.1)),
    )
    owned = [tuple(np.full(n, value, dtype) for value, dtype in fills) for _ in range(num_workers)]
    best = float("inf")
    with ThreadPoolExecutor(num_workers) as workers:
        for _ in range(3):
            started = time.perf_counter()
            list(workers.map(update, owned))
            best = min(best, time.perf_counter() - started)
    return num_workers * n / best
