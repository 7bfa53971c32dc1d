"""From model, budgets and machine to a plan: simple rules, in the order of drive traffic saved per byte of memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from fuyou.config import format_bytes
from fuyou.costs import step_flops
from fuyou.errors import PlanError
from fuyou.hardware import HardwareProfile
from fuyou.plan import BlockPlan, Plan, Prediction
from io_engine.buffers import size_class_bytes

MEBIBYTE = 2**20
NUM_RECORD_BUFFERS = 4
MIN_ACTIVATION_BYTES = 8 * MEBIBYTE


@dataclasses.dataclass(frozen=True)
class ShardSize:
    """What the planner knows of one block."""

    name: str
    kind: str
    num_parameters: int
    trainable: bool
    weight_bytes: int
    state_bytes: int
    gradient_bytes: int
    record_bytes: int
    gradient_chunk_bytes: int
    borrowed_bytes: int = 0
    """Weights of other blocks that it computes with too."""
    borrowed: tuple[str, ...] = ()


def pooled_bytes(num_bytes: int) -> int:
    """What a buffer takes from a pool; 0 for none."""
    return size_class_bytes(num_bytes) if num_bytes else 0


def make_plan(
    shards: Sequence[ShardSize],
    *,
    device: str,
    compute_dtype: str,
    host_memory_bytes: int,
    host_memory_reason: str,
    micro_batch_size: int | None,
    clipping: bool,
    num_cores: int,
    hardware: HardwareProfile | None = None,
    boundary_bytes: int | None = None,
    num_tokens: int | None = None,
) -> Plan:
    """Decide; PlanError says how much memory is short and what the least is.

    Without `hardware` there is no prediction of time. `boundary_bytes` is what one step saves between blocks (None: not known before the first batch), `num_tokens` the
    tokens of one step.
    """
    reasons = {"host_memory": host_memory_reason}
    trainable = [s for s in shards if s.trainable]
    window: Literal["backward", "forward"] = "forward" if clipping else "backward"
    reasons["update_window"] = (
        "clipping needs the norm of all gradients first; each block is updated on the way to its next forward pass"
        if clipping
        else "no clipping: each block is updated as soon as its gradient is whole"
    )
    # What is needed whatever the model's size: the blocks in use, the next one, and the one before on its way out.
    bound = [pooled_bytes(s.weight_bytes) for s in shards]
    least_weights = max(b + pooled_bytes(s.borrowed_bytes) for b, s in zip(bound, shards, strict=True))
    largest = sorted(bound, reverse=True)
    comfortable_weights = max(sum(largest[:3]), least_weights + sum(largest[:1]))
    tied = {name for s in shards for name in s.borrowed}
    gradients = {s.name: pooled_bytes(s.gradient_bytes) for s in trainable}
    widest = sorted(gradients.values(), reverse=True)
    # Gradients of borrowed weights stay open from the last block to the first.
    open_gradients = sum(gradients.get(name, 0) for name in tied)
    least_gradients = (widest[0] if widest else 0) + open_gradients
    comfortable_gradients = sum(widest[:2]) + open_gradients
    record_bytes = max((s.record_bytes for s in trainable), default=0)
    spilled_record_bytes = record_bytes + max((s.gradient_chunk_bytes for s in trainable), default=0)
    records = (NUM_RECORD_BUFFERS - 1) * pooled_bytes(record_bytes)
    spill_records = (NUM_RECORD_BUFFERS - 1) * pooled_bytes(spilled_record_bytes)
    activations = MIN_ACTIVATION_BYTES
    needed = least_weights + least_gradients + (spill_records if clipping else records) + activations
    if needed > host_memory_bytes:
        raise PlanError(
            f"host_memory = {format_bytes(host_memory_bytes)} is {format_bytes(needed - host_memory_bytes)} short: the least "
            f"for this model is {format_bytes(needed)} (weights {format_bytes(least_weights)}, gradients "
            f"{format_bytes(least_gradients)}, records {format_bytes(spill_records if clipping else records)}, activations "
            f'{format_bytes(activations)}). Set host_memory="{-(-needed // MEBIBYTE)}MiB" or more'
        )
    free = host_memory_bytes - needed

    def take(wanted: int) -> int:
        nonlocal free
        taken = min(max(0, wanted), free)
        free -= taken
        return taken

    weight_pool = least_weights + take(comfortable_weights - least_weights)
    prefetch_depth = 1 if weight_pool < comfortable_weights else 2
    gradient_pool = least_gradients + take(comfortable_gradients - least_gradients)
    activations += take((boundary_bytes or host_memory_bytes // 16) - activations)
    # Held gradients save 8 B of traffic for 4 B of memory, weights 4 for 2, states 10 for 10: in this order.
    held: set[str] = set()
    if clipping:
        for shard in trainable:
            size = gradients[shard.name]
            if size > free:
                break
            gradient_pool += take(size)
            held.add(shard.name)
        reasons["gradients"] = (
            f"{len(held)} of {len(trainable)} blocks' gradients wait for the norm in host memory"
            + ("" if len(held) == len(trainable) else ", the others in scratch files: 8 B more a parameter")
        )
    spills = clipping and len(held) < len(trainable)
    record_pool = spill_records if clipping else records
    record_pool += take(pooled_bytes(spilled_record_bytes if spills else record_bytes))
    weights_in_host, states_in_host = set(), set()
    for shard in shards:
        if pooled_bytes(shard.weight_bytes) <= free:
            weight_pool += take(pooled_bytes(shard.weight_bytes))
            weights_in_host.add(shard.name)
    for shard in trainable:
        if pooled_bytes(shard.state_bytes) <= free:
            record_pool += take(pooled_bytes(shard.state_bytes))
            states_in_host.add(shard.name)
    activations += take(free)
    reasons["weights_in_host"] = "saves 2 B of reads for each byte kept; every step is still written through"
    reasons["durability"] = "every optimizer step is committed; a crash costs at most the two steps in flight"
    reasons["activations"] = "each layer is computed again in the backward pass; its input alone is kept"
    blocks = tuple(
        BlockPlan(
            name=s.name,
            kind=s.kind,
            num_parameters=s.num_parameters,
            trainable=s.trainable,
            weight_bytes=s.weight_bytes,
            state_bytes=s.state_bytes if s.trainable else 0,
            gradient_bytes=s.gradient_bytes if s.trainable else 0,
            weights_in_host=s.name in weights_in_host,
            states_in_host=s.name in states_in_host,
            gradient="host" if not clipping or s.name in held else "spill",
        )
        for s in shards
    )
    num_workers = max(1, num_cores // 2 if device == "cpu" else num_cores - 2)
    return Plan(
        device=device,
        compute_dtype=compute_dtype,
        micro_batch_size=micro_batch_size,
        durability="step",
        update_window=window,
        prefetch_depth=prefetch_depth,
        num_update_workers=num_workers,
        num_io_threads=4,
        host_memory_bytes=host_memory_bytes,
        weight_pool_bytes=weight_pool,
        gradient_pool_bytes=gradient_pool,
        record_pool_bytes=record_pool,
        activation_pool_bytes=activations,
        blocks=blocks,
        reasons=reasons,
        prediction=None if hardware is None else predict(blocks, window, hardware, num_tokens),
    )


def predict(
    blocks: Sequence[BlockPlan], window: str, hardware: HardwareProfile, num_tokens: int | None
) -> Prediction:
    """A steady step's traffic and time: the busiest lane's, with compute and Adam sharing the cores on a CPU."""
    read = written = 0
    for block in blocks:
        if not block.weights_in_host:
            # Forward and backward; the head and its loss run once.
            read += block.weight_bytes * (1 if block.kind == "epilogue" and window == "forward" else 2)
        if block.trainable:
            read += 0 if block.states_in_host else block.state_bytes
            written += block.weight_bytes + block.state_bytes
            if block.gradient == "spill":
                read += block.gradient_bytes
                written += block.gradient_bytes
    num_parameters = sum(b.num_parameters for b in blocks)
    compute = step_flops(num_parameters, num_tokens or 0) / hardware.compute_flops_per_second
    adam = sum(b.num_parameters for b in blocks if b.trainable) / hardware.adam_parameters_per_second
    lanes = {
        "gpu": compute,
        "cpu": adam,
        "ssd_read": read / hardware.read_bytes_per_second,
        "ssd_write": written / hardware.write_bytes_per_second,
    }
    drive = (read + written) / hardware.mixed_bytes_per_second
    cores = compute + adam if hardware.device == "cpu" else max(compute, adam)
    seconds = max(cores, drive, *lanes.values())
    limiting = max(lanes, key=lambda lane: lanes[lane])
    return Prediction(seconds, lanes, limiting, read, written)
