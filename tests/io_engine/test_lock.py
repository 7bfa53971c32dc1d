"""A store belongs to one process, and to nobody once that process is dead."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from io_engine import ExtentSpec, PosixEngine, Store, StoreCorruptError, StoreError, StoreLockedError
from tests.io_engine.test_store_crash import run_child

OPEN = """
    import sys
    from io_engine import PosixEngine, Store, StoreLockedError
    try:
        store = Store.open(sys.argv[1], engine=PosixEngine(1))
    except StoreLockedError as error:
        print("locked:", error)
    else:
        print("open", flush=True)
        sys.stdin.read()
"""


def test_the_same_process_cannot_open_it_twice(tmp_path: Path) -> None:
    with PosixEngine(1) as engine:
        with Store.create(tmp_path / "s", identity={}, engine=engine):
            for _ in range(2):  # also after a refusal, which must not have dropped the lock
                with pytest.raises(StoreLockedError, match=f"already open in this process \\({os.getpid()}\\)"):
                    Store.open(tmp_path / "s", engine=engine)
            (tmp_path / "link").symlink_to(tmp_path / "s")
            with pytest.raises(StoreLockedError):
                Store.open(tmp_path / "link", engine=engine)
            child = run_child(OPEN, str(tmp_path / "s"))
            assert child.communicate(timeout=60)[0].startswith("locked:")
        Store.open(tmp_path / "s", engine=engine).close()


def test_another_process_is_told_who_has_it(tmp_path: Path) -> None:
    with PosixEngine(1) as engine:
        Store.create(tmp_path / "s", identity={}, engine=engine).close()
        child = run_child(OPEN, str(tmp_path / "s"))
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        with pytest.raises(
            StoreLockedError,
            match=f"the store in {tmp_path / 's'} is in use by process {child.pid}; .*use another directory",
        ):
            Store.open(tmp_path / "s", engine=engine)
        assert Store.peek(tmp_path / "s").step == -1  # looking needs no lock
        child.communicate("")
        Store.open(tmp_path / "s", engine=engine).close()


def test_children_of_a_dead_process_do_not_hold_it(tmp_path: Path) -> None:
    child = run_child(
        """
        import os, sys
        from io_engine import PosixEngine, Store
        store = Store.create(sys.argv[1], identity={}, engine=PosixEngine(1))
        worker = os.fork()
        if worker == 0:
            import time
            os.close(1)
            time.sleep(600)
        print(worker, flush=True)
        sys.stdin.read()
        """,
        str(tmp_path / "s"),
    )
    assert child.stdout is not None
    worker = int(child.stdout.readline())
    try:
        with PosixEngine(1) as engine:
            with pytest.raises(StoreLockedError, match=str(child.pid)):
                Store.open(tmp_path / "s", engine=engine)
            child.kill()
            child.communicate()
            os.kill(worker, 0)  # the worker is alive, with the lock file's descriptor
            Store.open(tmp_path / "s", engine=engine).close()
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # forking beside threads is the point here
def test_a_forked_child_neither_uses_nor_releases_it(tmp_path: Path) -> None:
    with PosixEngine(1) as engine:
        store = Store.create(tmp_path / "s", identity={}, engine=engine)
        store.allocate([ExtentSpec("w", 4096)])
        store.scratch("x", 4096)
        process_id = os.fork()
        if process_id == 0:
            code = 1
            try:
                store.commit(step=1, slots={}, checksums={}, state={})
            except RuntimeError as error:
                store.close()
                code = 0 if "forked child" in str(error) else 2
            finally:
                os._exit(code)
        _, status = os.waitpid(process_id, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert (tmp_path / "s" / "scratch-0.bin").exists()
        child = run_child(OPEN, str(tmp_path / "s"))
        assert child.communicate(timeout=60)[0].startswith("locked:")
        store.close()


def test_a_deleted_store_is_not_locked_by_its_ghost(tmp_path: Path) -> None:
    with PosixEngine(1) as engine:
        store = Store.create(tmp_path / "s", identity={}, engine=engine)
        store.delete()
        with Store.create(tmp_path / "s", identity={}, engine=engine) as again:
            child = run_child(OPEN, str(tmp_path / "s"))
            assert child.communicate(timeout=60)[0].startswith("locked:")
            assert again.uuid != store.uuid


READ = OPEN.replace("engine=PosixEngine(1))", "engine=PosixEngine(1), read_only=True)")


def test_readers_share_it_and_keep_writers_out(tmp_path: Path) -> None:
    """Two here and one in another process; the lock lasts until the last of them has gone."""
    store = str(tmp_path / "s")
    with PosixEngine(1) as engine:
        with Store.create(store, identity={}, engine=engine):
            with pytest.raises(StoreLockedError, match="already open in this process"):
                Store.open(store, engine=engine, read_only=True)
            child = run_child(READ, store)
            assert f"in use by process {os.getpid()}" in child.communicate(timeout=60)[0]
        first = Store.open(store, engine=engine, read_only=True)
        second = Store.open(store, engine=engine, read_only=True)
        child = run_child(READ, store)
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        first.close()
        writer = run_child(OPEN, store)
        assert "the base of a run that is under way" in writer.communicate(timeout=60)[0]
        with pytest.raises(StoreLockedError, match="already open in this process"):
            Store.open(store, engine=engine)
        second.close()
        with pytest.raises(StoreLockedError, match="the base of a run that is under way"):
            Store.open(store, engine=engine)
        child.communicate("")
        Store.open(store, engine=engine).close()


def test_what_is_open_for_reading_cannot_be_changed(tmp_path: Path) -> None:
    """Nor is anything tidied up at opening, which another reader may be in the middle of."""
    with PosixEngine(1) as engine:
        with Store.create(tmp_path / "s", identity={}, engine=engine) as store:
            store.allocate([ExtentSpec("w", 4096)])
        leftover = tmp_path / "s" / "extents-99.bin"
        leftover.write_bytes(b"")
        before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
        with Store.open(tmp_path / "s", engine=engine, read_only=True) as store:
            assert store.extent("w").num_bytes == 4096
            for change in (
                lambda: store.allocate([ExtentSpec("v", 4096)]),
                lambda: store.commit(step=1, slots={}, checksums={}, state={}),
                lambda: store.checkpoint("now"),
                lambda: store.restore("now"),
                lambda: store.remove_checkpoint("now"),
                lambda: store.scratch("x", 4096),
                store.delete,
            ):
                with pytest.raises(StoreError, match="open for reading only"):
                    change()
            assert store.verify() == []
        assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == before
        (tmp_path / "s" / "manifest.json").write_bytes(b"torn")
        with pytest.raises(StoreCorruptError, match="fuyou verify"):
            Store.open(tmp_path / "s", engine=engine, read_only=True)
