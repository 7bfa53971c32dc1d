"""A step of any shape on any machine under published schedules and ours, for comparison and for what to buy.

The simulator plays all of them, each lane at the machine's full rate: a schedule's own overheads (copies, locks, small
files) are not in it, so that a published program may be slower than its schedule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fuyou.costs import SCHEMES, TFLOPS_FORMULA
from fuyou.errors import ConfigError
from fuyou.hardware import HardwareProfile
from fuyou.plan import BlockPlan
from fuyou.plan_search import best_count, spread
from fuyou.planner import ShardSize, fitting_micro_batch, least_memory, make_plan
from fuyou.simulator import SimulatedStep, multiplied_parameters, simulate_step

HOST_MEMORY_SHARE = 0.8
"""Part of a machine's host memory that a run may take."""


@dataclasses.dataclass(frozen=True)
class SimulatedRun:
    """What a scheme makes of a machine."""

    scheme: str
    seconds_per_step: float
    tflops: float
    tokens_per_second: float
    lanes: dict[str, float]
    """Per lane, the seconds in which it is busy."""
    limiting_lane: str
    num_layers_swapped: int
    """Layers whose activations wait outside of the GPU instead of being computed again."""

    def describe(self) -> str:
        """The run for people."""
        lanes = "\n".join(
            f"  {lane:<10} {seconds:8.2f} s  {seconds / self.seconds_per_step:4.0%}"
            + ("  the limit" if lane == self.limiting_lane else "")
            for lane, seconds in self.lanes.items()
        )
        return (
            f"{self.scheme}: {self.seconds_per_step:.2f} s a step, {self.tokens_per_second:,.0f} tokens/s, "
            f"{self.tflops:.1f} TFLOPS; activations of {self.num_layers_swapped} layers swapped\n{lanes}\n{TFLOPS_FORMULA}"
        )

    def to_json(self) -> dict[str, Any]:
        """The run as JSON."""
        return dataclasses.asdict(self)


def simulate_scheme(
    scheme: str, shards: Sequence[ShardSize], hardware: HardwareProfile, *, batch_size: int, sequence_length: int
) -> SimulatedRun:
    """A steady step of a batch: of one micro-batch under published schedules, of as few as find room under ours.

    ConfigError for an unknown scheme, PlanError if ours does not fit.
    """
    num_tokens = batch_size * sequence_length
    num_micro_batches = 1

    def step_of(blocks: Sequence[BlockPlan], prefetch_depth: int = 2, after_backward: bool = False) -> SimulatedStep:
        return simulate_step(
            blocks,
            hardware,
            num_tokens=num_tokens,
            num_micro_batches=num_micro_batches,
            prefetch_depth=prefetch_depth,
            sequence_length=sequence_length,
            updates_after_backward=after_backward,
            with_spans=False,
        )

    if scheme == "fuyou":
        if hardware.gpu_memory_bytes is not None:
            size = fitting_micro_batch(
                shards,
                "bfloat16",
                num_rows=batch_size,
                sequence_length=sequence_length,
                room_bytes=hardware.gpu_memory_bytes - least_memory(shards).device,
                loss_chunk_tokens=None,
            )
            num_micro_batches = -(-batch_size // size)
        plan = make_plan(
            shards,
            device=hardware.device,
            compute_dtype="bfloat16",
            moment_dtype="float32",
            host_memory_bytes=int(HOST_MEMORY_SHARE * hardware.host_memory_bytes),
            host_memory_reason=f"{HOST_MEMORY_SHARE:.0%} of the machine's",
            gpu_memory_bytes=hardware.gpu_memory_bytes,
            micro_batch_size=None,
            clipping=True,
            num_cores=hardware.num_cores,
            hardware=hardware,
            boundary_bytes=num_tokens * sum(s.input_bytes_per_token for s in shards),
            num_tokens=num_tokens,
            num_micro_batches=num_micro_batches,
            sequence_length=sequence_length,
        )
        blocks: Sequence[BlockPlan] = plan.blocks
        step = step_of(blocks, plan.prefetch_depth)
    elif scheme == "zero-infinity":
        # Gradients in files of 4 B a parameter, which the optimizer reads back.
        blocks = [_published(s, shards, update_window="forward", gradient="spill") for s in shards]
        step = step_of(blocks, after_backward=True)
    elif scheme == "paper":
        blocks = _paper(shards, hardware, num_tokens, lambda tried: step_of(tried).seconds)
        step = step_of(blocks)
    else:
        raise ConfigError(f"--scheme {scheme}: choose one of {', '.join(SCHEMES)}")
    flops = 6.0 * sum(multiplied_parameters(blocks, sequence_length).values()) * num_tokens
    return SimulatedRun(
        scheme=scheme,
        seconds_per_step=step.seconds,
        tflops=flops / step.seconds / 1e12,
        tokens_per_second=num_tokens / step.seconds,
        lanes=step.lane_seconds,
        limiting_lane=step.limiting_lane,
        num_layers_swapped=sum(b.activations != "recompute" for b in blocks),
    )


def _published(shard: ShardSize, shards: Sequence[ShardSize], **changes: Any) -> BlockPlan:
    """Weights of 2 B beside a master of 4 and moments of 8, all on the drive: 16 B read and 14 written a parameter."""
    plan = BlockPlan(
        name=shard.name,
        kind=shard.kind,
        num_parameters=shard.num_parameters,
        trainable=True,
        weight_bytes=2 * shard.num_parameters,
        state_bytes=12 * shard.num_parameters,
        gradient_bytes=4 * shard.num_parameters,
        weights_in_host=False,
        states_in_host=False,
        update_window="backward",
        gradient="free",
        num_borrowers=sum(shard.name in other.borrowed for other in shards),
        width=shard.width,
        input_bytes_per_token=2 * shard.width,
        activation_bytes_per_token=shard.activation_bytes_per_token,
    )
    return dataclasses.replace(plan, **changes)


def _paper(shards: Sequence[ShardSize], hardware: HardwareProfile, num_tokens: int, seconds: Any) -> list[BlockPlan]:
    """As many layers' activations swapped as shortens the step, in host memory and then on the drive."""
    # Gradients leave the GPU in half precision.
    blocks = [_published(s, shards, gradient_bytes=2 * s.num_parameters) for s in shards]
    layers = [number for number, block in enumerate(blocks) if block.activation_bytes_per_token]
    inputs = num_tokens * sum(block.input_bytes_per_token for block in blocks)
    room = max(0, int(HOST_MEMORY_SHARE * hardware.host_memory_bytes) - inputs)

    def swapped(count: int) -> list[BlockPlan]:
        changed, left = list(blocks), room
        for number in spread(layers, count):
            needed = num_tokens * blocks[number].activation_bytes_per_token
            place = "host" if needed <= left else "ssd"
            left -= needed if place == "host" else 0
            changed[number] = dataclasses.replace(blocks[number], activations=place)
        return changed

    return swapped(best_count(len(layers), lambda count: seconds(swapped(count))))
