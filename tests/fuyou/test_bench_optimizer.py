"""`fuyou bench optimizer`, `step` and `generate` on small things: what they report adds up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fuyou.bench.generate
from fuyou.cli import main
from fuyou.hardware import cached_hardware


@pytest.mark.parametrize(("moment_dtype", "bytes_per_parameter"), [("float32", 24.0), ("int8", 12.06)])
def test_bench_optimizer(moment_dtype: str, bytes_per_parameter: float, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--parameters", "1e6", "--repeats", "2", "--moment-dtype", moment_dtype]
    assert main(["bench", "optimizer", str(tmp_path), *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # The weights are read once here, by what stands for the backward pass.
    assert found["bytes_per_parameter"] == pytest.approx(bytes_per_parameter, rel=0.01)
    for name in ("step", "clipping", "limit"):
        assert found[name]["bytes_per_second"] == pytest.approx(found["bytes_moved"] / found[name]["seconds"])
    assert found["ratio"] > 0
    assert list(tmp_path.iterdir()) == []
    assert main(["bench", "optimizer", str(tmp_path / "missing")]) == 2
    assert f"{tmp_path}/missing does not exist" in capsys.readouterr().err
    assert main(["bench", "optimizer", str(tmp_path), *arguments]) == 0
    assert "ratio to the limit" in capsys.readouterr().out


def test_bench_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(fuyou.bench.SHAPES, "26M", (64, 128, 2, 2))
    arguments = [
        "--size",
        "26M",
        "--repeats",
        "2",
        "--device",
        "cpu",
        "--host-memory",
        "32MiB",
        "--rows",
        "1",
        "--length",
        "8",
    ]
    assert main(["bench", "step", str(tmp_path), *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["learns"]
    assert found["num_tokens"] == 8
    # Float32 compute: 28 B a parameter and step where nothing is kept; the budget keeps some.
    # Spilled gradients, where the plan finds that worth it, are 4 B more.
    assert 12 * found["num_parameters"] <= found["bytes_written"] <= 17 * found["num_parameters"] + 2**16
    assert 0 <= found["bytes_read"] <= 16 * found["num_parameters"] + 2**16
    assert found["predicted_seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_bench_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(fuyou.bench.SHAPES, "26M", (256, 512, 6, 2))
    small = ["--size", "26M", "--repeats", "3", "--device", "cpu", "--host-memory", "20MiB"]
    assert main(["bench", "generate", str(tmp_path), *small, "--rows", "2", "--prompt", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # 4 B of each parameter are read for a token of both texts; what little is kept is counted.
    assert 0.5 * 4 * found["num_parameters"] < found["planned_bytes_per_token_step"] < 4.1 * found["num_parameters"]
    assert found["bytes_read_per_token_step"] == pytest.approx(found["planned_bytes_per_token_step"], rel=0.1)
    limit, ours = found["limit"], found["generate"]
    assert limit["bytes_per_second"] * limit["seconds"] == pytest.approx(4 * found["planned_bytes_per_token_step"])
    assert found["ratio"] == pytest.approx(limit["seconds"] / ours["seconds"], rel=0.9)
    assert found["tokens_per_second"] == pytest.approx(2 * 4 / ours["seconds"])
    assert found["predicted_seconds"] == pytest.approx(ours["seconds"] * (1 + found["prediction_error"]))
    assert list(tmp_path.iterdir()) == []
    hardware = cached_hardware(tmp_path, "cpu", "float32")
    assert hardware is not None
    assert 0 < hardware.seconds_per_block < found["predicted_seconds"]
    assert "a bare loop that reads the same bytes" in fuyou.bench.generate.describe(found)


@pytest.mark.slow
def test_bench_step_over_two_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(fuyou.bench.SHAPES, "26M", (64, 128, 2, 2))
    drives = [tmp_path / "a", tmp_path / "b"]
    for drive in drives:
        drive.mkdir()
    shape = ["--size", "26M", "--layers", "3", "--rows", "1", "--length", "8", "--micro-batches", "3"]
    few = ["--repeats", "2", "--device", "cpu", "--host-memory", "32MiB", "--without-torch"]
    assert main(["bench", "step", *map(str, drives), *shape, *few, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_layers"] == 3
    assert found["num_tokens"] == 24
    assert found["num_parameters"] == 2 * 256 * 64 + 64 + 3 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64)
    assert found["learns"]
    assert "in_memory" not in found
    assert found["peak_host_bytes"] > 0
    assert [list(drive.iterdir()) for drive in drives] == [[], []]
    assert main(["bench", "step", str(tmp_path / "missing")]) == 2
    assert f"{tmp_path}/missing does not exist" in capsys.readouterr().err
    assert main(["bench", "step", str(tmp_path), "--micro-batches", "0"]) == 2
    assert "--micro-batches 0: must be 1 or more" in capsys.readouterr().err
