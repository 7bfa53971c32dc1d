"""Fuyou beside other tools on this machine, in turns, and the table of it. Started by scripts/bench_peers.

Each contestant is a process that lives through a whole scenario; they step one after the other (A B C, then C B A), the
others stopped meanwhile (SIGSTOP), so that whatever else the drive and the machine do falls on all of them alike and
nobody pays for starting again. A turn is a few steps and the wait until all that they left to do is done: what Fuyou
would still write while others compute counts as its own time. A contestant that fails, is killed at the memory limit or
is not there is a row with its reason.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import os
import platform
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark_page import write_part

from fuyou.bench import median_ratio
from fuyou.config import format_bytes, parse_bytes

ROOT = Path(__file__).parents[1]
NEVER, ALWAYS = 1e9, 1e-3
"""Limits of the gradients' norm, which is between 0.1 and 100 here."""
SAMPLE_SECONDS = 0.01
LEAST_TAKEN_BYTES = 2**29
"""Below it a contestant that failed was not yet under way."""
RESULTS = "docs/peers.json"
REPORT = "docs/benchmarks.md"
PART = "bench_peers"
"""Of that page."""

TITLES = {
    "fuyou": "Fuyou",
    "deepspeed": "DeepSpeed ZeRO-3, NVMe",
    "deepspeed-lean": "DeepSpeed ZeRO-3, NVMe, no parameters kept live",
    "fsdp2": "FSDP2, CPU offload",
    "torchao": "torchao, CPU offload",
    "in-memory": "in memory",
    "in-memory-checkpointing": "in memory, gradient checkpointing",
}
EVERYONE = ("fuyou", "deepspeed", "deepspeed-lean", "fsdp2", "torchao", "in-memory", "in-memory-checkpointing")


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What is trained, by whom, how often."""

    title: str
    size: str
    contestants: tuple[str, ...]
    num_micro_batches: int = 1
    num_rows: int = 2
    length: int = 128
    max_norm: float = NEVER
    learning_rate: float = 3e-4
    host_memory: str = "768MiB"
    """Fuyou's budget."""
    memory_limit: str | None = "8GiB"
    """Hard, for each contestant's processes together."""
    without_limit: tuple[str, ...] = ()
    """Contestants that come again without the limit, so that their need is known."""
    rounds: int = 5
    steps_per_turn: int = 2
    warm_up_steps: int = 2


SCENARIOS = {
    "206M": Scenario(
        "206M, one micro-batch a step, clipping that never triggers", "206M", EVERYONE, host_memory="600MiB"
    ),
    "206M-clipped": Scenario(
        "206M, one micro-batch a step, clipping that always triggers",
        "206M",
        ("fuyou", "deepspeed-lean", "in-memory-checkpointing"),
        max_norm=ALWAYS,
    ),
    "206M-8": Scenario(
        "206M, eight micro-batches a step, clipping that never triggers",
        "206M",
        ("fuyou", "deepspeed-lean", "in-memory-checkpointing"),
        num_micro_batches=8,
        rounds=4,
        steps_per_turn=1,
        warm_up_steps=1,
    ),
    "567M": Scenario(
        "567M under a hard limit of 1.5 GiB",
        "567M",
        ("fuyou", "deepspeed-lean"),
        learning_rate=2e-5,  # from random weights, without warming up, the loss grows with more
        memory_limit="1.5GiB",
        without_limit=("deepspeed-lean",),
        rounds=2,
        steps_per_turn=2,
        warm_up_steps=1,
    ),
    "1.2B": Scenario(
        "1.2B under a hard limit of 1.5 GiB",
        "1.2B",
        ("fuyou", "deepspeed-lean"),
        learning_rate=2e-5,
        memory_limit="1.5GiB",
        without_limit=("deepspeed-lean",),
        rounds=2,
        steps_per_turn=1,
        warm_up_steps=1,
    ),
}
SMALLEST = Scenario(
    "tiny",
    "tiny",
    ("fuyou", "in-memory", "torchao"),
    length=16,
    host_memory="64MiB",
    memory_limit=None,
    rounds=1,
    warm_up_steps=0,
)


