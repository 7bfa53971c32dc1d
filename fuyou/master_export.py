"""Exports of the float32 masters: plain safetensors, and torch.distributed.checkpoint with Adam's states, for FSDP2 on a cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from fuyou.blocks import Block, find_blocks
from fuyou.errors import ModelError
from fuyou.exporting import export_checkpoint
from fuyou.memory import return_freed_memory
from fuyou.opening import model_of
from fuyou.quantising import QuantisedLayout
from fuyou.store_contents import DTYPES, Directories, opened_store, stored_config, stored_shards
from io_engine import BufferPool, Store, VerifyingEngine
from optim import ShardLayout
from optim.layout import ParameterSlot
from optim.states import StateFiles
from optim.steps import StepCounts

_Values = dict[str, torch.Tensor]


def export_distributed(store: Directories, folder: str | os.PathLike[str]) -> int:
    """Write a store's weights and Adam states to `folder` for `torch.distributed.checkpoint.load`; returns the step.

    The keys are those of `{"model": model.state_dict(), "optim": {"state": ...}}`, the latter as
    `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict` names it: float32 masters, exp_avg, exp_avg_sq and
    step; frozen parameters have no state. Beside them lies the model's config.json. Blocks; holds one parameter at a
    time in host memory (its masters and both moments). Takes the store's lock and changes nothing in it.

    ModelError if `folder` holds files already, StoreError, StoreCorruptError for damaged data, OSError. Nothing is left
    of an export that failed.
    """
    path = Path(folder).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ModelError(f"{path} exists and is not an empty folder: name a new one")
    with _parameters_of(store) as (model, reader, step):
        try:
            _save(model, reader, path)
            model.config.save_pretrained(path)
        except CheckpointException as error:  # around what happened in here, with its traceback as text
            shutil.rmtree(path, ignore_errors=True)
            raise next(iter(error.failures.values()))[0] from None
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)  # which was not there, or empty
            raise
    return step


def export_masters(store: Directories, folder: str | os.PathLike[str]) -> int:
    """As `export_checkpoint`, with float32 masters instead of the weights of compute; returns the step.

    Blocks; holds one block's masters and one parameter's moments in host memory. Takes the store's lock and changes
    nothing in it. ModelError, StoreError, StoreCorruptError, OSError.
    """
    with _parameters_of(store) as (model, reader, step):

        def read_block(block: Block) -> contextlib.AbstractContextManager[_Values]:
            return contextlib.nullcontext({name: reader.read(name, "weight") for name in block.parameters})

        export_checkpoint(model, find_blocks(model, reader.blocks_path), read_block, folder)
    return step


@contextlib.contextmanager
def _parameters_of(store: Directories) -> Iterator[tuple[Any, _Reader, int]]:
    """The model in a store, float32 on the meta device, what reads its parameters, and the committed step."""
    return_freed_memory()
    with opened_store(store) as (opened, engine):
        directory = Path(opened.directories[0])
        if not opened.state.get("filled"):
            raise ModelError(f"the store in {directory} was never filled: there is nothing to export")
        if opened.state.get("adapters") is not None or opened.state.get("base") is not None:
            raise ModelError(
                f"the run in {directory} trains adapters beside a frozen base: export them in peft's format, or the merged "
                "model (fuyou export STORE OUT, with or without --merge)"
            )
        description = opened.description
        config = stored_config(description, opened.identity, directory)
        shards = stored_shards(description, directory)
        if any(isinstance(shard, QuantisedLayout) for shard in shards):
            raise ModelError(
                f"the store in {directory} holds quantised weights, of which there are no float32 masters: export it as "
                "safetensors (fuyou export STORE OUT)"
            )
        chunk_bytes = max(max(shard.weight_range(0)[1], shard.full_record_bytes) for shard in shards)
        with model_of(config, torch.float32) as model, BufferPool(chunk_bytes + 2**21, name="export") as pool:
            reader = _Reader(opened, VerifyingEngine(engine, opened), pool, shards)
            yield model, reader, opened.step


class _Reader:
    """Parameters of a store as float32 tensors, one at a time."""

    def __init__(self, store: Store, engine: Any, pool: BufferPool, shards: Sequence[ShardLayout]) -> None:
        self._store, self._engine, self._pool = store, engine, pool
        self._states = StateFiles(store, engine, pool)
        self._places = {slot.name: (shard, slot) for shard in shards for slot in shard.parameters}
        present = set(store.names())
        self._trained = {shard.name for shard in shards if shard.state_name in present}
        untrained = (s.name for shard in shards if shard.state_name not in store.checksums for s in shard.parameters)
        self._counts = StepCounts(store.state.get("optimizer", {}), untrained)
        self._current: tuple[str, _Values] = ("", {})
        self.blocks_path: str | None = store.description.get("blocks_path")

    def fields(self, name: str) -> tuple[str, ...]:
        """What there is of a parameter."""
        shard, _ = self._place(name)
        return ("weight", "exp_avg", "exp_avg_sq", "step") if shard.name in self._trained else ("weight",)

    def read(self, name: str, field: str) -> torch.Tensor:
        """A value of a parameter; the next parameter takes the place of this one's others."""
        if self._current[0] != name:
            self._current = ("", {})  # before the next is read: one at a time
            self._current = (name, self._values(name))
        return self._current[1][field]

    def _place(self, name: str) -> tuple[ShardLayout, ParameterSlot]:
        if name not in self._places:
            raise ModelError(f"the store has no weights of {name}, which its own config asks for")
        return self._places[name]

    def _values(self, name: str) -> _Values:
        shard, slot = self._place(name)
        if shard.name not in self._trained:
            return {"weight": self._weights(shard, slot)}
        arrays = self._states.read(shard, slot, self._store.active_slot(shard.weight_name))
        values = [torch.from_numpy(array).reshape(slot.shape) for array in arrays]
        step = torch.tensor(float(self._counts.of(name)))
        return dict(zip(("weight", "exp_avg", "exp_avg_sq", "step"), (*values, step), strict=True))

    def _weights(self, shard: ShardLayout, slot: ParameterSlot) -> torch.Tensor:
        """Of a shard that was never trained: the weights of compute."""
        dtype = DTYPES[shard.compute_dtype]
        weights = torch.empty(slot.num_elements)
        extent = self._store.extent(shard.weight_name)
        for chunk in range(shard.num_chunks):
            begin, end = shard.chunk_range(chunk)
            first, last = max(begin, slot.start), min(end, slot.stop)
            if first >= last:
                continue
            offset, num_bytes = shard.weight_range(chunk)
            with self._pool.acquire(num_bytes) as buffer:
                array = buffer.array[:num_bytes]
                self._engine.read(extent.sub(offset, num_bytes), array).wait()
                part = torch.from_numpy(array).view(dtype)[first - begin : last - begin]
                weights[first - slot.start : last - slot.start] = part
        return weights.reshape(slot.shape)


