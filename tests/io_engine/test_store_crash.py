"""A crash, and a failure, at every single point of create, allocate and commit.

The points are all calls that change something on disk. A crash is simulated by a `BaseException` after which
every further such call raises too, so that no clean-up code runs, like after kill -9; with the mock engine
the power fails also: data that were not synced vanish. Real kills of real processes are at the end.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from io_engine import ExtentSpec, MockEngine, PosixEngine, Store, StoreCorruptError, StoreError, checksum
from tests.io_engine.helpers import PAGE, aligned, pattern

OLD, NEW = pattern(PAGE, seed=1), pattern(PAGE, seed=2)
REPOSITORY = Path(__file__).parents[2]


class Crash(BaseException):
    """The process dies here."""


class Faults:
    """Counts the calls that change the disk and breaks the one numbered `at`."""

    def __init__(self, at: int | None, *, crash: bool) -> None:
        self.at = at
        self.crash = crash
        self.num_calls = 0
        self.dead = False
        self.log: list[str] = []

    def wrap(self, name: str, real: Callable[..., Any], counts: Callable[..., bool]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not counts(*args, **kwargs):
                return real(*args, **kwargs)
            if self.dead:
                raise Crash
            self.num_calls += 1
            self.log.append(name)
            if self.num_calls - 1 == self.at:
                if self.crash:
                    self.dead = True
                    raise Crash
                raise OSError(errno.EIO, os.strerror(errno.EIO), name)
            return real(*args, **kwargs)

        return call


@contextmanager
def broken(engine: Any, at: int | None, *, crash: bool) -> Iterator[Faults]:
    """Let the disk break at call number `at`; None only counts."""
    faults = Faults(at, crash=crash)

    def always(*args: Any, **kwargs: Any) -> bool:
        return True

    def creates(path: Any, flags: int, *args: Any, **kwargs: Any) -> bool:
        return bool(flags & os.O_CREAT)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "unlink", "link", "fsync", "write"):
            patch.setattr(os, name, faults.wrap(name, getattr(os, name), always))
        patch.setattr(os, "open", faults.wrap("open", os.open, creates))
        for name in ("write", "sync", "preallocate", "remove"):
            patch.setattr(engine, name, faults.wrap(f"engine.{name}", getattr(engine, name), always))
        yield faults


def write(store: Store, engine: MockEngine, name: str, slot: int, data: np.ndarray) -> str:
    engine.write(store.extent(name, slot), aligned(PAGE, data)).wait()
    return checksum(data)


def content(store: Store, engine: MockEngine, name: str) -> bytes:
    array = aligned(PAGE)
    engine.read(store.extent(name), array).wait()
    return array.tobytes()


def die(store: Store | None, engine: MockEngine, *, power_loss: bool) -> None:
    """End the process that had the store: its lock goes, and with the power the unsynced data."""
    if store is not None:
        store._lock_file.release()
    if power_loss:
        engine.lose_unsynced()


def make(folder: Path, engine: MockEngine) -> Store:
    """A store at step 1, whose extents "a" and "b" hold OLD in slot 0."""
    store = Store.create([folder / "0", folder / "1"], identity={"test": True}, engine=engine)
    store.allocate([ExtentSpec("a", PAGE, 2), ExtentSpec("b", PAGE, 2), ExtentSpec("single", PAGE)])
    sums = {name: write(store, engine, name, 0, OLD) for name in ("a", "b")}
    store.commit(step=1, slots={}, checksums=sums, state={"step": 1})
    return store


def reopen(folder: Path, engine: MockEngine) -> Store:
    return Store.open([folder / "0", folder / "1"], engine=engine)


def step_two(store: Store, engine: MockEngine) -> None:
    sums = {name: write(store, engine, name, store.inactive_slot(name), NEW) for name in ("a", "b")}
    slots = {name: store.inactive_slot(name) for name in ("a", "b")}
    store.commit(step=2, slots=slots, checksums=sums, state={"step": 2})


def widen(store: Store, engine: MockEngine) -> None:
    store.allocate([ExtentSpec("c", 3 * PAGE, 2)], description={"wide": 1}, second_slots_for=["single"])


def own_files(folder: Path) -> dict[str, list[str]]:
    return {name: sorted(os.listdir(folder / name)) for name in ("0", "1")}


def count_points(folder: Path, action: Callable[[Store, MockEngine], None]) -> int:
    with MockEngine() as engine, make(folder, engine) as store, broken(engine, None, crash=False) as faults:
        action(store, engine)
        num_points = faults.num_calls
        assert {"replace", "fsync", "link", "engine.sync", "engine.write"} <= set(faults.log)
    return num_points


@pytest.mark.parametrize("power_loss", [False, True], ids=["kill", "power loss"])
def test_a_crash_at_any_point_of_a_commit(tmp_path: Path, power_loss: bool) -> None:
    num_points = count_points(tmp_path / "count", step_two)
    assert num_points >= 9
    outcomes = []
    for at in range(num_points):
        folder, engine = tmp_path / str(at), MockEngine()
        store = make(folder, engine)
        with broken(engine, at, crash=True) as faults, pytest.raises(Crash):
            step_two(store, engine)
        assert faults.dead
        die(store, engine, power_loss=power_loss)
        with reopen(folder, engine) as store:
            outcomes.append(store.step)
            wanted = {1: OLD, 2: NEW}[store.step]
            assert store.state == {"step": store.step}
            assert [content(store, engine, name) for name in ("a", "b")] == [wanted.tobytes()] * 2
            assert store.verify() == []
            assert not [note for note in store.notes if "fell back" in note]
            step_two(store, engine)  # and it goes on
            assert store.step == 2
    assert outcomes == sorted(outcomes)  # before some point step 1, after it step 2
    assert outcomes[0] == 1


@pytest.mark.parametrize("power_loss", [False, True], ids=["kill", "power loss"])
def test_a_crash_at_any_point_of_an_allocation(tmp_path: Path, power_loss: bool) -> None:
    num_points = count_points(tmp_path / "count", widen)
    outcomes = []
    for at in range(num_points):
        folder, engine = tmp_path / str(at), MockEngine()
        store = make(folder, engine)
        with broken(engine, at, crash=True), pytest.raises(Crash):
            widen(store, engine)
        die(store, engine, power_loss=power_loss)
        with reopen(folder, engine) as store:
            done = "c" in store.names()
            outcomes.append(done)
            assert store.num_slots("single") == 1 + done
            assert store.description == ({"wide": 1} if done else {})
            assert (store.step, store.state) == (1, {"step": 1})
            assert [content(store, engine, name) for name in ("a", "b")] == [OLD.tobytes()] * 2
            # The half-made files are gone: what lies there is what the layout names.
            bins = [name for names in own_files(folder).values() for name in names if name.endswith(".bin")]
            assert len(bins) == (4 if done else 2)
            if not done:
                widen(store, engine)
            assert engine.file_size(store.extent("c", 1).path) > 0
            step_two(store, engine)
        with reopen(folder, engine) as store:
            assert (store.step, store.notes, store.num_slots("c")) == (2, [], 2)
    assert outcomes == sorted(outcomes)
    assert not outcomes[0]


def test_a_crash_at_any_point_of_a_creation(tmp_path: Path) -> None:
    def create(folder: Path, engine: MockEngine) -> Store:
        return Store.create([folder / "0", folder / "1"], identity={"n": 1}, engine=engine)

    with MockEngine() as engine, broken(engine, None, crash=False) as faults:
        create(tmp_path / "count", engine).close()
    for at in range(faults.num_calls):
        folder, engine = tmp_path / str(at), MockEngine()
        with broken(engine, at, crash=True), pytest.raises(Crash):
            create(folder, engine).close()
        if Store.exists([folder / "0", folder / "1"]):
            reopen(folder, engine).close()
        else:
            with create(folder, engine) as store:  # over the leftovers of the first attempt
                store.allocate([ExtentSpec("w", PAGE)])
            reopen(folder, engine).close()


def test_a_failure_at_any_point_of_a_commit_changes_nothing(tmp_path: Path) -> None:
    for at in range(count_points(tmp_path / "count", step_two)):
        folder, engine = tmp_path / str(at), MockEngine()
        with make(folder, engine) as store:
            before = Store.peek(store.directories)
            with (
                broken(engine, at, crash=False),
                pytest.raises(OSError, match="Input/output error") as caught,
            ):
                step_two(store, engine)
            assert caught.value.errno == errno.EIO
            assert Store.peek(store.directories) == before
            assert (store.step, store.slots, store.state) == (1, {"a": 0, "b": 0, "single": 0}, {"step": 1})
            step_two(store, engine)  # the drive has recovered
            assert store.step == 2
        with reopen(folder, engine) as store:
            assert (store.step, store.verify()) == (2, [])


def test_a_failure_at_any_point_of_an_allocation_changes_nothing(tmp_path: Path) -> None:
    for at in range(count_points(tmp_path / "count", widen)):
        folder, engine = tmp_path / str(at), MockEngine()
        with make(folder, engine) as store:
            before, files_before = Store.peek(store.directories), own_files(folder)
            with broken(engine, at, crash=False), pytest.raises(OSError, match="Input/output error"):
                widen(store, engine)
            assert Store.peek(store.directories) == before
            assert (store.names(), store.num_slots("single")) == (["a", "b", "single"], 1)
            left = {name: set(names) - set(files_before[name]) for name, names in own_files(folder).items()}
            assert not any(name.endswith(".bin") for names in left.values() for name in names)
            widen(store, engine)
        with reopen(folder, engine) as store:
            assert (store.num_slots("c"), store.verify()) == (2, [])


def test_an_interrupt_after_the_manifest_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between the rename and the return: memory and disk must still agree, or the next step
    overwrites.
    """
    engine = MockEngine()
    with make(tmp_path, engine) as store:
        from io_engine.durable import replace_durably

        interrupted: list[str] = []

        def then_interrupt(path: str, data: bytes) -> None:
            replace_durably(path, data)
            if not interrupted:
                interrupted.append(path)
                raise KeyboardInterrupt

        monkeypatch.setattr("io_engine.store.replace_durably", then_interrupt)
        with pytest.raises(KeyboardInterrupt):
            step_two(store, engine)
        assert interrupted
        assert (store.step, store.slots["a"]) == (1, 0)
        assert Store.peek(store.directories).step == 1