class MemoryGroup:
    """A memory cgroup with a hard limit; `path` is None, with a reason, where there can be none."""

    def __init__(self, limit_bytes: int) -> None:
        self.path: Path | None = None
        self.reason = "no memory cgroup here"
        for root, file in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
            if not (Path(root) / "cgroup.procs").exists():
                continue
            path = Path(root) / f"fuyou-peers-{uuid.uuid4().hex[:12]}"
            try:
                path.mkdir()
                self.path = path
                (path / file).write_text(str(limit_bytes))
            except OSError as error:
                self.reason = f"no limit can be set in {root} ({error.strerror})"
                self.remove()
                continue
            return

    def remove(self) -> None:
        """Once its processes are gone."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.rmdir()
            self.path = None


class PeerFailed(Exception):
    """A contestant is out, and why."""


class Peer:
    """A contestant's process: runs only while it is asked something."""

    def __init__(self, name: str, tool: str, spec: dict[str, Any], limit_bytes: int | None, folder: Path) -> None:
        self.name = name
        self._limit_bytes = limit_bytes
        self._group = MemoryGroup(limit_bytes) if limit_bytes is not None else None
        self.limited_by = None
        if self._group is not None:
            self.limited_by = "cgroup" if self._group.path is not None else f"not limited: {self._group.reason}"
        group_path = str(self._group.path) if self._group is not None and self._group.path is not None else None
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._log_path = folder.with_suffix(".log")
        self._log = self._log_path.open("w")
        command = [sys.executable, str(ROOT / "scripts/peer_process.py"), json.dumps(spec | {"cgroup": group_path})]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, start_new_session=True
        )
        self.peak_bytes = 0

    def ask(self, timeout_seconds: float, **command: Any) -> dict[str, Any]:
        """Its answer, with bytes moved meanwhile; PeerFailed with the reason."""
        pids = self._processes()
        before = _bytes_moved(pids)
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        with self._sampled():
            ready, _, _ = select.select([self._process.stdout], [], [], timeout_seconds)
            line = self._process.stdout.readline() if ready else ""
        if not line:
            raise PeerFailed(self._why(bool(ready), timeout_seconds))
        found = json.loads(line)
        if "reason" in found:
            raise PeerFailed(found["reason"])
        after = _bytes_moved(self._processes())
        found |= {"bytes_read": after[0] - before[0], "bytes_written": after[1] - before[1]}
        self._signal(signal.SIGSTOP)
        return found

    def end(self) -> None:
        """Gone, whatever it was doing."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(OSError):
                stream.close()
        if self._group is not None:
            for _ in range(50):  # the kernel takes a moment to see that it is empty
                self._group.remove()
                if self._group.path is None:
                    break
                time.sleep(0.1)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _why(self, ended: bool, timeout_seconds: float) -> str:
        if not ended:
            return f"no answer in {timeout_seconds:.0f} s"
        code = self._process.wait()
        if code == -signal.SIGKILL and self._limit_bytes is not None:
            return f"killed at the limit of {format_bytes(self._limit_bytes)}"
        lines = [line for line in self._log_path.read_text(errors="replace").splitlines() if line.strip()]
        return f"exit code {code}: {lines[-1][:300] if lines else 'it said nothing'}"

    def _processes(self) -> list[int]:
        found, waiting = [], [self._process.pid]
        while waiting:
            pid = waiting.pop()
            found.append(pid)
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    waiting += [int(child) for child in children.read_text().split()]
        return found

    @contextlib.contextmanager
    def _sampled(self) -> Iterator[None]:
        """Peak of anonymous and shared memory of its processes together."""
        stop = threading.Event()

        def sample() -> None:
            pids, rounds = self._processes(), 0
            while not stop.wait(SAMPLE_SECONDS):
                rounds += 1
                if rounds % 50 == 0:
                    pids = self._processes()
                self.peak_bytes = max(self.peak_bytes, sum(map(_resident_bytes, pids)))

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _resident_bytes(pid: int) -> int:
    """Memory that no file backs: anonymous, and shared without a file."""
    total = 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += int(line.split()[1]) * 1024
    return total


def _bytes_moved(pids: Sequence[int]) -> tuple[int, int]:
    """Read from and written to drives by these processes so far, by the kernel's counters."""
    read = written = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            counters = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
            read += int(counters["read_bytes"])
            written += int(counters["write_bytes"])
    return read, written


def occupied_bytes(folder: Path) -> int:
    """Of a folder's files, on the drive."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def tool_of(name: str) -> str:
    """The contestant's class in peer_process.py."""
    return "deepspeed" if name.startswith("deepspeed") else name


