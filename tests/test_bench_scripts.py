"""`scripts/bench_peers` and `scripts/bench_scaling`: their tables say what was found, and a short run comes to its end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", f"scripts/{script}.py", *map(str, arguments)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
        capture_output=True,
        text=True,
        timeout=200,
    )


def page(folder: Path, name: str) -> Path:
    path = folder / "page.md"
    path.write_text(f"# Page\n\nBy hand, above.\n\n<!-- {name} -->\nold\n<!-- /{name} -->\n\nBy hand, below.\n")
    return path


def turn(seconds: float, losses: list[float], norms: list[float]) -> dict[str, Any]:
    moved = {"bytes_read": 3_000_000_000, "bytes_written": 1_000_000_000}
    return {"seconds": seconds, "losses": losses, "norms": norms} | moved


def measured(tool: str, seconds: list[float], **more: Any) -> dict[str, Any]:
    row = {
        "tool": tool,
        "limit_bytes": 2**31,
        "turns": [turn(s, [2.0, 1.0], [0.5, 2.0]) for s in seconds],
        "open_peak_bytes": 100 * 2**20,
        "peak_bytes": 300 * 2**20,
        "left_behind_bytes": 2_500_000_000,
        "losses": [3.0, 2.0, 1.0],
    }
    return row | more


def test_peers_table(tmp_path: Path) -> None:
    scenario = {
        "title": "206M, as written here",
        "num_rows": 2,
        "length": 128,
        "num_micro_batches": 4,
        "max_norm": 1.0,
        "steps_per_turn": 2,
        "memory_limit": "2GiB",
    }
    rows = {
        "fuyou": measured("fuyou", [4.0, 8.0, 6.0]),
        "deepspeed": measured("deepspeed", [12.0, 16.0, 15.0], open_peak_bytes=900 * 2**20),
        "torchao": {"tool": "torchao", "turns": [], "reason": "no CUDA | device", "peak_bytes": 2**20},
        "fsdp2": {"tool": "fsdp2", "turns": [], "reason": "killed at the limit of 2 GiB", "peak_bytes": 2**31},
    }
    results = {
        "206M": {"scenario": scenario, "rows": rows, "commit": "abc", "products": "float32"},
        "first-step": {
            "install_seconds": {"everyone": 90, "deepspeed": 30},
            "rows": {"fuyou": {"seconds": 60.0}, "deepspeed": {"reason": "not installed"}},
        },
        "resume": {
            "rows": {
                "fuyou": {
                    "uninterrupted": [4.0, 3.0, 2.0, 1.0],
                    "resumed": [4.0, 3.0, 2.0, 1.0],
                    "equal": True,
                    "save_seconds": 0.0,
                    "saved_bytes": 0,
                },
                "deepspeed": {
                    "uninterrupted": [4.0, 3.0, 2.0, 1.0],
                    "resumed": [4.0, 3.0, 2.5, 1.5],
                    "equal": False,
                    "save_seconds": 1.25,
                    "saved_bytes": 5_000_000,
                },
            }
        },
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    path = page(tmp_path, "bench_peers")
    done = run("bench_peers", "--report", "--results", tmp_path / "results.json", "--page", path)
    assert done.returncode == 0, done.stderr
    lines = path.read_text().splitlines()
    assert {"By hand, above.", "By hand, below."} <= set(lines)
    assert "old" not in lines
    # 3.0 s of 1,024 tokens; the rounds' own ratios are 3.0, 2.0 and 2.5.
    assert (
        "| Fuyou | 3.00 (2.00 to 4.00) | 341 |  | 300 MiB | 1.50 GB, 0.50 GB | 2.50 GB | 3 of 6 | 3.000, 2.000, 1.000 |"
        in lines
    )
    assert any(
        line.startswith("| DeepSpeed ZeRO-3, NVMe | 7.50 (6.00 to 8.00) | 137 | 2.50 x | 900 MiB (opening) |")
        for line in lines
    )
    assert "| torchao, CPU offload | not measured: no CUDA / device | | | | | | | |" in lines
    assert (
        "| FSDP2, CPU offload | not measured: killed at the limit of 2 GiB, 2048 MiB taken by then | | | | | | | |"
        in lines
    )
    assert "| Fuyou | 1.5 min | 1.0 min | equal | 0.0 s, 0 MB |" in lines
    assert (
        "| DeepSpeed ZeRO-3, NVMe | + 0.5 min | not installed | differ: 2.5000, 1.5000 instead of 2.0000, 1.0000 | 1.2 s, 5 MB |"
        in lines
    )
    assert lines.count("Not measured yet.") == 4  # the other scenarios

    path.write_text("nothing to fill in")
    done = run("bench_peers", "--report", "--results", tmp_path / "results.json", "--page", path)
    assert done.returncode == 1
    assert 'needs one line "<!-- bench_peers -->"' in done.stderr
    assert path.read_text() == "nothing to fill in"


@pytest.mark.slow
def test_two_steps_beside_memory(tmp_path: Path) -> None:
    """A turn of two steps of Fuyou, of torch in memory, and of a tool that is not there."""
    results = tmp_path / "results.json"
    done = run(
        "bench_peers",
        *("--only", "smallest", "--device", "cpu", "--products", "torch", "--work", tmp_path / "work"),
        *("--results", results, "--page", page(tmp_path, "bench_peers")),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(results.read_text())["smallest"]["rows"]
    assert rows["fuyou"]["losses"] == pytest.approx(rows["in-memory"]["losses"], rel=2e-3)
    assert len(rows["fuyou"]["losses"]) == 2
    assert "CUDA" in rows["torchao"]["reason"]
    # Weights are read, and weights and states written; the store stays.
    steps = rows["fuyou"]["turns"][0]
    assert steps["bytes_written"] > 0
    assert rows["fuyou"]["left_behind_bytes"] > 0
    assert rows["in-memory"]["left_behind_bytes"] == 0
    assert [path.name for path in (tmp_path / "work").iterdir() if path.is_dir()] == ["model-tiny"]
    assert "| torchao, CPU offload | not measured: " in done.stdout


def scaling_row(**values: Any) -> dict[str, Any]:
    return {"layers": 16, "micro_batches": 1, "host_memory": "384MiB", "drives": 1} | values


def scaling_found(parameters: float, step: float, transfers: float, compute: float) -> dict[str, Any]:
    return {
        "num_parameters": parameters,
        "step": {"seconds": step, "spread": 0.02},
        "transfers": {"seconds": transfers, "spread": 0.02},
        "compute": {"seconds": compute, "spread": 0.02},
        "ratio": step / max(transfers, compute),
        "peak_host_bytes": 300 * 2**20,
        "tokens_per_second": 100.0,
        "predicted_seconds": step,
    }


def test_scaling_page(tmp_path: Path) -> None:
    layers = [
        {"row": scaling_row(layers=n), "found": scaling_found(n * 10e6, 0.1 + 0.02 * n, 0.02 * n, 0.015 * n)}
        for n in (8, 16, 64)
    ]
    drives = [
        {"row": scaling_row(drives=1), "found": scaling_found(160e6, 1.0, 0.9, 0.3)},
        {"row": scaling_row(drives=2), "found": {"reason": "only 1 directories were named"}},
    ]
    about = {"machine": "2 cores", "torch": "2.13.0", "commit": "abc", "num_file_systems": 1}
    (tmp_path / "scaling.json").write_text(json.dumps({"about": about, "layers": layers, "drives": drives}))
    path = page(tmp_path, "bench_scaling")
    done = run("bench_scaling", "--report", "--out", tmp_path, "--page", path)
    assert done.returncode == 0, done.stderr
    text = path.read_text()
    # 0.02 s for each layer of 10M parameters.
    assert "Seconds = 0.100 + 2.00 for each billion parameters, largest error 0.0 %." in text
    # Steps of 1.62, 1.31 and 1.08 times the transfers; the row of the drives has too little compute to count.
    assert "within 2 x of each other in 3 rows; the step is at most 1.15 x the longer of them in 1 " in text
    assert "| 2 | not measured: only 1 directories were named | | | | | | | | |" in text
    assert "(scaling.svg)" in text
    assert (tmp_path / "scaling.svg").read_text().startswith("<?xml")
