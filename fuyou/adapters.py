"""Parameters that peft has added to a streamed model: small, resident on the device, with shards of their own.

peft puts its modules around and beside the model's own ones, whose weights stay where they are, on the drive. What it
adds has real memory. Each block's trainable additions make a shard (one for each data type), which the optimizer
treats as any other: two slots, committed with the step. Only, its weights and states stay in host memory, and its
update ends before `optimizer.step()` returns, so that what peft reads and saves is always the last step's.
"""

from __future__ import annotations

import contextlib
import enum
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fuyou.blocks import EPILOGUE, ModelBlocks
from fuyou.building import StreamedParameter, is_placeholder, write_block
from fuyou.errors import ConfigError, ModelError
from fuyou.plan_search import pooled_bytes
from io_engine import BufferPool, Engine, ExtentSpec, Store
from optim import DEFAULT_CHUNK_ELEMENTS, OffloadedAdamW, ShardLayout, UpdateJob

_KEPT_INITIALISATIONS = (True, False, "gaussian", "orthogonal")
"""Values of LoraConfig.init_lora_weights that neither read nor change the base's weights."""

_COMPUTE_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

_VOLATILE_FIELDS = ("base_model_name_or_path", "inference_mode", "peft_version", "revision", "auto_mapping")
"""Of a peft config: what may differ between two invocations of one run."""

BoundBlock = Callable[[str], contextlib.AbstractContextManager[None]]
"""Makes a context in which a block's parameters hold their weights."""


def peft_configs(model: nn.Module) -> dict[str, Any]:
    """The configs of the adapters that peft has put into the model, by adapter; empty for none."""
    found = getattr(model, "peft_config", None)
    return dict(found) if isinstance(found, Mapping) else {}