class _Planner(DefaultSavePlanner):
    """Asks for each tensor when it is about to be written, all of a parameter one behind the other."""

    def __init__(self, sources: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        super().__init__()
        self._sources = dict(sources)

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        order = {key: number for number, key in enumerate(self._sources)}
        self.plan = dataclasses.replace(plan, items=sorted(plan.items, key=lambda item: order[item.index.fqn]))
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        return self._sources[write_item.index.fqn]()


def _save(model: nn.Module, reader: _Reader, path: Path) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    aliases: dict[str, list[str]] = {name: [] for name in names.values()}
    for alias, parameter in model.named_parameters(remove_duplicate=False):
        aliases[names[id(parameter)]].append(alias)
    shapes = dict(model.named_parameters())
    weights: _Values = {}
    states: dict[str, _Values] = {}
    sources: dict[str, Callable[[], torch.Tensor]] = {}
    for name, keys in aliases.items():
        like = torch.empty(shapes[name].shape, device="meta")
        for key in keys:
            weights[key] = like
            sources[f"model.{key}"] = _source(reader, name, "weight")
        for field in reader.fields(name)[1:]:
            states.setdefault(name, {})[field] = torch.empty((), device="meta") if field == "step" else like
            sources[f"optim.state.{name}.{field}"] = _source(reader, name, field)
    for key, value in nn.Module.state_dict(model).items():
        if key not in weights:  # persistent buffers, as their constructor made them
            weights[key] = value
            sources[f"model.{key}"] = value.detach
    with warnings.catch_warnings():
        # That nothing distributed is going on is meant.
        warnings.filterwarnings("ignore", message=".*single process")
        save(
            {"model": weights, "optim": {"state": states}},
            # A file a tensor: the writer keeps all that it has put into a file until the file is done.
            storage_writer=FileSystemWriter(path, single_file_per_rank=False),
            planner=_Planner(sources),
            no_dist=True,
        )


def _source(reader: _Reader, name: str, field: str) -> Callable[[], torch.Tensor]:
    return lambda: reader.read(name, field)
