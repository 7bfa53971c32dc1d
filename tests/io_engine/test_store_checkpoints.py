"""Checkpoints: whole copies or nothing, restored by a commit; and reads that are checked the first time."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import io_engine.checkpoints
from io_engine import (
    Engine,
    ExtentSpec,
    MockEngine,
    PosixEngine,
    Store,
    StoreCorruptError,
    StoreError,
    VerifyingEngine,
    checksum,
    combine_checksums,
    piece_digest,
)
from tests.io_engine.helpers import PAGE, aligned, pattern
from tests.io_engine.test_store_crash import Crash, broken

MIB = 1 << 20
SIZES = {"frozen": 5 * PAGE + 3, "a/weight": 3 * PAGE, "a/state": 9 * MIB + 100}
PIECES = {"frozen": 2 * PAGE, "a/weight": 0, "a/state": MIB}


def content(name: str, step: int) -> np.ndarray:
    """What an extent holds at a step."""
    return pattern(SIZES[name], seed=1000 * step * (name != "frozen") + len(name))


def put(store: Store, engine: Engine, name: str, slot: int, data: np.ndarray) -> str:
    extent = store.extent(name, slot)
    array = aligned(extent.num_bytes)
    array[: data.size] = data
    engine.write(extent, array).wait()
    size = PIECES[name] or SIZES[name]
    return combine_checksums([piece_digest(data[at : at + size]) for at in range(0, data.size, size)])


def get(store: Store, engine: Engine, name: str) -> bytes:
    extent = store.extent(name)
    array = aligned(extent.num_bytes)
    engine.read(extent, array).wait()
    return array.tobytes()[: SIZES[name]]


def take_step(store: Store, engine: Engine) -> None:
    step = store.step + 1
    names = ["a/weight", "a/state"]
    slots = {name: store.inactive_slot(name) for name in names}
    sums = {name: put(store, engine, name, slots[name], content(name, step)) for name in names}
    store.commit(step=step, slots=slots, checksums=sums, state={"at": step})


def make(folders: list[Path], engine: Engine) -> Store:
    """A store at step 1."""
    store = Store.create(folders, identity={}, engine=engine)
    specs = [ExtentSpec(name, size, 1 if name == "frozen" else 2, PIECES[name]) for name, size in SIZES.items()]
    store.allocate(specs, description={"about": "a test"}, prewrite=False)
    sums = {name: put(store, engine, name, 0, content(name, 0)) for name in SIZES}
    store.commit(step=0, slots={}, checksums=sums, state={"at": 0})
    take_step(store, engine)
    return store


def assert_at(store: Store, engine: Engine, step: int) -> None:
    assert (store.step, store.state) == (step, {"at": step})
    for name in SIZES:
        assert get(store, engine, name) == content(name, step).tobytes(), name
    assert store.verify() == []


@pytest.fixture(params=["posix", "mock", "two directories"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Directories and an engine."""
    folders = [tmp_path / "0", tmp_path / "1"] if request.param == "two directories" else [tmp_path / "0"]
    with MockEngine() if request.param == "mock" else PosixEngine(2) as engine:
        yield folders, engine


def test_restored_is_what_was_kept(place: Any) -> None:
    """At once, after further steps, and after opening the store again."""
    folders, engine = place
    with make(folders, engine) as store:
        assert store.checkpoint_bytes == sum(-(-size // PAGE) * PAGE for size in SIZES.values())
        made = store.checkpoint("one")
        assert (made.name, made.step, made.num_bytes) == ("one", 1, store.checkpoint_bytes)
        for _ in range(3):
            take_step(store, engine)
        store.checkpoint("four")
        take_step(store, engine)
        assert store.restore("one").step == 1
        assert_at(store, engine, 1)
        take_step(store, engine)
        assert_at(store, engine, 2)
    assert [c.name for c in Store.peek(folders).checkpoints] == ["one", "four"]
    with Store.open(folders, engine=engine) as store:
        assert store.notes == []
        assert_at(store, engine, 2)
        store.restore("four")
        assert_at(store, engine, 4)
    with Store.open(folders, engine=engine) as store:
        assert_at(store, engine, 4)


def test_replacing_and_removing(place: Any) -> None:
    folders, engine = place
    with make(folders, engine) as store:
        before = {folder: sorted(os.listdir(folder)) for folder in folders}
        store.checkpoint("x")
        take_step(store, engine)
        store.checkpoint("x")
        assert [(c.name, c.step) for c in store.checkpoints] == [("x", 2)]
        with pytest.raises(StoreError, match="no checkpoint 'y'; it has x"):
            store.remove_checkpoint("y")
        store.remove_checkpoint("x")
        assert store.checkpoints == ()
        assert {folder: sorted(os.listdir(folder)) for folder in folders} == before
        store.checkpoint("last")
        store.delete()
    for folder in folders:
        assert os.listdir(folder) == []


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 65, "sp ace"])
def test_names_that_are_refused(name: str, tmp_path: Path) -> None:
    with MockEngine() as engine, make([tmp_path], engine) as store:
        with pytest.raises(ValueError, match="letters, digits"):
            store.checkpoint(name)
        assert store.checkpoints == ()


