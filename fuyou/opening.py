"""Making and opening streamed models: `from_pretrained`, `from_config`, `open_store_model`."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fuyou.adapters import adapter_layouts, host_bytes
from fuyou.architecture import differences, fingerprint
from fuyou.base_store import SHARED, base_of_run, check_base, open_base
from fuyou.blocks import ModelBlocks, find_blocks, meta_model, shape_model
from fuyou.building import (
    BlockWriter,
    checkpoint_files,
    load_blocks,
    random_blocks,
    read_config,
    replace_by_placeholders,
    resolve_checkpoint,
    write_block,
)
from fuyou.config import OffloadConfig
from fuyou.errors import ConfigError, FuyouError, ModelError
from fuyou.executor.head import check_chunkable
from fuyou.freezing import freeze
from fuyou.hardware import HardwareProfile, cached_hardware
from fuyou.memory import bound_process_memory
from fuyou.plan import Plan, StepShape
from fuyou.planner import PlanInputs, ShardSize
from fuyou.planning import choose_device, plan_for, plan_inputs, shard_layouts, shard_sizes
from fuyou.quantising import QuantisedLayout, check_available
from fuyou.runtime import Runtime
from fuyou.store_contents import (
    DTYPES,
    MOST_LAYERS,
    check_layers,
    jsonable,
    name_contents,
    stored_config,
)
from fuyou.trace import Trace
from io_engine import (
    BufferPool,
    Engine,
    ExtentSpec,
    PosixEngine,
    Store,
    StoreError,
    StoreLockedError,
    StoreSnapshot,
    VerifyingEngine,
    choose_engine,
    probe_directory,
)
from io_engine.directories import make_directory
from optim import OffloadedAdamW, ShardLayout

_logger = logging.getLogger(__name__)

SWITCH_SECONDS = 5e-4
"""How long a thread keeps the interpreter from those that wait for it, at most; of the whole process, from the first model on."""


def from_pretrained(
    name_or_path: str | os.PathLike[str],
    *,
    offload: OffloadConfig,
    seed: int | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    trainable: Sequence[str] | None = None,
) -> Any:
    """A causal language model of a local folder or hub name, its weights in a store on the drive.

    The object is an instance of its transformers class; `model.fuyou` holds the rest. A new store is filled from the
    checkpoint's safetensors, one block in memory at a time; a store that holds this model already is continued at its
    committed step, as `offload.resume` says. `seed` chooses dropout's random numbers (None: 0, or the store's).
    `trainable` lists patterns (regular expressions of whole names) of parameters to train, or of modules to train all of;
    None: everything. Blocks until the weights are on the drive.

    Raises ConfigError, PlanError (budget too small), ModelError (checkpoint unusable), StoreError, OSError; nothing
    that was in the store is lost then.
    """
    folder = resolve_checkpoint(name_or_path, revision)
    config = read_config(folder)

    def fill(model: nn.Module, blocks: ModelBlocks, write: BlockWriter) -> None:
        load_blocks(model, blocks, folder, DTYPES[offload.compute_dtype], write)

    return _open(
        config,
        offload,
        source=str(name_or_path),
        seed=seed,
        attn_implementation=attn_implementation,
        trainable=trainable,
        fill=fill,
        check=lambda: checkpoint_files(folder),
        folder=folder,
    )


def from_config(
    config: Any,
    *,
    offload: OffloadConfig,
    seed: int | None = None,
    attn_implementation: str | None = None,
    trainable: Sequence[str] | None = None,
) -> Any:
    """As `from_pretrained`, with random weights made block by block from a transformers config and `seed`."""

    def fill(model: nn.Module, blocks: ModelBlocks, write: BlockWriter) -> None:
        random_blocks(model, blocks, seed or 0, write)

    return _open(
        config,
        offload,
        source=f"random weights, seed {seed or 0}",
        seed=seed,
        attn_implementation=attn_implementation,
        trainable=trainable,
        fill=fill,
        check=lambda: None,
        folder=None,
    )


def open_store_model(
    store: str | os.PathLike[str] | Sequence[str],
    *,
    host_memory: str | int | None = None,
    gpu_memory: str | int | None = None,
    device: str | None = None,
) -> Any:
    """The model of a store, from the store alone (its config is in it): for export, evaluation and generation.

    With the adapters of its run, if it has trained any, in peft's model around it. Nothing in it requires gradients, so
    that a budget for one block's weights does.
    """
    directories = OffloadConfig(store=store).store_directories
    snapshot = Store.peek(directories)
    description = snapshot.description
    if not _is_filled(snapshot):
        raise StoreError(f"{directories[0]} holds a store that was never filled, and no run: nothing can be opened")
    config = stored_config(description, snapshot.identity, directories[0])
    offload = OffloadConfig(
        store=store,
        device=device,
        gpu_memory=gpu_memory,
        host_memory=host_memory,
        compute_dtype=description["compute_dtype"],
        moment_dtype=description.get("moment_dtype", "float32"),
        frozen_dtype=description.get("frozen_dtype", "bfloat16"),
        resume="must",
        blocks=description.get("blocks_path"),
    )

    def fill(*_: Any) -> None:
        raise AssertionError("resume='must' opens filled stores only")

    model = _open(
        config,
        offload,
        source="",
        seed=None,
        attn_implementation=description.get("attn_implementation"),
        trainable=(),
        fill=fill,
        check=lambda: None,
        folder=None,
    )
    try:
        wrapped = model.fuyou.restore_adapters()
    except BaseException:
        model.fuyou.abandon()
        raise
    if wrapped is not model:
        model.fuyou.guard_wrapper(wrapped)
    return wrapped


def adamw(
    model: Any,
    lr: float = 1e-5,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    max_grad_norm: float | None = None,
    param_groups: Iterable[dict[str, Any]] | None = None,
) -> OffloadedAdamW:
    """AdamW for a streamed model, used like `torch.optim.AdamW`; its states live in the model's store.

    Trains what requires a gradient now; `param_groups` as in torch (groups of `model.parameters()`). `max_grad_norm`
    clips the global gradient norm exactly. Lays out the states at first; blocks for that. ConfigError, PlanError,
    StoreError, OSError.
    """
    runtime = getattr(model, "fuyou", None)
    if not isinstance(runtime, Runtime):
        raise ConfigError(
            "fuyou.AdamW needs a model of fuyou.from_pretrained or fuyou.from_config; for an ordinary model use "
            "torch.optim.AdamW"
        )
    groups = (
        list(param_groups)
        if param_groups is not None
        else [{"params": [p for p in model.parameters() if p.requires_grad]}]
    )
    try:
        optimizer = runtime.make_optimizer(
            groups, max_grad_norm=max_grad_norm, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )
        runtime.guard_wrapper(model)
        return optimizer
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(str(error)) from error


def plan_model(
    name_or_path_or_config: Any,
    *,
    offload: OffloadConfig,
    batch_size: int,
    sequence_length: int,
    max_grad_norm: float | None = None,
    hardware: HardwareProfile | None = None,
    trainable: Sequence[str] | None = None,
    lora: Any = None,
) -> Plan:
    """The plan of a training run without loading a weight; PlanError if it does not fit.

    With `hardware` for the machine of that profile, else for this one. `trainable` as in `from_pretrained`. `lora` is a peft
    config: the plan is of a frozen base with such adapters.
    """
    inputs = inputs_of_run(
        name_or_path_or_config,
        offload=offload,
        batch_size=batch_size,
        sequence_length=sequence_length,
        max_grad_norm=max_grad_norm,
        hardware=hardware,
        trainable=trainable,
        lora=lora,
    )
    return plan_for(inputs, offload)


def inputs_of_run(
    name_or_path_or_config: Any,
    *,
    offload: OffloadConfig,
    batch_size: int,
    sequence_length: int,
    max_grad_norm: float | None = None,
    hardware: HardwareProfile | None = None,
    trainable: Sequence[str] | None = None,
    lora: Any = None,
    elsewhere: bool = True,
    shape: StepShape | None = None,
) -> PlanInputs:
    """What `plan_model` decides by; `elsewhere`: `hardware` says how much memory there is, too.

    With `shape` its tokens count, and not those of batch_size rows of sequence_length.
    """
    config = name_or_path_or_config
    if isinstance(config, str | os.PathLike):
        config = read_config(resolve_checkpoint(config))
    device = hardware.device if hardware is not None else choose_device(offload)
    with model_of(config, DTYPES[offload.compute_dtype], make=shape_model) as model:
        blocks = find_blocks(model, offload.blocks)
        layouts = shard_layouts(blocks, model, offload.compute_dtype, offload.moment_dtype)
        freeze(model, trainable if lora is None else ())
        base = dict(model.named_parameters())
        adapters = {} if lora is None else _planned_adapters(model, blocks, base, lora)
        trained = {name for name, p in base.items() if p.requires_grad}
    return plan_inputs(
        shard_sizes(blocks, layouts, trained.__contains__, adapters),
        offload,
        device=device,
        clipping=max_grad_norm is not None,
        micro_batch_size=offload.micro_batch_size,
        hardware=hardware or cached_hardware(offload.store_directories, device, offload.compute_dtype),
        elsewhere=hardware is not None and elsewhere,
        shape=shape
        or StepShape(
            batch_size * sequence_length,
            -(-batch_size // (offload.micro_batch_size or batch_size)),
            sequence_length,
        ),
        adapter_bytes=host_bytes([shard for shards in adapters.values() for shard in shards]),
    )


def _planned_adapters(
    model: nn.Module, blocks: ModelBlocks, base: Mapping[str, nn.Parameter], config: Any
) -> dict[str, list[ShardLayout]]:
    """The shards, by block, of adapters that peft puts into a model of shapes alone."""
    import peft

    try:
        peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ConfigError(f"lora: {(str(error) or type(error).__name__).splitlines()[0]}") from None
    known = {id(p) for p in base.values()}
    added = {name: p for name, p in model.named_parameters() if id(p) not in known}
    return adapter_layouts(model, blocks, added, base)


def shards_of(config: Any) -> list[ShardSize]:
    """What the planner knows of a transformers config's model, all of it trained; nothing is loaded or downloaded."""
    with model_of(config, torch.bfloat16, make=shape_model) as model:
        blocks = find_blocks(model)
        layouts = shard_layouts(blocks, model, "bfloat16", "float32")
    return shard_sizes(blocks, layouts, lambda _name: True)


