"""The shard layout: a small one by hand, and what must hold for every one."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optim import DEFAULT_CHUNK_ELEMENTS, ParameterSlot, ShardLayout

PAGE = 4096

any_layout = st.builds(
    lambda sizes, dtype, pages: ShardLayout.of(
        "s", {f"p{i}": shape for i, shape in enumerate(sizes)}, dtype, 2048 * pages
    ),
    st.lists(st.lists(st.integers(1, 40), min_size=0, max_size=3).map(tuple), min_size=1, max_size=12),
    st.sampled_from(["bfloat16", "float32"]),
    st.integers(1, 5),
)


def test_small_layout_by_hand() -> None:
    """Three parameters of 6,000, 1 and 130 elements: starts at multiples of 64, the second chunk shorter."""
    layout = ShardLayout.of("layers.3", {"w": (60, 100), "s": (), "b": (130,)}, "bfloat16", 4096)
    assert layout.parameters == (
        ParameterSlot("w", (60, 100), 0, 6000),
        ParameterSlot("s", (), 6016, 1),
        ParameterSlot("b", (130,), 6080, 130),
    )
    assert (layout.weight_name, layout.state_name) == ("layers.3/weight", "layers.3/state")
    assert layout.num_parameters == 6131
    assert layout.num_elements == 6208 + 64  # 6,210 rounded up to 64
    assert layout.num_chunks == 2
    assert [layout.chunk_range(c) for c in range(2)] == [(0, 4096), (4096, 6272)]
    assert layout.weight_bytes == 16384  # 12,544 rounded up
    assert layout.gradient_bytes == 28672  # 25,088 rounded up
    # 4,096 x 10 = 40,960, a multiple of 4,096; 2,176 x 10 = 21,760 -> 24,576
    assert [layout.state_range(c) for c in range(2)] == [(0, 40960), (40960, 24576)]
    assert layout.state_bytes == 65536
    assert [layout.weight_range(c) for c in range(2)] == [(0, 8192), (8192, 8192)]
    assert [layout.gradient_range(c) for c in range(2)] == [(0, 16384), (16384, 12288)]
    assert layout.weight_piece_bytes == 8192


def test_small_layout_in_float32() -> None:
    layout = ShardLayout.of("e", {"w": (60, 100), "s": (), "b": (130,)}, "float32", 4096)
    assert layout.weight_bytes == 28672
    assert [layout.state_range(c) for c in range(2)] == [(0, 32768), (32768, 20480)]
    assert [layout.weight_range(c) for c in range(2)] == [(0, 16384), (16384, 12288)]


def test_record_views_lie_one_behind_the_other() -> None:
    """[low | m | v], sharing the record's memory; the second chunk's are as short as the chunk."""
    layout = ShardLayout.of("s", {"w": (4160,)}, "bfloat16", 4096)
    for chunk, n in ((0, 4096), (1, 64)):
        record = np.zeros(layout.state_range(chunk)[1], np.uint8)
        views = layout.views(record, chunk)
        assert views.low is not None
        views.low[:], views.m[:], views.v[:] = 7, 1.5, 2.5
        assert np.array_equal(record[: 2 * n].view(np.uint16), np.full(n, 7, np.uint16))
        assert np.array_equal(record[2 * n : 6 * n].view(np.float32), np.full(n, 1.5, np.float32))
        assert np.array_equal(record[6 * n : 10 * n].view(np.float32), np.full(n, 2.5, np.float32))
        assert not record[10 * n :].any()
    plain = dataclasses.replace(layout, compute_dtype="float32")
    record = np.zeros(plain.state_range(1)[1], np.uint8)
    views = plain.views(record, 1)
    assert views.low is None
    views.m[:], views.v[:] = 1.5, 2.5
    assert np.array_equal(record[:512].view(np.float32), np.repeat(np.float32([1.5, 2.5]), 64))


@given(any_layout)
@settings(max_examples=200, deadline=None)
def test_ranges_cover_everything_once(layout: ShardLayout) -> None:
    """Chunks, records, weights and gradients: no gap, no overlap, every one on whole pages."""
    chunks = [layout.chunk_range(c) for c in range(layout.num_chunks)]
    assert chunks[0][0] == 0
    assert chunks[-1][1] == layout.num_elements
    assert all(end == begin for (_, end), (begin, _) in pairwise(chunks))
    assert all(begin < end for begin, end in chunks)
    for ranges, total in (
        ([layout.state_range(c) for c in range(layout.num_chunks)], layout.state_bytes),
        ([layout.weight_range(c) for c in range(layout.num_chunks)], layout.weight_bytes),
        ([layout.gradient_range(c) for c in range(layout.num_chunks)], layout.gradient_bytes),
    ):
        assert ranges[0][0] == 0
        assert sum(ranges[-1]) == total
        assert all(a + n == b for (a, n), (b, _) in pairwise(ranges))
        assert all(offset % PAGE == 0 and n % PAGE == 0 for offset, n in ranges)
    # Records hold all their arrays.
    for c in range(layout.num_chunks):
        record = np.zeros(layout.state_range(c)[1], np.uint8)
        views = layout.views(record, c)
        n = chunks[c][1] - chunks[c][0]
        assert views.m.size == views.v.size == n
        assert views.low is None or views.low.size == n


@given(any_layout)
@settings(max_examples=100, deadline=None)
def test_parameters_do_not_overlap(layout: ShardLayout) -> None:
    for p in layout.parameters:
        assert p.start % 64 == 0
        assert p.num_elements == int(np.prod(p.shape))
    assert all(a.stop <= b.start < a.stop + 64 for a, b in pairwise(layout.parameters))
    assert layout.parameters[-1].stop <= layout.num_elements < layout.parameters[-1].stop + 64
    assert layout.num_parameters == sum(p.num_elements for p in layout.parameters)


def test_chunk_boundaries_cross_parameters() -> None:
    """A parameter that spans three chunks, and a chunk that holds parts of three parameters."""
    layout = ShardLayout.of("s", {"a": (3000,), "b": (6000,), "c": (100,)}, "float32", 4096)
    parts = {
        (p.name, c)
        for p in layout.parameters
        for c in range(layout.num_chunks)
        if p.start < layout.chunk_range(c)[1] and p.stop > layout.chunk_range(c)[0]
    }
    assert parts == {("a", 0), ("b", 0), ("b", 1), ("b", 2), ("c", 2)}


@given(any_layout)
@settings(max_examples=100, deadline=None)
def test_json_round_trip(layout: ShardLayout) -> None:
    assert ShardLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@pytest.mark.parametrize(
    ("shapes", "dtype", "chunk_elements", "message"),
    [
        ({"w": (8,)}, "float16", 4096, "compute_dtype='float16'"),
        ({"w": (8,)}, "bfloat16", 1000, "chunk_elements=1000 .* multiple of 2048"),
        ({"w": (8,)}, "bfloat16", 0, "chunk_elements=0"),
        ({"w": (8,)}, "bfloat16", -2048, "chunk_elements=-2048"),
        ({}, "bfloat16", 4096, "no elements"),
        ({"w": (0, 4)}, "bfloat16", 4096, "no elements"),
    ],
)
def test_impossible_layouts(shapes: dict[str, tuple[int, ...]], dtype: str, chunk_elements: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardLayout.of("s", shapes, dtype, chunk_elements)


def test_default_records_are_whole_pages() -> None:
    layout = ShardLayout.of("s", {"w": (DEFAULT_CHUNK_ELEMENTS,)}, "bfloat16")
    assert layout.full_record_bytes == 10 * DEFAULT_CHUNK_ELEMENTS == 20 << 20
