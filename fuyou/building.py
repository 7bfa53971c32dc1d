"""Filling a model's blocks one at a time: from a checkpoint's safetensors, or with seeded random values.

At no time is more than one block in memory. Checkpoints are read through transformers' own weight conversion, since
their layout is not that of the modules (one tensor per expert in the file, one fused tensor in the module).
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import nn

from fuyou.blocks import CONSTRUCTED_VALUES, Block, ModelBlocks
from fuyou.errors import ModelError
from fuyou.quantising import QuantisedLayout
from io_engine import BufferPool, Engine, Store, combine_checksums, piece_digest
from optim import ShardLayout

BlockWriter = Callable[[Block, dict[str, torch.Tensor]], None]
"""Takes a block and its parameters' values by name, in the compute dtype, in host memory, until it returns."""


class StreamedParameter(nn.Parameter):
    """A parameter whose values and gradients are in memory for moments only; reading `grad` says so.

    Without that, `torch.nn.utils.clip_grad_norm_` and whatever else works on `p.grad` would find None everywhere, and
    silently do nothing.
    """

    stand_in: Callable[[], torch.Tensor | None] | None = None
    """What `grad` gives while something that only looks at gradients (Trainer's log) is known to be running."""

    @property
    def grad(self) -> torch.Tensor | None:
        """None if it needs no gradient; ModelError otherwise, since the gradient is not kept."""
        if self.stand_in is not None:
            return self.stand_in()
        if not self.requires_grad:
            return None
        raise ModelError(
            "p.grad of a streamed model: its gradients go to the optimizer block by block and are never kept. To clip, use "
            "fuyou.AdamW(model, ..., max_grad_norm=...) instead of clip_grad_norm_; with transformers.Trainer pass "
            "callbacks=[fuyou.FuyouCallback()], which moves its max_grad_norm there; the optimizer must be fuyou.AdamW"
        )

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        if value is not None:
            raise ModelError("p.grad of a streamed model cannot be set: its gradients never wait in p.grad")

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in torch; ModelError for weights on the drive that are to be converted, which is to be computed with.

        What initialises adapters by the base's weights (PiSSA, OLoRA, CorDA, LoftQ, MiCA) begins so.
        """
        converts = any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values()))
        if converts and is_placeholder(self):
            raise ModelError(
                "weights of a streamed model were about to be computed with while they are on the drive. If this is an "
                "adapter's initialisation (PiSSA, OLoRA, CorDA, LoftQ, MiCA): those compute adapters from the base's weights, or "
                "change these. Use init_lora_weights=True, 'gaussian' or 'orthogonal'; or make the adapter and the changed base "
                "once in memory with peft, save both, and open the changed base here"
            )
        return super().to(*args, **kwargs)

    def take_gradient(self) -> torch.Tensor | None:
        """The gradient that autograd has left here, which is forgotten here."""
        descriptor: Any = torch.Tensor.grad
        gradient: torch.Tensor | None = descriptor.__get__(self)
        descriptor.__set__(self, None)
        return gradient


_WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
"""What a safetensors file may hold a weight in."""


def placeholder(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of the right shape, dtype and device that takes one element of memory.

    It is NaN, so that a use of weights which are not there cannot pass for a result.
    """
    return torch.full((1,), float("nan") if dtype.is_floating_point else 0, dtype=dtype, device=device).expand(shape)


def is_placeholder(tensor: torch.Tensor) -> bool:
    """Whether this is one, or has one element and could be."""
    return tensor.untyped_storage().nbytes() <= tensor.element_size()