@contextlib.contextmanager
def model_of(config: Any, dtype: torch.dtype, *, make: Any = meta_model, **kwargs: Any) -> Iterator[nn.Module]:
    """`meta_model` (or `shape_model`) of a config that may be anybody's: ModelError for whatever transformers raises."""
    with contextlib.ExitStack() as stack:
        try:
            check_layers(config.to_dict(), MOST_LAYERS)
            model = stack.enter_context(make(config, dtype, **kwargs))
        except FuyouError:
            raise
        except Exception as error:  # models of many authors fail in many ways
            reason = (str(error) or "no reason given").splitlines()[0][:200]
            raise ModelError(
                f"transformers cannot make a model of this {getattr(config, 'model_type', '')} config "
                f"({type(error).__name__}: {reason}): check its sizes"
            ) from error
        yield model


def _open(
    config: Any,
    offload: OffloadConfig,
    *,
    source: str,
    seed: int | None,
    attn_implementation: str | None,
    trainable: Sequence[str] | None,
    fill: Callable[[nn.Module, ModelBlocks, BlockWriter], None],
    check: Callable[[], object],
    folder: Path | None,
) -> Any:
    bound_process_memory()
    # I/O threads ask for the interpreter between requests; at Python's 5 ms a busy main thread costs them a quarter.
    sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
    device = choose_device(offload)
    dtype = DTYPES[offload.compute_dtype]
    kwargs = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    directories = offload.store_directories
    _let_go_of_interrupted(directories[0])
    found = Store.peek(directories) if Store.exists(directories) else None
    _check_resume(offload, found, directories[0])
    base_directories = base_of_run(offload, found, directories[0])
    if base_directories is not None:
        if trainable:
            raise ConfigError(
                f"base={base_directories[0]}: nothing of a base is trained, and trainable={list(trainable)!r} asks for it: leave "
                "one of them out"
            )
        trainable = ()
    with model_of(config, dtype, **kwargs) as model:
        blocks = find_blocks(model, offload.blocks)
    # A base has no states, and should fit all runs whatever theirs are.
    moment_dtype = "float32" if base_directories is not None else offload.moment_dtype
    layouts = shard_layouts(blocks, model, offload.compute_dtype, moment_dtype)
    replace_by_placeholders(model, dtype, torch.device(device))
    freeze(model, trainable)
    model.train()
    if offload.loss_chunk_tokens is not None:
        check_chunkable(model)
    identity = {
        "fingerprint": fingerprint(config, type(model).__name__),
        "compute_dtype": offload.compute_dtype,
        "moment_dtype": moment_dtype,
        "frozen_dtype": offload.frozen_dtype,
    }
    if found is not None:
        _check_identity(found, identity, jsonable(config.to_dict()), type(model).__name__, directories[0])
    holder = found  # of the weights
    if base_directories is not None:
        holder = Store.peek(base_directories) if Store.exists(base_directories) else None
        if _is_filled(holder):
            assert holder is not None
            check_base(holder, identity, layouts.values(), jsonable(config.to_dict()), type(model).__name__)
    if offload.frozen_dtype != "bfloat16":
        layouts |= _quantised(layouts, model, blocks, offload.frozen_dtype, holder)
    # Refused before anything is made on the drive; clipping is not known yet, and needs no more memory.
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    plan = plan_for(
        plan_inputs(
            shard_sizes(blocks, layouts, trained.__contains__),
            offload,
            device=device,
            clipping=False,
            micro_batch_size=None,
        ),
        offload,
    )
    if holder is None:
        check()  # a checkpoint that cannot be read makes no store
    everywhere = (*directories, *(base_directories or ()))
    for directory in everywhere:  # what is measured must be there
        make_directory(str(directory))
    choice = choose_engine(offload.io, everywhere, num_threads=plan.num_io_threads)
    engine = choice.engine
    description = {
        "model": type(model).__name__,
        "source": source,
        "compute_dtype": offload.compute_dtype,
        "moment_dtype": moment_dtype,
        "frozen_dtype": offload.frozen_dtype,
        "blocks_path": blocks.path,
        "attn_implementation": attn_implementation,
        "config": config.to_dict() | {"model_type": config.model_type},
        "shards": [layout.to_json() for layout in layouts.values()],
    }

    def fill_store(store: Store, numerics: Mapping[str, Any], **state: Any) -> None:
        _allocate(store, layouts, description)
        _fill(store, engine, model, blocks, layouts, fill, {"numerics": numerics, **state})

    store: Store | None = None
    base: Store | None = None
    record: dict[str, Any] = {}
    runtime: Runtime | None = None
    try:
        if base_directories is not None:
            if not _is_filled(holder):
                with _open_or_create(base_directories, identity, engine) as made:
                    fill_store(made, _numerics(made, offload, seed, device), **{SHARED: True})
            base, record = open_base(base_directories, engine, layouts.values(), found)
            name_contents(base)
        store = _open_or_create(directories, identity, engine)
        name_contents(store)
        numerics = _numerics(store, offload, seed, device)
        went_back = _go_back(store, offload.resume)
        holds_run = _is_filled(store)
        if holds_run:
            resumed = f"resumed at step {store.step} from {directories[0]}{went_back}"
        elif base is None:
            resumed = f"new store in {directories[0]}, filled from {source}"
            fill_store(store, numerics)
        else:
            resumed = f"new store in {directories[0]}"
            store.allocate([], description=jsonable(description))
            store.commit(
                step=0, slots={}, checksums={}, state={"filled": True, "numerics": dict(numerics), "base": record}
            )
        if base is not None:
            resumed += f", on the base in {', '.join(base.directories)}"
            resumed += "" if _is_filled(holder) else f", filled from {source}"
            if store.state["base"] != record:  # it was moved
                store.commit(step=store.step, slots={}, checksums={}, state={**store.state, "base": record})
        if _is_filled(holder) and folder is not None and any(True for _ in model.buffers()):
            _load_buffers(model, folder)
        for note in store.notes:
            resumed += f"; {note}"
        if not isinstance(engine, PosixEngine):
            resumed += f"; {choice.reason}"
        if device == "cpu" and torch.get_num_threads() != numerics["num_threads"]:
            resumed += f"; compute threads set to the run's {numerics['num_threads']}"
        checked = VerifyingEngine(engine, store)
        runtime = Runtime(
            model,
            blocks,
            layouts,
            offload,
            store=store,
            base=base,
            engine=checked if base is None else VerifyingEngine(checked, base),
            trace=Trace(),
            device=device,
            seed=numerics["seed"],
            micro_batch_size=numerics["micro_batch_size"],
            # Stores made before there was a choice name none.
            loss_chunk_tokens=numerics.get("loss_chunk_tokens"),
            num_threads=numerics["num_threads"],
            resumed=resumed,
        )
        _opened[_key(directories[0])] = runtime
        if holds_run and offload.resume == "auto":
            # What a cell that was run again must say; a warning, since nothing less is shown where nobody asked for more.
            _logger.warning('%s (resume="auto"; "never" would refuse)', resumed)
        _load_generation_config(model, folder)
        if plan.gpu_memory_bytes is not None:
            # The promise: torch frees what it caches, or says that memory is used up, before it takes more.
            total_bytes = torch.cuda.mem_get_info(torch.device(device))[1]
            torch.cuda.set_per_process_memory_fraction(
                min(1.0, plan.gpu_memory_bytes / total_bytes), torch.device(device)
            )
    except BaseException:
        if runtime is not None:
            runtime.abandon()
        else:
            for opened in (store, base):
                if opened is not None:
                    opened.close()
        engine.close()
        raise
    return model


_opened: weakref.WeakValueDictionary[tuple[int, str], Runtime] = weakref.WeakValueDictionary()
"""By process, since forked children inherit this, and the store's first directory."""


def _key(directory: Path) -> tuple[int, str]:
    return os.getpid(), os.path.realpath(directory)


def _let_go_of_interrupted(directory: Path) -> None:
    """Close the model that this process has open on a store, if Ctrl-C has left it useless; StoreLockedError if it is not.

    So that a notebook's cell that opens a model can be run again.
    """
    runtime = _opened.get(_key(directory))
    if runtime is None or runtime.closed:
        return
    if runtime.cut_short is None:
        raise StoreLockedError(
            f"{directory} is open in this process already: go on with that model, or close it first (model.fuyou.close())"
        )
    runtime.abandon()


def _is_filled(store: Store | StoreSnapshot | None) -> bool:
    return store is not None and bool(store.state.get("filled"))


def _open_or_create(directories: Sequence[Path], identity: Mapping[str, Any], engine: Engine) -> Store:
    if Store.exists(directories):
        return Store.open(directories, engine=engine)
    return Store.create(
        directories, identity=identity, engine=engine, directory_bytes_per_second=_rates(directories, engine)
    )


def _allocate(store: Store, layouts: Mapping[str, ShardLayout], description: Mapping[str, Any]) -> None:
    """Make the extents of weights that an attempt before has not made."""
    names = set(store.names())
    specs = [
        ExtentSpec(layout.weight_name, layout.weight_bytes, piece_bytes=layout.weight_piece_bytes)
        for layout in layouts.values()
        if layout.weight_name not in names
    ]
    store.allocate(specs, description=jsonable(description), prewrite=False)


