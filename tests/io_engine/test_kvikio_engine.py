"""The engine over kvikio: its traps, with a stand-in; and with a GPU where there is one."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from io_engine import EngineError, Extent, KvikioEngine, PosixEngine, choose_engine, probe_directory
from io_engine import choice as choice_module
from tests.io_engine.fake_kvikio import FakeDevice, FakeKvikio, install
from tests.io_engine.helpers import PAGE, aligned, pattern


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKvikio]:
    made = install(monkeypatch)
    yield made
    made.pool.shutdown()


def test_its_slow_defaults_are_set(fake: FakeKvikio) -> None:
    with KvikioEngine():
        assert fake.settings["num_threads"] == 8
        assert fake.settings["auto_direct_io_read"] is True
        assert fake.settings["auto_direct_io_write"] is True
    fake.settings["num_threads"] = 32
    with KvikioEngine(num_threads=4):
        assert fake.settings["num_threads"] == 32  # others may be in the middle of something


def test_the_path_is_said(fake: FakeKvikio) -> None:
    with KvikioEngine() as engine:
        assert engine.reason.startswith("kvikio 26.10.00: compatibility mode, through host memory")
        fake.compat_mode = False
        assert "libcufile without GPUDirect Storage" in engine.reason
        fake.gds_available = True
        assert engine.reason == "kvikio 26.10.00: GPUDirect Storage, 8 threads"
        fake.gds_available = None
        assert "does not say whether" in engine.reason
    del fake.settings["auto_direct_io_read"]
    with KvikioEngine() as engine:
        assert engine.reason.endswith("this version has no setting auto_direct_io_read")


def test_device_buffers_go_whole_and_in_parts(tmp_path: Path, fake: FakeKvikio) -> None:
    path, data = str(tmp_path / "x"), pattern(5 * PAGE, seed=1)
    (tmp_path / "other").mkdir()
    with KvikioEngine(request_bytes=2 * PAGE) as engine:
        source = FakeDevice(data)
        engine.write(Extent(path, PAGE, data.size), source).wait()  # type: ignore[arg-type]
        assert np.fromfile(path, np.uint8)[PAGE:].tobytes() == data.tobytes()
        target = FakeDevice(np.zeros_like(data))
        engine.read(Extent(path, PAGE, data.size), target).wait()  # type: ignore[arg-type]
        assert target.bytes() == data.tobytes()
        striped = Extent.join([Extent(path, 0, 2 * PAGE), Extent(str(tmp_path / "other" / "x"), 0, 3 * PAGE)])
        engine.write(striped, source).wait()  # type: ignore[arg-type]
        target = FakeDevice(np.zeros_like(data))
        engine.read(striped, target).wait()  # type: ignore[arg-type]
        assert target.bytes() == data.tobytes()
    assert max(size for _, _, size, _ in fake.transfers) == 2 * PAGE


def test_buffers_that_do_not_fit_are_refused(tmp_path: Path, fake: FakeKvikio) -> None:
    import torch

    extent = Extent(str(tmp_path / "x"), 0, PAGE)
    bad: list[tuple[Any, str]] = [
        (FakeDevice(np.zeros(2 * PAGE, np.uint8)), "slice it to 4096"),
        (FakeDevice(np.zeros(PAGE // 4, np.float32)), "not 1-D contiguous uint8"),
        (FakeDevice(np.zeros((2, PAGE // 2), np.uint8)), "not 1-D contiguous uint8"),
        (FakeDevice(np.zeros(PAGE, np.uint8), strides=(2,)), "not 1-D contiguous uint8"),
        (FakeDevice(np.zeros(PAGE, np.uint8), read_only=True), "read-only"),
        (torch.zeros(PAGE, dtype=torch.uint8), r"pass tensor\.view\(torch\.uint8\)\.numpy\(\)"),
        (aligned(2 * PAGE)[16 : 16 + PAGE], "not aligned"),
    ]
    with KvikioEngine() as engine:
        for array, message in bad:
            with pytest.raises(ValueError, match=message):
                engine.read(extent, array)
        engine.write(extent, FakeDevice(np.zeros(PAGE, np.uint8), read_only=True)).wait()  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EFAULT, errno.EDQUOT])
def test_errors_without_a_number_get_theirs(tmp_path: Path, fake: FakeKvikio, number: int) -> None:
    path = str(tmp_path / "x")
    with KvikioEngine() as engine:
        fake.failure = os.strerror(number)
        with pytest.raises(OSError, match="write of 4096 bytes at offset 8192: kvikio: KvikIO failure") as caught:
            engine.write(Extent(path, 8192, PAGE), aligned(PAGE)).wait()
        assert (caught.value.errno, caught.value.filename) == (number, path)
        fake.failure = "something else went wrong, libx.so: No such file or directory"
        with pytest.raises(OSError, match="something else") as caught:
            engine.write(Extent(path, 0, PAGE), aligned(PAGE)).wait()
        assert caught.value.errno == errno.EIO
        fake.short_bytes = 100
        with pytest.raises(OSError, match="short write: only 100 bytes"):
            engine.write(Extent(path, 0, PAGE), aligned(PAGE)).wait()
        engine.write(Extent(path, 0, PAGE), aligned(PAGE)).wait()  # it goes on


def test_a_file_that_kvikio_cannot_open(tmp_path: Path, fake: FakeKvikio, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: str) -> None:
        raise RuntimeError("cuFile error at: CU_FILE_IO_NOT_SUPPORTED: Operation not supported")

    before = len(os.listdir("/proc/self/fd"))
    with KvikioEngine(num_threads=1) as engine:
        monkeypatch.setattr(sys.modules["kvikio"], "CuFile", refuse)
        with pytest.raises(OSError, match="CU_FILE_IO_NOT_SUPPORTED") as caught:
            engine.write(Extent(str(tmp_path / "x"), 0, PAGE), aligned(PAGE)).wait()
        assert caught.value.errno == errno.ENOTSUP
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_missing_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", no_driver)
        with pytest.raises(EngineError, match=r"driver.*libcuda\.so\.1.*pip install 'fuyou\[cuda12\]'"):
            KvikioEngine()
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda name: None)
        patch.setitem(sys.modules, "kvikio", None)
        with pytest.raises(EngineError, match=r"kvikio package.*pip install 'fuyou\[cuda12\]'"):
            KvikioEngine()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("io_engine")]


# ---- choosing


def test_what_is_asked_for_is_taken(tmp_path: Path, fake: FakeKvikio) -> None:
    for io, kind in (("posix", PosixEngine), ("kvikio", KvikioEngine)):
        chosen = choose_engine(io, [tmp_path])  # type: ignore[arg-type]
        with chosen.engine:
            assert isinstance(chosen.engine, kind)
            assert chosen.reason == f"{io}: asked for"
    with pytest.raises(ValueError, match="'auto', 'posix' or 'kvikio'"):
        choose_engine("aio", [tmp_path])  # type: ignore[arg-type]


def test_without_a_driver_auto_is_posix_and_kvikio_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", no_driver)
    chosen = choose_engine("auto", [tmp_path], num_threads=3)
    with chosen.engine:
        assert isinstance(chosen.engine, PosixEngine)
        assert "libcuda.so.1 cannot be loaded" in chosen.reason
        assert chosen.engine.reason == "posix: O_DIRECT, 3 threads"
    with pytest.raises(EngineError, match="install"):
        choose_engine("kvikio", [tmp_path])


@pytest.mark.parametrize(("kvikio_rate", "kind"), [(1.2e9, KvikioEngine), (1.01e9, PosixEngine), (0.5e9, PosixEngine)])
def test_auto_measures(
    tmp_path: Path, fake: FakeKvikio, monkeypatch: pytest.MonkeyPatch, kvikio_rate: float, kind: type
) -> None:
    def rate(engine: Any, directories: Any, probe_bytes: int) -> float:
        return 2 * (kvikio_rate if isinstance(engine, KvikioEngine) else 1e9)

    monkeypatch.setattr(choice_module, "_mixed_rate", rate)
    chosen = choose_engine("auto", [tmp_path, tmp_path])
    with chosen.engine:
        assert type(chosen.engine) is kind
        assert f"{2 * kvikio_rate / 1e9:.2f} GB/s by kvikio, 2.00 by system calls" in chosen.reason


def test_auto_leaves_nothing_behind(tmp_path: Path, fake: FakeKvikio) -> None:
    with choose_engine("auto", [tmp_path], probe_bytes=1).engine:
        assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        choose_engine("auto", [tmp_path / "missing"])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("io_engine")]


# ---- with a GPU


@pytest.mark.gds
@pytest.mark.parametrize("num_bytes", [PAGE, 3 * PAGE, 40 << 20])
def test_gpu_memory_round_trips(tmp_path: Path, num_bytes: int) -> None:
    import torch

    path = str(tmp_path / "x")
    data = pattern(num_bytes, seed=1)
    source = torch.from_numpy(data).cuda()
    target = torch.zeros_like(source)
    torch.cuda.synchronize()
    with KvikioEngine(request_bytes=16 << 20) as engine:
        engine.write(Extent(path, PAGE, num_bytes), source).wait()  # type: ignore[arg-type]
        engine.sync(path)
        assert np.fromfile(path, np.uint8)[PAGE:].tobytes() == data.tobytes()
        engine.read(Extent(path, PAGE, num_bytes), target).wait()  # type: ignore[arg-type]
        assert torch.equal(source, target)
        with pytest.raises(OSError, match="short read"):
            engine.read(Extent(path, 2 * PAGE, num_bytes), target).wait()  # type: ignore[arg-type]


@pytest.mark.gds
def test_host_memory_goes_through_kvikio_too(tmp_path: Path) -> None:
    with KvikioEngine() as engine:
        result = probe_directory(tmp_path, num_bytes=64 << 20, engine=engine)
    assert result.reason.startswith("kvikio ")
    assert result.mixed_bytes_per_second > 0
