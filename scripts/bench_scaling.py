"""Seconds and peak memory of a training step against layers, micro-batches, host memory and drives.

Each row is a `fuyou bench step` in a process of its own: the step beside its transfers alone and its compute alone, in
turns. Started by scripts/bench_scaling.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark_page import write_part

from fuyou.config import parse_bytes

ROOT = Path(__file__).parents[1]
PART = "bench_scaling"
"""Of docs/benchmarks.md."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One `fuyou bench step`."""

    layers: int = 16
    micro_batches: int = 1
    host_memory: str = "384MiB"
    drives: int = 1
    size: str = "85M"
    length: int = 40
    repeats: int = 5


SWEEPS: dict[str, tuple[Row, ...]] = {
    "layers": tuple(Row(layers=n, repeats=5 if n <= 24 else 3) for n in (8, 16, 24, 32, 48, 64)),
    "micro_batches": tuple(Row(micro_batches=n, size="26M", layers=8) for n in (1, 2, 4, 8, 16)),
    "host_memory": tuple(Row(host_memory=size) for size in ("256MiB", "512MiB", "1GiB", "2GiB")),
    "drives": tuple(Row(drives=n) for n in (1, 2, 3, 4)),
}
TITLES = {
    "layers": "Layers (of the 85M shape, 7.1M parameters each)",
    "micro_batches": "Micro-batches (8 layers of the 26M shape, 80 tokens each)",
    "host_memory": "Host memory (16 layers of the 85M shape)",
    "drives": "Directories of the store (16 layers of the 85M shape)",
}
LIMITED_BY_BOTH = 2.0
"""Transfers alone and compute alone count as near each other up to this factor; there overlap shows."""


def measure(row: Row, directories: Sequence[Path]) -> dict[str, Any]:
    """What `fuyou bench step` found, or `reason` why not."""
    command = [sys.executable, "-m", "fuyou", "bench", "step", *map(str, directories[: row.drives])]
    command += ["--without-torch", "--json"]
    for name, value in dataclasses.asdict(row).items():
        if name != "drives":
            command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return {"reason": (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def linear_fit(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """Slope and offset of the line that leaves the least relative squares, and its largest relative error."""
    # Weighted by 1/y: a tenth of a second is much for a small model and little for a large one.
    weights = [1 / y**2 for y in ys]
    total = sum(weights)
    mean_x = sum(w * x for w, x in zip(weights, xs, strict=True)) / total
    mean_y = sum(w * y for w, y in zip(weights, ys, strict=True)) / total
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, x, y in zip(weights, xs, ys, strict=True)) / sum(
        w * (x - mean_x) ** 2 for w, x in zip(weights, xs, strict=True)
    )
    offset = mean_y - slope * mean_x
    return slope, offset, max(abs(offset + slope * x - y) / y for x, y in zip(xs, ys, strict=True))


def near_each_other(found: Mapping[str, Any]) -> bool:
    """Whether neither transfers nor compute dwarf the other."""
    transfers, compute = found["transfers"]["seconds"], found["compute"]["seconds"]
    return max(transfers, compute) <= LIMITED_BY_BOTH * min(transfers, compute)


def value_of(sweep: str, row: Mapping[str, Any]) -> str:
    """What a sweep varies, for people."""
    return str(row["layers" if sweep == "layers" else sweep])


def table(sweep: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of markdown."""
    lines = [
        f"| {sweep.replace('_', ' ')} | parameters | step | transfers alone | compute and Adam alone | step / longer of them | "
        "near each other | peak memory | tokens/s | predicted |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in rows:
        name, found = value_of(sweep, entry["row"]), entry["found"]
        if "reason" in found:
            lines.append(f"| {name} | not measured: {found['reason'].replace('|', '/')} | | | | | | | | |")
            continue
        cells = [
            name,
            f"{found['num_parameters'] / 1e6:.0f}M",
            f"{found['step']['seconds']:.3f} s +- {100 * found['step']['spread']:.0f} %",
            f"{found['transfers']['seconds']:.3f} s",
            f"{found['compute']['seconds']:.3f} s",
            f"{found['ratio']:.2f}",
            "yes" if near_each_other(found) else "no",
            f"{found['peak_host_bytes'] / 2**20:.0f} MiB",
            f"{found['tokens_per_second']:.0f}",
            f"{found['predicted_seconds']:.3f} s",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def overlap_summary(results: Mapping[str, Any]) -> str:
    """How many of the rows in which overlap shows are within 1.15 of the limit."""
    near = [
        entry["found"]["ratio"]
        for sweep in SWEEPS
        for entry in results.get(sweep, [])
        if "reason" not in entry["found"] and near_each_other(entry["found"])
    ]
    if not near:
        return "No row has transfers and compute within 2 x of each other."
    within = sum(ratio <= 1.15 for ratio in near)
    return (
        f"Transfers and compute are within 2 x of each other in {len(near)} rows; the step is at most 1.15 x the longer of "
        f"them in {within} (median {statistics.median(near):.2f}, {min(near):.2f} to {max(near):.2f})."
    )


def layers_summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The line through the rows, and how memory moves."""
    found = [entry["found"] for entry in rows if "reason" not in entry["found"]]
    if len(found) < 3:
        return "Too few rows for a line."
    slope, offset, error = linear_fit([f["num_parameters"] / 1e6 for f in found], [f["step"]["seconds"] for f in found])
    peaks = [f["peak_host_bytes"] / 2**20 for f in found]
    return (
        f"Seconds = {offset:.3f} + {1000 * slope:.2f} for each billion parameters, largest error {100 * error:.1f} %. "
        f"Peak memory {min(peaks):.0f} to {max(peaks):.0f} MiB with {found[0]['num_parameters'] / 1e6:.0f}M to "
        f"{found[-1]['num_parameters'] / 1e6:.0f}M parameters."
    )


def report(results: Mapping[str, Any]) -> str:
    """What goes into docs/benchmarks.md."""
    about = results["about"]
    parts = [
        "![step seconds and peak memory against layers, micro-batches, host memory and drives](scaling.svg)",
        "",
    ]
    parts += [
        f"`scripts/bench_scaling`: {about['machine']}, torch {about['torch']}, commit {about['commit']}. Each row is a `fuyou bench "
        "step` in a process of its own: float32 on the CPU, 80 tokens a micro-batch, clipping that never triggers, budget 384 MiB "
        'unless the row says otherwise; medians of 5 rounds in turn (3 from 32 layers on), +- half the quartile range. "Alone" is '
        "measured beside it with the step's own plan of activations. Peak memory is anonymous memory above the process's start. "
        '"Predicted" is the plan\'s simulation and no measurement.',
        "",
        overlap_summary(results),
        "",
    ]
    for sweep, title in TITLES.items():
        parts += [f"### {title}", ""]
        rows = results.get(sweep)
        parts += [*table(sweep, rows), ""] if rows else ["Not measured yet.", ""]
        if rows and sweep == "layers":
            parts += [layers_summary(rows), ""]
        if sweep == "drives" and rows and about["num_file_systems"] == 1:
            parts += [
                "All directories lie on one drive here: what is measured is the price of striping, not its gain.",
                "",
            ]
    return "\n".join(parts)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """A picture for each sweep: the step and its parts, and memory on an axis of its own."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fuyou"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    for sweep, axis in zip(SWEEPS, axes.flat, strict=True):
        entries = [entry for entry in results.get(sweep, []) if "reason" not in entry["found"]]
        if sweep == "host_memory":
            xs = [parse_bytes(entry["row"][sweep]) / 2**20 for entry in entries]
            axis.set(xlabel="host_memory, MiB")
            axis.set_xscale("log", base=2)
        else:
            xs = [entry["row"][sweep] for entry in entries]
            axis.set(xlabel=sweep.replace("_", " "))
        for name, label in (("step", "step"), ("transfers", "transfers alone"), ("compute", "compute and Adam alone")):
            axis.plot(xs, [entry["found"][name]["seconds"] for entry in entries], marker="o", markersize=3, label=label)
        axis.set(ylabel="seconds", ylim=(0, None), title=TITLES[sweep])
        memory = axis.twinx()
        peaks = [entry["found"]["peak_host_bytes"] / 2**20 for entry in entries]
        memory.plot(xs, peaks, linestyle=":", color="gray", label="peak memory")
        memory.set(ylabel="peak memory, MiB", ylim=(0, None))
        if sweep == "layers":
            handles = [*axis.get_legend_handles_labels()[0], *memory.get_legend_handles_labels()[0]]
            axis.legend(handles, [handle.get_label() for handle in handles])
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    """Measure, keep, write the section and draw."""
    parser = argparse.ArgumentParser(description=__doc__, prog="bench_scaling")
    parser.add_argument("directories", nargs="*", type=Path, help="a directory on each drive (runs/scaling/0 to 3)")
    parser.add_argument("--only", action="append", choices=tuple(SWEEPS), help="a sweep (all); may be repeated")
    parser.add_argument("--report", action="store_true", help="only write the section and the picture")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of scaling.json and scaling.svg (docs)")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/benchmarks.md", help="file with the section")
    options = parser.parse_args()
    path = options.out / "scaling.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if not options.report:
        directories = options.directories or [Path(f"runs/scaling/{number}") for number in range(4)]
        for directory in directories:
            directory.mkdir(parents=True, exist_ok=True)
        results["about"] = _about(directories)
        for sweep in options.only or SWEEPS:
            results[sweep] = []
            for row in SWEEPS[sweep]:
                if row.drives > len(directories):
                    found: dict[str, Any] = {"reason": f"only {len(directories)} directories were named"}
                else:
                    found = measure(row, directories)
                results[sweep].append({"row": dataclasses.asdict(row), "found": found})
                print(table(sweep, results[sweep])[-1], file=sys.stderr, flush=True)
                path.write_text(json.dumps(results, indent=1) + "\n")
    if "about" not in results:
        parser.error(f"{path}: nothing measured yet; run without --report first")
    draw(results, options.out / "scaling.svg")
    write_part(options.page, PART, report(results))
    return 0


def _about(directories: Sequence[Path]) -> dict[str, Any]:
    import importlib.metadata

    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}",
        "torch": importlib.metadata.version("torch"),
        "commit": commit.stdout.strip() or None,
        "date": datetime.date.today().isoformat(),
        "num_file_systems": len({directory.stat().st_dev for directory in directories}),
    }


if __name__ == "__main__":
    sys.exit(main())