def _quantised(
    layouts: Mapping[str, ShardLayout], model: nn.Module, blocks: ModelBlocks, frozen_dtype: str, found: Any
) -> dict[str, ShardLayout]:
    """The layouts of the decoder layers that are frozen now, or that are quantised in a store already; ConfigError for none."""
    check_available()
    parameters = dict(model.named_parameters())
    if found is not None and found.description:
        names = {shard["name"] for shard in found.description.get("shards", []) if shard.get("frozen_dtype")}
    else:
        names = {b.name for b in blocks.layers if not any(parameters[name].requires_grad for name in b.parameters)}
    if not names & layouts.keys():
        raise ConfigError(
            f"frozen_dtype={frozen_dtype!r}, but no decoder layer is frozen: pass trainable=() to train adapters alone, or "
            "trainable with the patterns of what is trained"
        )
    return {name: QuantisedLayout.from_plain(layouts[name], frozen_dtype) for name in names & layouts.keys()}


def _rates(directories: Sequence[Path], engine: Engine) -> list[float] | None:
    """By what several drives are given shares of every large extent: reading and writing at once, measured now."""
    if len(directories) == 1:
        return None
    return [probe_directory(directory, engine=engine).mixed_bytes_per_second for directory in directories]


def _check_resume(offload: OffloadConfig, found: StoreSnapshot | None, directory: Path) -> None:
    """StoreError if `offload.resume` and what the directory holds do not go together; nothing is changed."""
    wanted = offload.resume
    holds_run = _is_filled(found)  # else making it ended early
    if wanted == "never" and holds_run:
        assert found is not None
        raise StoreError(
            f'{directory} holds a run already, at step {found.step}, and resume="never": name another directory, or '
            'resume="auto" to continue it'
        )
    if (wanted == "must" or isinstance(wanted, int)) and not holds_run:
        state = "holds no run" if found is None else "holds a store that was never filled, and no run"
        raise StoreError(f'{directory} {state} to resume (resume={wanted!r}): begin one with resume="auto"')
    if isinstance(wanted, int) and found is not None:
        kept = sorted({checkpoint.step for checkpoint in found.checkpoints})
        if wanted not in (found.step, *kept):
            raise StoreError(
                f"{directory} stands at step {found.step}, not at resume={wanted}, and keeps "
                f"{'checkpoints of the steps ' + ', '.join(map(str, kept)) if kept else 'no other'}: use one of these, or "
                'resume="auto"'
            )


