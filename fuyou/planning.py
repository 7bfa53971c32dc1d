"""From a model and a config to its plan: the shards and their sizes, this machine's memory, plans that were given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import nn

from fuyou.blocks import Block, ModelBlocks
from fuyou.config import OffloadConfig, format_bytes, parse_bytes
from fuyou.errors import ConfigError, PlanError
from fuyou.hardware import HardwareProfile, available_host_bytes, num_cores, run_key
from fuyou.plan import Plan, StepShape
from fuyou.plan_search import pooled_bytes
from fuyou.planner import PlanInputs, ShardSize, least_memory
from fuyou.quantising import QuantisedLayout
from optim import DEFAULT_CHUNK_ELEMENTS, ShardLayout

GPU_MEMORY_SHARE = 0.95
"""Part of the GPU's memory free now that is taken when gpu_memory is not given: kernels and libraries take some beside."""

HOST_MEMORY_SHARE = 0.7
"""Part of the memory available now that is taken when host_memory is not given."""


def shard_layouts(
    blocks: ModelBlocks, model: nn.Module, compute_dtype: str, moment_dtype: str
) -> dict[str, ShardLayout]:
    """One shard for each block that owns parameters."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return {
        block.name: ShardLayout.of(
            block.name,
            {name: shapes[name] for name in block.parameters},
            compute_dtype,
            DEFAULT_CHUNK_ELEMENTS,
            moment_dtype,
        )
        for block in blocks.blocks
        if block.parameters
    }


def layer_widths(layout: ShardLayout) -> tuple[int, int]:
    """Elements of one token: of a layer's input, and of the outputs of its matrix products and attention.

    By shape alone: a layer's first vector is the weight of the norm of its input; a product's output has the length of
    its bias (transformers' Conv1D stores its matrix the other way around), else that of its matrix. 0 for products
    with experts, of which each token meets some only.
    """
    shapes = {p.name: p.shape for p in layout.parameters}
    width = next((shape[0] for shape in shapes.values() if len(shape) == 1), 0)
    if any(len(shape) > 2 for shape in shapes.values()) or ".experts." in "".join(shapes):
        return width, 0
    outputs = [
        shapes.get(name.removesuffix("weight") + "bias", shape)[0] for name, shape in shapes.items() if len(shape) == 2
    ]
    return width, sum(outputs) + width


def shard_sizes(
    blocks: ModelBlocks,
    layouts: Mapping[str, ShardLayout],
    trainable: Callable[[str], bool],
    adapted: Collection[str] = (),
) -> list[ShardSize]:
    """What the planner knows of the blocks that own parameters, in the order of the forward pass.

    Those named in `adapted` have something trained in them that is not streamed.
    """
    trained = [block.name in adapted or any(map(trainable, block.parameters)) for block in blocks.blocks]
    lowest = trained.index(True) if any(trained) else len(trained)
    reached = {block.name for number, block in enumerate(blocks.blocks) if number >= lowest or block.kind == "epilogue"}
    widths = {
        b.name: layer_widths(layouts[b.name]) if b.kind == "layer" else (0, 0)
        for b in blocks.blocks
        if b.name in layouts
    }
    return [
        ShardSize(
            name=block.name,
            kind=block.kind,
            num_parameters=layouts[block.name].num_parameters,
            trainable=any(trainable(name) for name in block.parameters),
            weight_bytes=layouts[block.name].weight_bytes,
            state_bytes=layouts[block.name].state_bytes,
            gradient_bytes=layouts[block.name].gradient_bytes,
            record_bytes=layouts[block.name].full_record_bytes,
            gradient_chunk_bytes=layouts[block.name].gradient_range(0)[1],
            borrowed_bytes=sum(layouts[b].weight_bytes for b in block.borrows),
            borrowed=block.borrows,
            width=widths[block.name][0],
            input_bytes_per_token=widths[block.name][0] * layouts[block.name].weight_itemsize,
            activation_bytes_per_token=widths[block.name][1] * layouts[block.name].weight_itemsize,
            in_backward=block.name in reached,
            num_idle_parameters=_num_idle_parameters(layouts[block.name], blocks.num_experts_per_token),
            bound_bytes=_bound_bytes(layouts[block.name]),
            logits_per_token=_logits_per_token(block, layouts) if block.kind == "epilogue" else 0,
        )
        for block in _with_borrowers(blocks, layouts)
    ]


def _bound_bytes(layout: ShardLayout) -> int:
    """Of all weights of a quantised block in the dtype of compute, and one matrix more while they are made."""
    if not isinstance(layout, QuantisedLayout):
        return 0
    largest = max(p.num_elements for p in layout.parameters)
    # int8 becomes float16 first.
    return (layout.num_elements + (2 if layout.frozen_dtype == "int8" else 1) * largest) * layout.weight_itemsize


def _logits_per_token(block: Block, layouts: Mapping[str, ShardLayout]) -> int:
    """The rows of the largest matrix that the epilogue multiplies with: its own, or an embedding that is tied to it."""
    shapes = [p.shape for name in (block.name, *block.borrows) if name in layouts for p in layouts[name].parameters]
    return max((shape[0] for shape in shapes if len(shape) == 2), default=0)


def _num_idle_parameters(layout: ShardLayout, num_experts_per_token: int | None) -> int:
    """Of experts that one token does not meet; transformers stacks the experts' matrices of a layer in one tensor."""
    if num_experts_per_token is None:
        return 0
    experts = [p for p in layout.parameters if len(p.shape) == 3]
    return sum(p.num_elements // p.shape[0] * max(0, p.shape[0] - num_experts_per_token) for p in experts)


def _with_borrowers(blocks: ModelBlocks, layouts: Mapping[str, ShardLayout]) -> list[Block]:
    """The blocks that own parameters; what a block without any borrows counts for the last layer."""
    owning = [block for block in blocks.blocks if block.name in layouts]
    borrowed = {name for block in owning for name in block.borrows}
    orphaned = tuple({b: None for block in blocks.blocks if block.name not in layouts for b in block.borrows})
    missing = tuple(name for name in orphaned if name not in borrowed)
    if missing:
        owning[-1] = dataclasses.replace(owning[-1], borrows=(*owning[-1].borrows, *missing))
    return owning


def check_plan(plan: Plan, sizes: Sequence[ShardSize], config: OffloadConfig, *, device: str, clipping: bool) -> None:
    """ConfigError if a plan that was given is for another model or run, PlanError if its pools would lock up."""
    expected = {s.name: s for s in sizes}
    if [b.name for b in plan.blocks] != list(expected):
        raise ConfigError(
            f"plan: its blocks ({len(plan.blocks)}, first {plan.blocks[0].name if plan.blocks else None!r}) are not those of "
            f"this model ({len(expected)}, first {next(iter(expected))!r}): make a plan for this model"
        )
    for block in plan.blocks:
        size = expected[block.name]
        if (block.weight_bytes, block.num_parameters) != (size.weight_bytes, size.num_parameters):
            raise ConfigError(
                f"plan: block {block.name} has {block.num_parameters} parameters in {block.weight_bytes} bytes, the model's "
                f"{size.num_parameters} in {size.weight_bytes}: make a plan for this model and compute_dtype"
            )
        if block.trainable and block.state_bytes != size.state_bytes:
            raise ConfigError(
                f"plan: block {block.name} has states of {block.state_bytes} bytes, the model's are {size.state_bytes}: make a "
                "plan for this moment_dtype"
            )
        if clipping and block.trainable and block.gradient == "free":
            raise ConfigError(
                f"plan: the gradient of block {block.name} is given back before the norm is known, so that it cannot be "
                'clipped: choose "host" or "spill", or max_grad_norm=None'
            )
    for field, planned, actual in (
        ("compute_dtype", plan.compute_dtype, config.compute_dtype),
        ("moment_dtype", plan.moment_dtype, config.moment_dtype),
        ("device", torch.device(plan.device).type, torch.device(device).type),
        ("durability", plan.durability, config.durability or plan.durability),
        ("commit_every_steps", plan.commit_every_steps, config.commit_every_steps or plan.commit_every_steps),
    ):
        if planned != actual:
            raise ConfigError(f"plan: {field}={planned!r}, this run has {actual!r}: make a plan for this run")
    least = least_memory(sizes)
    on_device = sum(b.weight_bytes for b in plan.blocks if b.weights_on_device)
    if plan.gpu_memory_bytes is not None and on_device > plan.gpu_memory_bytes - least.device:
        raise PlanError(
            f"plan: weights_on_device of {format_bytes(on_device)} beside the {format_bytes(least.device)} of the blocks under way "
            f"are more than gpu_memory_bytes = {format_bytes(plan.gpu_memory_bytes)}: keep fewer there"
        )
    for field, has, needs in (
        (
            "weight_pool_bytes",
            plan.weight_pool_bytes,
            least.weights + sum(pooled_bytes(b.weight_bytes) for b in plan.blocks if b.weights_in_host),
        ),
        (
            "gradient_pool_bytes",
            plan.gradient_pool_bytes,
            least.gradients + sum(pooled_bytes(b.gradient_bytes) for b in plan.blocks if b.gradient == "host"),
        ),
        (
            "record_pool_bytes",
            plan.record_pool_bytes,
            least.records + sum(pooled_bytes(b.state_bytes) for b in plan.blocks if b.states_in_host),
        ),
    ):
        if has < needs:
            raise PlanError(
                f"plan: {field} = {has} is {needs - has} bytes short of what its choices for the blocks need ({needs})"
            )


def key_of(shards: Sequence[ShardSize], moment_dtype: str) -> str:
    """The `run_key` of these blocks."""
    num_trained = sum(s.num_parameters for s in shards if s.trainable)
    return run_key(sum(s.num_parameters for s in shards), num_trained, len(shards), moment_dtype)


def plan_inputs(
    shards: Sequence[ShardSize],
    config: OffloadConfig,
    *,
    device: str,
    clipping: bool,
    micro_batch_size: int | None,
    hardware: HardwareProfile | None = None,
    elsewhere: bool = False,
    shape: StepShape | None = None,
    adapter_bytes: int = 0,
) -> PlanInputs:
    """What a plan of these blocks is decided by; `elsewhere`: on the machine of `hardware`, not on this one.

    Of this machine what earlier runs have found counts, too.
    `shape` is that of a step, if it is known. `adapter_bytes` of the host memory are taken already, by adapters that are trained.
    """
    there = hardware if elsewhere else None
    if hardware is not None:
        hardware = hardware.refined_for(key_of(shards, config.moment_dtype))
    if config.host_memory is not None:
        host_bytes, reason = parse_bytes(config.host_memory, "host_memory"), "as given"
    else:
        available = available_host_bytes() if there is None else there.host_memory_bytes
        host_bytes = int(available * HOST_MEMORY_SHARE)
        reason = f"{HOST_MEMORY_SHARE:.0%} of what {'is available now' if there is None else 'the profile names'}"
    if adapter_bytes:
        host_bytes = max(0, host_bytes - adapter_bytes)
        reason += f", less {format_bytes(adapter_bytes)} for adapters"
    if config.gpu_memory is None and there is not None and there.gpu_memory_bytes is not None:
        gpu_bytes: int | None = int(GPU_MEMORY_SHARE * there.gpu_memory_bytes)
    else:
        gpu_bytes = gpu_memory_bytes(config, device)
    return PlanInputs(
        shards=tuple(shards),
        device=device,
        compute_dtype=config.compute_dtype,
        moment_dtype=config.moment_dtype,
        host_memory_bytes=host_bytes,
        host_memory_reason=reason,
        gpu_memory_bytes=gpu_bytes,
        micro_batch_size=micro_batch_size,
        clipping=clipping,
        num_cores=num_cores() if there is None else there.num_cores,
        durability=config.durability,
        commit_every_steps=config.commit_every_steps,
        hardware=hardware,
        # Every layer's input waits for its backward pass.
        boundary_bytes=None
        if shape is None
        else shape.num_tokens * sum(s.input_bytes_per_token for s in shards if s.in_backward),
        num_tokens=None if shape is None else shape.num_tokens,
        num_micro_batches=1 if shape is None else shape.num_micro_batches,
        sequence_length=0 if shape is None else shape.sequence_length,
        loss_chunk_tokens=config.loss_chunk_tokens,
    )


def plan_for(inputs: PlanInputs, config: OffloadConfig) -> Plan:
    """The plan of a model; the config's own plan, if it has one. Raises as `make_plan` and `check_plan`."""
    if config.plan is None:
        return inputs.plan()
    plan = config.plan if isinstance(config.plan, Plan) else Plan.from_json(config.plan)
    check_plan(plan, inputs.shards, config, device=inputs.device, clipping=inputs.clipping)
    return plan


def gpu_memory_bytes(config: OffloadConfig, device: str) -> int | None:
    """The limit as given, or by what is free now; None if it is not known (a plan for another machine)."""
    if config.gpu_memory is not None:
        return parse_bytes(config.gpu_memory, "gpu_memory")
    if device.startswith("cuda") and torch.cuda.is_available():
        return int(GPU_MEMORY_SHARE * torch.cuda.mem_get_info(torch.device(device))[0])
    return None


def choose_device(config: OffloadConfig) -> str:
    """The device's name; ConfigError if CUDA is asked for and not there."""
    if config.device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f'device="{config.device}": torch {torch.__version__} sees no CUDA device; use device="cpu"')
    return config.device