def replace_by_placeholders(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give every parameter of a meta model a placeholder on `device`, ties kept; move the buffers there."""
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in replaced:
                data = placeholder(parameter.shape, dtype, device)
                replaced[id(parameter)] = StreamedParameter(data, requires_grad=parameter.is_floating_point())
            module._parameters[name] = replaced[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def random_blocks(model: nn.Module, blocks: ModelBlocks, seed: int, write: BlockWriter) -> None:
    """Initialise each block as transformers would, from (seed, number of the block), and write it."""
    from transformers import PreTrainedModel
    from transformers import initialization as init

    owners = _owners(model)
    parents: dict[nn.Module, PreTrainedModel] = {}

    def assign(module: nn.Module, parent: Any) -> None:
        parent = module if isinstance(module, PreTrainedModel) else parent
        parents[module] = parent
        for child in module.children():
            assign(child, parent)

    assign(model, model)
    guard = getattr(init, "guard_torch_init_functions", contextlib.nullcontext)
    state = torch.get_rng_state()
    placeholders = list(model.parameters())
    try:
        # A module may hold parameters of several blocks (a tied weight and a bias of its own): only this block's are made.
        for made in placeholders:
            made._is_hf_initialized = True  # type: ignore[attr-defined]
        for number, block in enumerate(blocks.blocks):
            first_holders = {(id(owners[name][0][0]), owners[name][0][1]) for name in block.parameters}
            torch.manual_seed((seed * 1_000_003 + number) & (2**63 - 1))
            with _materialised(model, block, owners) as modules, torch.no_grad(), guard():
                for module in modules:
                    # A tied weight is initialised as its first holder's, usually the embedding's, not again as the head's.
                    for attribute, parameter in module._parameters.items():
                        if parameter is not None:
                            first = (id(module), attribute) in first_holders
                            parameter._is_hf_initialized = not first  # type: ignore[attr-defined]
                    parents[module]._init_weights(module)
                values: dict[str, torch.Tensor] = {}
                for name in block.parameters:
                    holder, attribute = owners[name][0]
                    values[name] = holder._parameters[attribute].detach()  # type: ignore[union-attr]
                    _check_initialised(name, values[name])
                write(block, values)
    finally:
        for parameter in placeholders:
            del parameter._is_hf_initialized  # type: ignore[attr-defined]
        torch.set_rng_state(state)


def _check_initialised(name: str, value: torch.Tensor) -> None:
    """Some classes fill large weights in their constructor, which has run without memory, and nowhere else."""
    if bool(torch.isnan(value).any()):
        raise ModelError(
            f"{name} is not initialised by its model's _init_weights: make the model once in transformers, "
            "save_pretrained it, and use fuyou.from_pretrained"
        )


def _owners(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Each parameter's name -> every (module, attribute) that holds it."""
    names = {id(p): name for name, p in model.named_parameters()}
    owners: dict[str, list[tuple[nn.Module, str]]] = collections.defaultdict(list)
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners[names[id(parameter)]].append((module, attribute))
    return owners


@contextlib.contextmanager
def _materialised(
    model: nn.Module, block: Block, owners: dict[str, list[tuple[nn.Module, str]]]
) -> Iterator[list[nn.Module]]:
    """Real host parameters, NaN where no constructor set them, for one block; yields its modules, children first."""
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    direct: set[nn.Module] = set()
    for name in block.parameters:
        module, attribute = owners[name][0]
        old = module._parameters[attribute]
        assert old is not None
        new = nn.Parameter(torch.full(old.shape, float("nan"), dtype=old.dtype), requires_grad=False)
        constructed = getattr(module, CONSTRUCTED_VALUES, {}).get(attribute)
        if constructed is not None:
            new.data.copy_(constructed)
        for module, attribute in owners[name]:
            kept.append((module, attribute, old))
            module._parameters[attribute] = new
            direct.add(module)
    if block.kind == "layer":
        root = model.get_submodule(block.name)
        modules = [m for m in _children_first(root)]
    else:
        modules = [m for m in _children_first(model) if m in direct]
    try:
        yield modules
    finally:
        for module, attribute, old in kept:
            module._parameters[attribute] = old


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _children_first(child)
    yield module


def read_config(folder: Path) -> Any:
    """The transformers config of a checkpoint's folder; ModelError."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json in it; name the folder that holds it and the safetensors files")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{folder}: no usable config.json ({said[:300]})") from error


def resolve_checkpoint(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local folder of a checkpoint; a hub name is downloaded (configs, tokenizer, safetensors)."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{name_or_path}: is a file; name the folder that holds config.json and the safetensors files")
    if path.is_absolute() or str(name_or_path).startswith((".", "~")):
        raise ModelError(f"{name_or_path}: no such folder; name one that holds config.json and the safetensors files")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(name_or_path),
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
            )
        )
    except Exception as error:  # the hub's client raises its own errors, OSErrors and ValueErrors
        raise ModelError(
            f"{name_or_path!r} is no local folder and could not be had from the Hugging Face hub: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder; ModelError if there are none or one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index}: not a safetensors index ({error}); fetch the checkpoint again") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{folder}: {len(missing)} of {len(names)} weight files named by the index are missing, first {missing[0]}; "
                "fetch the checkpoint again"
            )
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise ModelError(
        f"{folder}: no model.safetensors and no model.safetensors.index.json; other formats are converted by loading the "
        "model in transformers and calling save_pretrained once"
    )


def load_blocks(model: nn.Module, blocks: ModelBlocks, folder: Path, dtype: torch.dtype, write: BlockWriter) -> None:
    """Stream a checkpoint's weights into the blocks, one block at a time, and its persistent buffers into the model.

    ModelError for missing, corrupt or mismatching weights; nothing random is ever put in their place.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        convert_and_load_state_dict_in_model,
        rename_source_key,
    )
    from transformers.modeling_utils import LoadStateDictConfig

    files = checkpoint_files(folder)
    mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = model.state_dict()
    owners = _owners(model)
    prefixes = {module: f"{name}." if name else "" for name, module in model.named_modules()}
    aliases = {f"{prefixes[m]}{attribute}": name for name, pairs in owners.items() for m, attribute in pairs}
    block_of = {name: block for block in blocks.blocks for name in block.parameters}
    keys: dict[str, list[tuple[Path, str]]] = collections.defaultdict(list)
    buffers: list[tuple[Path, str]] = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                dtypes = {key: opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: not a readable safetensors file ({error}); fetch it again") from None
        for key, stored_dtype in dtypes.items():
            target, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, known)  # type: ignore[arg-type]
            if target not in known and key in known:
                target = key
            if target in aliases:
                if stored_dtype not in _WEIGHT_DTYPES:
                    raise ModelError(
                        f"{file}: {key} is stored as {stored_dtype}: only unquantized weights ({', '.join(_WEIGHT_DTYPES)}) can "
                        "be trained"
                    )
                keys[block_of[aliases[target]].name].append((file, key))
            elif target in known:
                buffers.append((file, key))

    def load(entries: list[tuple[Path, str]]) -> Any:
        with contextlib.ExitStack() as stack:
            opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in {f for f, _ in entries}}
            slices = {key: opened[file].get_slice(key) for file, key in entries}
            config = LoadStateDictConfig(dtype=dtype, weight_mapping=mapping)  # type: ignore[arg-type]
            return convert_and_load_state_dict_in_model(model, slices, config)[0]  # type: ignore[arg-type]

    with _quietly_sequential():
        for block in blocks.blocks:
            if not block.parameters:
                continue
            originals = {name: [(m, a, m._parameters[a]) for m, a in owners[name]] for name in block.parameters}
            try:
                try:
                    info = load(keys[block.name])
                except (SafetensorError, OSError) as error:
                    raise ModelError(f"{folder}: the weights of {block.name} cannot be read: {error}") from error
                _check_loaded(info, folder, block.name)
                values: dict[str, torch.Tensor] = {}
                for name, holders in originals.items():
                    loaded = [m._parameters[a] for m, a, old in holders if m._parameters[a] is not old]
                    if not loaded or loaded[0] is None:
                        raise ModelError(
                            f"{folder}: {name} is missing in the checkpoint; it does not belong to this config"
                        )
                    values[name] = loaded[0].detach()
                write(block, values)
            finally:
                for holders in originals.values():
                    for module, attribute, old in holders:
                        module._parameters[attribute] = old
        if buffers:
            load(buffers)
    # Exports use the default conversion of the model's class, also after a restart that loaded no checkpoint.
    if hasattr(model, "_weight_conversions"):
        del model._weight_conversions