def _go_back(store: Store, resume: str | int) -> str:
    """Restore the checkpoint of the step asked for, if the store stands at another; says what was done."""
    if not isinstance(resume, int) or store.step == resume:
        return ""
    left_step = store.step
    name = next(checkpoint.name for checkpoint in reversed(store.checkpoints) if checkpoint.step == resume)
    store.restore(name)
    return f", restored from its checkpoint {name}; it stood at step {left_step}"


def _check_identity(
    store: StoreSnapshot, identity: dict[str, str], config: Mapping[str, Any], model_class: str, directory: Path
) -> None:
    if store.identity.get("fingerprint") != identity["fingerprint"]:
        found = store.description.get("model", "another model") if store.description else "another model"
        source = store.description.get("source", "") if store.description else ""
        raise StoreError(
            f"{directory} belongs to another model ({found}, {source}), not to this {model_class}"
            f"{differences(store.description, config, model_class)}: name another directory for this run, or open that model"
        )
    # Stores made before there was a choice of moments, or of frozen weights, name none.
    for field, before in (("compute_dtype", None), ("moment_dtype", "float32"), ("frozen_dtype", "bfloat16")):
        found = store.identity.get(field, before)
        if found != identity[field]:
            raise StoreError(
                f"{directory} was made with {field}={found!r}, this run asks for {identity[field]!r}: a run keeps its "
                "numerics; use the former or another directory"
            )