def configs_json(model: nn.Module) -> dict[str, Any]:
    """The same as JSON whose text does not depend on the order of sets, without what says nothing of the run."""
    return {
        name: {k: _plain(v) for k, v in config.to_dict().items() if k not in _VOLATILE_FIELDS}
        for name, config in peft_configs(model).items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def prepare(
    model: nn.Module,
    blocks: ModelBlocks,
    added: Mapping[str, nn.Parameter],
    base: Mapping[str, nn.Parameter],
    bound: BoundBlock,
) -> None:
    """Check parameters that were added to a streamed model and give those their values that begin as base weights.

    `added` and `base` are by name, those of `base` as they were before. Modules to save and the magnitudes of DoRA are
    filled, one block in memory at a time, unless a loaded adapter has done so. Blocks. ModelError for an
    initialisation that cannot be had without the whole base in memory, and for whatever is still without a value.
    """
    for adapter, config in peft_configs(model).items():
        wanted = getattr(config, "init_lora_weights", True)
        if wanted not in _KEPT_INITIALISATIONS:
            raise ModelError(
                f"adapter {adapter!r}: init_lora_weights={wanted!r} computes adapters from the base's weights, or changes "
                "these, while they are on the drive. Use True, False, 'gaussian' or 'orthogonal'; or make the adapter and the "
                "changed base once in memory with peft, save both, and open the changed base here"
            )
    changed = [name for name, p in base.items() if not is_placeholder(p)]
    if changed:
        raise ModelError(
            f"{changed[0]} and {len(changed) - 1} more weights of the base were replaced in memory, where they are not kept: "
            "a streamed base cannot be changed by adapters"
        )
    on_meta = [name for name, p in added.items() if p.device.type == "meta"]
    if on_meta:
        raise ModelError(f"{on_meta[0]} is on the meta device: call peft without low_cpu_mem_usage=True")
    if any(_has_nan(p) for p in added.values()):
        _fill(model, blocks, base, bound)
    for name, parameter in added.items():
        if _has_nan(parameter):
            raise ModelError(
                f"{name} has no value: it was made from weights of the base, which are on the drive, in a way that is not "
                "known here (known are modules_to_save and DoRA). Leave that option of the adapter's config out"
            )


def _has_nan(parameter: torch.Tensor) -> bool:
    return bool(torch.isnan(parameter.detach()).any())


def _fill(model: nn.Module, blocks: ModelBlocks, base: Mapping[str, nn.Parameter], bound: BoundBlock) -> None:
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    wrappers: dict[str, list[nn.Module]] = {}
    place = _Places(model, blocks, base)
    for module in model.modules():
        if isinstance(module, (ModulesToSaveWrapper, LoraLayer)):
            wrappers.setdefault(place.of(module), []).append(module)
    for block in blocks.blocks:
        if block.name not in wrappers:
            continue
        with bound(block.name), torch.no_grad():
            for wrapper in wrappers[block.name]:
                if isinstance(wrapper, ModulesToSaveWrapper):
                    _fill_copies(wrapper)
                else:
                    _fill_magnitudes(wrapper)


def _fill_copies(wrapper: Any) -> None:
    for copy in wrapper.modules_to_save.values():
        for name, parameter in copy.named_parameters():
            if _has_nan(parameter):
                parameter.data.copy_(wrapper.original_module.get_parameter(name))


def _fill_magnitudes(layer: Any) -> None:
    """By peft's own arithmetic, in the data type in which it has it: the adapters' before they were cast to float32."""
    for adapter, dora in layer.lora_magnitude_vector.items():
        kept = dora.weight
        if not _has_nan(kept):
            continue
        weight = layer.get_base_layer().weight
        if adapter in layer.lora_A:
            lora_a, lora_b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        else:
            lora_a, lora_b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        dora.update_layer(
            base_layer=layer.get_base_layer(),
            lora_A=lora_a.to(weight.dtype),
            lora_B=lora_b.to(weight.dtype),
            scaling=layer.scaling[adapter],
        )
        kept.data.copy_(dora.weight)
        dora.weight = kept


class _Places:
    """Tells which block a module that peft has made belongs to."""

    def __init__(self, model: nn.Module, blocks: ModelBlocks, base: Mapping[str, nn.Parameter]) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._modules = dict(model.named_modules())
        self._layers = f"{blocks.path}."
        owners = {name: block.name for block in blocks.blocks for name in block.parameters}
        self._owner_of: dict[int, str] = {id(parameter): owners[name] for name, parameter in base.items()}
        self._head: Any = model.get_output_embeddings()  # type: ignore[operator]

    def of(self, module: nn.Module) -> str:
        """The block; ModelError if the module is around no part of one."""
        name = self._names[module]
        if name.startswith(self._layers):
            index = name.removeprefix(self._layers).split(".")[0]
            return f"{self._layers}{index}"
        # Outside of the layers: as the nearest module around it that has weights of the base in it.
        while name:
            around = self._modules[name]
            if around is self._head:  # before its weights are asked: tied ones are the prologue's
                return EPILOGUE
            for parameter in around.parameters():
                if id(parameter) in self._owner_of:
                    return self._owner_of[id(parameter)]
            name = name.rpartition(".")[0]
        raise ModelError(f"{self._names[module]} was added beside the model's blocks, where it cannot be streamed")


def adapter_layouts(
    model: nn.Module, blocks: ModelBlocks, added: Mapping[str, nn.Parameter], base: Mapping[str, nn.Parameter]
) -> dict[str, list[ShardLayout]]:
    """By block, the shards of what was added to it and requires a gradient: one for each data type.

    ModelError for a data type that is not trained, and for a parameter that belongs to several blocks. Moments are
    float32 whatever those of the base are: adapters are small.
    """
    place = _Places(model, blocks, base)
    names = {id(p): name for name, p in added.items() if p.requires_grad}
    found: dict[int, str] = {}
    shapes: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) not in names:
                continue
            name, block = names[id(parameter)], place.of(module)
            if found.setdefault(id(parameter), block) != block:
                raise ModelError(f"{name} is used by {found[id(parameter)]} and {block}: adapters cannot be tied here")
            dtype = _COMPUTE_DTYPES.get(parameter.dtype)
            if dtype is None:
                raise ModelError(f"{name} is {parameter.dtype}: adapters must be float32 or bfloat16")
            shapes.setdefault((block, dtype), {})[name] = tuple(parameter.shape)
    layouts: dict[str, list[ShardLayout]] = {}
    for (block, dtype), of_shard in sorted(shapes.items()):
        name = f"{block}.adapters.{dtype}"
        layouts.setdefault(block, []).append(ShardLayout.of(name, of_shard, dtype, DEFAULT_CHUNK_ELEMENTS))
    return layouts