def test_a_store_whose_disk_is_unknown_refuses_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rename succeeds, the sync of the folder fails, and so does every attempt to put the old manifest
    back.
    """
    engine = MockEngine()
    store = make(tmp_path, engine)
    with monkeypatch.context() as patch:
        import io_engine.durable as durable

        def fail(path: str) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

        patch.setattr(durable, "sync_directory", fail)
        with pytest.raises(OSError, match="Input/output error"):
            step_two(store, engine)
    with pytest.raises(StoreError, match="close it and open it again"):
        step_two(store, engine)
    store.close()
    with reopen(tmp_path, engine) as store:
        assert store.step in (1, 2)
        assert store.verify() == []


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "missing", "layout"])
def test_a_torn_manifest_falls_back_to_the_previous_one(tmp_path: Path, damage: str) -> None:
    engine = MockEngine()
    with make(tmp_path, engine) as store:
        step_two(store, engine)
        if damage == "layout":
            widen(store, engine)
    first = tmp_path / "0"
    path = first / ("manifest.json" if damage != "layout" else "layout-2.json")
    raw = path.read_bytes()
    flipped = raw[:60] + bytes([raw[60] ^ 1]) + raw[61:]
    path.unlink() if damage == "missing" else path.write_bytes(
        {"truncate": raw[:100], "flip": flipped, "empty": b"", "layout": flipped}[damage]
    )
    with reopen(tmp_path, engine) as store:
        assert store.step == (2 if damage == "layout" else 1)
        assert "fell back to manifest.previous.json" in store.notes[0]
        assert "all 2 extents with a checksum match that step; 1 have none" in store.notes[1]
        assert content(store, engine, "a") == (NEW if damage == "layout" else OLD).tobytes()
        step_two(store, engine)
    with reopen(tmp_path, engine) as store:
        assert (store.step, store.verify()) == (2, [])
        assert not [note for note in store.notes if "fell back" in note]


def test_a_fall_back_to_overwritten_data_is_refused(tmp_path: Path) -> None:
    engine = MockEngine()
    with make(tmp_path, engine) as store:
        step_two(store, engine)
        write(store, engine, "b", store.inactive_slot("b"), pattern(PAGE, seed=3))  # step 3 began
    path = tmp_path / "0" / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])
    before = own_files(tmp_path)
    with pytest.raises(StoreCorruptError, match="overwritten since: extent 'b'"):
        reopen(tmp_path, engine)
    assert own_files(tmp_path) == before


def test_without_any_usable_manifest_the_store_is_corrupt(tmp_path: Path) -> None:
    engine = MockEngine()
    make(tmp_path, engine).close()
    for name in ("manifest.json", "manifest.previous.json"):
        (tmp_path / "0" / name).write_bytes(b"{}")
    with pytest.raises(StoreCorruptError, match=r"manifest\.json.*is torn.*manifest\.previous\.json"):
        reopen(tmp_path, engine)
    assert Store.exists([tmp_path / "0", tmp_path / "1"])


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    engine = MockEngine()
    with make(tmp_path, engine) as store:
        step_two(store, engine)
    (tmp_path / "0" / "manifest.json").write_bytes(b"")
    with reopen(tmp_path, engine) as store:
        assert store.step == 1


# ---- real processes


def run_child(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a Python process on our packages; the test ends it."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


TRAIN = """
    import sys
    import numpy as np
    from io_engine import BufferPool, ExtentSpec, PosixEngine, Store, checksum
    engine, pool = PosixEngine(2), BufferPool(1 << 20, name="child")
    store = Store.create(sys.argv[1], identity={}, engine=engine)
    names = [f"w{i}" for i in range(8)]
    store.allocate([ExtentSpec(name, 4096 * 3, 2) for name in names])
    array = pool.acquire(4096 * 3).array
    step = 0
    while True:
        step += 1
        sums = {}
        for name in names:
            array[:] = step % 251
            engine.write(store.extent(name, store.inactive_slot(name)), array).wait()
            sums[name] = checksum(array)
        slots = {name: store.inactive_slot(name) for name in names}
        store.commit(step=step, slots=slots, checksums=sums, state={"step": step})
        print(step, flush=True)