def _numerics(store: Store, offload: OffloadConfig, seed: int | None, device: str) -> dict[str, Any]:
    """The run's numerics: those of the store, or new ones. ConfigError names both where they conflict."""
    stored = store.state.get("numerics") if _is_filled(store) else None
    if stored is None:
        return {
            "seed": seed or 0,
            "micro_batch_size": offload.micro_batch_size,
            "loss_chunk_tokens": offload.loss_chunk_tokens,
            "num_threads": torch.get_num_threads(),
            "device": torch.device(device).type,
        }
    if not _are_numerics(stored):
        raise StoreError(
            f"{store.directories[0]}: what its manifest says of the run's numerics is unusable ({str(stored)[:80]}); it was "
            "made by another program, or by hand: restore it from a backup"
        )
    for field, asked in (
        ("seed", seed),
        ("micro_batch_size", offload.micro_batch_size),
        ("loss_chunk_tokens", offload.loss_chunk_tokens),
    ):
        if asked is not None and asked != stored.get(field):
            raise ConfigError(
                f"{field}={asked!r} conflicts with the run's {field}={stored.get(field)!r}, fixed when it was created: leave it "
                "out, or begin a new run in another directory"
            )
    return dict(stored)


def _are_numerics(stored: Any) -> bool:
    """Whether a manifest's numerics can be a run's."""
    kinds = {
        "seed": int,
        "micro_batch_size": int | None,
        "loss_chunk_tokens": int | None,
        "num_threads": int,
        "device": str,
    }
    return (
        isinstance(stored, dict)
        and all(isinstance(stored.get(field), kind) for field, kind in kinds.items())
        and all(stored.get(field) is None or stored[field] > 0 for field in ("micro_batch_size", "loss_chunk_tokens"))
        and 0 < stored["num_threads"] < 2**16
    )


