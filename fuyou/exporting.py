"""Writing a streamed model as an ordinary checkpoint: one safetensors file a block, an index, the configs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from fuyou.blocks import Block, ModelBlocks
from fuyou.errors import ModelError

INDEX_NAME = "model.safetensors.index.json"


def export_checkpoint(
    model: nn.Module,
    blocks: ModelBlocks,
    read_block: Callable[[Block], dict[str, torch.Tensor]],
    folder: str | os.PathLike[str],
) -> None:
    """Write the model to `folder` in transformers' format, holding one block in memory at a time.

    `read_block` gives a block's parameters by name; they are not used after the block was written. Files are written
    under other names first, so that an earlier export stays whole until this one is.
    """
    from transformers.core_model_loading import revert_weight_conversion

    path = Path(folder).expanduser()
    if path.exists() and not path.is_dir():
        raise ModelError(f"{path}: is a file; name a folder to export to")
    path.mkdir(parents=True, exist_ok=True)
    written = [block for block in blocks.blocks if block.parameters]
    weight_map: dict[str, str] = {}
    total_bytes = 0
    partial: list[tuple[Path, Path]] = []
    persistent = _persistent_buffers(model)
    try:
        for number, block in enumerate(written, start=1):
            tensors = read_block(block)
            if block is written[-1]:
                tensors |= persistent
            converted = revert_weight_conversion(model, tensors)  # type: ignore[arg-type]
            name = f"model-{number:05d}-of-{len(written):05d}.safetensors"
            final, temporary = path / name, path / f".{name}.partial"
            partial.append((temporary, final))
            save_file({k: v.contiguous() for k, v in converted.items()}, temporary, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(converted, name)
            total_bytes += sum(v.nbytes for v in converted.values())
            del tensors, converted
    except BaseException:
        for temporary, _final in partial:
            temporary.unlink(missing_ok=True)
        raise
    # A single-file checkpoint of before would be preferred by every loader.
    (path / "model.safetensors").unlink(missing_ok=True)
    for old in path.glob("model-?????-of-?????.safetensors"):
        if old.name not in weight_map.values():
            old.unlink()
    for temporary, final in partial:
        temporary.replace(final)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (path / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    _save_configs(model, path)


def _persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {k: v.detach().cpu() for k, v in nn.Module.state_dict(model).items() if k not in parameters}


def _save_configs(model: nn.Module, path: Path) -> None:
    config = model.config
    config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")  # type: ignore[union-attr]
    config.architectures = [type(model).__name__]  # type: ignore[union-attr]
    config.save_pretrained(path)  # type: ignore[union-attr,operator]
    if getattr(model, "can_generate", lambda: False)() and getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(path)  # type: ignore[union-attr,operator]
