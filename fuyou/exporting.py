"""Writing a streamed model as an ordinary checkpoint: one safetensors file a block, an index, the configs."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fuyou.blocks import Block, ModelBlocks
from fuyou.errors import ModelError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_FILE_NAME = "model.safetensors"


def export_checkpoint(
    model: nn.Module,
    blocks: ModelBlocks,
    read_block: Callable[[Block], dict[str, torch.Tensor]],
    folder: str | os.PathLike[str],
) -> None:
    """Write the model to `folder` in transformers' format, holding one block in memory at a time; blocks until done.

    `read_block` gives a block's parameters by name, in host memory; they are not used after the block was written. An
    earlier export in the folder stays whole until the new index takes its place in one rename; its weight files are
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
            tensors = read_block(block)
            if block is written[-1]:
                tensors |= _persistent_buffers(model)
            converted = _checkpoint_layout(model, tensors)
            save_file(converted, path / name, metadata={"format": "pt"})
            _make_durable(path / name)
            weight_map |= dict.fromkeys(converted, name)
            total_bytes += sum(v.nbytes for v in converted.values())
            del tensors, converted
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
