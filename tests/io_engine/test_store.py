"""The store as its users see it, over real files and over the mock."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xxhash

from io_engine import (
    BufferPool,
    Engine,
    Extent,
    ExtentSpec,
    MockEngine,
    PosixEngine,
    Store,
    StoreCorruptError,
    StoreError,
    checksum,
    combine_checksums,
    piece_digest,
)
from tests.io_engine.helpers import PAGE, aligned, pattern

MIB = 1 << 20


@pytest.fixture(params=["posix", "mock"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made: Engine = PosixEngine(2) if request.param == "posix" else MockEngine()
    yield made
    made.close()


@pytest.fixture
def posix() -> Iterator[PosixEngine]:
    with PosixEngine(2) as made:
        yield made


def write(store: Store, engine: Engine, name: str, slot: int, data: np.ndarray) -> str:
    """Write content into a slot and return its checksum."""
    extent = store.extent(name, slot)
    array = aligned(extent.num_bytes)
    array[: data.size] = data
    engine.write(extent, array).wait()
    return checksum(data)


def read(store: Store, engine: Engine, name: str, slot: int | None = None) -> np.ndarray:
    extent = store.extent(name, slot)
    array = aligned(extent.num_bytes)
    engine.read(extent, array).wait()
    return array[: store.spec(name).num_bytes]


def test_create_commit_reopen(tmp_path: Path, engine: Engine) -> None:
    folder = tmp_path / "deep" / "store"
    assert not Store.exists(folder)
    specs = [ExtentSpec("w", 10_000, num_slots=2), ExtentSpec("frozen", 3 * MIB), ExtentSpec("tiny", 1)]
    with Store.create([folder], identity={"model": "m", "n": [1, 2]}, engine=engine) as store:
        assert Store.exists(folder)
        assert (store.step, store.state, store.names(), store.size_bytes) == (-1, {}, [], 0)
        store.allocate(specs, description={"shapes": {"w": [100, 25]}})
        assert store.names() == ["w", "frozen", "tiny"]
        assert [store.num_slots(name) for name in store.names()] == [2, 1, 1]
        assert (store.active_slot("w"), store.inactive_slot("w")) == (0, 1)
        assert store.inactive_slot("frozen") == 0
        for name in store.names():
            assert not read(store, engine, name).any()
        frozen, w1 = pattern(3 * MIB, seed=1), pattern(10_000, seed=2)
        sums = {"frozen": write(store, engine, "frozen", 0, frozen), "w": write(store, engine, "w", 1, w1)}
        store.commit(step=0, slots={"w": 1}, checksums=sums, state={"rng": [1, 2.5, None], "pair": (1, 2)})
        assert store.committed_seconds > 0
        assert (store.active_slot("w"), store.inactive_slot("w")) == (1, 0)
        assert store.state == {"rng": [1, 2.5, None], "pair": [1, 2]}  # as it reads back
        w2 = pattern(10_000, seed=3)
        store.commit(step=7, slots={"w": 0}, checksums={"w": write(store, engine, "w", 0, w2)}, state={"at": 7})
        uuid = store.uuid
        if isinstance(engine, MockEngine):
            engine.lose_unsynced()  # everything committed was synced
    with Store.open(str(folder), engine=engine) as store:
        assert (store.uuid, store.identity) == (uuid, {"model": "m", "n": [1, 2]})
        assert (store.step, store.state, store.slots) == (7, {"at": 7}, {"w": 0, "frozen": 0, "tiny": 0})
        assert store.description == {"shapes": {"w": [100, 25]}}
        assert store.notes == []
        assert read(store, engine, "frozen").tobytes() == frozen.tobytes()
        assert read(store, engine, "w").tobytes() == w2.tobytes()
        assert read(store, engine, "w", slot=1).tobytes() == w1.tobytes()
        assert store.verify() == []
        assert [store.spec(name) for name in store.names()] == specs
        snapshot = Store.peek([folder])
        assert (snapshot.step, snapshot.state, snapshot.slots) == (store.step, store.state, store.slots)
        assert (snapshot.identity, snapshot.description) == (store.identity, store.description)
        assert snapshot.size_bytes == store.size_bytes
        assert store.free_bytes() > 0


def test_extents_are_aligned_and_apart(tmp_path: Path, engine: Engine) -> None:
    specs = [ExtentSpec(f"e{i}", n, num_slots=1 + i % 2) for i, n in enumerate([1, 5 * MIB, PAGE + 1, 2 * MIB, 70_000])]
    with Store.create(tmp_path / "s", identity={}, engine=engine) as store:
        store.allocate(specs)
        extents = [store.extent(s.name, slot) for s in specs for slot in range(s.num_slots)]
        for extent in extents:
            assert extent.offset_bytes % (2 * MIB if extent.num_bytes >= 2 * MIB else PAGE) == 0
            assert extent.path == str(tmp_path / "s" / "extents-1.bin")
        ends = sorted((e.offset_bytes, e.offset_bytes + e.num_bytes) for e in extents)
        assert all(ends[i][1] <= ends[i + 1][0] for i in range(len(ends) - 1))
        assert store.size_bytes == ends[-1][1] == engine.file_size(extents[0].path)
        # Small ones go behind the big ones, so the only gap is behind the 5 MiB.
        assert store.size_bytes <= sum(e.num_bytes for e in extents) + 4 * MIB


def test_a_failed_step_is_forgotten(tmp_path: Path, engine: Engine) -> None:
    with Store.create(tmp_path / "s", identity={}, engine=engine) as store:
        store.allocate([ExtentSpec("w", PAGE, 2)])
        data = pattern(PAGE, seed=1)
        store.commit(step=1, slots={"w": 1}, checksums={"w": write(store, engine, "w", 1, data)}, state={})
        write(store, engine, "w", store.inactive_slot("w"), pattern(PAGE, seed=2))  # step 2, never committed
    with Store.open(tmp_path / "s", engine=engine) as store:
        assert store.step == 1
        assert read(store, engine, "w").tobytes() == data.tobytes()


def test_commits_refuse_nonsense_and_change_nothing(tmp_path: Path, engine: Engine) -> None:
    with Store.create(tmp_path / "s", identity={}, engine=engine) as store:
        store.allocate([ExtentSpec("weight", PAGE, 2), ExtentSpec("bias", PAGE)])
        store.commit(step=5, slots={}, checksums={}, state={"a": 1})
        before = (store.step, store.slots, store.checksums, store.state, Store.peek(tmp_path / "s"))
        bad: list[tuple[dict[str, Any], type[Exception], str]] = [
            ({"step": 4}, ValueError, "step=4 goes back behind the committed step 5"),
            ({"slots": {"bias": 1}}, ValueError, "'bias' has no slot 1"),
            ({"slots": {"wieght": 1}}, StoreError, "did you mean 'weight'"),
            ({"checksums": {"other": "xxh3:0"}}, StoreError, "no extent 'other'"),
            ({"state": {"loss": float("nan")}}, ValueError, "JSON"),
            ({"state": {"loss": object()}}, TypeError, "JSON"),
        ]
        for change, kind, message in bad:
            arguments: dict[str, Any] = {"step": 6, "slots": {}, "checksums": {}, "state": {}} | change
            with pytest.raises(kind, match=message):
                store.commit(**arguments)
        assert (store.step, store.slots, store.checksums, store.state, Store.peek(tmp_path / "s")) == before
        store.commit(step=5, slots={}, checksums={}, state={"a": 2})  # the same step again is allowed
        assert store.state == {"a": 2}


def test_a_changed_slot_loses_its_old_checksum(tmp_path: Path, engine: Engine) -> None:
    with Store.create(tmp_path / "s", identity={}, engine=engine) as store:
        store.allocate([ExtentSpec("a", PAGE, 2), ExtentSpec("b", PAGE, 2)])
        zeros = checksum(np.zeros(PAGE, np.uint8))
        store.commit(step=1, slots={}, checksums={"a": zeros, "b": zeros}, state={})
        store.commit(step=2, slots={"a": 1}, checksums={}, state={})
        assert store.checksums == {"b": zeros}


def test_allocate_again_and_widen(tmp_path: Path, engine: Engine) -> None:
    folder = tmp_path / "s"
    with Store.create(folder, identity={}, engine=engine) as store:
        store.allocate([ExtentSpec("w", 3 * PAGE), ExtentSpec("frozen", PAGE)], description={"v": 1})
        data = pattern(3 * PAGE, seed=1)
        store.commit(step=0, slots={}, checksums={"w": write(store, engine, "w", 0, data)}, state={"s": 1})
        store.allocate([ExtentSpec("w.m", 5 * PAGE, 2)], second_slots_for=["w"])
        assert store.names() == ["w", "frozen", "w.m"]
        assert [store.num_slots(name) for name in store.names()] == [2, 1, 2]
        assert (store.step, store.state, store.description) == (0, {"s": 1}, {"v": 1})
        store.add_slots(["frozen"], prewrite=False)
        assert store.num_slots("frozen") == 2
        store.allocate([], description={"v": 2})
        with pytest.raises(StoreError, match="'w' has 2 slots already"):
            store.add_slots(["w"])
        with pytest.raises(StoreError, match="no extent 'x'"):
            store.add_slots(["x"])
        with pytest.raises(StoreError, match="'w' exists already"):
            store.allocate([ExtentSpec("w", PAGE)])
        with pytest.raises(StoreError, match="named twice"):
            store.allocate([ExtentSpec("n", PAGE), ExtentSpec("n", PAGE)])
        with pytest.raises(ValueError, match="at most 2 slots"):
            store.add_slots(["w"], num_slots=3)
    with Store.open(folder, engine=engine) as store:
        assert store.description == {"v": 2}
        assert read(store, engine, "w").tobytes() == data.tobytes()
        assert not read(store, engine, "w", slot=1).any()
        assert store.verify() == []
        places = [store.extent(n, slot) for n in store.names() for slot in range(store.num_slots(n))]
        assert len(set(places)) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "num_bytes=0"),
        ((PAGE, 3), "num_slots=3"),
        ((PAGE, 0), "num_slots=0"),
        ((PAGE, 1, -1), "piece_bytes"),
    ],
)
def test_bad_specs_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExtentSpec("name", *arguments)


def test_several_directories_share_the_load(tmp_path: Path, engine: Engine) -> None:
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    with Store.create(folders, identity={}, engine=engine) as store:
        store.allocate([ExtentSpec(f"e{i}", 100 * PAGE, 2) for i in range(6)])
        used = [engine.file_size(str(folder / "extents-1.bin")) for folder in folders]
        assert used == [400 * PAGE] * 3
        data = {name: pattern(100 * PAGE, seed=i) for i, name in enumerate(store.names())}
        sums = {name: write(store, engine, name, 1, content) for name, content in data.items()}
        store.commit(step=1, slots=dict.fromkeys(data, 1), checksums=sums, state={})
        store.allocate([ExtentSpec("more", PAGE)])  # only one directory gets a file
        assert not (folders[1] / "extents-2.bin").exists()
    with Store.open(folders, engine=engine) as store:
        assert store.verify() == []
        for name, content in data.items():
            assert read(store, engine, name).tobytes() == content.tobytes()


def test_wrong_directories_are_recognised(tmp_path: Path, posix: PosixEngine) -> None:
    a, b, other = (str(tmp_path / name) for name in ("a", "b", "other"))
    Store.create([a, b], identity={}, engine=posix).close()
    Store.create([other], identity={}, engine=posix).close()
    (tmp_path / "empty").mkdir()
    bad: list[tuple[list[str], str]] = [
        ([b, a], f"in another order; give them as {a}, {b}"),
        ([a], "2 directories, 1 are given, and number 1 is missing"),
        ([b], "number 0 is missing"),
        ([a, other], "give the directories of one store"),
        ([a, str(tmp_path / "empty")], "is its drive mounted"),
        ([a, str(tmp_path / "missing")], "is its drive mounted"),
        ([str(tmp_path / "missing")], "there is no store in"),
        ([str(tmp_path / "empty")], "there is no store in"),
    ]
    for directories, message in bad:
        with pytest.raises(StoreError, match=message):
            Store.open(directories, engine=posix)
        with pytest.raises(StoreError, match=message):
            Store.peek(directories)
    assert os.listdir(tmp_path / "empty") == []
    for nothing, message in (([], "at least one directory"), ([a, a], "named twice")):
        with pytest.raises(ValueError, match=message):
            Store.open(nothing, engine=posix)
    Store.open([a, b], engine=posix).close()


def test_foreign_files_are_refused_and_kept(tmp_path: Path, posix: PosixEngine) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "thesis.tex").write_text("five years")
    with pytest.raises(StoreError, match=r"is not empty: thesis\.tex"):
        Store.create(folder, identity={}, engine=posix)
    assert os.listdir(folder) == ["thesis.tex"]
    # Also in the second directory, and then the first stays usable.
    with pytest.raises(StoreError, match=r"thesis\.tex"):
        Store.create([tmp_path / "first", folder], identity={}, engine=posix)
    (folder / "thesis.tex").unlink()
    Store.create([tmp_path / "first", folder], identity={}, engine=posix).close()
    for again in ([tmp_path / "first", folder], [folder], [tmp_path / "first"]):
        with pytest.raises(StoreError, match="holds a store already"):
            Store.create(again, identity={}, engine=posix)
    Store.open([tmp_path / "first", folder], engine=posix).close()


def test_a_mount_point_with_lost_and_found_is_empty_enough(tmp_path: Path, posix: PosixEngine) -> None:
    (tmp_path / "s" / "lost+found").mkdir(parents=True)
    Store.create(tmp_path / "s", identity={}, engine=posix).close()


def test_places_where_no_store_can_be(tmp_path: Path, posix: PosixEngine) -> None:
    (tmp_path / "file").write_text("x")
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError) as caught:
            Store.create(bad, identity={}, engine=posix)
        assert str(tmp_path / "file") in str(caught.value.filename)
    with pytest.raises(TypeError):
        Store.create(tmp_path / "s", identity={"bad": object()}, engine=posix)
    assert not Store.exists(tmp_path / "s")
    Store.create(tmp_path / "s", identity={"good": 1}, engine=posix).close()


def test_a_read_only_file_system_is_erofs(tmp_path: Path, posix: PosixEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def read_only(path: str, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OSError, match="Read-only file system") as caught:
        Store.create(tmp_path / "s", identity={}, engine=posix)
    assert caught.value.errno == errno.EROFS
    assert str(tmp_path / "s") in str(caught.value.filename)


def _pretend_free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=num_bytes // PAGE, f_frsize=PAGE))


def test_a_full_drive_is_told_before_anything_is_written(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.create([tmp_path / "a", tmp_path / "b"], identity={}, engine=engine) as store:
        store.allocate([ExtentSpec("w", MIB)])
        written, listing = engine.bytes_written, sorted(os.listdir(tmp_path / "a"))
        # Both directories are on one file system, so both halves count; with the 1 % it does not fit.
        _pretend_free(monkeypatch, 80 * MIB)
        specs = [ExtentSpec(f"e{i}", 40 * MIB) for i in range(2)]
        with pytest.raises(OSError, match=r"1 % reserve.*are free") as caught:
            store.allocate(specs)
        assert caught.value.errno == errno.ENOSPC
        assert str(tmp_path / "a") in caught.value.filename
        assert f"needs {80 * MIB} bytes" in str(caught.value)
        with pytest.raises(OSError, match="more scratch space") as caught:
            store.scratch("spill", 80 * MIB)
        assert caught.value.errno == errno.ENOSPC
        assert (engine.bytes_written, sorted(os.listdir(tmp_path / "a"))) == (written, listing)
        assert store.names() == ["w"]
        monkeypatch.undo()
        store.allocate([ExtentSpec("e0", MIB)])


def test_scratch(tmp_path: Path, engine: Engine) -> None:
    folder = tmp_path / "s"
    with Store.create(folder, identity={}, engine=engine) as store:
        one = store.scratch("act", 10_000)
        assert one.num_bytes == 3 * PAGE
        assert store.scratch("act", 10_000) == one
        assert store.scratch("act", 3 * PAGE) == one
        two = store.scratch("grad", 3 * MIB)
        assert two.offset_bytes % (2 * MIB) == 0
        assert two.offset_bytes >= one.offset_bytes + one.num_bytes
        data = pattern(3 * PAGE, seed=1)
        engine.write(one, aligned(data.size, data)).wait()
        array = aligned(data.size)
        engine.read(one, array).wait()
        assert array.tobytes() == data.tobytes()
        bigger = store.scratch("act", 20_000)
        assert bigger != one
        assert store.scratch("other", 10_000) == one  # the place that became free
        store.release_scratch("other")
        with pytest.raises(KeyError):
            store.release_scratch("other")
        with pytest.raises(ValueError, match="not positive"):
            store.scratch("none", 0)
        assert store.size_bytes == bigger.offset_bytes + bigger.num_bytes
        assert (folder / "scratch-0.bin").exists() or isinstance(engine, MockEngine)
        assert "scratch" not in (folder / "manifest.json").read_text()
    assert not (folder / "scratch-0.bin").exists()


def test_scratch_of_a_crashed_run_is_removed(tmp_path: Path, engine: Engine) -> None:
    folder = tmp_path / "s"
    Store.create(folder, identity={}, engine=engine).close()
    (folder / "scratch-0.bin").write_bytes(bytes(100))
    (folder / "mine.txt").write_text("kept")
    with Store.open(folder, engine=engine) as store:
        assert store.notes == [f"removed scratch-0.bin of an unfinished run from {folder}"]
    assert not (folder / "scratch-0.bin").exists()
    assert (folder / "mine.txt").exists()


def _committed_store(folder: Path, engine: Engine, *, piece_bytes: int = 0, num_bytes: int = 20 * MIB + 777) -> None:
    with Store.create(folder, identity={}, engine=engine) as store:
        store.allocate([ExtentSpec("w", num_bytes, 2, piece_bytes), ExtentSpec("small", 100)])
        data = pattern(num_bytes, seed=9)
        whole = write(store, engine, "w", 1, data)
        size = piece_bytes or num_bytes
        digests = [piece_digest(data[begin : begin + size]) for begin in range(0, num_bytes, size)]
        sums = {"w": combine_checksums(digests) if piece_bytes else whole}
        sums["small"] = write(store, engine, "small", 0, pattern(100, seed=10))
        store.commit(step=3, slots={"w": 1}, checksums=sums, state={})


@pytest.mark.parametrize("piece_bytes", [0, 4096, 3 * MIB + 4096, 8 * MIB, 100 * MIB])
def test_verify_finds_a_flipped_bit(tmp_path: Path, posix: PosixEngine, piece_bytes: int) -> None:
    folder = tmp_path / "s"
    _committed_store(folder, posix, piece_bytes=piece_bytes)
    with Store.open(folder, engine=posix) as store:
        assert store.verify() == []
        extent = store.extent("w")
        size = piece_bytes or 100 * MIB
        last_byte = extent.offset_bytes + store.spec("w").num_bytes - 1
    with open(extent.path, "r+b") as file:  # behind the store's back
        for position in (extent.offset_bytes, extent.offset_bytes + 9 * MIB, last_byte):
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ 0x10]))
            file.flush()
            with Store.open(folder, engine=posix) as store:
                (problem,) = store.verify()
            assert f"extent 'w' is damaged: its bytes {(position - extent.offset_bytes) // size * size} to " in problem
            assert extent.path in problem
            file.seek(position)
            file.write(bytes([byte]))
            file.flush()
        file.seek(last_byte + 1)
        file.write(b"\xff")  # behind the content: no part of it
    with Store.open(folder, engine=posix) as store:
        assert store.verify() == []


def test_verify_reports_what_it_cannot_check(tmp_path: Path) -> None:
    with MockEngine() as engine, Store.create(tmp_path / "s", identity={}, engine=engine) as store:
        store.allocate([ExtentSpec(name, PAGE) for name in "abc"])
        zeros = checksum(np.zeros(PAGE, np.uint8))
        store.commit(step=0, slots={}, checksums={"a": zeros, "b": "crc:1", "c": zeros}, state={})
        engine.fail_next("read", "extents-1", OSError(errno.EIO, "Input/output error"))
        first, second = store.verify()
        assert "'a'" in first
        assert "Input/output error" in first
        assert "'b'" in second
        assert "xxh3" in second


def test_missing_and_truncated_data_files(tmp_path: Path, posix: PosixEngine) -> None:
    folder = tmp_path / "s"
    _committed_store(folder, posix, num_bytes=MIB)
    path = folder / "extents-1.bin"
    with open(path, "r+b") as file:
        file.truncate(PAGE)
    with pytest.raises(StoreCorruptError, match=r"extents-1\.bin has 4096 bytes instead of"):
        Store.open(folder, engine=posix)
    path.unlink()
    for _ in range(2):  # the lock was released
        with pytest.raises(StoreCorruptError, match=r"extents-1\.bin is missing"):
            Store.open(folder, engine=posix)


@pytest.mark.parametrize(("name", "known"), [("manifest.json", "versions 1 to 2"), ("store-id.json", "version 1")])
def test_a_store_of_a_later_version_is_refused(name: str, known: str, tmp_path: Path, posix: PosixEngine) -> None:
    """And left as it is: the program that wrote it can still read it."""
    folder = tmp_path / "s"
    _committed_store(folder, posix, num_bytes=PAGE)
    _put_body(folder / name, _body(folder / name)[1] | {"version": 3})
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}
    with pytest.raises(StoreError, match=f"format version 3, this program reads {known}"):
        Store.open(folder, engine=posix)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"} == before


def test_delete_takes_exactly_its_own_files(tmp_path: Path, posix: PosixEngine) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    store = Store.create(folders, identity={}, engine=posix)
    store.allocate([ExtentSpec("w", PAGE, 2)])
    store.allocate([ExtentSpec("v", PAGE, 2)])
    store.commit(step=1, slots={}, checksums={}, state={})
    store.scratch("x", PAGE)
    (folders[1] / "mine.txt").write_text("kept")
    store.delete()
    assert os.listdir(folders[0]) == []
    assert os.listdir(folders[1]) == ["mine.txt"]
    with pytest.raises(RuntimeError, match="closed"):
        store.delete()
    store.close()
    Store.create(folders[0], identity={}, engine=posix).close()


def test_a_closed_store_says_so(tmp_path: Path, engine: Engine) -> None:
    store = Store.create(tmp_path / "s", identity={}, engine=engine)
    store.close()
    store.close()
    calls = [
        lambda: store.commit(step=1, slots={}, checksums={}, state={}),
        lambda: store.allocate([ExtentSpec("w", PAGE)]),
        lambda: store.scratch("x", PAGE),
        store.delete,
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="closed"):
            call()


def _body(path: Path) -> tuple[str, dict[str, Any]]:
    """The checksum and the body of a small file, after docs/store-format.md."""
    raw = path.read_bytes()
    assert raw[:18] == b'{"checksum":"xxh3:'
    assert raw[34:43] == b'","body":'
    assert raw[-2:] == b"}\n"
    assert raw[18:34].decode() == xxhash.xxh3_64_hexdigest(raw[43:-2])
    assert json.loads(raw)["body"] == json.loads(raw[43:-2])
    return raw[13:34].decode(), json.loads(raw[43:-2])


def _put_body(path: Path, body: dict[str, Any]) -> str:
    """Write a small file, after docs/store-format.md, and return its checksum."""
    text = json.dumps(body, separators=(",", ":"))
    path.write_text(f'{{"checksum":"xxh3:{xxhash.xxh3_64_hexdigest(text.encode())}","body":{text}}}\n')
    return f"xxh3:{xxhash.xxh3_64_hexdigest(text.encode())}"


def _documented_read(folders: list[Path], name: str, slot: int | None = None) -> np.ndarray:
    """A reader written from docs/store-format.md alone, with nothing of io_engine."""
    by_index = {_body(folder / "store-id.json")[1]["index"]: folder for folder in folders}
    _, manifest = _body(by_index[0] / "manifest.json")
    _, layout = _body(by_index[0] / manifest["layout"]["file"])
    extent = layout["extents"][name]
    place = extent["slots"][manifest["slots"].get(name, 0) if slot is None else slot]
    if layout["version"] == 1:
        place = [[*place, -(-extent["num_bytes"] // 4096) * 4096]]
    parts = []
    for file_index, offset, num_bytes in place:
        file = layout["files"][file_index]
        parts.append(np.fromfile(by_index[file["directory"]] / file["name"], np.uint8, num_bytes, offset=offset))
    return np.concatenate(parts)[: extent["num_bytes"]]


def test_the_bytes_on_disk_are_as_documented(tmp_path: Path, posix: PosixEngine) -> None:
    folder, piece = tmp_path / "s", 2 * PAGE
    data = pattern(5 * PAGE + 5, seed=4)
    with Store.create(folder, identity={"model": "tiny"}, engine=posix) as store:
        store.allocate([ExtentSpec("w", data.size, 2, piece)], description={"dtype": "uint8"})
        write(store, posix, "w", 1, data)
        digests = [piece_digest(data[begin : begin + piece]) for begin in range(0, data.size, piece)]
        store.commit(step=12, slots={"w": 1}, checksums={"w": combine_checksums(digests)}, state={"k": "ü"})

    _, identity = _body(folder / "store-id.json")
    _, manifest = _body(folder / "manifest.json")
    _, previous = _body(folder / "manifest.previous.json")
    layout_checksum, layout = _body(folder / manifest["layout"]["file"])
    uuid = identity["uuid"]
    assert identity == {"format": "fuyou-store-id", "version": 1, "uuid": uuid, "index": 0, "count": 1}
    assert manifest == {
        "format": "fuyou-store",
        "version": 2,
        "uuid": uuid,
        "identity": {"model": "tiny"},
        "step": 12,
        "layout": {"file": "layout-1.json", "checksum": layout_checksum},
        "slots": {"w": 1},
        "checksums": {"w": manifest["checksums"]["w"]},
        "state": {"k": "ü"},
    }
    assert (previous["step"], previous["slots"], previous["layout"]) == (-1, {}, manifest["layout"])
    slots = [[[0, 0, 6 * PAGE]], [[0, 6 * PAGE, 6 * PAGE]]]
    assert layout == {
        "format": "fuyou-store-layout",
        "version": 2,
        "uuid": uuid,
        "generation": 1,
        "files": [{"name": "extents-1.bin", "directory": 0, "num_bytes": 12 * PAGE}],
        "extents": {"w": {"num_bytes": data.size, "piece_bytes": piece, "slots": slots}},
        "bytes_per_second": None,
        "description": {"dtype": "uint8"},
    }
    raw = _documented_read([folder], "w").tobytes()
    assert raw == data.tobytes()
    listed = "".join(xxhash.xxh3_64_hexdigest(raw[begin : begin + piece]) for begin in range(0, data.size, piece))
    assert manifest["checksums"]["w"] == "xxh3-list:" + listed
    assert sorted(os.listdir(folder)) == [
        "extents-1.bin",
        "layout-1.json",
        "lock",
        "manifest.json",
        "manifest.previous.json",
        "store-id.json",
    ]


def test_striped_bytes_are_as_documented(tmp_path: Path, posix: PosixEngine) -> None:
    folders = [tmp_path / name for name in "abc"]
    data = {"big": pattern(70 * MIB + 5, seed=5), "small": pattern(3 * MIB, seed=6)}
    with Store.create(folders, identity={}, engine=posix, directory_bytes_per_second=[2e9, 1e9, 1e9]) as store:
        store.allocate([ExtentSpec(name, content.size, 2) for name, content in data.items()], prewrite=False)
        sums = {name: write(store, posix, name, 1, content) for name, content in data.items()}
        store.commit(step=1, slots=dict.fromkeys(data, 1), checksums=sums, state={})
    layout = _body(folders[0] / "layout-1.json")[1]
    assert layout["bytes_per_second"] == [2e9, 1e9, 1e9]
    assert [len(layout["extents"][name]["slots"][1]) > 1 for name in data] == [True, False]
    for folder in folders:
        sizes = {f["directory"]: f["num_bytes"] for f in layout["files"]}
        index = _body(folder / "store-id.json")[1]["index"]
        assert (folder / "extents-1.bin").stat().st_size == sizes[index]
    for name, content in data.items():
        assert _documented_read(folders[::-1], name).tobytes() == content.tobytes()
        assert not _documented_read(folders, name, slot=0).any()


def test_a_store_of_layout_version_1_still_opens(tmp_path: Path, engine: Engine) -> None:
    """Made as the first version of the format had it: slots are `[file, offset]`, and there are no rates."""
    folders = [tmp_path / "a", tmp_path / "b"]
    data = {name: pattern(100 * PAGE + 1, seed=i) for i, name in enumerate("xyz")}
    with Store.create(folders, identity={}, engine=engine) as store:
        store.allocate([ExtentSpec(name, content.size, 2) for name, content in data.items()])
        sums = {name: write(store, engine, name, 1, content) for name, content in data.items()}
        store.commit(step=3, slots=dict.fromkeys(data, 1), checksums=sums, state={})
    _, layout = _body(folders[0] / "layout-1.json")
    layout["version"] = 1
    del layout["bytes_per_second"]
    for extent in layout["extents"].values():
        assert all(len(slot) == 1 for slot in extent["slots"])
        extent["slots"] = [slot[0][:2] for slot in extent["slots"]]
    _, manifest = _body(folders[0] / "manifest.json")
    manifest["layout"]["checksum"] = _put_body(folders[0] / "layout-1.json", layout)
    _put_body(folders[0] / "manifest.json", manifest)
    for _ in range(2):  # the second time from the layout that the first time wrote
        with Store.open(folders, engine=engine) as store:
            assert (store.step, store.verify()) == (3, [])
            for name, content in data.items():
                assert read(store, engine, name).tobytes() == content.tobytes()
                if isinstance(engine, PosixEngine):
                    assert _documented_read(folders, name).tobytes() == content.tobytes()
            store.allocate([], description={"now": "version 2"})
    assert _body(next(folders[0].glob("layout-*.json")))[1]["version"] == 2


def test_a_manifest_of_version_1_still_opens(tmp_path: Path, posix: PosixEngine) -> None:
    """Its checksums are of all pieces together."""
    folder, piece = tmp_path / "s", 2 * PAGE
    data = pattern(5 * PAGE + 5, seed=4)
    with Store.create(folder, identity={}, engine=posix) as store:
        store.allocate([ExtentSpec("w", data.size, 2, piece)])
        write(store, posix, "w", 1, data)
        store.commit(step=1, slots={"w": 1}, checksums={}, state={})
        extent = store.extent("w")
    _, manifest = _body(folder / "manifest.json")
    raw = data.tobytes()
    packed = b"".join(
        struct.pack("<Q", xxhash.xxh3_64_intdigest(raw[begin : begin + piece])) for begin in range(0, data.size, piece)
    )
    manifest |= {"version": 1, "checksums": {"w": "xxh3-pieces:" + xxhash.xxh3_64_hexdigest(packed)}}
    _put_body(folder / "manifest.json", manifest)
    with Store.open(folder, engine=posix) as store:
        assert store.verify() == []
        with open(extent.path, "r+b") as file:
            file.seek(extent.offset_bytes + 3 * PAGE)
            file.write(b"\xff")
        assert f"bytes 0 to {data.size}" in store.verify()[0]


def test_a_layout_of_a_later_version_is_refused(tmp_path: Path, posix: PosixEngine) -> None:
    folder = tmp_path / "s"
    _committed_store(folder, posix, num_bytes=PAGE)
    _, layout = _body(folder / "layout-1.json")
    _, manifest = _body(folder / "manifest.json")
    manifest["layout"]["checksum"] = _put_body(folder / "layout-1.json", layout | {"version": 3})
    _put_body(folder / "manifest.json", manifest)
    with pytest.raises(StoreError, match="format version 3, this program reads versions 1 to 2"):
        Store.open(folder, engine=posix)


def test_prewriting_goes_through_the_engine(tmp_path: Path, engine: Engine) -> None:
    with Store.create(tmp_path / "s", identity={}, engine=engine) as store:
        store.allocate([ExtentSpec("big", 19 * MIB, 2)])
        assert engine.bytes_written == store.size_bytes
        store.allocate([ExtentSpec("lazy", MIB, 2)], prewrite=False)
        assert engine.bytes_written == store.size_bytes - 2 * MIB
        assert not read(store, engine, "lazy", slot=1).any()


def test_pool_buffers_and_parts_of_extents_work_with_a_store(tmp_path: Path, posix: PosixEngine) -> None:
    pool = BufferPool(8 * MIB, name="test")
    with Store.create(tmp_path / "s", identity={}, engine=posix) as store, pool.acquire(3 * MIB) as buffer:
        store.allocate([ExtentSpec("w", 3 * MIB, 2, piece_bytes=MIB)])
        buffer.array[:] = pattern(buffer.num_bytes, seed=1)[: buffer.num_bytes]
        extent = store.extent("w", 1)
        assert isinstance(extent, Extent)
        for begin in range(0, 3 * MIB, MIB):
            posix.write(extent.sub(begin, MIB), buffer.array[begin : begin + MIB]).wait()
        digests = [piece_digest(buffer.array[begin : begin + MIB]) for begin in range(0, 3 * MIB, MIB)]
        store.commit(step=1, slots={"w": 1}, checksums={"w": combine_checksums(digests)}, state={})
        assert store.verify() == []
    pool.close()