def specification(scenario: Scenario, name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What peer_process.py is told."""
    return {
        "tool": tool_of(name),
        "size": scenario.size,
        "model": str(options.work / f"model-{scenario.size}"),
        "folder": str(folder),
        "drives": None,
        "device": options.device,
        "products": options.products,
        "seed": 0,
        "num_rows": scenario.num_rows,
        "num_micro_batches": scenario.num_micro_batches,
        "length": scenario.length,
        "max_norm": scenario.max_norm,
        "learning_rate": scenario.learning_rate,
        "host_memory": options.host_memory or scenario.host_memory,
        "deepspeed_lean": name == "deepspeed-lean",
        "deepspeed_pipeline": options.deepspeed_pipeline,
        "first_step": 0,
        "resume_from": None,
    }


def make_model(scenario: Scenario, options: argparse.Namespace) -> None:
    """The checkpoint that all begin with, once."""
    model = options.work / f"model-{scenario.size}"
    if (model / "config.json").exists():
        return
    with tempfile.TemporaryDirectory(prefix="make-", dir=options.work) as work:
        folder = Path(work) / "make"
        maker = Peer("make", "make", specification(scenario, "make", folder, options), None, folder)
        try:
            maker.ask(600)
        finally:
            maker.end()


def run_scenario(
    scenario: Scenario, options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Rows by contestant; blocks for minutes. `keep` gets what there is after each round."""
    make_model(scenario, options)
    begun_seconds = time.monotonic()
    limit_bytes = None if scenario.memory_limit is None else parse_bytes(scenario.memory_limit)
    names = [(name, name, limit_bytes) for name in scenario.contestants]
    names += [(f"{name} without the limit", name, None) for name in scenario.without_limit]
    if options.contestants is not None:
        names = [entry for entry in names if entry[1] in options.contestants]
    rows: dict[str, Any] = {}
    result = {"scenario": dataclasses.asdict(scenario), "products": options.products, "rows": rows} | about(options)
    peers: dict[str, Peer] = {}

    def ask_steps(row: str, count: int) -> dict[str, Any]:
        turn = peers[row].ask(options.timeout_seconds, do="steps", count=count)
        rows[row]["losses"] += turn["losses"]
        rows[row]["peak_bytes"] = peers[row].peak_bytes
        _say(f"{scenario.size}: {row}: {turn['seconds'] / count:.2f} s a step")
        return turn

    with tempfile.TemporaryDirectory(prefix="scenario-", dir=options.work) as work:
        try:
            for number, (row, name, limit) in enumerate(names):
                folder = Path(work) / str(number)
                _say(f"{scenario.size}: opening {row}")
                folder.mkdir()
                peer = Peer(row, name, specification(scenario, name, folder, options), limit, folder)
                rows[row] = {
                    "tool": name,
                    "limit_bytes": limit,
                    "limited_by": peer.limited_by,
                    "turns": [],
                    "losses": [],
                }
                peers[row] = peer
                with _dropping(peers, rows, row):
                    opened = peer.ask(options.timeout_seconds, do="open")
                    rows[row] |= {k: opened[k] for k in ("settings", "version")}
                    rows[row]["open_seconds"], rows[row]["open_peak_bytes"] = opened["seconds"], peer.peak_bytes
                    peer.peak_bytes = 0
            for row in list(peers) if scenario.warm_up_steps else ():
                with _dropping(peers, rows, row):
                    ask_steps(row, scenario.warm_up_steps)
            for number in range(options.rounds or scenario.rounds):
                if number > 0 and time.monotonic() - begun_seconds > 60 * options.minutes:
                    _say(f"{scenario.size}: {number} rounds in {options.minutes} minutes, no more are begun")
                    break
                for row in list(peers)[:: 1 if number % 2 == 0 else -1]:
                    with _dropping(peers, rows, row):
                        rows[row]["turns"].append(ask_steps(row, scenario.steps_per_turn))
                keep(result)
            for row in list(peers):
                with _dropping(peers, rows, row):
                    rows[row]["lane_seconds"] = peers[row].ask(options.timeout_seconds, do="close").get("lane_seconds")
                    peers[row].end()
                    rows[row]["left_behind_bytes"] = occupied_bytes(peers[row].folder)
        finally:
            for peer in peers.values():
                peer.end()
    return result


@contextlib.contextmanager
def _dropping(peers: dict[str, Peer], rows: dict[str, Any], row: str) -> Iterator[None]:
    """A contestant that fails is out, with its reason; the others go on."""
    try:
        yield
    except PeerFailed as error:
        _say(f"{row}: {error}")
        rows[row]["reason"] = str(error)
        rows[row]["peak_bytes"] = peers[row].peak_bytes
        peers.pop(row).end()


def run_resume(options: argparse.Namespace) -> dict[str, Any]:
    """Four steps at once, and two, then two more in another process: equal losses?"""
    scenario = dataclasses.replace(SCENARIOS["206M"], size=options.resume_size, title="resume", memory_limit=None)
    if scenario.size == "tiny":
        scenario = dataclasses.replace(scenario, length=16, host_memory="64MiB")
    make_model(scenario, options)
    rows: dict[str, Any] = {}
    for name in EVERYONE:
        if options.contestants is not None and name not in options.contestants:
            continue
        _say(f"resume: {name}")
        with tempfile.TemporaryDirectory(prefix="resume-", dir=options.work) as work:
            rows[name] = _resume(name, scenario, Path(work), options)
    return {"size": scenario.size, "rows": rows} | about(options)


def _resume(name: str, scenario: Scenario, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    def losses(folder: Path, first: int, count: int, resume_from: Path | None, save_to: Path | None) -> list[float]:
        spec = specification(scenario, name, folder, options)
        spec |= {"first_step": first, "resume_from": None if resume_from is None else str(resume_from)}
        peer = Peer(name, name, spec, None, folder)
        try:
            peer.ask(options.timeout_seconds, do="open")
            found: list[float] = peer.ask(options.timeout_seconds, do="steps", count=count)["losses"]
            if save_to is not None:
                saved.update(peer.ask(options.timeout_seconds, do="save", folder=str(save_to)))
                peer.ask(options.timeout_seconds, do="close")
            return found
        finally:
            peer.end()

    saved: dict[str, Any] = {}
    try:
        whole = losses(work / "whole", 0, 4, None, None)
        begun = losses(work / "halves", 0, 2, None, work / "saved")
        ended = losses(work / "halves", 2, 2, work / "saved", None)
    except PeerFailed as error:
        return {"reason": str(error)}
    return {
        "uninterrupted": whole,
        "resumed": begun + ended,
        "equal": whole == begun + ended,
        "save_seconds": saved["seconds"],
        "saved_bytes": occupied_bytes(work / "saved"),
    }


def run_first_step(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds from starting a process to its first step's end, with nothing compiled before; install seconds beside them.

    Leaves what was compiled for DeepSpeed where later runs find it.
    """
    venv = Path(sys.prefix)
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR")
    if extensions is not None and options.keep_compiled:
        # Left by a compilation that was cut short; torch would wait for its end.
        for lock in Path(extensions).glob("*/lock"):
            lock.unlink()
    elif extensions is not None:
        shutil.rmtree(extensions, ignore_errors=True)
    installed = {}
    with contextlib.suppress(OSError):
        installed = {
            k: int(v) for k, v in (line.split() for line in (venv / "install-seconds").read_text().splitlines())
        }
    make_model(SMALLEST, options)
    rows: dict[str, Any] = {}
    for name in EVERYONE:
        if name == "deepspeed-lean" or (options.contestants is not None and name not in options.contestants):
            continue
        _say(f"first step: {name}")
        with tempfile.TemporaryDirectory(prefix="first-", dir=options.work) as work:
            started_seconds = time.perf_counter()
            with _environment(NUMBA_CACHE_DIR=str(Path(work) / "numba")):
                peer = Peer(
                    name, name, specification(SMALLEST, name, Path(work) / "run", options), None, Path(work) / "run"
                )
            try:
                peer.ask(options.timeout_seconds, do="open")
                peer.ask(options.timeout_seconds, do="steps", count=1)
                rows[name] = {"seconds": time.perf_counter() - started_seconds}
            except PeerFailed as error:
                rows[name] = {"reason": str(error)}
            finally:
                peer.end()
    return {"install_seconds": installed, "rows": rows} | about(options)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Machine, commit, time and command."""
    import importlib.metadata

    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}",
        "device": options.device,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "commit": commit.stdout.strip() or None,
        "date": datetime.date.today().isoformat(),
    }


# The table.

_COLUMNS = (
    "| | s a step: median (min to max) | tokens/s | Fuyou is faster by | peak memory | read, written a step | left behind "
    "| clipped | last losses |"
)


def scenario_table(result: Mapping[str, Any]) -> list[str]:
    """Lines of markdown: one row a contestant, those that failed with their reason."""
    scenario = result["scenario"]
    tokens = scenario["num_rows"] * scenario["length"] * scenario["num_micro_batches"]
    ours = _step_seconds(result["rows"].get("fuyou", {}), scenario)
    lines = [_COLUMNS, "|---" * (_COLUMNS.count("|") - 1) + "|"]
    for name, row in result["rows"].items():
        title = TITLES[row["tool"]] + name.removeprefix(row["tool"])
        seconds = _step_seconds(row, scenario)
        if "reason" in row or not seconds:
            was_running = row.get("peak_bytes", 0) > LEAST_TAKEN_BYTES
            peak = f", {_size(row['peak_bytes'])} taken by then" if was_running else ""
            lines.append(f"| {title} | not measured: {_cell(row.get('reason', 'no turn'))}{peak} | | | | | | | |")
            continue
        turns = row["turns"]
        num_steps = sum(len(turn["losses"]) for turn in turns)
        faster = "" if name == "fuyou" or len(ours) != len(seconds) else f"{median_ratio(seconds, ours):.2f} x"
        norms = [norm for turn in turns for norm in turn["norms"]]
        peak = max(row["peak_bytes"], row["open_peak_bytes"])
        opening = " (opening)" if row["open_peak_bytes"] > row["peak_bytes"] else ""
        cells = [
            f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
            f"{tokens / statistics.median(seconds):.0f}",
            faster,
            _size(peak) + opening,
            f"{sum(t['bytes_read'] for t in turns) / num_steps / 1e9:.2f} GB, "
            f"{sum(t['bytes_written'] for t in turns) / num_steps / 1e9:.2f} GB",
            f"{row['left_behind_bytes'] / 1e9:.2f} GB" if "left_behind_bytes" in row else "not measured",
            f"{sum(norm > scenario['max_norm'] for norm in norms)} of {num_steps}",
            ", ".join(f"{loss:.3f}" for loss in row["losses"][-3:]),
        ]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def _step_seconds(row: Mapping[str, Any], scenario: Mapping[str, Any]) -> list[float]:
    return [turn["seconds"] / scenario["steps_per_turn"] for turn in row.get("turns", [])]


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def first_step_table(first: Mapping[str, Any], resume: Mapping[str, Any]) -> list[str]:
    """Lines of markdown: from install to the first step, and what comes of a resume."""
    lines = [
        "| | install | process start to first step, nothing compiled | losses after a resume | save |",
        "|---|---|---|---|---|",
    ]
    installed = first.get("install_seconds", {})
    for name in EVERYONE:
        if name not in first.get("rows", {}) and name not in resume.get("rows", {}):
            continue
        started, resumed = first.get("rows", {}).get(name, {}), resume.get("rows", {}).get(name, {})
        if "everyone" in installed and name in ("fuyou", "in-memory"):
            install = f"{installed['everyone'] / 60:.1f} min"
        elif name == "deepspeed" and "deepspeed" in installed:
            install = f"+ {installed['deepspeed'] / 60:.1f} min"
        else:
            install = ""
        seconds = (
            f"{started['seconds'] / 60:.1f} min"
            if "seconds" in started
            else _cell(started.get("reason", "as above" if name == "deepspeed-lean" else "not measured"))
        )
        if "equal" in resumed:
            told = "equal" if resumed["equal"] else "differ: " + ", ".join(f"{x:.4f}" for x in resumed["resumed"][2:])
            told += (
                "" if resumed["equal"] else " instead of " + ", ".join(f"{x:.4f}" for x in resumed["uninterrupted"][2:])
            )
            save = f"{resumed['save_seconds']:.1f} s, {resumed['saved_bytes'] / 1e6:.0f} MB"
        else:
            told, save = _cell(resumed.get("reason", "not measured")), ""
        lines.append(f"| {TITLES[name]} | {install} | {seconds} | {told} | {save} |")
    return lines


def report(results: Mapping[str, Any]) -> str:
    """What goes into docs/benchmarks.md."""
    parts = []
    for key in SCENARIOS:
        result = results.get(key)
        if result is None:
            parts += [f"### {SCENARIOS[key].title}", "", "Not measured yet.", ""]
            continue
        scenario = result["scenario"]
        limit = scenario["memory_limit"]
        num_rounds = max(len(row["turns"]) for row in result["rows"].values())
        steps = f"rounds: {num_rounds}, turns of {scenario['steps_per_turn']}"
        how = f"limit {limit} each" if limit else "no limit"
        parts += [f"### {scenario['title']}", ""]
        parts += [f"`scripts/bench_peers --only {key}`, commit {result['commit']}, {steps} steps; {how}.", ""]
        parts += [*scenario_table(result), ""]
    first, resume = results.get("first-step"), results.get("resume")
    if first or resume:
        parts += ["### First step and resume", ""]
        parts += [*first_step_table(first or {}, resume or {}), ""]
    return "\n".join(parts)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _end_on_sigterm(*_: Any) -> None:
    raise SystemExit(143)  # so that contestants, which live in sessions of their own, are ended, too


def main() -> int:
    """Run what is asked for, keep all results in one JSON file, write the section."""
    parser = argparse.ArgumentParser(description=__doc__, prog="bench_peers")
    known = (*SCENARIOS, "first-step", "resume", "smallest")
    parser.add_argument("--only", action="append", choices=known, help="a part (all but `smallest`); may be repeated")
    parser.add_argument("--contestants", type=lambda text: tuple(text.split(",")), help="some of " + ",".join(EVERYONE))
    parser.add_argument("--prepare", action="store_true", help="install, compile and time the first steps; no more")
    parser.add_argument(
        "--keep-compiled", action="store_true", help="do not compile DeepSpeed's operators anew for that"
    )
    parser.add_argument("--report", action="store_true", help="only write the section from the results")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/peers"), help="folder on the drive to measure (runs/peers)"
    )
    parser.add_argument("--results", type=Path, help=f"JSON file ({RESULTS})")
    parser.add_argument("--page", type=Path, help=f"file with the section ({REPORT}; none with --results)")
    parser.add_argument("--device", help="cuda or cpu (cuda if there is one)")
    parser.add_argument(
        "--products",
        choices=("torch", "float32"),
        help="how bfloat16 matrix products are computed: torch's way, or for all contestants alike as float32 products "
        "(float32 on a CPU without bfloat16 units)",
    )
    parser.add_argument("--host-memory", metavar="SIZE", help="Fuyou's budget (the scenario's)")
    parser.add_argument("--rounds", type=int, help="turns of each (the scenario's)")
    parser.add_argument("--minutes", type=float, default=30, help="of a scenario, after which no round is begun (30)")
    parser.add_argument(
        "--deepspeed-pipeline", action="store_true", help="DeepSpeed's pipeline_read and pipeline_write"
    )
    parser.add_argument("--resume-size", default="26M", help="model of the resume (26M)")
    parser.add_argument("--timeout-seconds", type=float, default=900, help="for one answer (900)")
    options = parser.parse_args()
    unknown = set(options.contestants or ()) - set(EVERYONE)
    if unknown:
        parser.error(f"--contestants: {', '.join(sorted(unknown))} unknown; choose from {', '.join(EVERYONE)}")
    if options.results is None:
        options.results, options.page = ROOT / RESULTS, options.page or ROOT / REPORT
    results: dict[str, Any] = json.loads(options.results.read_text()) if options.results.exists() else {}
    signal.signal(signal.SIGTERM, _end_on_sigterm)
    if not options.report:
        options.work.mkdir(parents=True, exist_ok=True)
        options.work = options.work.resolve()
        _choose_device(options)
        parts = ["first-step"] if options.prepare else options.only or ["first-step", *SCENARIOS, "resume"]

        def keep(part: str, result: dict[str, Any]) -> None:
            results[part] = result
            options.results.write_text(json.dumps(results, indent=1) + "\n")

        for part in parts:
            if part == "first-step":
                keep(part, run_first_step(options))
            elif part == "resume":
                keep(part, run_resume(options))
            else:
                scenario = SMALLEST if part == "smallest" else SCENARIOS[part]
                keep(part, run_scenario(scenario, options, functools.partial(keep, part)))
                print("\n".join(scenario_table(results[part])))
    if options.page is not None:
        write_part(options.page, PART, report(results))
    return 0


def _choose_device(options: argparse.Namespace) -> None:
    import torch

    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.products is None:
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        has_units = "avx512_bf16" in flags or "amx_bf16" in flags
        options.products = "float32" if options.device == "cpu" and not has_units else "torch"


if __name__ == "__main__":
    sys.exit(main())
