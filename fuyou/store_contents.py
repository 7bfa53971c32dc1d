"""What a store says about itself: its model, its shards, its files, and what its bytes are; all of it may be hostile."""

from __future__ import annotations

import contextlib
import math
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fuyou.architecture import fingerprint
from fuyou.base_store import recorded_base
from fuyou.config import OffloadConfig
from fuyou.html import StoreContents
from fuyou.quantising import QuantisedLayout
from fuyou.trace_files import TRACE_NAME
from io_engine import Checkpoint, Engine, PosixEngine, Store, StoreError
from optim import ShardLayout

Directories = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

MOST_LAYERS = 1_000
"""Of a config; transformers makes modules for each of them, on the meta device too."""


def inspect_store(store: Directories) -> StoreContents:
    """What a store holds, as JSON; takes no lock and writes nothing. StoreError if it is none."""
    directories = OffloadConfig(store=store).store_directories
    snapshot = Store.peek(directories)
    shards = stored_shards(snapshot.description, directories[0])
    return StoreContents(
        {
            "directories": [str(d) for d in directories],
            "identity": snapshot.identity,
            "source": str(snapshot.description.get("source", "")),
            "base": recorded_base(snapshot.state, directories[0]),
            "step": snapshot.step,
            "filled": bool(snapshot.state.get("filled")),
            "numerics": snapshot.state.get("numerics", {}),
            "optimizer": snapshot.state.get("optimizer", {}),
            "crash": _crash_costs(snapshot.state.get("optimizer", {})),
            "num_parameters": sum(s.num_parameters for s in shards),
            "size_bytes": snapshot.size_bytes,
            "checkpoints": [checkpoint_json(checkpoint) for checkpoint in snapshot.checkpoints],
            "notes": list(snapshot.notes),
            "files": [
                {
                    "name": file.path,
                    "num_bytes": file.num_bytes,
                    "purpose": _OF_OURS.get(os.path.basename(file.path), file.purpose),
                }
                for file in snapshot.files
            ],
            "shards": [
                {
                    "name": s.name,
                    "num_parameters": s.num_parameters,
                    "weight_bytes": s.weight_bytes,
                    "state_bytes": s.state_bytes if s.state_name in snapshot.slots else 0,
                    "slot": snapshot.slots.get(s.weight_name, 0),
                    "parameters": {p.name: list(p.shape) for p in s.parameters},
                }
                for s in shards
            ],
        }
    )


def verify_store(store: Directories) -> list[str]:
    """Read everything committed and compare it with its checksums; a sentence for each problem. Takes the lock.

    A run's base is read, too.
    """
    with opened_store(store) as (opened, engine):
        problems = opened.verify()
        base = recorded_base(opened.state, opened.directories[0])
        if base is not None:
            with Store.open(base["directories"], engine=engine, read_only=True) as shared:
                problems += shared.verify()
        if not opened.state.get("filled"):
            problems.append("the store was never filled: run the command that made it again")
        return problems


def stored_config(description: Mapping[str, Any], identity: Mapping[str, Any], directory: Path) -> Any:
    """The transformers config in a store; StoreError if it is not the one that the store was made for."""
    from transformers import AutoConfig

    try:
        data = _from_jsonable(description["config"])
        check_layers(data, len(description["shards"]))
        config = AutoConfig.for_model(data.pop("model_type"), **data)
        if fingerprint(config, description["model"]) != identity["fingerprint"]:
            raise ValueError("it is not the one that the store was made for")
        if description["compute_dtype"] not in DTYPES:
            raise ValueError("compute_dtype is none")
    except Exception as error:  # configs of many authors check their fields in many ways
        raise StoreError(
            f"{directory}: the model's config in its layout is unusable ({type(error).__name__}: {str(error)[:200]}): "
            "restore the store from a backup"
        ) from None
    return config


def check_layers(data: Mapping[str, Any], most: int) -> None:
    """ValueError for a config of more layers than that, before anything is made for each."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            check_layers(value, most)
        elif (
            key in ("num_hidden_layers", "n_layer", "num_layers") and value is not None and not 0 <= int(value) <= most
        ):
            raise ValueError(f"{key}={value}: expected at most {most}")


def _checked_shard(data: Any) -> ShardLayout:
    """A shard's layout; KeyError, TypeError or ValueError for one whose numbers do not go together."""
    shapes = {str(p["name"]): tuple(map(operator.index, p["shape"])) for p in data["parameters"]}
    # Before numpy multiplies them, in 64 bits.
    if any(size < 0 for shape in shapes.values() for size in shape) or max(map(math.prod, shapes.values())) >= 2**50:
        raise ValueError("a shape is negative or absurd")
    layout = ShardLayout.from_json(data)
    made = ShardLayout.of(
        str(data["name"]), shapes, layout.compute_dtype, operator.index(layout.chunk_elements), layout.moment_dtype
    )
    if layout != made:
        raise ValueError(f"the parameters of {made.name[:80]} do not lie where they should")
    kind = data.get("frozen_dtype")
    return made if kind is None else QuantisedLayout.from_plain(made, str(kind))