def _check_loaded(info: Any, folder: Path, block_name: str) -> None:
    """ModelError for what transformers reports of a block instead of raising it."""
    if info.mismatched_keys:
        name, found, expected = next(iter(info.mismatched_keys))
        raise ModelError(
            f"{folder}: {name} has shape {tuple(found)} in the checkpoint, the config asks for {tuple(expected)}"
        )
    if info.conversion_errors or info.error_msgs:
        problem = next(iter([*info.conversion_errors.values(), *info.error_msgs]))
        raise ModelError(f"{folder}: the weights of {block_name} could not be converted: {problem}")


@contextlib.contextmanager
def _quietly_sequential() -> Iterator[None]:
    """One tensor at a time, so that memory stays at one block, and no progress bar a block."""
    from transformers.utils import logging

    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
        if before is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before


def write_block(
    store: Store, engine: Engine, layout: ShardLayout, values: Mapping[str, torch.Tensor], pool: BufferPool
) -> str:
    """Write a block's weights to its extent's active slot and return their checksum; blocks."""
    weight_type = torch.bfloat16 if layout.compute_dtype == "bfloat16" else torch.float32
    with pool.acquire(layout.weight_bytes) as buffer:
        array = buffer.array[: layout.weight_bytes]
        array[:] = 0
        if isinstance(layout, QuantisedLayout):
            for name, value in values.items():
                _check_finite(name, value)
            layout.quantise(values, torch.from_numpy(array))
            return _write(store, engine, layout, array)
        flat = torch.from_numpy(array.view(np.int16 if layout.compute_dtype == "bfloat16" else np.float32))
        flat = flat.view(weight_type)
        for p in layout.parameters:
            value = values[p.name]
            _check_finite(p.name, value)
            flat[p.start : p.stop].copy_(value.reshape(-1))
        return _write(store, engine, layout, array)


def _write(store: Store, engine: Engine, layout: ShardLayout, array: NDArray[np.uint8]) -> str:
    engine.write(store.extent(layout.weight_name), array).wait()
    piece = layout.weight_piece_bytes
    return combine_checksums([piece_digest(array[at : at + piece]) for at in range(0, len(array), piece)])


def _check_finite(name: str, value: torch.Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise ModelError(f"{name} holds NaN or infinity: this checkpoint cannot be trained")