"""


@pytest.mark.parametrize("num_steps", [1, 5, 9])
def test_kill_9_loses_no_committed_step(tmp_path: Path, num_steps: int) -> None:
    child = run_child(TRAIN, str(tmp_path / "s"))
    assert child.stdout is not None
    for _ in range(num_steps):
        child.stdout.readline()
    child.kill()
    reported = [num_steps, *map(int, child.communicate()[0].split())]
    with PosixEngine(1) as engine, Store.open(tmp_path / "s", engine=engine) as store:
        assert reported[-1] <= store.step <= reported[-1] + 1
        assert store.state == {"step": store.step}
        assert store.verify() == []
        for name in store.names():
            array = aligned(3 * PAGE)
            engine.read(store.extent(name), array).wait()
            assert (array == store.step % 251).all()


def test_kill_9_leaves_an_interrupted_allocation_behind(tmp_path: Path) -> None:
    child = run_child(
        """
        import os, signal, sys
        from io_engine import ExtentSpec, PosixEngine, Store
        engine = PosixEngine(1)
        store = Store.create(sys.argv[1], identity={}, engine=engine)
        store.allocate([ExtentSpec("w", 4096)])
        store.scratch("x", 4096)
        engine.sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        store.allocate([ExtentSpec("v", 1 << 20)])
        """,
        str(tmp_path / "s"),
    )
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert {"extents-2.bin", "scratch-0.bin"} <= set(os.listdir(tmp_path / "s"))
    with PosixEngine(1) as engine, Store.open(tmp_path / "s", engine=engine) as store:
        assert store.names() == ["w"]
        assert len(store.notes) == 2
        assert not {"extents-2.bin", "scratch-0.bin"} & set(os.listdir(tmp_path / "s"))
        store.allocate([ExtentSpec("v", 1 << 20)])
