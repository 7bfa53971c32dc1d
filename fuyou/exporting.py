"""Writing a streamed model as an ordinary checkpoint: one safetensors file a block, an index, the configs."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file
from torch import nn

from fuyou.blocks import Block, ModelBlocks
from fuyou.errors import ModelError

ReadBlock = Callable[[Block], AbstractContextManager[dict[str, torch.Tensor]]]
"""Gives a block's parameters by name, in host memory, valid inside the context."""

INDEX_NAME = "model.safetensors.index.json"
SINGLE_FILE_NAME = "model.safetensors"


def export_checkpoint(
    model: nn.Module,
    blocks: ModelBlocks,
    read_block: ReadBlock,
    folder: str | os.PathLike[str],
) -> None:
    """Write the model to `folder` in transformers' format, holding one block in memory at a time; blocks until done.

    An earlier export in the folder stays whole until the new index takes its place in one rename; its weight files are
    deleted then, other files of the folder stay. ModelError if `folder` is a file, OSError if it cannot be written.
    """
    path = Path(folder).expanduser()
    if path.exists() and not path.is_dir():
        raise ModelError(f"{path}: is a file; name a folder to export to")
    path.mkdir(parents=True, exist_ok=True)
    written = [block for block in blocks.blocks if block.parameters]
    earlier = _weight_files(path)
    names = _file_names(len(written), taken={*earlier, *(p.name for p in path.iterdir())})
    weight_map: dict[str, str] = {}
    total_bytes = 0
    index = path / f".{INDEX_NAME}.partial"
    try:
        for block, name in zip(written, names, strict=True):
            with read_block(block) as tensors:
                if block is written[-1]:
                    tensors = tensors | _persistent_buffers(model)
                converted = _checkpoint_layout(model, tensors)
                save_file(converted, path / name, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(converted, name)
                total_bytes += sum(v.nbytes for v in converted.values())
                del tensors, converted
            _make_durable(path / name)
        content = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        index.write_text(json.dumps(content, indent=2) + "\n")
        _make_durable(index)
    except BaseException:
        for name in (*names, index.name):
            (path / name).unlink(missing_ok=True)
        raise
    _save_configs(model, path)
    index.replace(path / INDEX_NAME)
    _make_durable(path)
    # Last, since every loader prefers a single file to an index.
    for name in earlier:
        (path / name).unlink(missing_ok=True)


class NamesOnly(Mapping[str, Any]):
    """`state_dict()` of a streamed model: the names, as loaders of checkpoints ask for them, but no values."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = dict.fromkeys(names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> NoReturn:
        raise ModelError(
            "state_dict() of a streamed model would hold every weight in memory: use model.save_pretrained(folder) to "
            "export it, optimizer.state_of(name) to look at one parameter"
        )

    def __reduce__(self) -> NoReturn:
        self[""]
        raise AssertionError("unreachable")


def compare_state_dict(
    model: nn.Module,
    blocks: ModelBlocks,
    read_block: ReadBlock,
    state_dict: Mapping[str, torch.Tensor],
    *,
    strict: bool,
) -> Any:
    """`load_state_dict` of weights that the store holds already, as when a run continues; reads those blocks only.

    `state_dict` has the names of an export, tensors of any device. Returns torch's (missing_keys,
    unexpected_keys), of which nothing is missing.
    ModelError if a value differs, or if a name is missing or unknown and `strict`.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    homes: dict[str, Block] = {}
    for block in blocks.blocks:
        # Only the names are of interest, which depend on nothing but names and shapes.
        empty = {name: torch.empty_like(parameters[name], device="meta") for name in block.parameters}
        homes |= dict.fromkeys(_checkpoint_layout(model, empty), block)
    buffers = _persistent_buffers(model)
    known = {*homes, *buffers}
    missing, unexpected = sorted(known - set(state_dict)), sorted(set(state_dict) - known)
    if strict and (missing or unexpected):
        raise ModelError(
            f"load_state_dict() of a streamed model: {len(missing)} names are missing, {len(unexpected)} are none of the model's "
            f"(first: {[*missing, *unexpected][0]})"
        )
    for block in {id(homes[name]): homes[name] for name in state_dict if name in homes}.values():
        with read_block(block) as tensors:
            own = _checkpoint_layout(model, tensors)
            for name in own.keys() & state_dict.keys():
                given = state_dict[name].cpu()
                dtype = torch.promote_types(given.dtype, own[name].dtype)
                if not torch.equal(given.to(dtype), own[name].to(dtype)):
                    raise ModelError(
                        f"load_state_dict() of a streamed model: {name} differs from the store's, and the weights are those of the "
                        "store. A run continues from its store by itself; fuyou.from_pretrained(folder, ...) with another store "
                        "begins from other weights"
                    )
    return torch.nn.modules.module._IncompatibleKeys([], unexpected)  # the store has what is not given


def _weight_files(path: Path) -> set[str]:
    """Names of the weight files of the checkpoint that is in a folder; those that its index does not name are not ours."""
    found = {SINGLE_FILE_NAME} if (path / SINGLE_FILE_NAME).is_file() else set()
    try:
        named = json.loads((path / INDEX_NAME).read_text())["weight_map"].values()
    except (OSError, ValueError, KeyError, AttributeError):
        return found
    # A name with a folder in it could lead out of here.
    return found | {str(name) for name in named if Path(str(name)).name == str(name)}


def _file_names(count: int, *, taken: Collection[str]) -> list[str]:
    """transformers' usual names, or the first variant of them of which none is taken."""
    variant = 0
    while True:
        stem = "model" if variant == 0 else f"model-v{variant + 1}"
        names = [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        if not set(names) & set(taken):
            return names
        variant += 1


def _checkpoint_layout(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A block's tensors under the names and in the shapes that checkpoints of this model have."""
    from transformers.core_model_loading import revert_weight_conversion

    converted: dict[str, Any] = revert_weight_conversion(model, tensors)  # type: ignore[arg-type]
    return {name: tensor.contiguous() for name, tensor in converted.items()}


def _make_durable(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the drive."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {k: v.detach().cpu() for k, v in nn.Module.state_dict(model).items() if k not in parameters}


def _save_configs(model: nn.Module, path: Path) -> None:
    config: Any = copy.deepcopy(model.config)
    config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(path)
    generation_config: Any = getattr(model, "generation_config", None)
    if getattr(model, "can_generate", lambda: False)() and generation_config is not None:
        generation_config.save_pretrained(path)
