"""What drives, limits, signals, forks and other processes do to transfers: the right error, no hang, nothing left."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from io_engine import BufferPool, Extent, ExtentSpec, PosixEngine, Store, StoreCorruptError, Transfer, checksum
from io_engine import engine as engine_module
from tests.io_engine.helpers import PAGE, aligned, pattern

MIB = 1 << 20
linux_only = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's /proc")


@contextlib.contextmanager
def mounted(folder: Path, *arguments: str) -> Iterator[Path]:
    """Mount a file system for a test; skips it where that is not allowed."""
    folder.mkdir(exist_ok=True)
    try:
        subprocess.run(["mount", *arguments, str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount here: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)


@contextlib.contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Root may open everything: be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


class Gate:
    """Holds the preadv and pwritev of files whose path contains `name` until `open()`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self._opened = threading.Event()
        self.reached = threading.Event()
        for call in ("preadv", "pwritev"):
            monkeypatch.setattr(os, call, self._held(getattr(os, call), name))

    def _held(self, real: Callable[..., int], name: str) -> Callable[..., int]:
        def call(descriptor: int, *arguments: Any) -> int:
            if name in os.readlink(f"/proc/self/fd/{descriptor}"):
                self.reached.set()
                assert self._opened.wait(60)
            return real(descriptor, *arguments)

        return call

    def open(self) -> None:
        self._opened.set()


# ---- slow drives