def stored_shards(description: Mapping[str, Any], directory: Path) -> list[ShardLayout]:
    """The layouts of a store's shards; StoreError if what describes them was not written by us."""
    try:
        return [_checked_shard(shard) for shard in description.get("shards", [])]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise StoreError(
            f"{directory}: what its layout says of shards is unusable ({type(error).__name__}: {str(error)[:80]}); it was "
            "made by another program, or by hand: restore it from a backup"
        ) from None


_SPECIAL_FLOAT = "__float__"
"""Key of what stands for a number that JSON lacks, as in transformers' own config files."""


_OF_OURS = {
    TRACE_NAME: "the lanes of the last steps, for `fuyou trace`; may be deleted",
    "tokenizer": "the run's tokenizer, for `fuyou generate`",
}
"""What the runtime puts beside a store's own files."""


def _crash_costs(optimizer: Any) -> str:
    """What a crash of the run costs, if it goes on as it did at the last commit."""
    every = optimizer.get("commit_every_steps", 1) if isinstance(optimizer, Mapping) else 1
    if every == 1:
        return "costs at most the two steps in flight: every step is committed"
    return f"costs at most {every + 1} steps: one in {every} is committed" if isinstance(every, int) else "unknown"


@contextlib.contextmanager
def opened_store(store: Directories) -> Iterator[tuple[Store, Engine]]:
    """A store without a model, locked, and its engine; closed at the end. Errors as those of `Store.open`."""
    directories = OffloadConfig(store=store).store_directories
    with PosixEngine() as engine, Store.open(directories, engine=engine) as opened:
        name_contents(opened)
        yield opened, engine


def name_contents(store: Store) -> None:
    """Let the store's messages name the parameters that are damaged."""

    def contents(name: str, begin_bytes: int, num_bytes: int) -> list[str]:
        directory = Path(store.directories[0])
        try:
            shards = stored_shards(store.description, directory) + _adapter_shards(store.state, directory)
        except StoreError:  # the damage is to be told, not this
            return []
        for shard in shards:
            if name in (shard.weight_name, shard.state_name):
                return [*_parameters_in(shard, name == shard.state_name, begin_bytes, begin_bytes + num_bytes)]
        return []

    store.contents = contents


def _parameters_in(shard: ShardLayout, of_states: bool, begin_bytes: int, end_bytes: int) -> Iterator[str]:
    """Names of the parameters of which the chunks in these bytes of a shard's extent have a part."""
    chunk_bytes = shard.full_record_bytes if of_states else shard.chunk_elements * shard.weight_itemsize
    start = begin_bytes // chunk_bytes * shard.chunk_elements
    stop = -(-end_bytes // chunk_bytes) * shard.chunk_elements
    return (parameter.name for parameter in shard.parameters if parameter.start < stop and start < parameter.stop)


def _adapter_shards(state: Mapping[str, Any], directory: Path) -> list[ShardLayout]:
    adapters = state.get("adapters")
    return stored_shards(adapters, directory) if isinstance(adapters, Mapping) else []


def checkpoint_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """What there is to know of a checkpoint, as JSON."""
    return {
        "name": checkpoint.name,
        "step": checkpoint.step,
        "num_bytes": checkpoint.num_bytes,
        "created_seconds": checkpoint.created_seconds,
    }


def jsonable(data: Any) -> Any:
    """`data` in strict JSON's types: what is unknown as its string, infinity as {"__float__": "inf"}."""
    if isinstance(data, Mapping):
        return {str(key): jsonable(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [jsonable(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return {_SPECIAL_FLOAT: str(data)}
    return data if data is None or isinstance(data, (bool, int, float, str)) else str(data)


def _from_jsonable(data: Any) -> Any:
    if isinstance(data, Mapping):
        if data.keys() == {_SPECIAL_FLOAT}:
            return float(data[_SPECIAL_FLOAT])
        return {key: _from_jsonable(value) for key, value in data.items()}
    return [_from_jsonable(value) for value in data] if isinstance(data, list) else data
