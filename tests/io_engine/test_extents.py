from __future__ import annotations

import dataclasses

import pytest

from io_engine import Extent, round_up


def test_round_up_reaches_the_next_multiple() -> None:
    assert [round_up(n, 4096) for n in (0, 1, 4095, 4096, 4097)] == [0, 4096, 4096, 4096, 8192]


def test_sub_is_relative_to_the_extent() -> None:
    extent = Extent("/data/file", 8192, 16384)
    assert extent.sub(4096, 8192) == Extent("/data/file", 12288, 8192)
    assert extent.sub(0, 16384) == extent


@pytest.mark.parametrize(("offset_bytes", "num_bytes"), [(4096, 16384), (-4096, 4096), (16384, 4096)])
def test_sub_stays_inside(offset_bytes: int, num_bytes: int) -> None:
    with pytest.raises(ValueError, match="outside the extent of 16384 bytes"):
        Extent("file", 4096, 16384).sub(offset_bytes, num_bytes)


@pytest.mark.parametrize(("offset_bytes", "num_bytes"), [(1, 4096), (0, 4095), (0, 0), (-4096, 4096), (0, -4096)])
def test_unaligned_extents_cannot_exist(offset_bytes: int, num_bytes: int) -> None:
    with pytest.raises(ValueError, match="direct I/O"):
        Extent("file", offset_bytes, num_bytes)


def test_an_extent_is_a_value() -> None:
    extent = Extent("file", 0, 4096)
    assert {extent: 1}[Extent("file", 0, 4096)] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        extent.num_bytes = 8192  # type: ignore[misc]


def _striped() -> Extent:
    return Extent.join([Extent("a", 8192, 4096), Extent("b", 0, 8192), Extent("a", 12288, 4096)])


def test_ranges_join_to_one_extent() -> None:
    striped = _striped()
    assert (striped.path, striped.offset_bytes, striped.num_bytes) == ("a", 8192, 16384)
    assert striped.segments == (Extent("a", 8192, 4096), Extent("b", 0, 8192), Extent("a", 12288, 4096))
    assert Extent.join([striped, Extent("c", 0, 4096)]).segments == (*striped.segments, Extent("c", 0, 4096))
    assert {striped: 1}[_striped()] == 1
    whole = Extent("a", 0, 8192)
    assert whole.segments == (whole,)
    assert Extent.join([Extent("a", 0, 4096), Extent("a", 4096, 4096)]) == whole  # touching ranges are one
    assert Extent.join([whole]) == whole
    with pytest.raises(ValueError, match="at least one part"):
        Extent.join([])


def test_sub_of_a_striped_extent_is_each_page_of_it() -> None:
    striped = _striped()
    pages = [("a", 8192), ("b", 0), ("b", 4096), ("a", 12288)]
    for begin in range(4):
        for end in range(begin + 1, 5):
            part = striped.sub(begin * 4096, (end - begin) * 4096)
            assert part.num_bytes == (end - begin) * 4096
            found = [(s.path, s.offset_bytes + i) for s in part.segments for i in range(0, s.num_bytes, 4096)]
            assert found == pages[begin:end]
    assert striped.sub(4096, 8192) == Extent("b", 0, 8192)  # in one piece again
    for offset_bytes, num_bytes, message in ((0, 20480, "outside"), (4096, 0, "direct I/O"), (100, 4096, "direct I/O")):
        with pytest.raises(ValueError, match=message):
            striped.sub(offset_bytes, num_bytes)