def _fill(
    store: Store,
    engine: Engine,
    model: nn.Module,
    blocks: ModelBlocks,
    layouts: dict[str, ShardLayout],
    fill: Callable[[nn.Module, ModelBlocks, BlockWriter], None],
    state: Mapping[str, Any],
) -> None:
    checksums: dict[str, str] = {}
    largest = max(layout.weight_bytes for layout in layouts.values())
    with BufferPool(largest + 2 * 2**20, name="loading") as pool:

        def write(block: Any, values: dict[str, torch.Tensor]) -> None:
            if block.name in layouts:
                layout = layouts[block.name]
                checksums[layout.weight_name] = write_block(store, engine, layout, values, pool)

        fill(model, blocks, write)
    store.commit(
        step=0,
        slots={name: 0 for name in checksums},
        checksums=checksums,
        state={**store.state, "filled": True, **state},
    )


def _load_buffers(model: nn.Module, folder: Path) -> None:
    """Persistent buffers are not in the store: they come from the checkpoint, as at first."""
    from safetensors import safe_open

    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    wanted = [name for name in nn.Module.state_dict(model) if name not in parameters]
    if not wanted:
        return
    buffers = dict(model.named_buffers())
    for file in checkpoint_files(folder):
        with safe_open(file, framework="pt") as opened:
            for key in set(opened.keys()) & set(wanted):
                buffers[key].copy_(opened.get_tensor(key))


def _load_generation_config(model: Any, folder: Path | None) -> None:
    if folder is None or not (folder / "generation_config.json").is_file():
        return
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig.from_pretrained(folder)


__all__ = [
    "adamw",
    "from_config",
    "from_pretrained",
    "open_store_model",
    "plan_model",
]
