"""How bytes are spread over directories, and that they come back."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from io_engine import BufferPool, Engine, Extent, ExtentSpec, MockEngine, PosixEngine, Store, checksum
from io_engine import striping as striping_module
from io_engine.space import Room
from io_engine.striping import STRIPE_BYTES, Striper
from tests.io_engine.helpers import PAGE, aligned, pattern

MIB = 1 << 20
PLENTY = 1 << 50


def _rooms(*num_bytes: int) -> list[Room]:
    return [Room(n) for n in num_bytes]


def test_small_ranges_stay_whole_and_big_ones_are_cut() -> None:
    striper = Striper([1.0, 1.0], _rooms(PLENTY, PLENTY))
    for num_bytes in (PAGE, 5 * MIB, STRIPE_BYTES, STRIPE_BYTES + STRIPE_BYTES // 2 - PAGE):
        assert len(striper.place(num_bytes)) == 1
    pieces = striper.place(10 * STRIPE_BYTES + PAGE)
    assert len(pieces) >= 9
    assert sum(piece.num_bytes for piece in pieces) == 10 * STRIPE_BYTES + PAGE
    assert min(piece.num_bytes for piece in pieces) >= STRIPE_BYTES // 2  # no tail of a page


def test_one_directory_keeps_everything_in_one_piece() -> None:
    striper = Striper([1.0], _rooms(PLENTY))
    for num_bytes in (PAGE, 100 * MIB + PAGE, 3 * MIB):
        assert len(striper.place(num_bytes)) == 1


@pytest.mark.parametrize("rates", [(1.0, 1.0), (3.0, 1.0), (1.0, 7.0, 2.0, 0.5)])
def test_shares_follow_the_rates(rates: tuple[float, ...]) -> None:
    striper = Striper(rates, _rooms(*[PLENTY] * len(rates)))
    random = np.random.default_rng(0)
    for size in random.integers(1, 100 * 256, 60):
        striper.place(int(size) * PAGE)
        # Not only in the end: whoever streams through the extents finds all drives busy at any time.
        seconds = [end / rate for end, rate in zip(striper.end_bytes, rates, strict=True)]
        assert max(seconds) - min(seconds) <= 1.6 * STRIPE_BYTES / min(rates)


def test_pieces_are_aligned_and_apart() -> None:
    striper = Striper([2.0, 3.0], _rooms(PLENTY, PLENTY))
    random = np.random.default_rng(1)
    pieces = [piece for size in random.integers(1, 30 * 256, 200) for piece in striper.place(int(size) * PAGE)]
    for piece in pieces:
        assert piece.offset_bytes % (2 * MIB if piece.num_bytes >= 2 * MIB else PAGE) == 0
    for directory in range(2):
        ranges = sorted((p.offset_bytes, p.offset_bytes + p.num_bytes) for p in pieces if p.directory == directory)
        assert all(ranges[i][1] <= ranges[i + 1][0] for i in range(len(ranges) - 1))
        assert ranges[-1][1] == striper.end_bytes[directory]


def test_a_full_drive_gets_no_more() -> None:
    striper = Striper([10.0, 1.0], _rooms(100 * MIB, PLENTY))
    striper.place(1000 * MIB)
    assert striper.end_bytes[0] <= 100 * MIB
    assert striper.end_bytes[0] > 70 * MIB
    shared = Room(200 * MIB)  # two directories of one file system
    striper = Striper([1.0, 1.0, 1.0], [shared, shared, Room(PLENTY)])
    striper.place(1000 * MIB)
    assert 150 * MIB < striper.end_bytes[0] + striper.end_bytes[1] <= 200 * MIB


def test_among_equals_the_emptier_directory_comes_first() -> None:
    striper = Striper([1.0, 1.0], _rooms(PLENTY, PLENTY), other_bytes=[8 * PAGE, 4 * PAGE])
    assert striper.place(PAGE)[0].directory == 1


@pytest.mark.parametrize(
    ("rates", "message"), [([1e9], "each of the 2"), ([1e9, 0], "positive"), ([1e9, float("inf")], "positive")]
)
def test_rates_that_make_no_sense_are_refused(tmp_path: Path, rates: list[float], message: str) -> None:
    with MockEngine() as engine:
        folders = [tmp_path / "a", tmp_path / "b"]
        with pytest.raises(ValueError, match=message):
            Store.create(folders, identity={}, engine=engine, directory_bytes_per_second=rates)
        assert not folders[0].exists()


@pytest.mark.parametrize(
    "rates", [(1e9, 1e9), (3e9, 1e9), (2e9, 6e9), (1e9, 2e9, 3e9, 7e9)], ids=["1:1", "3:1", "1:3", "1:2:3:7"]
)
def test_drives_of_unequal_speed_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rates: tuple[float, ...]
) -> None:
    """In virtual time, written and read with a few transfers ahead as a pipeline does: >= 0.95 of the sum."""
    monkeypatch.setattr(striping_module, "STRIPE_BYTES", 256 * 1024)  # an experiment of 64 MiB instead of 4 GiB
    folders = [str(tmp_path / str(i)) for i in range(len(rates))]
    num_bytes, chunk_bytes = 32 * MIB, 4 * MIB
    with (
        MockEngine(directory_bytes_per_second=dict(zip(folders, rates, strict=True)), latency_seconds=1e-6) as engine,
        Store.create(folders, identity={}, engine=engine, directory_bytes_per_second=rates) as store,
    ):
        store.allocate([ExtentSpec("a", num_bytes), ExtentSpec("b", num_bytes)], prewrite=False)
        scratch = store.scratch("spill", 2 * num_bytes)
        for extents in ([store.extent("a"), store.extent("b")], [scratch]):
            chunks = [e.sub(at, chunk_bytes) for e in extents for at in range(0, e.num_bytes, chunk_bytes)]
            array = aligned(chunk_bytes)
            for move in (engine.write, engine.read):
                begun_seconds = engine.now_seconds
                under_way = [move(chunk, array) for chunk in chunks[:4]]
                for chunk in chunks[4:]:
                    under_way.pop(0).wait()
                    under_way.append(move(chunk, array))
                for transfer in under_way:
                    transfer.wait()
                rate = 2 * num_bytes / (engine.now_seconds - begun_seconds)
                assert rate >= 0.95 * sum(rates)


def test_drives_are_prepared_side_by_side(tmp_path: Path) -> None:
    folders, rates = [str(tmp_path / name) for name in "ab"], (3e9, 1e9)
    with (
        MockEngine(directory_bytes_per_second=dict(zip(folders, rates, strict=True)), latency_seconds=1e-6) as engine,
        Store.create(folders, identity={}, engine=engine, directory_bytes_per_second=rates) as store,
    ):
        store.allocate([ExtentSpec("w", 128 * MIB)])
        assert engine.bytes_written == store.size_bytes == 128 * MIB
        assert engine.now_seconds <= 128 * MIB / (0.9 * sum(rates))


def _round_trip(folder: Path, engine: Engine, num_directories: int, num_extents: int, seed: int) -> None:
    """Random extents in slots, rewritten in random parts, read back by other parts, after reopening too."""
    random = np.random.default_rng(seed)
    folders = [folder / f"{seed}-{i}" for i in range(num_directories)]
    rates = random.uniform(1, 4, num_directories).tolist()
    specs = [
        ExtentSpec(f"e{i}", int(n), int(slots))
        for i, (n, slots) in enumerate(
            zip(random.integers(1, 300_000, num_extents), random.integers(1, 3, num_extents), strict=True)
        )
    ]
    contents: dict[tuple[str, int], np.ndarray] = {}
    with Store.create(folders, identity={}, engine=engine, directory_bytes_per_second=rates) as store:
        store.allocate(specs[: num_extents // 2], prewrite=False)
        store.allocate(specs[num_extents // 2 :], prewrite=False)
        for spec in specs:
            for slot in range(spec.num_slots):
                extent = store.extent(spec.name, slot)
                data = pattern(extent.num_bytes, seed=int(random.integers(1 << 30)))
                contents[spec.name, slot] = data
                transfers = [
                    engine.write(extent.sub(begin, end - begin), aligned(end - begin, data[begin:end]))
                    for begin, end in _random_cuts(extent.num_bytes, random)
                ]
                for transfer in transfers:
                    transfer.wait()
        sums = {spec.name: checksum(contents[spec.name, 0][: spec.num_bytes]) for spec in specs}
        store.commit(step=0, slots={}, checksums=sums, state={})
    with Store.open(folders, engine=engine) as store:
        assert store.verify() == []
        for (name, slot), data in contents.items():
            extent = store.extent(name, slot)
            for begin, end in _random_cuts(extent.num_bytes, random):
                array = aligned(end - begin)
                engine.read(extent.sub(begin, end - begin), array).wait()
                assert array.tobytes() == data[begin:end].tobytes()
        used = {os.path.dirname(s.path) for name in store.names() for s in store.extent(name).segments}
        assert used == {str(f) for f in folders}
        store.delete()


def _random_cuts(num_bytes: int, random: np.random.Generator) -> list[tuple[int, int]]:
    pages = num_bytes // PAGE
    inner = sorted({int(n) for n in random.integers(1, pages + 1, 2)} - {pages})
    cuts = [0, *inner, pages]
    return [(a * PAGE, b * PAGE) for a, b in itertools.pairwise(cuts)]


@pytest.mark.parametrize("num_directories", [2, 4])
@pytest.mark.parametrize("kind", ["posix", "mock"])
def test_random_extents_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_directories: int, kind: str
) -> None:
    monkeypatch.setattr(striping_module, "STRIPE_BYTES", 64 * 1024)
    with PosixEngine(2, request_bytes=64 * 1024) if kind == "posix" else MockEngine(order="lifo") as engine:
        _round_trip(tmp_path, engine, num_directories, 60, seed=num_directories)


@pytest.mark.slow
@pytest.mark.parametrize("num_directories", [2, 4])
def test_ten_thousand_random_extents_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_directories: int
) -> None:
    monkeypatch.setattr(striping_module, "STRIPE_BYTES", 64 * 1024)
    with PosixEngine(2, request_bytes=64 * 1024) as engine:
        for seed in range(10):
            _round_trip(tmp_path, engine, num_directories, 1000, seed=seed)


def test_the_rates_of_the_last_allocation_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(striping_module, "STRIPE_BYTES", 64 * 1024)
    folders = [tmp_path / "a", tmp_path / "b"]

    def shares(store: Store, name: str, slot: int) -> list[int]:
        segments = store.extent(name, slot).segments
        return [sum(s.num_bytes for s in segments if s.path.startswith(str(f))) // MIB for f in folders]

    with MockEngine() as engine:
        with Store.create(folders, identity={}, engine=engine, directory_bytes_per_second=[3e9, 1e9]) as store:
            store.allocate([ExtentSpec("w", 8 * MIB)], prewrite=False)
            assert shares(store, "w", 0) == [6, 2]
        with Store.open(folders, engine=engine) as store:
            store.add_slots(["w"], prewrite=False)
            assert shares(store, "w", 1) == [6, 2]
        with Store.open(folders, engine=engine, directory_bytes_per_second=[1, 1]) as store:
            store.allocate([ExtentSpec("v", 8 * MIB)], prewrite=False)
            assert shares(store, "v", 0) == [4, 4]
            assert shares(store, "w", 0) == [6, 2]  # what is placed stays


def test_a_drive_with_little_room_gets_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two file systems, one with 40 MiB left: an equal split of 200 MiB would not fit, an unequal one does."""
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    free = {folders[0]: 40 * MIB, folders[1]: 1000 * MIB}
    real_stat = os.stat
    with MockEngine() as engine, Store.create(folders, identity={}, engine=engine) as store:
        monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=free[path] // PAGE, f_frsize=PAGE))
        monkeypatch.setattr(
            os,
            "stat",
            lambda path, **k: SimpleNamespace(st_dev=folders.index(path)) if path in folders else real_stat(path, **k),
        )
        store.allocate([ExtentSpec("w", 200 * MIB)], prewrite=False)
        assert [len(engine.files[f"{folder}/extents-1.bin"]) // MIB for folder in folders] == [32, 168]
        with pytest.raises(OSError, match="No space left on device"):
            store.scratch("spill", 2000 * MIB)
        monkeypatch.undo()


def test_a_failure_in_one_part_names_its_directory(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    parts = [Extent(str(tmp_path / name / "x"), 0, 4 * PAGE) for name in "ab"]
    (tmp_path / "a" / "x").write_bytes(bytes(4 * PAGE))
    (tmp_path / "b" / "x").write_bytes(bytes(2 * PAGE))
    with (
        PosixEngine(1, request_bytes=PAGE) as engine,
        BufferPool(MIB, name="test") as pool,
        pool.acquire(8 * PAGE) as buffer,
    ):
        with pytest.raises(OSError, match="short read") as caught:
            engine.read(Extent.join(parts), buffer.array).wait()
        assert caught.value.filename == str(tmp_path / "b" / "x")
        assert "at offset 8192" in str(caught.value) or "at offset 12288" in str(caught.value)
