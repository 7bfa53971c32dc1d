"""Temporary folders: gone at the end, and with the next one if their process was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuyou.temporary import PREFIX, remove_abandoned, temporary_folder

_PROGRAM = """
import os, sys
from pathlib import Path
from fuyou.temporary import temporary_folder
with temporary_folder(Path(sys.argv[1])) as folder:
    (folder / "part").mkdir()
    (folder / "part" / "weights.bin").write_bytes(bytes(9))
    print(folder.parent, flush=True)
    sys.stdin.readline()
    os._exit(130)  # as a second Ctrl-C does
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process with a temporary folder in `tmp_path`, which ends at the first line that it is sent; and the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    yield process, Path(process.stdout.readline().strip())
    process.kill()
    process.communicate()


def test_it_is_gone_at_the_end(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), temporary_folder(tmp_path) as folder:
        assert not list(folder.iterdir())
        (folder / "weights.bin").touch()
        assert [path.name.startswith(PREFIX) for path in tmp_path.iterdir()] == [True]
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_that_of_a_killed_process_goes_with_the_next(other: tuple[subprocess.Popen[str], Path], tmp_path: Path) -> None:
    """Not while it lives, and those of this process stay."""
    process, left = other
    with temporary_folder(tmp_path) as ours:
        assert (left / "contents" / "part" / "weights.bin").is_file()
        process.communicate("end\n")
        assert left.is_dir()
        with temporary_folder(tmp_path) as second:
            assert {path.name for path in tmp_path.iterdir()} == {ours.parent.name, second.parent.name}
        assert ours.is_dir()


def test_a_removal_that_was_cut_short_is_taken_up(tmp_path: Path) -> None:
    """The mark is what goes last."""
    abandoned = tmp_path / f"{PREFIX}x"
    abandoned.mkdir()
    (abandoned / "owner").touch()
    remove_abandoned(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_we_did_not_make_stays(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    for name, files in (("a", ["notes.txt"]), ("b", ["owner", "notes.txt"]), ("c", []), ("d", ["owner.new"])):
        folder = tmp_path / f"{PREFIX}{name}"
        folder.mkdir()
        for file in files:
            (folder / file).touch()
    mine.mkdir()
    (mine / "owner").touch()
    (tmp_path / f"{PREFIX}link").symlink_to(mine)
    (tmp_path / f"{PREFIX}file").touch()
    (tmp_path / f"{PREFIX}e").mkdir()
    (tmp_path / f"{PREFIX}e" / "owner").symlink_to(mine / "owner")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "owner").touch()
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    remove_abandoned(tmp_path)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