@linux_only
def test_a_slow_directory_does_not_hold_up_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("slow", "fast"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_bytes(bytes(20 * PAGE))
    gate = Gate(monkeypatch, "/slow/")
    with PosixEngine(1, request_bytes=PAGE) as engine:
        slow = [engine.write(Extent(str(tmp_path / "slow" / "x"), i * PAGE, PAGE), aligned(PAGE)) for i in range(20)]
        fast = [engine.read(Extent(str(tmp_path / "fast" / "x"), i * PAGE, PAGE), aligned(PAGE)) for i in range(20)]
        for transfer in fast:
            transfer.wait(60)
        engine.sync(str(tmp_path / "fast" / "x"))
        assert not any(transfer.done() for transfer in slow)
        gate.open()
        for transfer in slow:
            transfer.wait(60)
        assert engine.reason.endswith("1 thread for each of 2 directories")


@linux_only
def test_what_hangs_is_reported_once_while_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine_module, "PATIENCE_SECONDS", 0.05)
    parts = []
    for name in ("good", "hung"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_bytes(bytes(3 * PAGE))
        parts.append(Extent(str(tmp_path / name / "x"), PAGE, 2 * PAGE))
    gate = Gate(monkeypatch, "/hung/")
    with PosixEngine(1) as engine, caplog.at_level(logging.WARNING, "io_engine"):
        transfer = engine.read(Extent.join(parts), aligned(4 * PAGE))
        for _ in range(2):
            with pytest.raises(TimeoutError, match="still under way after 0.3 s"):
                transfer.wait(timeout_seconds=0.3)
        (message,) = caplog.messages
        assert f"the read of {2 * PAGE} bytes at offset {PAGE} of {tmp_path}/hung/x is not done after" in message
        gate.open()
        transfer.wait()  # it was waited for, not given up
        engine.read(parts[0], aligned(2 * PAGE)).wait()
    assert len(caplog.messages) == 1


def test_nothing_is_reported_of_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(engine_module, "PATIENCE_SECONDS", -1e9)
    with PosixEngine(1) as engine:
        transfer = engine.write(Extent(str(tmp_path / "x"), 0, PAGE), aligned(PAGE))
        while not transfer.done():
            threading.Event().wait(0.001)
        transfer.wait()
        transfer.wait(timeout_seconds=0)
    assert caplog.messages == []


# ---- errors of the system


def test_a_forbidden_file_is_eacces(tmp_path: Path) -> None:
    path = str(tmp_path / "data.bin")
    Path(path).write_bytes(bytes(PAGE))
    os.chmod(path, 0)
    with PosixEngine(1) as engine:
        for move in (engine.read, engine.write):
            with as_ordinary_user(), pytest.raises(PermissionError, match="of 4096 bytes at offset 0") as caught:
                move(Extent(path, 0, PAGE), aligned(PAGE)).wait()
            assert (caught.value.errno, caught.value.filename) == (errno.EACCES, path)
    with PosixEngine(1) as engine, as_ordinary_user(), pytest.raises(PermissionError):
        Store.create(tmp_path / "store", identity={}, engine=engine)


@linux_only
def test_too_many_open_files_is_emfile(tmp_path: Path) -> None:
    import resource

    path, full = str(tmp_path / "data.bin"), str(tmp_path / "other.bin")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with PosixEngine(1) as engine, BufferPool(MIB, name="test") as pool:
        with pool.acquire(PAGE) as buffer:
            engine.write(Extent(path, 0, PAGE), buffer.array).wait()
            lowest_free = os.open(os.devnull, os.O_RDONLY)
            os.close(lowest_free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
            try:
                transfer = engine.write(Extent(full, 8192, PAGE), buffer.array)
                with pytest.raises(OSError, match=r"write of 4096 bytes at offset 8192.*ulimit -n") as caught:
                    transfer.wait()
                engine.write(Extent(path, 0, PAGE), buffer.array).wait()  # what is open goes on
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert (caught.value.errno, caught.value.filename) == (errno.EMFILE, full)
            engine.write(Extent(full, 8192, PAGE), buffer.array).wait()
        assert pool.used_bytes == 0


def test_a_drive_that_fills_up_in_mid_run_is_enospc(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=4m", "none") as folder:
        path = str(folder / "data.bin")
        with PosixEngine(2, request_bytes=MIB) as engine, BufferPool(16 * MIB, name="test") as pool:
            with pool.acquire(8 * MIB) as buffer:
                buffer.array[:] = 7
                with pytest.raises(OSError, match=r"No space left on device \(write of \d+ bytes at offset") as caught:
                    engine.write(Extent(path, 0, 8 * MIB), buffer.array).wait()
                assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, path)
                engine.remove(path)
                engine.write(Extent(path, 0, MIB), buffer.array[:MIB]).wait()
            assert pool.used_bytes == 0
            with pytest.raises(OSError, match="preallocation of") as caught:
                engine.preallocate(str(folder / "big.bin"), 64 * MIB)
            assert caught.value.errno == errno.ENOSPC


def test_a_drive_that_fails_to_read_is_eio(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(32 * MIB)
    try:
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot make a file system here: {error}")
    with mounted(tmp_path / "broken", "-o", "loop", str(image)) as folder:
        path = str(folder / "data.bin")
        with PosixEngine(2, request_bytes=MIB) as engine:
            data = pattern(8 * MIB, seed=1)
            engine.write(Extent(path, 0, data.size), aligned(data.size, data)).wait()
            engine.sync(path)
            os.truncate(image, 16 * PAGE)  # the drive's cells are gone
            with pytest.raises(OSError, match=r"Input/output error \(read of \d+ bytes at offset") as caught:
                engine.read(Extent(path, 0, data.size), aligned(data.size)).wait()
            assert (caught.value.errno, caught.value.filename) == (errno.EIO, path)


# ---- other processes


def _committed(folder: Path, engine: PosixEngine) -> Store:
    store = Store.create(folder, identity={}, engine=engine)
    store.allocate([ExtentSpec("w", 4 * PAGE, 2)])
    data = pattern(4 * PAGE, seed=1)
    engine.write(store.extent("w", 0), aligned(data.size, data)).wait()
    store.commit(step=1, slots={}, checksums={"w": checksum(data)}, state={})
    return store


def test_a_file_that_others_truncate(tmp_path: Path) -> None:
    with PosixEngine(2, request_bytes=PAGE) as engine, _committed(tmp_path / "s", engine) as store:
        extent = store.extent("w", 0)
        array = aligned(extent.num_bytes)
        engine.read(extent, array).wait()
        os.truncate(extent.path, 2 * PAGE)
        with pytest.raises(OSError, match=r"short read.*ends at 8192") as caught:
            engine.read(extent, array).wait()
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, extent.path)
        with pytest.raises(StoreCorruptError, match="has 8192 bytes instead of"):
            store.commit(step=2, slots={}, checksums={}, state={})
        assert store.step == 1
        assert Store.peek(tmp_path / "s").step == 1


@pytest.mark.parametrize("replaced", [True, False])
def test_a_file_that_others_replace_or_remove(tmp_path: Path, replaced: bool) -> None:
    """What was written went to a file without a name: a commit must not say that it is safe."""
    with PosixEngine(2) as engine, _committed(tmp_path / "s", engine) as store:
        path = store.extent("w").path
        engine.write(store.extent("w", 1), aligned(4 * PAGE)).wait()
        if replaced:
            copy = tmp_path / "copy"
            copy.write_bytes(Path(path).read_bytes())
            os.replace(copy, path)
        else:
            os.unlink(path)
        with pytest.raises(OSError, match="replaced by another process" if replaced else "No such file") as caught:
            store.commit(step=2, slots={"w": 1}, checksums={}, state={})
        assert (caught.value.errno, caught.value.filename) == (errno.ESTALE if replaced else errno.ENOENT, path)
        assert (store.step, store.active_slot("w")) == (1, 0)


# ---- interrupts, close, forks


def _no_thread_nor_descriptor_left(descriptors: set[str]) -> None:
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("io_engine")]
    assert set(os.listdir("/proc/self/fd")) == descriptors


@linux_only
def test_ctrl_c_leaves_no_thread_no_descriptor_no_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "held" / "x")
    os.mkdir(tmp_path / "held")
    pool = BufferPool(8 * MIB, name="test")
    descriptors = set(os.listdir("/proc/self/fd"))
    gate = Gate(monkeypatch, "/held/")
    transfers: list[Transfer] = []
    # Shells let what they start in the background ignore Ctrl-C.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        assert gate.reached.wait(60)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        threading.Event().wait(0.05)
        gate.open()

    thread = threading.Thread(target=interrupt)
    # The engine is left first: then the buffer has no other owner any more when it goes back.
    with pytest.raises(KeyboardInterrupt), pool.acquire(MIB) as buffer, PosixEngine(2, request_bytes=PAGE) as engine:
        thread.start()
        transfers.append(engine.write(Extent(path, 0, MIB), buffer.array[:MIB]))
        transfers[0].wait()
    thread.join()
    signal.signal(signal.SIGINT, handler)
    assert transfers[0].done()
    assert pool.used_bytes == 0
    pool.close()
    _no_thread_nor_descriptor_left(descriptors)


