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
