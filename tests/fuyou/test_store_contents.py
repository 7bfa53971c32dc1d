"""Damaged bytes are told by the parameters that lie there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fuyou.store_contents import name_contents
from io_engine import ExtentSpec, PosixEngine, Store
from optim import ShardLayout

SHAPES = {"a": (3000,), "b": (5,), "c": (64, 64), "d": (7, 1)}


@pytest.mark.parametrize("place", ["model", "adapters"])
@pytest.mark.parametrize(
    ("compute_dtype", "moment_dtype"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "int8")]
)
def test_contents_of_every_chunk(compute_dtype: str, moment_dtype: str, place: str, tmp_path: Path) -> None:
    """Against a map of elements to parameters."""
    layout = ShardLayout.of("s", SHAPES, compute_dtype, 2048, moment_dtype)
    owners = np.full(layout.num_elements, "", dtype="<U1")
    for parameter in layout.parameters:
        owners[parameter.start : parameter.stop] = parameter.name
    shards = {"shards": [layout.to_json()]}
    with PosixEngine(1) as engine, Store.create([tmp_path / "s"], identity={}, engine=engine) as store:
        store.allocate(
            [ExtentSpec(layout.weight_name, layout.weight_bytes), ExtentSpec(layout.state_name, layout.state_bytes)],
            description=shards if place == "model" else {},
        )
        store.commit(step=1, slots={}, checksums={}, state={"adapters": shards} if place == "adapters" else {})
        name_contents(store)
        for chunk in range(layout.num_chunks):
            expected = sorted(set(owners[slice(*layout.chunk_range(chunk))]) - {""})
            assert store.contents(layout.weight_name, *layout.weight_range(chunk)) == expected
            assert store.contents(layout.state_name, *layout.state_range(chunk)) == expected
        assert store.contents(layout.weight_name, 0, layout.weight_bytes) == list(SHAPES)
        assert store.contents("other/weight", 0, 4096) == []


def test_a_description_that_is_unusable_names_nothing(tmp_path: Path) -> None:
    with PosixEngine(1) as engine, Store.create([tmp_path / "s"], identity={}, engine=engine) as store:
        store.allocate([ExtentSpec("s/weight", 4096)], description={"shards": [{"name": "s"}]})
        name_contents(store)
        assert store.contents("s/weight", 0, 4096) == []