@linux_only
def test_close_during_transfers_of_other_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    descriptors = set(os.listdir("/proc/self/fd"))
    gate = Gate(monkeypatch, "/a/")
    engine = PosixEngine(2, request_bytes=PAGE)
    data = pattern(64 * PAGE, seed=3)
    accepted: list[Transfer] = []
    outcomes: list[str] = []

    def submit() -> None:
        for index in range(1000):
            extent = Extent.join(Extent(str(f / "x"), index % 8 * 8 * PAGE, 8 * PAGE) for f in folders)
            try:
                accepted.append(engine.write(extent, aligned(16 * PAGE, data[: 16 * PAGE])))
            except RuntimeError as error:
                outcomes.append(str(error))
                return

    submitters = [threading.Thread(target=submit) for _ in range(2)]
    for thread in submitters:
        thread.start()
    assert gate.reached.wait(60)
    closer = threading.Thread(target=engine.close)
    closer.start()
    gate.open()
    for thread in (closer, *submitters):
        thread.join(60)
        assert not thread.is_alive()
    assert accepted
    for transfer in accepted:  # each was done whole
        assert transfer.done()
        transfer.wait()
    assert all("closed" in text for text in outcomes)
    _no_thread_nor_descriptor_left(descriptors)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # forking beside threads is the point here
def test_workers_that_fork_during_transfers(tmp_path: Path) -> None:
    """As DataLoader workers do: they inherit the objects in any state, drop them and end; the bytes stay right."""
    path, num_bytes = str(tmp_path / "x"), 8 * MIB
    children: list[int] = []
    with PosixEngine(4, request_bytes=64 * 1024) as engine, BufferPool(4 * num_bytes, name="test") as pool:
        for turn in range(8):
            data = pattern(num_bytes, seed=turn)
            with pool.acquire(num_bytes) as source, pool.acquire(num_bytes) as target:
                source.array[:] = data
                write = engine.write(Extent(path, 0, num_bytes), source.array)
                children.append(_fork_child(engine))
                write.wait()
                target.array[:] = 0
                read = engine.read(Extent(path, 0, num_bytes), target.array)
                children.append(_fork_child(engine))
                read.wait()
                assert np.array_equal(target.array, data)
        for child in children:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _fork_child(engine: PosixEngine) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with pytest.raises(RuntimeError, match="forked child"):
                engine.read(Extent("x", 0, PAGE), aligned(PAGE))
            engine.close()
            gc.collect()
            code = 0
        finally:
            os._exit(code)
    return child
