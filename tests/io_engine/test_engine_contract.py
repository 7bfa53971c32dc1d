"""What every engine promises. A new engine is done when it passes these; add it to `_RIGS`."""

from __future__ import annotations

import errno
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from io_engine import BufferPool, Engine, Extent, KvikioEngine, MockEngine, PosixEngine, Transfer
from tests.io_engine.fake_kvikio import install
from tests.io_engine.helpers import PAGE, aligned, pattern

REQUEST_BYTES = 64 * 1024


class Rig:
    """An engine, and a way to files that does not go through it."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine = engine
        self.folder = folder

    def path(self, name: str = "data.bin") -> str:
        return str(self.folder / name)

    def contents(self, path: str) -> bytes:
        return np.fromfile(path, np.uint8).tobytes()

    def put(self, path: str, data: bytes) -> None:
        Path(path).write_bytes(data)


class MockRig(Rig):
    engine: MockEngine

    def contents(self, path: str) -> bytes:
        return bytes(self.engine.files[path])

    def put(self, path: str, data: bytes) -> None:
        self.engine.files[path] = bytearray(data)


def _kvikio(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    install(monkeypatch)
    return Rig(KvikioEngine(3, REQUEST_BYTES), folder)


_RIGS: dict[str, Callable[[Path, pytest.MonkeyPatch], Rig]] = {
    "posix direct": lambda folder, _: Rig(PosixEngine(4, REQUEST_BYTES), folder),
    "posix one thread": lambda folder, _: Rig(PosixEngine(1, REQUEST_BYTES), folder),
    "posix page cache": lambda folder, _: Rig(PosixEngine(3, REQUEST_BYTES, direct=False), folder),
    "mock fifo": lambda folder, _: MockRig(MockEngine(), folder),
    "mock lifo": lambda folder, _: MockRig(MockEngine(order="lifo", latency_seconds=1.0), folder),
    "kvikio stand-in": _kvikio,
    "kvikio": lambda folder, _: Rig(KvikioEngine(3, REQUEST_BYTES), folder),
}
_MARKS = {"kvikio": pytest.mark.gds}


@pytest.fixture(params=[pytest.param(name, marks=_MARKS.get(name, ())) for name in _RIGS])
def rig(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    made = _RIGS[request.param](tmp_path, monkeypatch)
    yield made
    made.engine.close()


SIZES = [
    PAGE,
    2 * PAGE,
    REQUEST_BYTES - PAGE,
    REQUEST_BYTES,
    REQUEST_BYTES + PAGE,
    3 * REQUEST_BYTES,
    1_130_496,
]


@pytest.mark.parametrize("num_bytes", SIZES)
@pytest.mark.parametrize("offset_bytes", [0, PAGE, REQUEST_BYTES + PAGE])
def test_bytes_arrive_where_they_should(rig: Rig, num_bytes: int, offset_bytes: int) -> None:
    path, data = rig.path(), pattern(num_bytes, seed=num_bytes + offset_bytes)
    before = pattern(offset_bytes + num_bytes + PAGE, seed=1)
    rig.put(path, before.tobytes())
    rig.engine.write(Extent(path, offset_bytes, num_bytes), aligned(num_bytes, data)).wait()
    expected = before.copy()
    expected[offset_bytes : offset_bytes + num_bytes] = data
    assert rig.contents(path) == expected.tobytes()
    array = aligned(num_bytes)
    rig.engine.read(Extent(path, offset_bytes, num_bytes), array).wait()
    assert array.tobytes() == data.tobytes()


def test_a_write_makes_and_extends_the_file(rig: Rig) -> None:
    path, data = rig.path("new.bin"), pattern(2 * PAGE, seed=2)
    rig.engine.write(Extent(path, PAGE, 2 * PAGE), aligned(2 * PAGE, data)).wait()
    assert rig.contents(path) == bytes(PAGE) + data.tobytes()
    assert rig.engine.file_size(path) == 3 * PAGE


def test_many_transfers_at_once(rig: Rig) -> None:
    num_files, num_each, num_bytes = 3, 12, 5 * PAGE
    data = {(f, i): pattern(num_bytes, seed=100 * f + i) for f in range(num_files) for i in range(num_each)}
    writes = [
        rig.engine.write(Extent(rig.path(f"{f}.bin"), i * num_bytes, num_bytes), aligned(num_bytes, data[f, i]))
        for f, i in data
    ]
    for transfer in reversed(writes):
        transfer.wait()
    for f in range(num_files):
        assert rig.contents(rig.path(f"{f}.bin")) == b"".join(data[f, i].tobytes() for i in range(num_each))
    arrays = {key: aligned(num_bytes) for key in data}
    reads = {
        (f, i): rig.engine.read(Extent(rig.path(f"{f}.bin"), i * num_bytes, num_bytes), arrays[f, i]) for f, i in data
    }
    # New writes beside the reads, to other files.
    others = [
        rig.engine.write(Extent(rig.path("other.bin"), i * PAGE, PAGE), aligned(PAGE, pattern(PAGE, seed=i)))
        for i in range(20)
    ]
    for key, transfer in reads.items():
        transfer.wait()
        assert arrays[key].tobytes() == data[key].tobytes()
    for transfer in others:
        transfer.wait()
    assert rig.contents(rig.path("other.bin")) == b"".join(pattern(PAGE, seed=i).tobytes() for i in range(20))


def _striped(rig: Rig, num_parts: int, seed: int) -> Extent:
    """Parts of random length, one after the other in the files of three directories."""
    random = np.random.default_rng(seed)
    ends: dict[str, int] = {}
    parts = []
    for index in range(num_parts):
        folder = rig.folder / f"drive-{index % 3}"
        folder.mkdir(exist_ok=True)
        path, num_bytes = str(folder / f"{seed}.bin"), int(random.integers(1, 40)) * PAGE
        parts.append(Extent(path, ends.get(path, PAGE), num_bytes))
        ends[path] = ends.get(path, PAGE) + num_bytes + PAGE  # with a gap, so that no two parts become one
    return Extent.join(parts)


@pytest.mark.parametrize("num_parts", [2, 3, 20])
def test_striped_extents_go_to_each_of_their_places(rig: Rig, num_parts: int) -> None:
    extents = [_striped(rig, num_parts, seed) for seed in range(3)]
    data = [pattern(extent.num_bytes, seed=i) for i, extent in enumerate(extents)]
    done: list[Transfer] = []
    writes = [rig.engine.write(e, aligned(e.num_bytes, d)) for e, d in zip(extents, data, strict=True)]
    for write in writes:
        write.add_done_callback(done.append)
        write.wait()
        assert write.unfinished == []
    for extent, content in zip(extents, data, strict=True):
        assert len(extent.parts) == num_parts
        begin = 0
        for part in extent.parts:  # looked at past the engine
            raw = rig.contents(part.path)[part.offset_bytes : part.offset_bytes + part.num_bytes]
            assert raw == content[begin : begin + part.num_bytes].tobytes()
            begin += part.num_bytes
        for begin, end in ((0, extent.num_bytes), (PAGE, extent.num_bytes), (0, 2 * PAGE)):
            array = aligned(end - begin)
            rig.engine.read(extent.sub(begin, end - begin), array).wait()
            assert array.tobytes() == content[begin:end].tobytes()
    assert rig.engine.bytes_written == sum(extent.num_bytes for extent in extents)
    assert len(done) == 3


def test_a_striped_extent_fails_as_a_whole_and_names_the_place(rig: Rig) -> None:
    extent = _striped(rig, 3, seed=0)
    for part in extent.parts[:2]:
        rig.put(part.path, bytes(part.offset_bytes + part.num_bytes))
    with pytest.raises(FileNotFoundError) as caught:
        rig.engine.read(extent, aligned(extent.num_bytes)).wait()
    assert caught.value.filename == extent.parts[2].path
    assert rig.engine.bytes_read == 0
    rig.put(extent.parts[2].path, bytes(extent.parts[2].offset_bytes + 100))
    with pytest.raises(OSError, match="short read: only") as caught:
        rig.engine.read(extent, aligned(extent.num_bytes)).wait()
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, extent.parts[2].path)


def test_threads_share_an_engine(rig: Rig) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            path = rig.path(f"{seed}.bin")
            for turn in range(8):
                data = pattern(3 * PAGE, seed=seed * 100 + turn)
                rig.engine.write(Extent(path, 0, data.size), aligned(data.size, data)).wait()
                array = aligned(data.size)
                rig.engine.read(Extent(path, 0, data.size), array).wait()
                assert array.tobytes() == data.tobytes()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors


def test_counters_count_completed_bytes(rig: Rig) -> None:
    path, engine = rig.path(), rig.engine
    assert (engine.bytes_read, engine.bytes_written) == (0, 0)
    engine.write(Extent(path, 0, 3 * PAGE), aligned(3 * PAGE)).wait()
    for _ in range(2):
        engine.read(Extent(path, PAGE, 2 * PAGE), aligned(2 * PAGE)).wait()
    with pytest.raises(OSError, match="short read"):
        engine.read(Extent(path, 0, 4 * PAGE), aligned(4 * PAGE)).wait()
    assert (engine.bytes_read, engine.bytes_written) == (4 * PAGE, 3 * PAGE)
    assert engine.read_seconds > 0
    assert engine.write_seconds > 0
    before = engine.read_seconds
    assert engine.read_seconds == before  # nothing is under way, so the clock stands


def test_a_transfer_knows_itself(rig: Rig) -> None:
    extent, array = Extent(rig.path(), 0, PAGE), aligned(PAGE)
    transfer = rig.engine.write(extent, array)
    assert (transfer.kind, transfer.extent, transfer.num_bytes) == ("write", extent, PAGE)
    assert transfer.array is array
    transfer.wait()
    transfer.wait()
    transfer.wait(timeout_seconds=0)
    assert transfer.done()
    assert transfer.error is None
    assert transfer.submitted_seconds <= transfer.started_seconds <= transfer.ended_seconds
    assert transfer.seconds == transfer.ended_seconds - transfer.started_seconds


def test_callbacks_run_once_before_and_after_completion(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    called: list[Transfer] = []
    ran = threading.Event()

    def bad(transfer: Transfer) -> None:
        raise RuntimeError("a callback of the test")

    def good(transfer: Transfer) -> None:
        called.append(transfer)
        ran.set()

    transfer = rig.engine.write(Extent(rig.path(), 0, PAGE), aligned(PAGE))
    transfer.add_done_callback(bad)
    transfer.add_done_callback(good)
    transfer.wait()
    assert ran.wait(30)
    transfer.add_done_callback(good)
    assert called == [transfer, transfer]
    rig.engine.write(Extent(rig.path(), 0, PAGE), aligned(PAGE)).wait()  # the I/O thread lives
    assert "a callback of the write" in caplog.text


def test_callbacks_see_failures_too(rig: Rig) -> None:
    seen: list[BaseException | None] = []
    ran = threading.Event()
    transfer = rig.engine.read(Extent(rig.path("missing"), 0, PAGE), aligned(PAGE))

    def look(done: Transfer) -> None:
        seen.append(done.error)
        ran.set()

    transfer.add_done_callback(look)
    with pytest.raises(FileNotFoundError):
        transfer.wait()
    assert ran.wait(30)
    assert isinstance(seen[0], FileNotFoundError)


def test_the_array_lives_as_long_as_the_transfer(rig: Rig) -> None:
    pool = BufferPool(1 << 20, name="test")
    buffer = pool.acquire(PAGE)
    array = buffer.array[:]
    gone = weakref.ref(array)
    array[:] = 9
    transfer = rig.engine.write(Extent(rig.path(), 0, PAGE), array)
    del array
    gc.collect()
    assert gone() is not None
    transfer.wait()
    rig.engine.write(Extent(rig.path("other.bin"), 0, PAGE), aligned(PAGE)).wait()
    assert rig.contents(rig.path()) == bytes([9]) * PAGE
    del transfer
    _collect_until_gone(gone)  # and no longer: the engine keeps nothing
    buffer.release()
    pool.close()


def _collect_until_gone(gone: weakref.ref[np.ndarray]) -> None:
    # The I/O thread that woke us may still be on its way out of the transfer.
    for _ in range(1000):
        gc.collect()
        if gone() is None:
            return
        threading.Event().wait(0.005)
    pytest.fail("the engine keeps the array of a transfer that is done and dropped")


def test_a_read_past_the_end_is_an_error(rig: Rig) -> None:
    path = rig.path()
    rig.put(path, bytes(PAGE + 1000))
    transfer = rig.engine.read(Extent(path, 0, 2 * PAGE), aligned(2 * PAGE))
    for _ in range(2):  # wait raises every time
        with pytest.raises(OSError, match=f"short read: only {PAGE + 1000} bytes") as caught:
            transfer.wait()
        assert caught.value.errno == errno.EIO
        assert caught.value.filename == path
        assert "read of 8192 bytes at offset 0" in str(caught.value)
    assert transfer.done()
    with pytest.raises(OSError, match="short read: only 0 bytes"):
        rig.engine.read(Extent(path, 1 << 20, PAGE), aligned(PAGE)).wait()


def test_a_failure_in_one_request_of_many(rig: Rig) -> None:
    path, num_bytes = rig.path(), 10 * REQUEST_BYTES
    rig.put(path, bytes(7 * REQUEST_BYTES))
    transfer = rig.engine.read(Extent(path, 0, num_bytes), aligned(num_bytes))
    with pytest.raises(OSError, match="short read"):
        transfer.wait()
    array = aligned(REQUEST_BYTES)
    rig.engine.read(Extent(path, 0, REQUEST_BYTES), array).wait()  # the engine goes on


def test_a_missing_file(rig: Rig) -> None:
    path = rig.path("missing.bin")
    with pytest.raises(FileNotFoundError, match="read of 4096 bytes at offset 8192") as caught:
        rig.engine.read(Extent(path, 8192, PAGE), aligned(PAGE)).wait()
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == path
    for call in (rig.engine.sync, rig.engine.file_size, rig.engine.remove):
        with pytest.raises(FileNotFoundError) as caught:
            call(path)
        assert caught.value.filename == path


def test_arrays_that_do_not_fit_are_refused_at_once(rig: Rig) -> None:
    extent = Extent(rig.path(), 0, 2 * PAGE)
    bad: dict[str, np.ndarray] = {
        "slice it to 8192": aligned(3 * PAGE),
        "not 1-D contiguous uint8": aligned(2 * PAGE).view(np.float32),
        "of shape": aligned(2 * PAGE).reshape(2, -1),
        "not 1-D contiguous": aligned(4 * PAGE)[::2],
    }
    for message, array in bad.items():
        for move in (rig.engine.read, rig.engine.write):
            with pytest.raises(ValueError, match=message):
                move(extent, array)
    frozen = aligned(2 * PAGE)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        rig.engine.read(extent, frozen)
    rig.engine.write(extent, frozen).wait()


def test_sync_preallocate_remove(rig: Rig) -> None:
    path = rig.path("pre.bin")
    rig.engine.preallocate(path, 3 * PAGE)
    assert rig.engine.file_size(path) == 3 * PAGE
    array = aligned(3 * PAGE, pattern(3 * PAGE, seed=3))
    rig.engine.read(Extent(path, 0, 3 * PAGE), array).wait()
    assert not array.any()
    rig.engine.write(Extent(path, PAGE, PAGE), aligned(PAGE, np.full(PAGE, 5, np.uint8))).wait()
    rig.engine.sync(path)
    rig.engine.preallocate(path, 5 * PAGE)  # keeps what is there
    assert rig.contents(path) == bytes(PAGE) + bytes([5]) * PAGE + bytes(3 * PAGE)
    rig.engine.forget(path)
    rig.engine.read(Extent(path, PAGE, PAGE), array[:PAGE]).wait()
    assert (array[:PAGE] == 5).all()
    rig.engine.remove(path)
    with pytest.raises(FileNotFoundError):
        rig.engine.read(Extent(path, 0, PAGE), aligned(PAGE)).wait()


def test_close_completes_what_is_under_way_and_refuses_the_rest(rig: Rig) -> None:
    data = pattern(4 * REQUEST_BYTES, seed=4)
    transfer = rig.engine.write(Extent(rig.path(), 0, data.size), aligned(data.size, data))
    rig.engine.close()
    rig.engine.close()
    assert transfer.done()
    transfer.wait()
    assert rig.contents(rig.path()) == data.tobytes()
    for move in (rig.engine.read, rig.engine.write):
        with pytest.raises(RuntimeError, match="closed"):
            move(Extent(rig.path(), 0, PAGE), aligned(PAGE))
    with pytest.raises(RuntimeError, match="closed"):
        rig.engine.sync(rig.path())


def test_the_reason_is_said(rig: Rig) -> None:
    assert rig.engine.reason.startswith(("posix: ", "mock: ", "kvikio "))
