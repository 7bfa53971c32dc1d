"""What `Store.peek` says of files is what `Store.open` then does with them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from io_engine import ExtentSpec, PosixEngine, Store, StoreSnapshot

PAGE = 4096


def purposes(snapshot: StoreSnapshot) -> dict[str, str]:
    return {os.path.relpath(file.path, snapshot.directories[0]): file.purpose for file in snapshot.files}


def test_every_file_is_explained_and_leftovers_go(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    with PosixEngine(1) as engine:
        with Store.create(folders, identity={}, engine=engine) as store:
            store.allocate([ExtentSpec("x/weight", PAGE)])
            store.allocate([ExtentSpec("x/state", PAGE, 2)])
            store.commit(step=1, slots={}, checksums={}, state={})
            made = store.checkpoint("good")
            store.commit(step=2, slots={}, checksums={}, state={})
            store.scratch("s", PAGE)
            during = purposes(Store.peek(folders))
        assert "spilled gradients" in during["scratch-0.bin"]
        # As crashes leave them.
        a = tmp_path / "a"
        for name in ("extents-9.bin", "manifest.json.tmp", "checkpoint-8.bin", "../b/scratch-1.bin", "notes.txt"):
            (a / name).write_bytes(b"?" * 7)
        shutil.copy(a / f"checkpoint-{made.number}.json", a / "checkpoint-7.json")
        before = Store.peek(folders)
        found = purposes(before)
        listed = {f"{folder.name}/{name}" for folder in folders for name in os.listdir(folder)}
        assert {os.path.normpath(f"a/{name}") for name in found} == listed
        assert {file.num_bytes for file in before.files if "notes" in file.path} == {7}
        with Store.open(folders, engine=engine):
            left = {name for name in found if (a / name).exists()}
    gone = {name for name in found if "next opening removes" in found[name]}
    assert gone == {"extents-9.bin", "manifest.json.tmp", "checkpoint-8.bin", "../b/scratch-1.bin", "layout-1.json"}
    assert set(found) - left == gone
    assert found["notes.txt"].startswith("none of the store's")
    assert "step 2" in found["manifest.json"]
    assert found[f"checkpoint-{made.number}.json"] == "says what is in checkpoint good, step 1"
    assert "cannot be read" in found["checkpoint-7.json"]  # it calls itself by another number
    data = [found[name] for name in sorted(found) if "extents-" in name and "9" not in name]
    assert set(data) == {"holds slots of 1 extent (state)", "holds slots of 1 extent (weight)"}


def test_damage_names_what_lies_there(tmp_path: Path) -> None:
    """In the words of whoever knows what the extents mean."""
    with PosixEngine(1) as engine, Store.create([tmp_path / "s"], identity={}, engine=engine) as store:
        store.allocate([ExtentSpec("x", 3 * PAGE, piece_bytes=PAGE)])
        store.commit(step=1, slots={}, checksums={"x": "xxh3-list:" + 48 * "0"}, state={})
        store.contents = lambda name, begin_bytes, num_bytes: [f"{name} at {begin_bytes}, {num_bytes} bytes"]
        assert [", of x at 4096, 4096 bytes, are not" in problem for problem in store.verify()] == [False, True, False]
