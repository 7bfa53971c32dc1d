"""What the drives under some directories do through the engine, and by bare system calls in the same rounds."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fuyou.bench import MIN_REPEATS, existing_directory, median_ratio, spread, take_turns
from fuyou.config import format_bytes, parse_bytes
from fuyou.errors import ConfigError

if TYPE_CHECKING:
    from io_engine import ByteArray, Engine, Extent, Transfer

SUMMARY = "reading, writing and both at once through the engine, beside bare system calls"

NUM_THREADS = 4
"""For each directory, in the engine and in the bare loop."""

SHORT_SWITCH_SECONDS = 5e-4
"""A switch interval of Python's threads (its default is ten times that) with which a busy main thread disturbs less."""

MODES = ("read", "write", "mixed")


class Task(NamedTuple):
    """One request: `kind` is "read" or "write"."""

    kind: str
    extent: Extent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` reads."""
    parser.add_argument(
        "directories", nargs="+", metavar="DIR", help="directory on the drive; several are one stripe set"
    )
    parser.add_argument("--size", default="768MiB", help="bytes of a pass, on all drives together (default: 768MiB)")
    parser.add_argument(
        "--request",
        default="32MiB",
        help="bytes of a transfer, of which the engine makes a request for each of its threads (default: 32MiB)",
    )
    parser.add_argument("--rounds", type=int, default=MIN_REPEATS, help=f"passes of each (default: {MIN_REPEATS})")
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.0,
        help="then write for so long, past the drives' caches (default: not at all)",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; blocks for most of a minute by default, and for `--seconds` more. Removes its files.

    ConfigError for options that make no sense, OSError with the path from the drives.
    """
    from io_engine import ALIGNMENT_BYTES, PosixEngine, round_up
    from io_engine.space import check_space

    directories = [existing_directory(directory) for directory in options.directories]
    if options.rounds < 1 or options.seconds < 0:
        raise ConfigError("bench io: --rounds must be at least 1 and --seconds not negative")
    if len({os.path.realpath(directory) for directory in directories}) != len(directories):
        raise ConfigError(f"bench io: a directory is named twice in {', '.join(directories)}; name each drive's once")
    request_bytes = round_up(parse_bytes(options.request, "--request"), ALIGNMENT_BYTES)
    with PosixEngine(NUM_THREADS, request_bytes) as engine, contextlib.ExitStack() as stack:
        size_bytes = round_up(max(parse_bytes(options.size, "--size"), 4 * request_bytes), 4 * request_bytes)
        rates = _rates(directories)
        name = f".fuyou-bench-{uuid.uuid4().hex}.bin"
        extents = _place(directories, name, rates, size_bytes, request_bytes)
        check_space({d: _end_bytes(extents, d) for d in directories if _end_bytes(extents, d)}, "the benchmark")
        paths = sorted({extent.path for extent in extents})
        for path in paths:
            stack.callback(_remove, engine, path)
            engine.preallocate(path, _end_bytes(extents, os.path.dirname(path)))
        bench = _Bench(engine, extents, paths, stack)
        bench.engine_pass("write")  # blocks written for the first time cost half the speed
        modes = {mode: bench.measure(mode, options.rounds) for mode in MODES}
        copy_rate = bench.memory_copy_bytes_per_second(options.rounds)
        return {
            "directories": directories,
            "directory_bytes_per_second": rates if len(directories) > 1 else None,
            "reason": engine.reason,
            "size_bytes": size_bytes,
            "request_bytes": request_bytes,
            "num_threads": NUM_THREADS,
            "num_rounds": options.rounds,
            "modes": modes,
            "memory_copy_bytes_per_second": copy_rate,
            "read_over_memory_copy": modes["read"]["bytes_per_second"] / copy_rate,
            "fio": _fio(paths, size_bytes // len(paths), request_bytes),
            "sustained_write": bench.sustained_write(options.seconds) if options.seconds else None,
        }


def describe(result: dict[str, Any]) -> str:
    """The same as a table."""
    lines = [
        f"{', '.join(result['directories'])}: {result['reason']}",
        f"{format_bytes(result['size_bytes'])} a pass in transfers of {format_bytes(result['request_bytes'])}, medians of "
        f"{result['num_rounds']} rounds; limit: bare preadv/pwritev calls of the same requests, in turn with the engine",
        "",
        f"{'':6}{'GB/s':>7}{'limit':>7}{'ratio':>7}{'spread':>8}{'CPU s/GB':>9}{'request':>10}"
        f"{'busy':>7}{'bare':>7}{'switch':>7}",
    ]
    for mode, row in result["modes"].items():
        request_bytes = row["block_request_bytes"]
        lines.append(
            f"{mode:6}{row['bytes_per_second'] / 1e9:>7.2f}{row['limit_bytes_per_second'] / 1e9:>7.2f}{row['ratio']:>7.3f}"
            f"{row['spread']:>8.1%}{row['cpu_seconds_per_gb']:>9.4f}"
            f"{'unknown' if request_bytes is None else format_bytes(request_bytes):>10}"
            f"{row['busy_ratio']:>7.3f}{row['busy_limit_ratio']:>7.3f}{row['busy_short_switch_ratio']:>7.3f}"
        )
    lines += [
        "",
        "request: as the drive gets it; busy: the engine's rate over the quiet limit while the main thread runs Python loops; "
        f"bare: the same of the bare loop; switch: of the engine under sys.setswitchinterval({SHORT_SWITCH_SECONDS})",
        f"memory copy {result['memory_copy_bytes_per_second'] / 1e9:.2f} GB/s, of which reading reaches "
        f"{result['read_over_memory_copy']:.2f} (a limit for tmpfs only)",
    ]
    fio = result["fio"]
    lines.append(f"fio: {fio['error']}" if "error" in fio else "fio: " + _rates_text(fio))
    if result["sustained_write"]:
        parts = ", ".join(f"{rate / 1e9:.2f}" for rate in result["sustained_write"]["bytes_per_second"])
        total_bytes = result["sustained_write"]["num_bytes"]
        lines.append(f"sustained write of {format_bytes(total_bytes)}, GB/s in each tenth of the time: {parts}")
    return "\n".join(lines)


def _rates_text(rates: dict[str, float]) -> str:
    return ", ".join(f"{mode} {rate / 1e9:.2f} GB/s" for mode, rate in rates.items())


# ------------------------------------------------------------------------------------------------ where


def _rates(directories: Sequence[str]) -> list[float]:
    """What each directory's drive does, for the shares of a stripe set; one directory has it all."""
    from io_engine import probe_directory

    if len(directories) == 1:
        return [1.0]
    return [probe_directory(directory).mixed_bytes_per_second for directory in directories]


def _place(
    directories: Sequence[str], name: str, rates: Sequence[float], size_bytes: int, request_bytes: int
) -> list[Extent]:
    """The requests of a pass, in order, as extents, spread as a store spreads its own."""
    from io_engine import Extent
    from io_engine.space import rooms
    from io_engine.striping import Striper

    extents = []
    for piece in Striper(rates, rooms(directories)).place(size_bytes):
        whole = Extent(os.path.join(directories[piece.directory], name), piece.offset_bytes, piece.num_bytes)
        for begin_bytes in range(0, piece.num_bytes, request_bytes):
            extents.append(whole.sub(begin_bytes, min(request_bytes, piece.num_bytes - begin_bytes)))
    return extents


def _end_bytes(extents: Sequence[Extent], directory: str) -> int:
    ends = [e.offset_bytes + e.num_bytes for e in extents if os.path.dirname(e.path) == directory]
    return max(ends, default=0)


def _remove(engine: Engine, path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        engine.remove(path)


# -------------------------------------------------------------------------------------------- contestants


class _Bench:
    """The passes: the same requests on the same buffers, through the engine and by bare calls."""

    def __init__(self, engine: Engine, extents: list[Extent], paths: list[str], stack: contextlib.ExitStack) -> None:
        from io_engine import BufferPool
        from io_engine.buffers import size_class_bytes

        self._engine, self._paths = engine, paths
        num_buffers = 2 * NUM_THREADS * len(paths)
        largest_bytes = max(extent.num_bytes for extent in extents)
        pool = stack.enter_context(BufferPool(num_buffers * size_class_bytes(largest_bytes), name="bench"))
        self._arrays = [stack.enter_context(pool.acquire(largest_bytes)).array for _ in range(num_buffers)]
        for index, array in enumerate(self._arrays):
            array[:] = index + 1  # not zeros, which some drives do not store
        half = len(extents) // 2
        self._tasks: dict[str, list[Task]] = {
            "read": [Task("read", extent) for extent in extents],
            "write": [Task("write", extent) for extent in extents],
            # Reads of one half beside writes of the other: no read meets a write.
            "mixed": [
                task
                for read, write in zip(extents[:half], extents[half : 2 * half], strict=True)
                for task in (Task("read", read), Task("write", write))
            ],
        }
        self._descriptors = {path: open_direct(path, stack) for path in paths}

    def measure(self, mode: str, num_rounds: int) -> dict[str, Any]:
        """Rates, ratios and costs of one mode."""
        num_bytes = sum(task.extent.num_bytes for task in self._tasks[mode])
        engine_pass, bare_pass = (lambda: self.engine_pass(mode)), (lambda: self._bare_pass(mode))
        cpu = _Meter(engine_pass, self._paths)
        seconds = take_turns(
            {
                "engine": cpu,
                "limit": bare_pass,
                "busy": lambda: _beside_busy_main(engine_pass),
                "busy limit": lambda: _beside_busy_main(bare_pass),
                "busy short switch": lambda: _beside_busy_main(engine_pass, SHORT_SWITCH_SECONDS),
            },
            num_rounds,
        )
        return {
            "bytes_per_second": num_bytes / statistics.median(seconds["engine"]),
            "limit_bytes_per_second": num_bytes / statistics.median(seconds["limit"]),
            "ratio": median_ratio(seconds["limit"], seconds["engine"]),
            "spread": spread(seconds["engine"]),
            "cpu_seconds_per_gb": statistics.median(cpu.cpu_seconds[1:]) / (num_bytes / 1e9),
            "block_request_bytes": cpu.block_request_bytes(),
            "busy_ratio": median_ratio(seconds["limit"], seconds["busy"]),
            "busy_limit_ratio": median_ratio(seconds["limit"], seconds["busy limit"]),
            "busy_short_switch_ratio": median_ratio(seconds["limit"], seconds["busy short switch"]),
            "seconds": seconds,
        }

    def engine_pass(self, mode: str) -> None:
        """All requests of a mode through the engine, as many under way as there are buffers."""
        from io_engine.verify import finish

        under_way: list[Transfer] = []
        try:
            for index, (kind, extent) in enumerate(self._tasks[mode]):
                if len(under_way) == len(self._arrays):
                    under_way.pop(0).wait()  # in order of submission, so the array of this task is free now
                array = self._arrays[index % len(self._arrays)][: extent.num_bytes]
                under_way.append(
                    self._engine.read(extent, array) if kind == "read" else self._engine.write(extent, array)
                )
            while under_way:
                under_way.pop(0).wait()
        finally:
            finish(under_way)
        if mode != "read":
            for path in self._paths:
                self._engine.sync(path)

    def _bare_pass(self, mode: str) -> None:
        """The same by threads that do nothing but system calls; each directory has its own."""
        with ThreadPoolExecutor(NUM_THREADS * len(self._paths)) as threads:
            calls = []
            arrays = iter(self._arrays)
            for path in self._paths:
                tasks = iter([task for task in self._tasks[mode] if task.extent.path == path])  # shared by its threads
                for _ in range(NUM_THREADS):
                    pair = list(itertools.islice(arrays, 2))
                    calls.append(threads.submit(bare_calls, self._descriptors[path], tasks, pair))
            for call in calls:
                call.result()
        if mode != "read":
            for descriptor in self._descriptors.values():
                os.fdatasync(descriptor)

    def memory_copy_bytes_per_second(self, num_rounds: int) -> float:
        """Copies between the same buffers by as many threads: reading a file system in memory is no faster."""
        import numpy as np

        half = len(self._arrays) // 2
        num_bytes = sum(array.size for array in self._arrays[:half])
        with ThreadPoolExecutor(NUM_THREADS) as threads:
            seconds = take_turns(
                {"copy": lambda: list(threads.map(np.copyto, self._arrays[:half], self._arrays[half:]))}, num_rounds
            )
        return num_bytes / statistics.median(seconds["copy"])

    def sustained_write(self, wanted_seconds: float) -> dict[str, Any]:
        """Write over the files again and again; the rate in each tenth of the time."""
        num_bytes = sum(task.extent.num_bytes for task in self._tasks["write"])
        begun_seconds = time.perf_counter()
        ends: list[float] = []
        while not ends or ends[-1] < wanted_seconds:
            self.engine_pass("write")
            ends.append(time.perf_counter() - begun_seconds)
        # A pass counts for the tenths that it lies in, by its share of time in each.
        bounds = [ends[-1] * tenth / 10 for tenth in range(11)]
        rates = []
        for low, high in itertools.pairwise(bounds):
            moved_bytes = sum(
                num_bytes * max(0.0, min(high, end) - max(low, start)) / (end - start)
                for start, end in itertools.pairwise([0.0, *ends])
            )
            rates.append(moved_bytes / (high - low))
        return {"seconds": ends[-1], "num_bytes": num_bytes * len(ends), "bytes_per_second": rates}


def open_direct(path: str, stack: contextlib.ExitStack) -> int:
    """A descriptor for reading and writing past the page cache where that is possible, closed with `stack`."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags | os.O_DIRECT)
    except (OSError, AttributeError):
        descriptor = os.open(path, flags)  # as the engine does where the file system has no O_DIRECT
    stack.callback(os.close, descriptor)
    return descriptor


def bare_calls(descriptor: int, tasks: Iterator[Task], arrays: Sequence[ByteArray]) -> None:
    """Do the tasks that are left in one thread, by system calls on arrays taken in turn. OSError if one moves too little."""
    for array, (kind, extent) in zip(itertools.cycle(arrays), tasks, strict=False):
        view = array.data[: extent.num_bytes]
        move = os.preadv if kind == "read" else os.pwritev
        moved_bytes = move(descriptor, [view], extent.offset_bytes)
        if moved_bytes != extent.num_bytes:
            raise OSError(f"a bare {kind} of {extent.num_bytes} bytes at {extent.offset_bytes} moved {moved_bytes}")


def _beside_busy_main(call: Callable[[], object], switch_seconds: float | None = None) -> None:
    """Run `call` in a thread while this one runs Python code."""
    before_seconds = sys.getswitchinterval()
    if switch_seconds is not None:
        sys.setswitchinterval(switch_seconds)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        while thread.is_alive():
            for _ in range(1000):
                pass
    finally:
        thread.join()
        sys.setswitchinterval(before_seconds)
    if failures:
        raise failures[0]


class _Meter:
    """A contestant whose CPU time, and requests at the drives, are taken too."""

    def __init__(self, call: Callable[[], object], paths: Sequence[str]) -> None:
        self._call = call
        self._devices = {os.stat(path).st_dev for path in paths}
        self.cpu_seconds: list[float] = []
        self._num_requests = self._num_bytes = 0

    def __call__(self) -> None:
        """Do it once."""
        before, drives = resource.getrusage(resource.RUSAGE_SELF), self._drives()
        self._call()
        after, drives_after = resource.getrusage(resource.RUSAGE_SELF), self._drives()
        self.cpu_seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if drives is not None and drives_after is not None:
            self._num_requests += drives_after[0] - drives[0]
            self._num_bytes += drives_after[1] - drives[1]

    def block_request_bytes(self) -> int | None:
        """Mean size of the requests that the kernel made of it, other processes' included; None: not known here."""
        return self._num_bytes // self._num_requests if self._num_requests else None

    def _drives(self) -> tuple[int, int] | None:
        """Requests and bytes of the drives so far."""
        total_requests = total_bytes = 0
        for device in self._devices:
            try:
                fields = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()
            except OSError:
                return None
            total_requests += int(fields[0]) + int(fields[4])
            total_bytes += 512 * (int(fields[2]) + int(fields[6]))
        return total_requests, total_bytes


def _fio(paths: Sequence[str], file_bytes: int, request_bytes: int) -> dict[str, Any]:
    """What fio reaches with the same requests on huge pages, each mode once; or why it is not known."""
    fio = shutil.which("fio")
    if fio is None:
        return {"error": "not installed"}
    rates: dict[str, Any] = {}
    for mode, pattern in (("read", "read"), ("write", "write"), ("mixed", "rw")):
        command = [
            fio, "--name=fuyou", f"--filename={':'.join(paths)}", f"--rw={pattern}", f"--bs={request_bytes}",
            f"--size={file_bytes * len(paths)}", f"--numjobs={NUM_THREADS}", "--ioengine=psync", "--direct=1",
            "--iomem=mmaphuge", "--time_based", "--runtime=3", "--group_reporting", "--end_fsync=1",
            "--output-format=json",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            detail = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            return {"error": f"failed, {detail} (huge pages must be reserved: sysctl vm.nr_hugepages=1024)"}
        job = json.loads(done.stdout)["jobs"][0]
        rates[mode] = float(job["read"]["bw_bytes"] + job["write"]["bw_bytes"])
    return rates
