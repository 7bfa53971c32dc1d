"""`fuyou bench adam`: what is reported, worked out again from the samples, and what the limit really moves."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import types
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

from fuyou.bench import adam
from fuyou.cli import main
from fuyou.errors import ConfigError

KERNELS = {"float32": 28, "split": 28, "bfloat16": 20, "int8": 16.0625}


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    adam.add_arguments(parser)
    return parser.parse_args(["--parameters", "3e5", "--repeats", "2", *arguments])


def test_what_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    samples: list[dict[str, list[float]]] = []

    def keep(contestants: Mapping[str, Callable[[], object]], num_repeats: int) -> dict[str, list[float]]:
        for call in contestants.values():
            call()
        samples.append({name: [i + 1.0 + k for k in range(num_repeats)] for i, name in enumerate(contestants)})
        return samples[-1]

    monkeypatch.setattr(adam, "take_turns", keep)
    num_threads = torch.get_num_threads()
    result = adam.run(options("--workers", "2"))
    assert torch.get_num_threads() == num_threads
    assert json.loads(json.dumps(result)) == result
    n = result["num_parameters"]
    assert n == 2 * 2**18  # whole tiles
    assert list(result["workers"]) == ["1", "2"]
    for row, seconds in zip(result["workers"].values(), samples, strict=True):
        assert set(row["kernels"]) == set(KERNELS)
        for name, kernel in row["kernels"].items():
            ours, limit = seconds[name], seconds[f"{name} limit"]
            assert kernel["bytes_per_parameter"] == KERNELS[name]
            assert kernel["nanoseconds_per_parameter"] == pytest.approx(sum(ours) / 2 / n * 1e9)
            assert kernel["bytes_per_second"] == pytest.approx(KERNELS[name] * n / (sum(ours) / 2))
            assert kernel["ratio"] == pytest.approx(statistics.median(a / b for a, b in zip(limit, ours, strict=True)))
            assert kernel["limit"]["ratio_to_triad"] == pytest.approx(
                statistics.median((KERNELS[name] / a) / (12 / b) for a, b in zip(limit, seconds["triad"], strict=True))
            )
        torch_row = row["others"]["torch fused"]
        assert torch_row["our_speedup"] == pytest.approx(
            statistics.median(a / b for a, b in zip(seconds["torch fused"], seconds["float32"], strict=True))
        )
        alone, together = seconds["compute alone"], seconds["compute"]
        assert row["compute_speedup"] == pytest.approx(
            statistics.median(a / b for a, b in zip(alone, together, strict=True))
        )
    text = adam.describe(result)
    assert f"2 workers compute {result['workers']['2']['compute_speedup']:.2f} times as fast as one" in text
    for part in ("1 worker ", "2 workers ", *KERNELS, "torch fused", "triad", "ratio", "DeepSpeedCPUAdam"):
        assert part in text
    rows = [
        line for line in text.splitlines() if line.startswith(("1 worker ", "2 workers ", *KERNELS, "torch", "triad"))
    ]
    assert len(rows) == 2 * (len(KERNELS) + 3)
    assert max(map(len, rows)) <= 80


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_every_contestant_covers_every_parameter_once(num_workers: int) -> None:
    bench = adam._Bench(4 * 2**18)
    covered = np.zeros(bench.num_parameters, np.int32)

    def count(tile: slice) -> None:
        covered[tile] += 1

    with adam.ThreadPoolExecutor(num_workers) as workers:
        bench.spread_over(workers, num_workers, count)()
    assert (covered == 1).all()


def test_the_limit_writes_every_element_of_what_a_kernel_writes() -> None:
    touch, triad, compute = adam._bare_loops()
    for dtypes in ((np.float32,) * 3, (np.uint16, np.uint16, np.int8, np.uint8)):
        written = tuple(np.full(100, 3, dtype) for dtype in dtypes)
        read = np.ones(100, np.float32)
        touch(written, read)(slice(0, 60))
        for array in written:
            changed = array != 3
            assert changed[:60].all()
            assert not changed[60:].any()
            assert np.isfinite(array.astype(np.float32)).all()
        assert (read == 1).all()
    a, b, c = np.zeros(8, np.float32), np.ones(8, np.float32), np.full(8, 2, np.float32)
    triad(a, b, c)
    assert (a == 7).all()
    values = np.array([0.25, 0.75], np.float32)
    compute(values)
    np.testing.assert_allclose(values, 0.5)  # where x / 2 + 1 / 4 leads


def test_a_peer_that_cannot_be_built_is_reported(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Peer:
        def __init__(self, parameters: list[torch.nn.Parameter], lr: float) -> None:
            os.write(1, b"compiling")  # as a compiler does
            raise RuntimeError("no compiler\nand a long story")

    module = types.ModuleType("deepspeed.ops.adam")
    monkeypatch.setattr(module, "DeepSpeedCPUAdam", Peer, raising=False)
    for name, value in (("deepspeed", types.ModuleType("deepspeed")), ("deepspeed.ops.adam", module)):
        monkeypatch.setitem(sys.modules, name, value)
    monkeypatch.setattr(adam.importlib.util, "find_spec", lambda _name: object())
    others, missing = adam._Bench(2**18).others()
    assert list(others) == ["torch fused"]
    assert missing == {"DeepSpeedCPUAdam": "RuntimeError: no compiler"}

    # One that can be is a contestant; what it prints on the way is kept off stdout.
    monkeypatch.setattr(Peer, "__init__", lambda *_arguments, **_options: None)
    monkeypatch.setattr(Peer, "step", lambda _self: None, raising=False)
    others, missing = adam._Bench(2**18).others()
    assert list(others) == ["torch fused", "DeepSpeedCPUAdam"]
    assert missing == {}
    others["DeepSpeedCPUAdam"]()
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("arguments", [("--repeats", "0"), ("--workers", "-1"), ("--parameters", "-1")])
def test_options_that_make_no_sense_are_refused(arguments: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match="bench adam"):
        adam.run(options(*arguments))


def test_the_command_prints_json_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "adam", "--json", "--parameters", "3e5", "--repeats", "1", "--workers", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["workers"]["1"]["kernels"]["int8"]["ratio"] > 0