def pool_bytes(layouts: Sequence[ShardLayout]) -> int:
    """Host memory for weights and states of these shards."""
    return sum(pooled_bytes(s.weight_bytes) + pooled_bytes(s.state_bytes) for s in layouts)


def gradient_pool_bytes(layouts: Sequence[ShardLayout]) -> int:
    """Host memory for their gradients: all wait for the step, and one may be on its way to be added."""
    sizes = [pooled_bytes(s.gradient_bytes) for s in layouts]
    return sum(sizes) + max(sizes, default=0)


def record_pool_bytes(layouts: Sequence[ShardLayout]) -> int:
    """Host memory with which one parameter's state can be read and edited."""
    return 2 * max((pooled_bytes(s.full_record_bytes) for s in layouts), default=0)


def host_bytes(layouts: Sequence[ShardLayout]) -> int:
    """All host memory for these shards."""
    return pool_bytes(layouts) + gradient_pool_bytes(layouts) + record_pool_bytes(layouts)


class ResidentAdapters:
    """Trained adapters: their shards in the store, their weights and states in host memory, values on the device.

    Owns its buffers until `close`. The parameters become ones whose gradients the executor takes away.
    """

    def __init__(
        self,
        layouts: Sequence[ShardLayout],
        parameters: Mapping[str, nn.Parameter],
        configs: Mapping[str, Any],
        *,
        store: Store,
        engine: Engine,
    ) -> None:
        self.layouts = {layout.name: layout for layout in layouts}
        self._parameters = {slot.name: parameters[slot.name] for s in layouts for slot in s.parameters}
        self._store, self._engine = store, engine
        self._jobs: dict[str, UpdateJob] = {}
        self._lay_out(configs)
        self._pool = BufferPool(max(4096, pool_bytes(layouts)), name="adapters")
        try:
            self._weights = {s.name: self._pool.acquire(s.weight_bytes) for s in layouts}
            self.states = {s.name: self._pool.acquire(s.state_bytes) for s in layouts}
            for name in self.layouts:
                self.load(name, None)
        except BaseException:
            self._pool.close(force=True)
            raise
        for parameter in self._parameters.values():
            # The same object, which optimizers and peft hold already.
            parameter.__class__ = StreamedParameter

    def _lay_out(self, configs: Mapping[str, Any]) -> None:
        """Make the extents of a new run and commit its first values; ConfigError if the run has other adapters."""
        shards = json.loads(json.dumps([layout.to_json() for layout in self.layouts.values()]))
        described = {"configs": dict(configs), "shards": shards}
        stored: Any = self._store.state.get("adapters")
        if stored is not None:
            check_same(stored, described)
            return
        present = set(self._store.names())
        wanted = [layout for layout in self.layouts.values() if layout.weight_name not in present]
        specs = [ExtentSpec(s.weight_name, s.weight_bytes, 2, piece_bytes=s.weight_piece_bytes) for s in wanted]
        specs += [ExtentSpec(s.state_name, s.state_bytes, 2, piece_bytes=s.full_record_bytes) for s in wanted]
        self._store.allocate(specs)
        checksums: dict[str, str] = {}
        largest = max(layout.weight_bytes for layout in self.layouts.values())
        with BufferPool(largest + 2 * 2**20, name="adapters") as pool:
            for layout in self.layouts.values():
                values = {slot.name: self._parameters[slot.name].detach() for slot in layout.parameters}
                checksums[layout.weight_name] = write_block(self._store, self._engine, layout, values, pool)
        slots = {name: self._store.active_slot(name) for name in checksums}
        state: dict[str, Any] = self._store.state
        self._store.commit(
            step=self._store.step, slots=slots, checksums=checksums, state=state | {"adapters": described}
        )

    def load(self, name: str, slot: int | None) -> None:
        """Bring the weights of a shard's slot (None: the committed one) into memory and onto the device; blocks."""
        layout = self.layouts[name]
        array = self._weights[name].array[: layout.weight_bytes]
        self._engine.read(self._store.extent(layout.weight_name, slot), array).wait()
        self._to_parameters(layout)

    def reload(self, parameter: str, optimizer: OffloadedAdamW) -> None:
        """The same for the shard of a parameter whose state was edited, if it is one of these."""
        for layout in self.layouts.values():
            if any(slot.name == parameter for slot in layout.parameters):
                self.load(layout.name, optimizer.slot_of(layout.name))

    def start_update(self, name: str, optimizer: OffloadedAdamW) -> None:
        """Begin a shard's pending update; `finish_updates` makes its result visible."""
        # The last step's writes out of this buffer have ended: its commit is before this update in the queue.
        array = self._weights[name].array[: self.layouts[name].weight_bytes]
        self._jobs[name] = optimizer.start_pending_update(name, array, (), _nothing)

    def finish_updates(self, optimizer: OffloadedAdamW) -> None:
        """Give the parameters the values that the last step leaves; blocks until they are computed."""
        for name in self.layouts:
            if optimizer.has_pending_update(name):
                self.start_update(name, optimizer)
        for name, job in self._jobs.items():
            job.wait_ready()
            self._to_parameters(self.layouts[name])
        self._jobs.clear()

    def _to_parameters(self, layout: ShardLayout) -> None:
        read_values(layout, self._weights[layout.name].array[: layout.weight_bytes], self._parameters)

    def differing(self) -> str | None:
        """The name of a parameter into which somebody has put other values than its shard has; None for none."""
        for name, layout in self.layouts.items():
            flat = _flat(layout, self._weights[name].array[: layout.weight_bytes])
            for slot in layout.parameters:
                if not torch.equal(self._parameters[slot.name].detach().flatten().cpu(), flat[slot.start : slot.stop]):
                    return slot.name
        return None

    def close(self) -> None:
        """Give the buffers back, when nothing is being written from them any more. The parameters keep their values."""
        self._pool.close(force=True)


