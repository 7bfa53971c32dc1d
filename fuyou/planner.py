"""From model, budgets and machine to a plan: simple rules, in the order of drive traffic saved per byte of memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from fuyou.config import format_bytes
from fuyou.costs import num_update_workers, weight_bytes_per_parameter
from fuyou.errors import PlanError
from fuyou.hardware import HardwareProfile
from fuyou.plan import BlockPlan, Plan, Prediction, StepShape
from fuyou.plan_search import LEAST_GAIN, NUMS_FIRST, Search, best_count, pooled_bytes, spread
from fuyou.simulator import AMPLE, RECORD_PARAMETERS, Buffers, SimulatedStep, simulate_step

MEBIBYTE = 2**20
COMFORTABLE_RECORD_BUFFERS = 6
"""One is enough to run. With two, one record is read while another is updated or written; with six, no lane waits for a
late neighbour (measured: 0.91 of the drive's limit with four, 0.99 with six)."""
ACTIVATIONS_AT_ONCE = 2.5
"""Times the bytes that a layer's products return: what exists at the peak of its backward pass (measured with Llama's
layers, 512 and 2,048 tokens: 2.4 to 2.7 in float32, less in bfloat16)."""
UNKNOWN_WIDTHS = 16
"""Of a token between layers, for a layer whose products are not known by shape."""
LARGEST_MATRIX = 0.4
"""Of a layer's parameters, whose gradient exists before it is added to the sum."""
BYTES_PER_LOGIT = 14
"""Logits, in float32 too, their log-softmax, its gradient (measured: 12)."""
COMMIT_EVERY_STEPS = 20
"""With durability="checkpoint", where the user names no number: the drive gets a twentieth of the bytes."""
GRAPH_FACTOR = 4
"""Memory of a layer's graph, of what the outputs of its matrix products take (autograd keeps about twice them)."""
MIN_ACTIVATION_BYTES = MEBIBYTE // 4
"""For what passes between blocks, also while no step's tokens are known."""
UNKNOWN_TOKENS = 2048
"""Of a micro-batch while no step's are known: one layer's input has room before anything that only saves time."""
OVERHEAD_SHARE, MAX_OVERHEAD_BYTES = 6, 96 * MEBIBYTE
"""A sixth of the budget, at most this, stays free for Python objects, kernels, torch's temporaries and what the
allocator keeps: 60 to 90 MiB beside the pools were measured with 85M to 567M parameters."""


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
    width: int = 0
    """Elements of a token between layers; this and the rest as in `BlockPlan`."""
    input_bytes_per_token: int = 0
    activation_bytes_per_token: int = 0
    in_backward: bool = True
    num_idle_parameters: int = 0
    bound_bytes: int = 0
    """Of its weights in the dtype of compute, where they are stored otherwise (quantised): beside those stored while it is
    computed with."""
    logits_per_token: int = 0
    """Of the head."""


@dataclasses.dataclass(frozen=True)
class LeastMemory:
    """What a plan needs whatever it decides, in bytes of each pool: one block at a time, nothing read ahead."""

    weights: int
    gradients: int
    records: int
    activations: int
    device: int
    """On a GPU: weights and gradients of three blocks, one in compute, one on its way in or out, one between."""

    @property
    def pool_bytes(self) -> int:
        """All pools."""
        return self.weights + self.gradients + self.records + self.activations

    @property
    def host_memory_bytes(self) -> int:
        """The smallest budget whose share for the pools holds them; a whole number of MiB."""
        with_share = -(-self.pool_bytes * OVERHEAD_SHARE // (OVERHEAD_SHARE - 1))
        needed = min(with_share, self.pool_bytes + MAX_OVERHEAD_BYTES)
        return -(-needed // MEBIBYTE) * MEBIBYTE


def overhead_bytes(host_memory_bytes: int) -> int:
    """The part of a budget that no pool gets."""
    return min(MAX_OVERHEAD_BYTES, host_memory_bytes // OVERHEAD_SHARE)


def least_memory(shards: Sequence[ShardSize], shape: StepShape | None = None) -> LeastMemory:
    """The least for these blocks, clipping or not, so that what could be opened can also be trained.

    With `shape` for micro-batches of such steps, too.
    """
    num_tokens = 0 if shape is None else -(-shape.num_tokens // max(1, shape.num_micro_batches))
    waiting = num_tokens * max((s.input_bytes_per_token for s in shards), default=0)
    trainable = [s for s in shards if s.trainable]
    tied = {name for s in shards for name in s.borrowed}
    gradients = {s.name: pooled_bytes(s.gradient_bytes) for s in trainable}
    # Gradients of borrowed weights stay open from the last block to the first.
    open_gradients = sum(gradients.get(name, 0) for name in tied)
    record = max((s.record_bytes + s.gradient_chunk_bytes for s in trainable), default=0)
    weights = sorted((s.weight_bytes for s in shards), reverse=True)
    untied = sorted((s.gradient_bytes for s in trainable if s.name not in tied), reverse=True)
    tied_gradients = sum(s.gradient_bytes for s in trainable if s.name in tied)
    return LeastMemory(
        weights=max(pooled_bytes(s.weight_bytes) + pooled_bytes(s.borrowed_bytes) for s in shards),
        gradients=open_gradients + max((b for name, b in gradients.items() if name not in tied), default=0),
        records=pooled_bytes(record),
        activations=pooled_bytes(max(MIN_ACTIVATION_BYTES, waiting)),
        device=sum(weights[:3])
        + max(s.borrowed_bytes for s in shards)
        + max(s.bound_bytes for s in shards)
        + tied_gradients
        + sum(untied[:3]),
    )


def compute_bytes(
    shards: Sequence[ShardSize], compute_dtype: str, shape: StepShape, loss_chunk_tokens: int | None
) -> int:
    """What one micro-batch takes while a block computes with it, at the most, beside weights and the gradients' sums.

    Of a layer all that its backward pass needs, and the gradients of that; of the head the logits with what the loss makes
    of them; of an embedding its gradient. An estimate: models differ in what they keep.
    """
    tokens = -(-shape.num_tokens // max(1, shape.num_micro_batches))
    itemsize = weight_bytes_per_parameter(compute_dtype)
    found = [0]
    for s in shards:
        needed = 0.0
        if s.kind == "layer":
            # Experts' are not known by shape.
            each = s.activation_bytes_per_token or UNKNOWN_WIDTHS * s.width * itemsize
            needed = tokens * each * ACTIVATIONS_AT_ONCE
            needed += s.num_parameters * itemsize * LARGEST_MATRIX if s.trainable else 0
        elif s.kind == "epilogue":
            at_once = min(tokens, loss_chunk_tokens or tokens)
            needed = at_once * s.logits_per_token * BYTES_PER_LOGIT
            needed += (s.num_parameters * itemsize + s.borrowed_bytes) if s.trainable or s.borrowed else 0
        elif s.trainable:
            needed = s.num_parameters * itemsize
        found.append(int(needed) + s.bound_bytes)
    return max(found)


def fitting_micro_batch(
    shards: Sequence[ShardSize],
    compute_dtype: str,
    *,
    num_rows: int,
    sequence_length: int,
    room_bytes: int,
    loss_chunk_tokens: int | None,
) -> int:
    """Rows of the largest equal micro-batches of a batch whose `compute_bytes` find room; 1 if none do."""
    for count in range(1, num_rows + 1):
        size = -(-num_rows // count)
        shape = StepShape(size * sequence_length, 1, sequence_length)
        if compute_bytes(shards, compute_dtype, shape, loss_chunk_tokens) <= room_bytes:
            return size
    return 1


def make_plan(
    shards: Sequence[ShardSize],
    *,
    device: str,
    compute_dtype: str,
    moment_dtype: str,
    host_memory_bytes: int,
    host_memory_reason: str,
    gpu_memory_bytes: int | None,
    micro_batch_size: int | None,
    clipping: bool,
    num_cores: int,
    durability: Literal["step", "checkpoint"] = "step",
    commit_every_steps: int | None = None,
    hardware: HardwareProfile | None = None,
    boundary_bytes: int | None = None,
    num_tokens: int | None = None,
    num_micro_batches: int = 1,
    sequence_length: int = 0,
    loss_chunk_tokens: int | None = None,
) -> Plan:
    """Decide; PlanError says how much memory is short and what the least is.

    Without `hardware` there is no prediction of time. `boundary_bytes` is what one step saves between blocks (None: not
    known before the first batch), `num_tokens` the tokens of one step in all its micro-batches, padding included,
    `sequence_length` those of a row (0: not known, attention scores are left out of the time). With
    durability="checkpoint" everything that is trained must fit into host memory.
    """
    reasons = {"host_memory": host_memory_reason}
    shape = StepShape(num_tokens, num_micro_batches, sequence_length) if num_tokens else None
    least = least_memory(shards, shape)
    computing = 0 if shape is None else compute_bytes(shards, compute_dtype, shape, loss_chunk_tokens)
    overhead = overhead_bytes(host_memory_bytes)
    free = host_memory_bytes - overhead - least.pool_bytes
    if free < 0:
        raise PlanError(
            f"host_memory = {format_bytes(host_memory_bytes)} is {format_bytes(least.host_memory_bytes - host_memory_bytes)} "
            f"short: the least for this model is {format_bytes(least.host_memory_bytes)} (weights "
            f"{format_bytes(least.weights)}, gradients {format_bytes(least.gradients)}, records {format_bytes(least.records)}, "
            f"activations {format_bytes(least.activations)}, the rest for Python and torch). "
            f'Set host_memory="{least.host_memory_bytes // MEBIBYTE}MiB" or more',
            short_bytes=least.host_memory_bytes - host_memory_bytes,
        )

    if not device.startswith("cuda"):
        gpu_memory_bytes = None
        reasons["gpu_memory"] = "no GPU in use: blocks are computed in host memory, beside the pools"
    elif gpu_memory_bytes is not None:
        needed = least.device + computing
        if gpu_memory_bytes < needed:
            named = (needed if computing else least.device * 5 // 4) + MEBIBYTE - 1
            raise PlanError(
                f"gpu_memory = {format_bytes(gpu_memory_bytes)} is {format_bytes(needed - gpu_memory_bytes)} short: weights "
                f"and gradients of the blocks under way take {format_bytes(least.device)}, and "
                + (
                    f"a micro-batch in compute about {format_bytes(computing)}. Use a smaller micro_batch_size, or set"
                    if computing
                    else "the activations of the block in compute come on top. Set"
                )
                + f' gpu_memory="{named // MEBIBYTE}MiB" or more',
                short_bytes=needed - gpu_memory_bytes,
            )
        reasons["gpu_memory"] = (
            f"{format_bytes(least.device)} for weights and gradients of the blocks under way; the rest of "
            f"{format_bytes(gpu_memory_bytes)} is for the activations of the block in compute"
            + (f", which take about {format_bytes(computing)}" if computing else "")
        )

    def take(wanted: int) -> int:
        nonlocal free
        taken = min(max(0, wanted), free)
        free -= taken
        return taken

    trainable = [s for s in shards if s.trainable]
    writes_back = durability == "checkpoint"
    kept = _kept_bytes(trainable) if writes_back else (0, 0, 0)
    free -= sum(kept)
    if free < 0:
        raise PlanError(
            f'durability="checkpoint" keeps weights, states and gradients of all that is trained in host memory, and '
            f"host_memory = {format_bytes(host_memory_bytes)} is {format_bytes(-free)} short of that. Set host_memory to "
            f'{format_bytes(host_memory_bytes - free * 6 // 5)} or more, or durability="step"',
            short_bytes=-free * 6 // 5,
        )
    activations = least.activations
    if shape is None:
        activations += take(pooled_bytes(UNKNOWN_TOKENS * max(s.input_bytes_per_token for s in shards)) - activations)
    largest = sorted((pooled_bytes(s.weight_bytes) for s in shards), reverse=True)
    widest = sorted((pooled_bytes(s.gradient_bytes) for s in trainable), reverse=True)
    record = max((s.record_bytes for s in trainable), default=0)
    spilled_record = max((s.record_bytes + s.gradient_chunk_bytes for s in trainable), default=0)
    # Comfort first: a second record, three blocks of weights (one on its way in, one in use, one on its way out), two
    # gradients, more records.
    record_pool = least.records + (take(least.records) if free >= least.records else 0)
    wanted_weights = max(sum(largest[:3]) - least.weights, largest[0])
    weight_pool = least.weights + take(wanted_weights)
    prefetch_depth = 2 if weight_pool == least.weights + wanted_weights else 1
    gradient_pool = least.gradients + take(widest[1] if len(widest) > 1 else 0)
    ring = COMFORTABLE_RECORD_BUFFERS * pooled_bytes(spilled_record if clipping else record)
    record_pool += take(ring - record_pool)
    activations += take((boundary_bytes or host_memory_bytes // 16) - activations)
    weight_pool, gradient_pool, record_pool = weight_pool + kept[0], gradient_pool + kept[1], record_pool + kept[2]
    on_device = frozenset[str]()
    if gpu_memory_bytes is not None and num_tokens:
        at_once = min(num_tokens, (micro_batch_size or num_tokens) * (sequence_length or num_tokens))
        on_device = _kept_on_device(shards, gpu_memory_bytes - least.device, at_once)
        if on_device:
            reasons["weights_on_device"] = (
                f"weights of {len(on_device)} frozen blocks stay in half of the GPU's memory that the blocks under way and "
                f"the activations of {at_once} tokens leave: they are neither read nor copied again"
            )
    # Then what saves most traffic per byte of memory; a smaller thing behind a larger one that does not fit gets its
    # chance. In this order more memory never means more traffic.
    blocks = [
        BlockPlan(
            name=s.name,
            kind=s.kind,
            num_parameters=s.num_parameters,
            trainable=s.trainable,
            weight_bytes=s.weight_bytes,
            state_bytes=s.state_bytes if s.trainable else 0,
            gradient_bytes=s.gradient_bytes if s.trainable else 0,
            weights_in_host=writes_back and s.trainable,
            states_in_host=writes_back and s.trainable,
            update_window="forward" if writes_back and s.trainable else "backward",
            gradient="free" if not s.trainable else "host" if writes_back else "spill" if clipping else "free",
            num_borrowers=sum(s.name in other.borrowed for other in shards),
            width=s.width,
            num_idle_parameters=s.num_idle_parameters,
            input_bytes_per_token=s.input_bytes_per_token,
            activation_bytes_per_token=s.activation_bytes_per_token,
            in_backward=s.in_backward,
            weights_on_device=s.name in on_device,
        )
        for s in shards
    ]
    every = (commit_every_steps or COMMIT_EVERY_STEPS) if writes_back else 1

    def step_seconds(changed: Sequence[BlockPlan]) -> float:
        return predicted(changed).seconds

    def predicted(changed: Sequence[BlockPlan]) -> Prediction:
        assert hardware is not None
        return predict(
            changed,
            hardware,
            num_tokens,
            prefetch_depth,
            every,
            num_micro_batches=num_micro_batches,
            moment_dtype=moment_dtype,
            sequence_length=sequence_length,
            buffers=buffers,
        )

    buffers = _buffers(
        weight_pool - kept[0],
        gradient_pool - kept[1],
        record_pool - kept[2],
        (largest[0], widest[0] if widest else 0, pooled_bytes(spilled_record if clipping else record)),
    )

    # Records need no room for a gradient's chunk once nothing is spilled.
    surplus = ring - max(least.records, COMFORTABLE_RECORD_BUFFERS * pooled_bytes(record))
    search = Search(
        blocks,
        free_bytes=free,
        surplus_bytes=max(0, min(surplus, record_pool - kept[2] - least.records)),
        passing_bytes=activations - least.activations,
        num_tokens=num_tokens or 0,
        num_micro_batches=num_micro_batches,
        may_be_late=not writes_back,
        seconds=step_seconds if hardware is not None and num_tokens else None,
    )
    found = search.best()
    blocks = found.blocks
    weight_pool += found.weight_bytes
    gradient_pool += found.gradient_bytes
    record_pool += found.record_bytes
    activations += found.free_bytes + found.activation_bytes
    late = [b for b in blocks if b.trainable and b.update_window == "forward"]
    swapped = [b for b in blocks if b.activations != "recompute"]
    spills = any(b.gradient == "spill" for b in blocks)
    reasons["update_window"] = (
        "all updates are made on the way to the next forward pass: in memory there is no old slot to undo an early one from"
        if writes_back
        else f"updates of {len(trainable) - len(late)} of {len(trainable)} blocks begin in the backward pass, as soon as their "
        f"gradient is whole; {len(late)} on the way to their next forward pass, "
        + ("where the drive has time" if late else "which would make no step shorter by what is known now")
    )
    if clipping:
        num_held = sum(b.trainable and b.gradient == "host" for b in blocks)
        reasons["gradients"] = f"{num_held} of {len(trainable)} blocks' gradients wait for the norm in host memory" + (
            ", the others in scratch files: 4 B more a parameter, 8 B if its update is late or the step is clipped"
            if spills
            else ""
        )
        reasons["max_clipped_share"] = (
            "early updates are guesses until the norm is known, and a clipped step makes them anew at about twice the "
            "traffic: none are made while more than a quarter of the last 16 steps was clipped"
        )
    reasons["weights_in_host"] = (
        f"weights of {sum(b.weights_in_host for b in blocks)} and states of {sum(b.states_in_host for b in blocks)} of "
        f"{len(blocks)} blocks, by traffic saved per byte of memory{found.counted}; every step that is committed is "
        "written through"
    )
    reasons["durability"] = (
        f"all that is trained fits into host memory, so that the drive gets one step in {every}, and whatever is flushed; a "
        f"crash, or a Ctrl-C in the middle of a step, costs at most {every + 1} steps"
        if writes_back
        else "every optimizer step is committed; a crash costs at most the two steps in flight"
    )
    num_layers = sum(b.kind == "layer" for b in blocks)
    num_in_files = sum(b.activations == "ssd" for b in swapped)
    reasons["activations"] = (
        f"outputs of matrix products of {len(swapped)} of {num_layers} layers wait in "
        + ("host memory" if not num_in_files else f"host memory and, of {num_in_files}, in scratch files")
        + ", which takes less time than computing them again; of the others the input alone is kept"
        if swapped
        else "each layer is computed again in the backward pass; its input alone is kept"
    )
    return Plan(
        device=device,
        compute_dtype=compute_dtype,
        micro_batch_size=micro_batch_size,
        durability=durability,
        commit_every_steps=every,
        moment_dtype=moment_dtype,
        gpu_memory_bytes=gpu_memory_bytes,
        prefetch_depth=prefetch_depth,
        num_update_workers=num_update_workers(device, num_cores),
        num_io_threads=4,
        host_memory_bytes=host_memory_bytes,
        weight_pool_bytes=weight_pool,
        gradient_pool_bytes=gradient_pool,
        record_pool_bytes=record_pool,
        activation_pool_bytes=activations,
        overhead_bytes=overhead,
        compute_bytes=computing,
        blocks=tuple(blocks),
        reasons=reasons,
        prediction=None if hardware is None else predicted(blocks),
    )


@dataclasses.dataclass(frozen=True)
class PlanInputs:
    """What a plan is decided by: the arguments of `make_plan`, so that one of them can be changed."""

    shards: tuple[ShardSize, ...]
    device: str
    compute_dtype: str
    moment_dtype: str
    host_memory_bytes: int
    host_memory_reason: str
    gpu_memory_bytes: int | None
    micro_batch_size: int | None
    clipping: bool
    num_cores: int
    durability: Literal["step", "checkpoint"] | None = None
    """None: "checkpoint" where that costs no time, since it spares the drive."""
    commit_every_steps: int | None = None
    hardware: HardwareProfile | None = None
    boundary_bytes: int | None = None
    num_tokens: int | None = None
    num_micro_batches: int = 1
    sequence_length: int = 0
    loss_chunk_tokens: int | None = None

    @property
    def shape(self) -> StepShape | None:
        """Of a step, if it is known."""
        return StepShape(self.num_tokens, self.num_micro_batches, self.sequence_length) if self.num_tokens else None

    def least(self) -> LeastMemory:
        """`least_memory` of these."""
        return least_memory(self.shards, self.shape)

    def plan(self) -> Plan:
        """`make_plan` of these; PlanError if it does not fit."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.durability is not None:
            return make_plan(**values)
        each_step = make_plan(**{**values, "durability": "step"})
        # Nothing was measured that tells, or nothing is trained.
        if each_step.prediction is None or not any(block.trainable for block in each_step.blocks):
            return each_step
        try:
            plan = make_plan(**{**values, "durability": "checkpoint"})
        except PlanError:  # what is trained does not fit into host memory
            return each_step
        assert plan.prediction is not None
        return plan if plan.prediction.seconds <= each_step.prediction.seconds * (1 + LEAST_GAIN) else each_step


def _kept_bytes(trainable: Sequence[ShardSize]) -> tuple[int, int, int]:
    """What all trained weights, gradients and states take from their pools when they stay in host memory."""
    return (
        sum(pooled_bytes(s.weight_bytes) for s in trainable),
        sum(pooled_bytes(s.gradient_bytes) for s in trainable),
        sum(pooled_bytes(s.state_bytes) for s in trainable),
    )


def _kept_on_device(shards: Sequence[ShardSize], room_bytes: int, tokens_at_once: int) -> frozenset[str]:
    """Frozen blocks whose weights fit beside a layer's graph, generously estimated; none where that is not known."""
    if any(s.kind == "layer" and not s.activation_bytes_per_token for s in shards):
        return frozenset()
    widest = max((s.width for s in shards), default=0)
    vocabulary = max((s.num_parameters // widest for s in shards if s.kind != "layer" and widest), default=0)
    layer_bytes = GRAPH_FACTOR * max((s.activation_bytes_per_token for s in shards), default=0)
    room_bytes = (room_bytes - tokens_at_once * (layer_bytes + BYTES_PER_LOGIT * vocabulary)) // 2
    kept = set[str]()
    for shard in shards:
        if not shard.trainable and shard.weight_bytes <= room_bytes:
            kept.add(shard.name)
            room_bytes -= shard.weight_bytes
    return frozenset(kept)


def traffic(
    blocks: Sequence[BlockPlan], commit_every_steps: int = 1, num_micro_batches: int | None = None
) -> tuple[int, int]:
    """Bytes that a steady step reads from and writes to the drive, spilled activations left out; no step is clipped.

    Where not every step is written, its share of one that is. `num_micro_batches` None: not known.
    """
    read = written = 0
    for block in blocks:
        read += block.num_weight_reads() * block.weight_bytes
        if block.trainable:
            read += 0 if block.states_in_host else block.state_bytes
            written += (block.weight_bytes + block.state_bytes) // commit_every_steps
            if block.gradient == "spill":
                spilled_bytes = block.spilled_bytes(num_micro_batches)
                written += spilled_bytes
                read += spilled_bytes if block.update_window == "forward" else 0
    return read, written


def predict(
    blocks: Sequence[BlockPlan],
    hardware: HardwareProfile,
    num_tokens: int | None,
    prefetch_depth: int = 2,
    commit_every_steps: int = 1,
    *,
    num_micro_batches: int = 1,
    moment_dtype: str = "float32",
    sequence_length: int = 0,
    buffers: Buffers = AMPLE,
) -> Prediction:
    """A steady step's traffic and time, simulated; no step is clipped."""
    step = simulate_step(
        blocks,
        hardware,
        num_tokens=num_tokens or 0,
        num_micro_batches=num_micro_batches,
        moment_dtype=moment_dtype,
        prefetch_depth=prefetch_depth,
        commit_every_steps=commit_every_steps,
        sequence_length=sequence_length,
        buffers=buffers,
        with_spans=False,
    )
    return Prediction(
        step.seconds, step.lane_seconds, step.limiting_lane, *traffic(blocks, commit_every_steps, num_micro_batches)
    )


def predict_plan(
    plan: Plan, hardware: HardwareProfile, shape: StepShape, blocks: Sequence[BlockPlan] | None = None
) -> Prediction:
    """Of a steady step of a plan with such a batch; with these blocks instead, which take as much memory as its own."""
    return predict(
        plan.blocks if blocks is None else blocks,
        hardware,
        shape.num_tokens,
        plan.prefetch_depth,
        plan.commit_every_steps,
        num_micro_batches=shape.num_micro_batches,
        moment_dtype=plan.moment_dtype,
        sequence_length=shape.sequence_length,
        buffers=buffers_of(plan),
    )


def with_best_windows(plan: Plan, hardware: HardwareProfile, shape: StepShape) -> Plan:
    """A plan that was made before steps were known, with its updates when they fit such steps best; memory as it is.

    Blocks whose gradient has no place to wait keep their early updates, and all keep theirs with durability="checkpoint".
    """
    free = [n for n, b in enumerate(plan.blocks) if b.trainable and b.gradient != "free" and b.in_backward]
    if plan.durability == "checkpoint" or not shape.num_tokens:
        free = []

    def late(numbers: Sequence[int]) -> tuple[BlockPlan, ...]:
        chosen = set(numbers)
        return tuple(
            dataclasses.replace(b, update_window="forward" if n in chosen else "backward") if n in free else b
            for n, b in enumerate(plan.blocks)
        )

    def predicted(blocks: Sequence[BlockPlan]) -> Prediction:
        return predict_plan(plan, hardware, shape, blocks)

    count = best_count(len(free), lambda number: predicted(late(spread(free, number))).seconds)
    # The first blocks' gradients come last in the backward pass, and the next forward pass would wait for their writes.
    tried = [late(spread(free, count))] + [
        late([*free[:first], *spread(free[first:], max(0, count - first))])
        for first in NUMS_FIRST
        if first <= len(free)
    ]
    found = [predicted(blocks) for blocks in tried]
    best = min(range(len(tried)), key=lambda n: found[n].seconds)
    if found[best].seconds >= found[0].seconds * (1 - LEAST_GAIN):
        best = 0
    num_late = sum(b.update_window == "forward" for b in tried[best])
    reason = (
        f"updates of {num_late} of {len(plan.blocks)} blocks on the way to their next forward pass, by the first batch"
    )
    return dataclasses.replace(
        plan, blocks=tried[best], prediction=found[best], reasons={**plan.reasons, "update_window": reason}
    )


def _buffers(weights: int, gradients: int, records: int, largest: tuple[int, int, int]) -> Buffers:
    """How many of the largest buffers fit into these pools; one at least, since smaller blocks' do."""
    return Buffers(
        *(
            max(1, pool // size) if size else 0
            for pool, size in zip((weights, gradients, records), largest, strict=True)
        )
    )


def buffers_of(plan: Plan) -> Buffers:
    """How many of each kind a plan's pools hold beside what stays in them."""
    blocks = plan.blocks
    trained = [b for b in blocks if b.trainable]
    # The states of a record, and its piece of a gradient where some are spilled.
    record = max((b.state_bytes * min(1.0, RECORD_PARAMETERS / b.num_parameters) for b in trained), default=0)
    if any(b.gradient == "spill" for b in trained):
        record += max(4 * min(RECORD_PARAMETERS, b.num_parameters) for b in trained)
    return _buffers(
        plan.weight_pool_bytes - sum(pooled_bytes(b.weight_bytes) for b in blocks if b.weights_in_host),
        plan.gradient_pool_bytes - sum(pooled_bytes(b.gradient_bytes) for b in trained if b.gradient == "host"),
        plan.record_pool_bytes - sum(pooled_bytes(b.state_bytes) for b in trained if b.states_in_host),
        (
            max(pooled_bytes(b.weight_bytes) for b in blocks),
            max((pooled_bytes(b.gradient_bytes) for b in trained), default=0),
            pooled_bytes(int(record)),
        ),
    )


def simulate_plan(
    plan: Plan,
    hardware: HardwareProfile,
    num_tokens: int | None,
    sequence_length: int = 0,
    *,
    num_micro_batches: int = 1,
) -> SimulatedStep:
    """A steady step of a plan, of a batch with so many tokens in all its micro-batches."""
    return simulate_step(
        plan.blocks,
        hardware,
        num_tokens=num_tokens or 0,
        num_micro_batches=num_micro_batches,
        moment_dtype=plan.moment_dtype,
        prefetch_depth=plan.prefetch_depth,
        commit_every_steps=plan.commit_every_steps,
        sequence_length=sequence_length,
        buffers=buffers_of(plan),
    )
