"""What only the engine over real files does: O_DIRECT and its fall-back, threads, descriptors, the kernel's
errors.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from io_engine import Extent, PosixEngine, Transfer
from io_engine.engine import Kind
from io_engine.files import Files
from tests.io_engine.helpers import PAGE, aligned, pattern

MIB = 2**20

needs_direct = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this platform has no O_DIRECT")


def _refuse_direct_open(monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def fake_open(path: str, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument", path)
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", fake_open)


def _round_trip(engine: PosixEngine, path: str, num_bytes: int = 5 * PAGE) -> None:
    data = pattern(num_bytes, seed=1)
    engine.write(Extent(path, PAGE, num_bytes), aligned(num_bytes, data)).wait()
    array = aligned(num_bytes)
    engine.read(Extent(path, PAGE, num_bytes), array).wait()
    assert array.tobytes() == data.tobytes() == np.fromfile(path, np.uint8)[PAGE:].tobytes()


@needs_direct
def test_a_file_system_that_refuses_to_open_directly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _refuse_direct_open(monkeypatch)
    with PosixEngine(2) as engine:
        assert engine.reason == "posix: O_DIRECT, 2 threads"
        _round_trip(engine, str(tmp_path / "data.bin"))
        assert "page cache" in engine.reason
        assert str(tmp_path) in engine.reason
        assert "EINVAL at open" in engine.reason


@needs_direct
def test_a_file_system_that_refuses_the_first_direct_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refusing(real: Callable[..., int]) -> Callable[..., int]:
        def call(descriptor: int, *args: Any) -> int:
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(descriptor, *args)

        return call

    monkeypatch.setattr(os, "preadv", refusing(os.preadv))
    monkeypatch.setattr(os, "pwritev", refusing(os.pwritev))
    with PosixEngine(3, request_bytes=PAGE) as engine:
        _round_trip(engine, str(tmp_path / "data.bin"))
        assert "refused the first O_DIRECT request" in engine.reason


@pytest.mark.parametrize(
    ("num_bytes", "most_bytes", "expected"),
    [
        (24 * MIB, 32 * MIB, [6 * MIB] * 4),
        (16 * MIB + 4 * PAGE, 32 * MIB, [4 * MIB + PAGE] * 4),
        (16 * MIB + PAGE, 32 * MIB, [4 * MIB + PAGE] * 3 + [4 * MIB - 2 * PAGE]),
        (5 * MIB, 32 * MIB, [4 * MIB, MIB]),
        (24 * MIB, MIB, [MIB] * 24),
        (24 * MIB, 5 * MIB, [5 * MIB] * 4 + [4 * MIB]),
    ],
)
def test_every_thread_has_its_part_of_a_transfer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int, most_bytes: int, expected: list[int]
) -> None:
    moved: list[tuple[int, int]] = []
    move = Files.move

    def watched(self: Files, kind: Kind, path: str, offset_bytes: int, view: Any) -> None:
        moved.append((offset_bytes, len(view)))
        move(self, kind, path, offset_bytes, view)

    monkeypatch.setattr(Files, "move", watched)
    data = pattern(num_bytes, 54)
    with PosixEngine(4, request_bytes=most_bytes) as engine:
        engine.write(Extent(str(tmp_path / "data.bin"), PAGE, num_bytes), aligned(num_bytes, data)).wait()
    assert [size for _, size in sorted(moved)] == expected
    assert np.array_equal(np.fromfile(tmp_path / "data.bin", np.uint8)[PAGE:], data)


@needs_direct
def test_direct_true_insists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _refuse_direct_open(monkeypatch)
    with PosixEngine(1, direct=True) as engine:
        transfer = engine.write(Extent(str(tmp_path / "data.bin"), 0, PAGE), aligned(PAGE))
        with pytest.raises(OSError, match="use direct='auto'") as caught:
            transfer.wait()
        assert caught.value.errno == errno.EINVAL
        assert caught.value.filename == str(tmp_path / "data.bin")


@needs_direct
def test_direct_true_works_where_it_can(tmp_path: Path) -> None:
    with PosixEngine(2, direct=True) as engine:
        _round_trip(engine, str(tmp_path / "data.bin"))
        assert engine.reason == "posix: O_DIRECT, 2 threads"


@needs_direct
def test_unaligned_memory_is_refused_with_the_remedy(tmp_path: Path) -> None:
    array = aligned(3 * PAGE)[16 : 16 + PAGE]
    with PosixEngine(1) as engine:
        for move in (engine.read, engine.write):
            with pytest.raises(ValueError, match=r"not aligned to 4096 bytes.*BufferPool"):
                move(Extent(str(tmp_path / "data.bin"), 0, PAGE), array)
    with PosixEngine(1, direct=False) as engine:
        engine.write(Extent(str(tmp_path / "data.bin"), 0, PAGE), array).wait()
        assert engine.reason == "posix: page cache (direct=False), 1 thread"


@pytest.mark.parametrize("direct", [False, "auto"])
def test_partial_requests_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: Any) -> None:
    moved: list[int] = []

    def partial(real: Callable[..., int]) -> Callable[..., int]:
        def call(descriptor: int, views: list[memoryview], offset: int) -> int:
            part = views[0][: max(PAGE, len(views[0]) // 3 // PAGE * PAGE)]
            moved.append(len(part))
            return real(descriptor, [part], offset)

        return call

    monkeypatch.setattr(os, "preadv", partial(os.preadv))
    monkeypatch.setattr(os, "pwritev", partial(os.pwritev))
    with PosixEngine(2, direct=direct) as engine:
        _round_trip(engine, str(tmp_path / "data.bin"), 50 * PAGE)
    assert len(moved) > 10


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_device_is_enospc() -> None:
    with PosixEngine(2) as engine:
        transfer = engine.write(Extent("/dev/full", 8192, PAGE), aligned(PAGE))
        with pytest.raises(OSError, match="write of 4096 bytes at offset 8192") as caught:
            transfer.wait()
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == "/dev/full"
        assert engine.bytes_written == 0


def test_a_directory_is_not_a_file(tmp_path: Path) -> None:
    with PosixEngine(1) as engine, pytest.raises(IsADirectoryError) as caught:
        engine.write(Extent(str(tmp_path), 0, PAGE), aligned(PAGE)).wait()
    assert caught.value.filename == str(tmp_path)


def test_a_failed_write_stops_the_rest_and_waits_for_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev
    second_runs, first_failed = threading.Event(), threading.Event()
    calls: list[int] = []

    def pwritev(descriptor: int, views: list[memoryview], offset: int) -> int:
        calls.append(offset)
        if offset == 0:
            assert second_runs.wait(30)
            first_failed.set()
            raise OSError(errno.EIO, "Input/output error")
        second_runs.set()
        assert first_failed.wait(30)
        return real(descriptor, views, offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    with PosixEngine(2, request_bytes=PAGE) as engine:
        transfer = engine.write(Extent(str(tmp_path / "data.bin"), 0, 40 * PAGE), aligned(40 * PAGE))
        with pytest.raises(OSError, match="write of 4096 bytes at offset 0") as caught:
            transfer.wait()
        assert caught.value.errno == errno.EIO
        num_calls = len(calls)
        assert num_calls <= 4  # not 40
        assert transfer.done()


def test_a_failed_sync_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    path = str(tmp_path / "data.bin")
    with PosixEngine(1) as engine:
        engine.write(Extent(path, 0, PAGE), aligned(PAGE)).wait()
        monkeypatch.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="fdatasync") as caught:
            engine.sync(path)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, path)


@pytest.mark.parametrize("flood", ["read", "write"])
def test_neither_kind_starves_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flood: str) -> None:
    """With a queue full of one kind and one thread, a transfer of the other kind comes to its turn soon."""
    path = str(tmp_path / "data.bin")
    Path(path).write_bytes(bytes(PAGE))
    gate, real_preadv = threading.Event(), os.preadv
    order: list[Transfer] = []

    def gated_preadv(*args: Any) -> int:
        assert gate.wait(30)
        return real_preadv(*args)

    monkeypatch.setattr(os, "preadv", gated_preadv)
    with PosixEngine(1) as engine:
        engine.read(Extent(path, 0, PAGE), aligned(PAGE))  # holds the only thread while the queues fill
        flooding, rare = (engine.read, engine.write) if flood == "read" else (engine.write, engine.read)
        many = [flooding(Extent(path, 0, PAGE), aligned(PAGE)) for _ in range(50)]
        other = rare(Extent(path, 0, PAGE), aligned(PAGE))
        for transfer in [*many, other]:
            transfer.add_done_callback(order.append)
        gate.set()
        for transfer in [*many, other]:
            transfer.wait()
    assert order.index(other) <= 2


def test_descriptors_do_not_leak(tmp_path: Path) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs Linux's /proc/self/fd")
    before = set(os.listdir("/proc/self/fd"))
    with PosixEngine(3, request_bytes=PAGE) as engine:
        for index in range(5):
            _round_trip(engine, str(tmp_path / f"{index}.bin"))
        assert len(os.listdir("/proc/self/fd")) <= len(before) + 10
        for index in range(4):
            engine.forget(str(tmp_path / f"{index}.bin"))
        assert len(os.listdir("/proc/self/fd")) <= len(before) + 2
        with contextlib.suppress(OSError):
            engine.read(Extent(str(tmp_path / "missing"), 0, PAGE), aligned(PAGE)).wait()
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("io_engine-")]


def test_forget_while_requests_run(tmp_path: Path) -> None:
    path, num_bytes = str(tmp_path / "data.bin"), 200 * PAGE
    data = pattern(num_bytes, seed=5)
    with PosixEngine(4, request_bytes=PAGE) as engine:
        transfer = engine.write(Extent(path, 0, num_bytes), aligned(num_bytes, data))
        while not transfer.done():
            engine.forget(path)
        transfer.wait()
    assert Path(path).read_bytes() == data.tobytes()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # forking beside threads is the point here
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_is_told(tmp_path: Path) -> None:
    with PosixEngine(2) as engine:
        process_id = os.fork()
        if process_id == 0:
            code = 1
            try:
                engine.read(Extent(str(tmp_path / "x"), 0, PAGE), aligned(PAGE))
            except RuntimeError as error:
                engine.close()  # must not wait for threads that do not exist
                code = 0 if "forked child" in str(error) else 2
            finally:
                os._exit(code)
        _, status = os.waitpid(process_id, 0)
        assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_threads": 0}, "at least 1"),
        ({"request_bytes": 1000}, "multiple of 4096"),
        ({"request_bytes": 0}, "multiple of 4096"),
        ({"request_bytes": 1 << 31}, "multiple of 4096"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PosixEngine(**arguments)  # type: ignore[arg-type]