def _nothing() -> None:
    """What gives up nothing."""


def _flat(layout: ShardLayout, array: NDArray[np.uint8]) -> torch.Tensor:
    if layout.compute_dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.view(np.float32))


def read_values(layout: ShardLayout, array: NDArray[np.uint8], parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy a shard's weights, as they lie in the store, into its parameters; KeyError for one that is not there."""
    flat = _flat(layout, array)
    for slot in layout.parameters:
        # A copy: the buffer is written into while a graph may hold the parameter.
        parameters[slot.name].data.copy_(flat[slot.start : slot.stop].view(slot.shape))


def check_same(stored: Mapping[str, Any], described: Mapping[str, Any]) -> None:
    """ConfigError unless a run's adapters are those that it began with."""
    differing = sorted(
        f"{adapter}.{field}" if adapter else "adapters"
        for adapter, field in _differences(stored.get("configs", {}), described["configs"])
    )
    if differing or stored.get("shards") != described["shards"]:
        what = f"they differ in {', '.join(differing)}" if differing else "their parameters have other names or shapes"
        raise ConfigError(
            f"the adapters are not those of the run in this store: {what}. Give peft.get_peft_model the run's own config, or "
            "begin a new run in another directory"
        )


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, str]]:
    if one.keys() != other.keys():
        return [("", "")]
    return [
        (adapter, field)
        for adapter in one
        for field in one[adapter].keys() | other[adapter].keys()
        if one[adapter].get(field) != other[adapter].get(field)
    ]