def test_extents_made_later_are_zeros_again(place: Any) -> None:
    folders, engine = place
    with make(folders, engine) as store:
        store.checkpoint("before")
        store.allocate([ExtentSpec("late", 2 * MIB, 2)])
        extent = store.extent("late", 1)
        engine.write(extent, aligned(extent.num_bytes, pattern(extent.num_bytes, seed=1))).wait()
        sums = {"late": checksum(pattern(extent.num_bytes, seed=1))}
        store.commit(step=2, slots={"late": 1}, checksums=sums, state={"at": 2})
        engine.write(store.extent("late", 0), aligned(extent.num_bytes, pattern(extent.num_bytes, seed=2))).wait()
        store.restore("before")
        assert_at(store, engine, 1)
        array = aligned(extent.num_bytes)
        engine.read(store.extent("late"), array).wait()
        assert not array.any()
        assert "late" not in store.checksums


def test_a_damaged_extent_with_one_slot_is_repaired(tmp_path: Path) -> None:
    with PosixEngine(1) as engine, make([tmp_path / "s"], engine) as store:
        store.checkpoint("good")
        flip(store, "frozen", 3)
        assert len(store.verify()) == 1
        store.restore("good")
        assert_at(store, engine, 1)


def flip(store: Store, name: str, position: int) -> None:
    extent = store.extent(name)
    with open(extent.path, "r+b") as file:
        file.seek(extent.offset_bytes + position)
        byte = file.read(1)[0]
        file.seek(extent.offset_bytes + position)
        file.write(bytes([byte ^ 4]))


def test_damage_is_neither_kept_nor_restored(tmp_path: Path) -> None:
    with PosixEngine(1) as engine, make([tmp_path / "s"], engine) as store:
        kept = store.checkpoint("good")
        flip(store, "a/state", 2 * MIB + 5)
        files = sorted(os.listdir(tmp_path / "s"))
        with pytest.raises(
            StoreCorruptError, match=r"'a/state' is damaged: its bytes 2097152 to 3145728 .*Go back to .*good"
        ):
            store.checkpoint("bad")
        assert sorted(os.listdir(tmp_path / "s")) == files
        with open(tmp_path / "s" / f"checkpoint-{kept.number}.bin", "r+b") as file:
            file.seek(7 * PAGE)
            file.write(b"?????")
        take_step(store, engine)
        before = Store.peek(tmp_path / "s")
        with pytest.raises(StoreCorruptError, match="'good' cannot be restored"):
            store.restore("good")
        assert Store.peek(tmp_path / "s") == before
        assert_at(store, engine, 2)


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MockEngine() as engine, make([tmp_path], engine) as store:
        files = sorted(os.listdir(tmp_path))
        monkeypatch.setattr("io_engine.space.free_bytes", lambda _: MIB)
        with pytest.raises(OSError, match="the checkpoint 'big' needs") as caught:
            store.checkpoint("big")
        assert caught.value.errno == errno.ENOSPC
        assert sorted(os.listdir(tmp_path)) == files


