"""`fuyou doctor`: what this machine has, which way bytes go and why, and what to do about what is missing."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from fuyou.config import format_bytes

Status = Literal["ok", "note", "problem"]

PROBE_BYTES = 128 * 2**20
"""Size of the file that is written and read to measure a drive."""

NEEDED_DESCRIPTORS = 256
"""Open files a run may need: a few for each drive, and those of Python and its libraries."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    name: str
    status: Status
    value: str
    advice: str = ""
    """What to do; empty if nothing."""


def examine(directory: str | os.PathLike[str] = ".") -> list[Finding]:
    """Looks at everything; blocks for seconds. Writes, reads and removes 128 MiB in `directory`."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        _packages,
        _own_packages,
        _gpu,
        _memory,
        _huge_pages,
        _descriptors,
        lambda: _drive(Path(directory)),
    )
    return [finding for check in checks for finding in check()]


def advice(findings: list[Finding]) -> list[str]:
    """What to do, problems first; empty if all is well."""
    ordered = sorted((f for f in findings if f.advice), key=lambda f: f.status != "problem")
    return [f"{finding.name}: {finding.advice}" for finding in ordered]


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    wanted = _requires_python()
    good = wanted is None or _in_range(version, wanted)
    yield Finding(
        "Python",
        "ok" if good else "problem",
        f"{version} ({sys.executable})",
        "" if good else f"this version of fuyou is made for Python {wanted}: install it under one of these",
    )


def _packages() -> Iterator[Finding]:
    ranges = _required_ranges()
    for name in ("torch", "transformers", "numba", "numpy", "datasets"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "problem", "not installed", f"pip install '{name}{ranges.get(name, '')}'")
            continue
        wanted = ranges.get(name)
        if wanted is None or _in_range(version, wanted):
            yield Finding(name, "ok", version + (f" (supported: {wanted})" if wanted else ""))
        else:
            yield Finding(
                name,
                "problem",
                f"{version}, outside of the supported range {wanted}",
                f"pip install '{name}{wanted}'",
            )
    found = [
        f"{name} {importlib.metadata.version(name)}"
        for name in ("kvikio-cu12", "kvikio-cu13")
        if importlib.util.find_spec("kvikio") is not None and _installed(name)
    ]
    yield Finding(
        "kvikio",
        "note",
        f"{found[0]}; used where it is measured faster than system calls (offload.io)"
        if found
        else "not installed; system calls move the files",
    )


def _own_packages() -> Iterator[Finding]:
    here = Path(__file__).resolve().parent.parent
    for name in ("io_engine", "optim"):
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if origin is not None and origin.parent.parent == here:
            yield Finding(f"package {name}", "ok", str(origin.parent))
        else:
            yield Finding(
                f"package {name}",
                "problem",
                f"found at {origin}, not beside fuyou in {here}",
                f"rename {origin or name}, or run from another folder: it hides fuyou's own package",
            )


def _gpu() -> Iterator[Finding]:
    if not _installed("torch"):
        return
    import torch

    if not torch.cuda.is_available():
        yield Finding(
            "GPU",
            "note",
            f"none that torch {torch.__version__} can use; blocks are computed on the CPU",
            "for a GPU: check that nvidia-smi lists it and that torch is a CUDA build",
        )
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        bfloat16 = torch.cuda.get_device_capability(index) >= (8, 0)
        yield Finding(
            f"GPU {index}",
            "ok" if bfloat16 else "note",
            f"{torch.cuda.get_device_name(index)}, {format_bytes(free)} of {format_bytes(total)} free",
            "" if bfloat16 else 'computes bfloat16 slowly; consider offload.compute_dtype: "float32"',
        )


def _memory() -> Iterator[Finding]:
    import psutil

    from fuyou.hardware import available_host_bytes

    available, total = available_host_bytes(), psutil.virtual_memory().total
    low = available < 2 * 2**30
    yield Finding(
        "host memory",
        "note" if low else "ok",
        f"{format_bytes(available)} of {format_bytes(total)} available",
        "little memory is free: close other programs, or expect small budgets" if low else "",
    )


def _huge_pages() -> Iterator[Finding]:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    try:
        text = path.read_text().strip()
    except OSError:
        yield Finding("huge pages", "note", "unknown: this system does not say")
        return
    match = re.search(r"\[(\w+)\]", text)
    mode = match[1] if match else text
    off = mode == "never"
    yield Finding(
        "huge pages",
        "note" if off else "ok",
        mode,
        f"reads and writes cost more time without them; an administrator can enable them: echo madvise > {path}"
        if off
        else "",
    )


def _descriptors() -> Iterator[Finding]:
    try:
        import resource
    except ImportError:  # no such limit on this system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = soft != resource.RLIM_INFINITY and soft < NEEDED_DESCRIPTORS
    yield Finding(
        "open files",
        "problem" if low else "ok",
        f"at most {'unlimited' if soft == resource.RLIM_INFINITY else soft}",
        f"ulimit -n {NEEDED_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, 4096)}" if low else "",
    )


def _drive(directory: Path) -> Iterator[Finding]:
    from io_engine import EngineError, probe_directory

    name = f"drive of {directory.absolute()}"
    try:
        probe = probe_directory(directory, num_bytes=PROBE_BYTES)
    except (OSError, EngineError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        yield Finding(name, "problem", reason, "name a directory on the drive that the store will be on")
        return
    yield Finding(
        name,
        "ok" if probe.direct else "note",
        f"read {probe.read_bytes_per_second / 1e9:.2f} GB/s, write {probe.write_bytes_per_second / 1e9:.2f} "
        "GB/s, "
        f"both at once {probe.mixed_bytes_per_second / 1e9:.2f} GB/s; {format_bytes(probe.free_bytes)} free",
        "" if probe.direct else "this file system has no O_DIRECT; a store on ext4 or xfs is faster",
    )
    yield Finding("I/O path", "ok" if probe.direct else "note", probe.reason)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _requires_python() -> str | None:
    try:
        metadata = importlib.metadata.metadata("fuyou")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return None
    # Subscription of a missing field is deprecated, and the type has no `get`.
    return next(iter(metadata.get_all("Requires-Python") or ()), None)


def _required_ranges() -> dict[str, str]:
    """The version ranges that fuyou was installed with; empty if it runs from a checkout."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("fuyou") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    requirements = [Requirement(line) for line in lines]
    return {r.name: str(r.specifier) for r in requirements if r.marker is None and str(r.specifier)}


def _in_range(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)
