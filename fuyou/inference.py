"""Opening a model to look at it: out of a store, or out of a plain checkpoint folder, with its tokenizer and adapters."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fuyou.building import read_config, resolve_checkpoint
from fuyou.config import OffloadConfig, check_place
from fuyou.errors import ConfigError, DataError, ModelError
from fuyou.temporary import temporary_folder
from fuyou.tokenizing import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer
from io_engine import Store, StoreError

TOKENIZER_FOLDER = "tokenizer"
"""In a store's first directory: what `keep_tokenizer` leaves there. No part of the store's format."""

_BYTES_MARK = "bytes.json"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model comes from, looked at but not opened."""

    directories: tuple[Path, ...]
    """Of a store; empty for a checkpoint."""
    folder: Path | None
    """Of a checkpoint."""
    config: Any
    """The transformers config."""
    compute_dtype: str
    attn_implementation: str | None
    blocks_path: str | None
    made_from: str | None
    """What a store was filled from: a folder or a hub name, perhaps gone by now."""
    adapter: Path | None = None
    """A folder of peft with adapters to be put on the model; a store's run has its own on it already."""

    @property
    def place(self) -> Path:
        """Where its weights are."""
        return self.directories[0] if self.directories else self.folder or Path()


def find_source(given: str | Sequence[str], *, compute_dtype: str | None = None, adapter: str | None = None) -> Source:
    """A store's directory (or directories), a checkpoint's folder, or a name on the hub, which is downloaded.

    `compute_dtype` is for checkpoints; None: float32 where the config says so, else bfloat16. ConfigError, ModelError,
    StoreError.
    """

    from fuyou.store_contents import stored_config

    if adapter is not None and not (Path(adapter).expanduser() / "adapter_config.json").is_file():
        raise ConfigError(f"--adapter {adapter}: no adapter_config.json in it: name a folder that peft has saved")
    adapter_folder = None if adapter is None else Path(adapter).expanduser()
    directories = OffloadConfig(store=given).store_directories
    try:
        exists = Store.exists(directories)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if exists:
        snapshot = Store.peek(directories)
        if not snapshot.state.get("filled"):
            raise StoreError(f"{directories[0]} holds a store that was never filled, and no run: nothing can be opened")
        description = snapshot.description
        config = stored_config(description, snapshot.identity, directories[0])
        if compute_dtype not in (None, description["compute_dtype"]):
            raise ConfigError(
                f"--dtype {compute_dtype}: {directories[0]} is a store of {description['compute_dtype']} weights: leave it out"
            )
        if snapshot.state.get("adapters") and adapter is not None:
            raise ConfigError(f"--adapter {adapter}: the run in {directories[0]} has adapters of its own: leave it out")
        return Source(
            directories=directories,
            folder=None,
            config=config,
            compute_dtype=description["compute_dtype"],
            attn_implementation=description.get("attn_implementation"),
            blocks_path=description.get("blocks_path"),
            made_from=description.get("source"),
            adapter=adapter_folder,
        )
    if len(directories) > 1:
        raise StoreError(f"{', '.join(map(str, directories))}: no store of several directories")
    assert isinstance(given, str) or len(given) == 1
    name = given if isinstance(given, str) else given[0]
    folder = resolve_checkpoint(name)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: neither a store nor a checkpoint (no config.json in it)")
    config = read_config(folder)
    wanted = compute_dtype or ("float32" if "float32" in str(getattr(config, "dtype", None)) else "bfloat16")
    return Source((), folder, config, wanted, None, None, None, adapter_folder)


# ------------------------------------------------------------------------------------------------------ tokenizer


def keep_tokenizer(tokenizer: Tokenizer, generation_config: Any, directory: Path) -> None:
    """Leave a run's tokenizer and generation settings in its store's directory, unless they are there; OSError."""
    folder = directory / TOKENIZER_FOLDER
    if folder.is_dir():
        return
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.tokenizer.save_pretrained(str(partial))
    else:
        (partial / _BYTES_MARK).write_text("{}\n", encoding="utf-8")
    if generation_config is not None:
        (partial / "generation_config.json").write_text(
            json.dumps(generation_config.to_diff_dict(), indent=2, default=str) + "\n", encoding="utf-8"
        )
    partial.rename(folder)


def find_tokenizer(source: Source, name: str | None) -> Tokenizer:
    """The tokenizer named, or that of the source; DataError if there is none.

    A store's is the one that its run has left in it, else that of the checkpoint which it was filled from.
    """
    if name is not None:
        return load_tokenizer(name)
    if not source.directories:
        return load_tokenizer(str(source.folder))
    kept = source.directories[0] / TOKENIZER_FOLDER
    if (kept / _BYTES_MARK).is_file():
        return ByteTokenizer()
    if kept.is_dir():
        return load_tokenizer(str(kept))
    if source.made_from and Path(source.made_from).expanduser().is_dir():
        return load_tokenizer(str(Path(source.made_from).expanduser()))
    raise DataError(
        f"{source.place}: no tokenizer in this store (it was not made by fuyou train): name one with --tokenizer, a folder, "
        'a name on the hub, or "bytes"'
    )


# --------------------------------------------------------------------------------------------------------- opening


@contextlib.contextmanager
def opened(
    source: Source,
    *,
    device: str | None = None,
    gpu_memory: str | int | None = None,
    host_memory: str | int | None = None,
    temporary: str | None = None,
) -> Iterator[Any]:
    """The model in evaluation mode, frozen, until the end of the context; weights are read from where they are.

    A checkpoint's weights lie in the files as no transfer can take them (not aligned, not in the order of use, converted
    by transformers), so they are first copied, block by block, to a store in a new directory in `temporary` (None: beside
    the checkpoint), which is deleted at the end. Needs as much space as the weights. Blocks for that.
    """
    import fuyou
    from fuyou.opening import open_store_model

    options: dict[str, Any] = {"device": device, "gpu_memory": gpu_memory, "host_memory": host_memory}
    with contextlib.ExitStack() as stack:
        if source.directories:
            model = open_store_model([str(directory) for directory in source.directories], **options)
        else:
            assert source.folder is not None
            parent = source.folder.parent if temporary is None else Path(temporary).expanduser()
            check_place("--temporary", parent)
            if not parent.is_dir():
                raise ConfigError(f"--temporary {parent}: no such folder")
            try:
                copied = stack.enter_context(temporary_folder(parent))
            except OSError as error:
                raise ConfigError(
                    f"a copy of the weights cannot be made in {parent} ({error.strerror}): name another folder with --temporary"
                ) from None
            offload = OffloadConfig(store=copied, compute_dtype=source.compute_dtype, **options)  # type: ignore[arg-type]
            model = fuyou.from_pretrained(source.folder, offload=offload, trainable=())
        stack.enter_context(model.fuyou)
        _load_generation_config(model, source)
        if source.adapter is not None:
            import peft

            model = peft.PeftModel.from_pretrained(model, str(source.adapter))
        model.eval()
        yield model


def _load_generation_config(model: Any, source: Source) -> None:
    from transformers import GenerationConfig

    folders = [directory / TOKENIZER_FOLDER for directory in source.directories[:1]]
    if source.made_from:
        folders.append(Path(source.made_from).expanduser())
    for folder in folders:
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
            return
