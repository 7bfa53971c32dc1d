"""`fuyou bench io`: which bytes move, what is reported of them, and that nothing is left behind."""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fuyou.bench import io
from fuyou.errors import ConfigError

MIB = 1 << 20


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    io.add_arguments(parser)
    return parser.parse_args(["--size", "8MiB", "--request", "1MiB", "--rounds", "2", *arguments])


@pytest.mark.parametrize("num_directories", [1, 2])
def test_what_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_directories: int) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no fio here
    folders = [tmp_path / str(i) for i in range(num_directories)]
    for folder in folders:
        folder.mkdir()
    result = io.run(options(*map(str, folders)))
    assert json.loads(json.dumps(result)) == result
    assert result["directories"] == [str(folder) for folder in folders]
    assert (result["size_bytes"], result["request_bytes"], result["num_rounds"]) == (8 * MIB, MIB, 2)
    rates = result["directory_bytes_per_second"]
    assert rates is None if num_directories == 1 else len(rates) == 2 and min(rates) > 0
    assert list(result["modes"]) == ["read", "write", "mixed"]
    for row in result["modes"].values():
        seconds = row["seconds"]
        assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys(seconds, 2)
        # By hand, from the samples that are published with the medians.
        assert row["bytes_per_second"] == pytest.approx(8 * MIB / (sum(seconds["engine"]) / 2))
        ratios = [limit / ours for limit, ours in zip(seconds["limit"], seconds["engine"], strict=True)]
        assert row["ratio"] == pytest.approx(sum(ratios) / 2)
        busy = [limit / ours for limit, ours in zip(seconds["limit"], seconds["busy"], strict=True)]
        assert row["busy_ratio"] == pytest.approx(sum(busy) / 2)
        assert row["cpu_seconds_per_gb"] >= 0
        assert row["block_request_bytes"] is None or row["block_request_bytes"] >= 512
    assert result["memory_copy_bytes_per_second"] > 0
    assert result["fio"] == {"error": "not installed"}
    assert result["sustained_write"] is None
    for folder in folders:
        assert os.listdir(folder) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("io_engine")]
    text = io.describe(result)
    for part in (str(folders[-1]), "read", "write", "mixed", "ratio", "CPU s/GB", "fio: not installed", "8 MiB a pass"):
        assert part in text
    rows = [line for line in text.splitlines() if line.startswith(("    ", "read  ", "write ", "mixed "))]
    assert len(rows) == 4
    assert max(map(len, rows)) <= 80


def test_both_contestants_move_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the system calls: offsets, lengths, and how often."""
    calls: list[tuple[str, int, int, bool]] = []
    current = {"bare": False}

    def counting(kind: str) -> Any:
        real = getattr(os, kind)

        def call(descriptor: int, views: list[memoryview], offset: int) -> int:
            calls.append((kind, offset, len(views[0]), current["bare"]))
            return real(descriptor, views, offset)

        return call

    for kind in ("preadv", "pwritev"):
        monkeypatch.setattr(os, kind, counting(kind))
    real_pass = io._Bench._bare_pass

    def bare_pass(self: Any, mode: str) -> None:
        current["bare"] = True
        try:
            real_pass(self, mode)
        finally:
            current["bare"] = False

    monkeypatch.setattr(io._Bench, "_bare_pass", bare_pass)
    io.run(options(str(tmp_path), "--rounds", "1"))
    ours = sorted(call[:3] for call in calls if not call[3])
    bare = sorted(call[:3] for call in calls if call[3])
    # Each contestant: untimed and timed, quiet and busy; the engine once more with a short switch interval, and once
    # to fill the file.
    once = {kind: [(kind, i * MIB, MIB) for i in range(8)] for kind in ("preadv", "pwritev")}
    mixed = [("preadv", i * MIB, MIB) for i in range(4)] + [("pwritev", i * MIB, MIB) for i in range(4, 8)]
    a_round = once["preadv"] + once["pwritev"] + mixed
    assert bare == sorted(4 * a_round)
    assert ours == sorted(6 * a_round + once["pwritev"])


def test_sustained_writing_reports_tenths(tmp_path: Path) -> None:
    result = io.run(options(str(tmp_path), "--rounds", "1", "--seconds", "0.3"))
    sustained = result["sustained_write"]
    assert sustained["seconds"] >= 0.3
    assert sustained["num_bytes"] % (8 * MIB) == 0
    rates = sustained["bytes_per_second"]
    assert len(rates) == 10
    # The tenths add up to what was written.
    assert sum(rate * sustained["seconds"] / 10 for rate in rates) == pytest.approx(sustained["num_bytes"])
    assert "sustained write of" in io.describe(result)


def _fake_fio(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    script = folder / "bin" / "fio"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(script.parent))


def test_fio_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
assert "--iomem=mmaphuge" in sys.argv and "--direct=1" in sys.argv and "--bs=1048576" in sys.argv, sys.argv
print('{"jobs": [{"read": {"bw_bytes": 3000000000}, "write": {"bw_bytes": 1000000000}}]}')
"""
    _fake_fio(tmp_path, monkeypatch, body)
    result = io._fio([str(tmp_path / "x")], 8 * MIB, MIB)
    assert result == {"read": 4e9, "write": 4e9, "mixed": 4e9}
    second = tmp_path / "second"
    second.mkdir()
    _fake_fio(second, monkeypatch, "sys.exit('cannot allocate memory')")
    assert "cannot allocate memory" in io._fio([str(tmp_path / "x")], 8 * MIB, MIB)["error"]


def test_a_busy_main_thread_really_runs_and_failures_come_out() -> None:
    before_seconds = sys.getswitchinterval()
    seen: list[float] = []

    def call() -> None:
        seen.append(sys.getswitchinterval())
        assert threading.current_thread() is not threading.main_thread()
        time.sleep(0.01)

    io._beside_busy_main(call)
    io._beside_busy_main(call, 1e-4)
    assert seen == pytest.approx([before_seconds, 1e-4])
    with pytest.raises(ZeroDivisionError):
        io._beside_busy_main(lambda: 1 // 0)
    assert sys.getswitchinterval() == before_seconds


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}/missing does not exist: name an existing directory"):
        io.run(options(str(tmp_path / "missing")))
    with pytest.raises(ConfigError, match="is not a directory"):
        io.run(options(__file__))
    for bad in (["--rounds", "0"], ["--seconds", "-1"], ["--size", "much"], ["--request", "x"]):
        with pytest.raises(ConfigError, match=bad[0]):
            io.run(options(str(tmp_path), *bad))
    with pytest.raises(ConfigError, match="named twice"):
        io.run(options(str(tmp_path), str(tmp_path / "..") + f"/{tmp_path.name}"))
    assert os.listdir(tmp_path) == []


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fuyou.cli import main

    arguments = ["bench", "io", str(tmp_path), "--size", "4MiB", "--request", "1MiB", "--rounds", "1"]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["size_bytes"] == 4 * MIB
    assert main(arguments) == 0
    assert "GB/s" in capsys.readouterr().out