def test_sharing_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system can; here it is played by a copy, range by range."""
    shared: list[tuple[str, int]] = []

    def share(source: str, from_bytes: int, target: str, to_bytes: int, num_bytes: int) -> bool:
        if target.startswith(str(tmp_path / "1")):
            return False
        with open(source, "rb") as a, open(target, "r+b") as b:
            a.seek(from_bytes)
            b.seek(to_bytes)
            b.write(a.read(num_bytes))
        shared.append((target, num_bytes))
        return True

    monkeypatch.setattr(io_engine.checkpoints, "clone_range", share)
    folders = [tmp_path / "0", tmp_path / "1"]
    with PosixEngine(2) as engine, make(folders, engine) as store:
        made = store.checkpoint("x")
        assert sum(num_bytes for _, num_bytes in shared) <= made.num_bytes
        assert shared
        take_step(store, engine)
        store.restore("x")
        assert_at(store, engine, 1)


def test_cloning_where_it_is_not_possible_says_so(tmp_path: Path) -> None:
    from io_engine.files import clone_range

    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(PAGE))
    done = clone_range(str(tmp_path / "a"), 0, str(tmp_path / "b"), 0, PAGE)
    assert done in (True, False)
    assert (tmp_path / "b").read_bytes() == bytes(PAGE)
    assert not clone_range(str(tmp_path / "a"), 0, "/dev/null", 0, PAGE)
    with pytest.raises(FileNotFoundError):
        clone_range(str(tmp_path / "missing"), 0, str(tmp_path / "b"), 0, PAGE)


def _keep(store: Store, engine: Engine) -> None:
    store.checkpoint("new")


def _replace(store: Store, engine: Engine) -> None:
    store.checkpoint("old")


def _restore(store: Store, engine: Engine) -> None:
    store.restore("old")


@pytest.mark.parametrize(
    "action", [pytest.param(_keep, marks=pytest.mark.slow), _replace, pytest.param(_restore, marks=pytest.mark.slow)]
)
def test_a_crash_at_any_point(tmp_path: Path, action: Callable[[Store, Engine], None]) -> None:
    """The store opens before or after it, checkpoints are whole, and nothing is left over."""

    def prepared(folder: Path, engine: MockEngine) -> Store:
        store = make([folder], engine)
        store.checkpoint("old")
        take_step(store, engine)
        return store

    with MockEngine() as engine, prepared(tmp_path / "n", engine) as store, broken(engine, None, crash=False) as faults:
        action(store, engine)
    for at in range(faults.num_calls):
        engine = MockEngine()
        store = prepared(tmp_path / str(at), engine)
        with broken(engine, at, crash=True), pytest.raises(Crash):
            action(store, engine)
        store._lock_file.release()
        engine.lose_unsynced()
        with Store.open(tmp_path / str(at), engine=engine) as store:
            assert_at(store, engine, store.step)
            assert store.step in ((1, 2) if action is _restore else (2,))
            numbers = {str(checkpoint.number) for checkpoint in store.checkpoints}
            found = {
                name.split("-")[1].split(".")[0] for name in os.listdir(tmp_path / str(at)) if "checkpoint-" in name
            }
            assert found == numbers
            assert "old" in [checkpoint.name for checkpoint in store.checkpoints]
            for checkpoint in store.checkpoints:
                store.restore(checkpoint.name)
                assert_at(store, engine, checkpoint.step)


def test_a_failure_at_any_point_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    for action in (_keep, _restore):
        folder = tmp_path / action.__name__
        with MockEngine() as engine, make([folder], engine) as store:
            store.checkpoint("old")
            take_step(store, engine)
            with broken(engine, None, crash=False) as faults:
                action(store, engine)
        for at in range(faults.num_calls):
            engine = MockEngine()
            with make([folder / str(at)], engine) as store:
                store.checkpoint("old")
                take_step(store, engine)
                before = Store.peek(store.directories)
                with broken(engine, at, crash=False), pytest.raises(OSError, match="Input/output error"):
                    action(store, engine)
                assert Store.peek(store.directories) == before
                assert_at(store, engine, 2)
                action(store, engine)


def test_an_unreadable_checkpoint_is_told_and_left(tmp_path: Path) -> None:
    with PosixEngine(1) as engine:
        with make([tmp_path / "s"], engine) as store:
            made = store.checkpoint("x")
        path = tmp_path / "s" / f"checkpoint-{made.number}.json"
        path.write_bytes(path.read_bytes()[:-30])
        files = sorted(os.listdir(tmp_path / "s"))
        with Store.open(tmp_path / "s", engine=engine) as store:
            assert "not usable" in store.notes[0]
            assert store.checkpoints == ()
        assert sorted(os.listdir(tmp_path / "s")) == files
        assert "not usable" in Store.peek(tmp_path / "s").notes[0]


def test_files_and_directories_are_their_owners(tmp_path: Path) -> None:
    with PosixEngine(1) as engine, make([tmp_path / "new" / "s"], engine) as store:
        store.checkpoint("x")
        store.scratch("y", PAGE)
        for path in (tmp_path / "new").rglob("*"):
            wanted = 0o700 if path.is_dir() else 0o600
            assert stat.S_IMODE(path.stat().st_mode) == wanted, path


# ---- reads that are checked the first time


@pytest.mark.parametrize("name", list(SIZES))
def test_a_flipped_bit_does_not_arrive(place: Any, name: str) -> None:
    folders, engine = place
    with make(folders, engine) as store:
        position = SIZES[name] - 1
        if isinstance(engine, MockEngine):
            extent = store.extent(name)
            engine.files[extent.path][extent.offset_bytes + position] ^= 1
        else:
            segment = store.extent(name).sub(position // PAGE * PAGE, PAGE)
            with open(segment.path, "r+b") as file:
                file.seek(segment.offset_bytes + position % PAGE)
                byte = file.read(1)[0]
                file.seek(segment.offset_bytes + position % PAGE)
                file.write(bytes([byte ^ 1]))
        checking = VerifyingEngine(engine, store)
        for other in SIZES:
            if other != name:
                assert get(store, checking, other) == content(other, 1).tobytes()  # type: ignore[arg-type]
        size = PIECES[name] or SIZES[name]
        with pytest.raises(StoreCorruptError) as caught:
            get(store, checking, name)  # type: ignore[arg-type]
        assert f"{name!r} is damaged: its bytes {position // size * size} to {SIZES[name]} " in str(caught.value)
        assert "restore the store's files from a backup" in str(caught.value)
        assert store.extent(name).path in str(caught.value)


def test_pieces_are_checked_once_and_only_as_a_whole(tmp_path: Path) -> None:
    with PosixEngine(1) as engine, make([tmp_path], engine) as store:
        checking: Any = VerifyingEngine(engine, store)
        flip(store, "a/state", MIB + 1)
        extent = store.extent("a/state")
        assert not checking.read(extent.sub(0, PAGE), aligned(PAGE)).wait()  # a part of a piece
        assert not checking.read(extent.sub(MIB, PAGE), aligned(PAGE)).wait()
        checking.read(extent.sub(0, MIB), aligned(MIB)).wait()
        with pytest.raises(StoreCorruptError, match=f"bytes {MIB} to {2 * MIB} "):
            checking.read(extent.sub(0, 3 * MIB), aligned(3 * MIB)).wait()
        with pytest.raises(StoreCorruptError, match=f"bytes {MIB} to {2 * MIB} "):
            checking.read(extent.sub(MIB, MIB), aligned(MIB)).wait()  # and so at the next attempt
        checking.write(extent.sub(MIB, MIB), aligned(MIB, np.zeros(MIB, np.uint8))).wait()
        checking.read(extent.sub(MIB, MIB), aligned(MIB)).wait()  # what was written since is not as committed
        flip(store, "a/state", 7)
        checking.read(extent.sub(0, MIB), aligned(MIB)).wait()  # the second time
        get(store, checking, "a/weight")
        assert checking.bytes_read == engine.bytes_read


def test_failed_reads_stay_what_they_are(tmp_path: Path) -> None:
    with MockEngine() as engine, make([tmp_path], engine) as store:
        checking: Any = VerifyingEngine(engine, store)
        engine.fail_next("read", "extents-1", OSError(errno.EIO, "Input/output error"))
        with pytest.raises(OSError, match="Input/output error"):
            get(store, checking, "a/weight")
        assert get(store, checking, "a/weight") == content("a/weight", 1).tobytes()
