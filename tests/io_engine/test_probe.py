from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from io_engine import MockEngine, PosixEngine, probe_directory

MIB = 1 << 20


def test_what_is_measured(tmp_path: Path) -> None:
    """Wall time says nothing about a mock, so what is checked is which transfers the rates are made of."""
    with MockEngine() as engine:
        result = probe_directory(tmp_path, num_bytes=128 * MIB, engine=engine)
        assert (engine.bytes_read, engine.bytes_written) == (192 * MIB, 320 * MIB)  # mixed: half of each
        kinds = [line.split()[0] for line in engine.transfers]
        # Fresh blocks, then writes with their sync; reads without; both at once with the sync.
        assert kinds[:10] == (["write"] * 4 + ["sync"]) * 2
        assert kinds[10:14] == ["read"] * 4
        assert (sorted(kinds[14:18]), kinds[18:]) == (["read"] * 2 + ["write"] * 2, ["sync"])
        assert engine.num_under_way == 0
        assert engine.files == {}
    assert result.direct is False
    assert result.reason.startswith("mock")


def test_a_real_directory(tmp_path: Path) -> None:
    result = probe_directory(str(tmp_path), num_bytes=32 * MIB)
    rates = (result.read_bytes_per_second, result.write_bytes_per_second, result.mixed_bytes_per_second)
    assert all(rate > 0 for rate in rates)
    assert result.path == str(tmp_path)
    assert result.direct == ("O_DIRECT" in result.reason and "page cache" not in result.reason)
    assert result.free_bytes > 0
    assert os.listdir(tmp_path) == []


def test_through_the_page_cache_it_says_so(tmp_path: Path) -> None:
    with PosixEngine(2, direct=False) as engine:
        result = probe_directory(tmp_path, num_bytes=32 * MIB, engine=engine)
    assert not result.direct
    assert "page cache" in result.reason


def test_failures_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MockEngine() as engine:
        engine.fail_next("read", "probe", OSError(errno.EIO, "Input/output error"), num_to_skip=1)
        with pytest.raises(OSError, match="read of 33554432 bytes"):
            probe_directory(tmp_path, num_bytes=128 * MIB, engine=engine)
        assert engine.num_under_way == 0
        assert engine.files == {}
    with pytest.raises(FileNotFoundError, match="missing"):
        probe_directory(tmp_path / "missing")
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=100, f_frsize=4096))
    with pytest.raises(OSError, match="measuring the drive") as caught:
        probe_directory(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []
