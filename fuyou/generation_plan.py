"""How many texts are generated at once, where their keys and values wait, and how fast that will be: pure arithmetic.

A token of every text of a batch costs one pass over the weights, so that the largest batch that fits is the fastest
unless its cache takes memory from weights that would be kept there; candidates are compared by their predicted rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from fuyou.config import counted, format_bytes
from fuyou.errors import ConfigError, PlanError
from fuyou.hardware import HardwareProfile
from fuyou.plan import BlockPlan, Plan
from fuyou.plan_search import LEAST_GAIN
from fuyou.planner import MEBIBYTE, ShardSize, least_memory, make_plan
from fuyou.simulator import Task, compute_seconds, lane_speeds, multiplied_parameters, play

FLOAT32_BYTES = 4
LOGIT_COPIES = 4
"""float32 copies of one position's logits while a token is chosen: raw, scaled, sorted, as probabilities."""
MAX_PREFILL_TOKENS = 16_384
"""Of the rows that run through a layer at once: more do not make its matrix products any faster."""


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """What one token of one text leaves in each layer's cache of keys and values."""

    layer_bytes_per_token: int
    windows: tuple[int | None, ...]
    """For each layer, the tokens that it keeps at most; None: all."""
    heads: tuple[int, int, int] = (1, 1, 1)
    """Of queries, of keys and values, and the width of each."""

    def row_bytes(self, num_tokens: int) -> int:
        """Of all layers, for one text of so many tokens."""
        return sum(self.layer_bytes_per_token * min(num_tokens, window or num_tokens) for window in self.windows)


def cache_shape(config: Any, itemsize: int) -> CacheShape:
    """By the usual fields of a transformers config; itemsize is the compute dtype's. ConfigError where they are missing."""
    text = config.get_text_config()
    try:
        heads = text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        num_layers = text.num_hidden_layers
    except AttributeError as error:
        raise ConfigError(f"{config.model_type}: the size of its cache cannot be told ({error})") from None
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * num_layers
    window = getattr(text, "sliding_window", None)
    windows = tuple(window if "sliding" in kind else None for kind in kinds)
    return CacheShape(2 * kv_heads * head_dim * itemsize, windows, (heads, kv_heads, head_dim))


@dataclasses.dataclass(frozen=True)
class Demand:
    """What is to be generated."""

    num_texts: int
    prompt_tokens: int
    """Of the longest prompt."""
    new_tokens: int
    """At most, of each text."""

    @property
    def context(self) -> int:
        """Tokens of the longest text in the end."""
        return self.prompt_tokens + self.new_tokens


@dataclasses.dataclass(frozen=True)
class GenerationPlan:
    """What was decided, and what is expected of it."""

    batch_size: int
    """Texts generated at once: each weight is read once a token for all of them."""
    micro_batch_size: int
    """Of them, how many run through a layer at once while the prompts are read."""
    cache_tier: Literal["device", "host"]
    cache_bytes: int
    reserve_bytes: int
    """Of host memory, kept from the weights: cache, hidden states, logits, where they are there."""
    weights_host_bytes: int
    """The rest of the budget, which is planned for weights as in training."""
    read_bytes_per_token_step: int
    predicted_prefill_seconds: float
    """Of the first batch, with which weights come in that stay in memory."""
    predicted_later_prefill_seconds: float
    """Of any other."""
    predicted_seconds_per_token_step: float
    predicted_tokens_per_second: float
    """Of new tokens, prompts included in the time."""
    limiting_lane: str
    reasons: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return dataclasses.asdict(self)

    def describe(self) -> str:
        """For people: one line a decision."""
        return "\n".join(
            [
                f"{counted(self.batch_size, 'text')} at once ({self.reasons['batch_size']}), "
                f"prompts in parts of {self.micro_batch_size}",
                f"keys and values in {'host memory' if self.cache_tier == 'host' else 'the memory that computes'}: "
                f"{format_bytes(self.cache_bytes)} ({self.reasons['cache']})",
                f"{format_bytes(self.read_bytes_per_token_step)} are read from the drive for each token of the batch",
                f"predicted: {self.predicted_tokens_per_second:.3g} tokens/s; a token of the batch takes "
                f"{self.predicted_seconds_per_token_step:.3g} s (limit: {self.limiting_lane}), the prompts "
                f"{self.predicted_prefill_seconds:.3g} s",
            ]
        )


@dataclasses.dataclass(frozen=True)
class Room:
    """The memory that there is."""

    device: str
    num_cores: int
    host_memory_bytes: int
    gpu_memory_bytes: int | None
    """None where the host computes."""

    @property
    def on_host(self) -> bool:
        """Whether host memory holds what is computed with."""
        return self.device == "cpu"


@dataclasses.dataclass(frozen=True)
class Machine:
    """What limits generation here."""

    hardware: HardwareProfile
    host_memory_bytes: int
    gpu_memory_bytes: int | None
    """None where the host computes."""
    weight_bytes_per_second: Callable[[int], float]
    """Weights multiplied with so many tokens at once, on the device; measured."""
    cache_seconds: Callable[[int, int], float] = lambda _rows, _tokens: 0.0
    """What one layer's cache costs in a token step, of so many texts and tokens of each: to grow and to be read; measured."""

    @property
    def room(self) -> Room:
        """Its memory."""
        return Room(self.hardware.device, self.hardware.num_cores, self.host_memory_bytes, self.gpu_memory_bytes)


@dataclasses.dataclass(frozen=True)
class Wording:
    """How a refusal names what can be changed."""

    new_tokens: str
    fewer_texts: str
    host_memory: str


COMMAND = Wording("--max-new-tokens to {}", "take a smaller --batch-size", '--host-memory "{}MiB"')
CALL = Wording("max_new_tokens={}", "give fewer texts (or beams) at once", 'OffloadConfig(host_memory="{}MiB")')


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a batch finds room."""

    micro_batch_size: int
    cache_tier: Literal["device", "host"]
    cache_bytes: int
    reserve_bytes: int
    weights: Plan
    """Of what the reserve leaves of host memory."""
    reason: str
    """For the tier."""


class _Model:
    """Sizes of a model, and what a batch of texts takes beside the weights."""

    def __init__(self, shards: Sequence[ShardSize], cache: CacheShape, vocabulary_size: int, itemsize: int) -> None:
        self.shards, self.cache, self.vocabulary_size = shards, cache, vocabulary_size
        layers = [shard for shard in shards if shard.kind == "layer"] or shards
        self.width_bytes = max((shard.width for shard in layers), default=0) * itemsize
        # Twice: a product's outputs and what is made of them next.
        self.layer_bytes_per_token = 2 * max((shard.activation_bytes_per_token for shard in layers), default=0)
        self.weight_bytes = sum(shard.weight_bytes for shard in shards)
        self.by_name = {shard.name: shard for shard in shards}

    def multiplied_bytes(self, name: str, rows: int) -> int:
        """Of a block's weights, those that a token of each text is multiplied with: rows of an embedding are looked up."""
        shard = self.by_name[name]
        if shard.kind == "prologue":
            return 0
        # One token meets few of the experts, those of several may meet all.
        idle = shard.num_idle_parameters if rows == 1 else 0
        return shard.weight_bytes * (shard.num_parameters - idle) // max(1, shard.num_parameters) + shard.borrowed_bytes

    def cache_bytes(self, rows: int, context: int) -> int:
        # One more layer: a layer's cache grows by being copied.
        return rows * self.cache.row_bytes(context) * (len(self.cache.windows) + 1) // max(1, len(self.cache.windows))

    def beside_bytes(self, rows: int, micro_batch: int, prompt_tokens: int) -> int:
        hidden = 2 * rows * prompt_tokens * self.width_bytes
        logits = LOGIT_COPIES * rows * self.vocabulary_size * FLOAT32_BYTES
        return hidden + micro_batch * prompt_tokens * self.layer_bytes_per_token + logits


def make_generation_plan(
    shards: Sequence[ShardSize],
    cache: CacheShape,
    demand: Demand,
    machine: Machine,
    *,
    vocabulary_size: int,
    compute_dtype: str,
    batch_size: int | None = None,
) -> GenerationPlan:
    """The fastest of the plans that fit. `batch_size` None: chosen. `shards` are frozen ones.

    PlanError says how many tokens fit where these do not.
    """
    model = _Model(shards, cache, vocabulary_size, 2 if compute_dtype == "bfloat16" else 4)
    sizes = [batch_size] if batch_size is not None else _powers(demand.num_texts)
    found = [
        _predicted(model, demand, machine, rows, fit)
        for size in sizes
        if (fit := _fit(model, demand, machine.room, rows := min(size, demand.num_texts), compute_dtype)) is not None
    ]
    if not found:
        raise _does_not_fit(model, demand, machine.room, sizes[0], compute_dtype, COMMAND)
    fastest = max(plan.predicted_tokens_per_second for plan in found)
    # Fewer batches are also fewer prompts to be read: of what is about as fast, the largest.
    best = [plan for plan in found if plan.predicted_tokens_per_second >= fastest * (1 - LEAST_GAIN)][-1]
    if batch_size is not None:
        reason = "as asked for"
    elif best.batch_size == demand.num_texts:
        reason = "all there are"
    elif best is not found[-1]:
        reason = "more would take memory from weights that are kept there, and be slower"
    else:
        reason = "more do not fit, or make it no faster"
    return dataclasses.replace(best, reasons={**best.reasons, "batch_size": reason})


def fit_generation(
    shards: Sequence[ShardSize],
    cache: CacheShape,
    demand: Demand,
    room: Room,
    *,
    vocabulary_size: int,
    compute_dtype: str,
    cache_tier: Literal["device", "host"] | None = None,
) -> Fit:
    """Where all texts of the demand find room at once, for a call from Python: as `make_generation_plan`, nothing predicted.

    `cache_tier`: where the caller wants the cache, who has said so.
    """
    model = _Model(shards, cache, vocabulary_size, 2 if compute_dtype == "bfloat16" else 4)
    fit = _fit(model, demand, room, demand.num_texts, compute_dtype, cache_tier)
    if fit is None:
        raise _does_not_fit(model, demand, room, demand.num_texts, compute_dtype, CALL, cache_tier)
    return fit


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    sizes = [1]
    while sizes[-1] * 2 < most:
        sizes.append(sizes[-1] * 2)
    return [*sizes, most] if most > 1 else sizes


def _fit(
    model: _Model,
    demand: Demand,
    room: Room,
    rows: int,
    compute_dtype: str,
    wanted: Literal["device", "host"] | None = None,
) -> Fit | None:
    """How batches of so many rows find room; None if they do not."""
    micro_batch = max(1, min(rows, MAX_PREFILL_TOKENS // max(1, demand.prompt_tokens)))
    cache_bytes = model.cache_bytes(rows, demand.context)
    while True:
        beside = model.beside_bytes(rows, micro_batch, demand.prompt_tokens)
        tier: Literal["device", "host"] = "device"
        reserve = cache_bytes + beside if room.on_host else 0
        reason = "beside what computes with them"
        fits = True
        if room.gpu_memory_bytes is not None:
            free = room.gpu_memory_bytes - least_memory(model.shards).device - beside
            if wanted == "host" or (wanted is None and free < cache_bytes):
                tier, reserve = "host", cache_bytes
                reason = f"gpu_memory leaves {format_bytes(max(0, free))} beside weights and hidden states"
                # Two layers' of it are on the device at a time: one in use, one on its way in.
                fits = free >= 2 * cache_bytes // max(1, len(model.cache.windows))
            else:
                fits = free >= cache_bytes
        if fits:
            weights = _weights_plan(model, room, compute_dtype, room.host_memory_bytes - reserve)
            if weights is not None:
                return Fit(micro_batch, tier, cache_bytes, reserve, weights, reason)
        if micro_batch == 1:
            return None
        micro_batch = (micro_batch + 1) // 2


def _weights_plan(model: _Model, room: Room, compute_dtype: str, host_memory_bytes: int) -> Plan | None:
    if host_memory_bytes <= 0:
        return None
    try:
        return make_plan(
            model.shards,
            device=room.device,
            compute_dtype=compute_dtype,
            moment_dtype="float32",
            host_memory_bytes=host_memory_bytes,
            host_memory_reason="",
            gpu_memory_bytes=room.gpu_memory_bytes,
            micro_batch_size=None,
            clipping=False,
            num_cores=room.num_cores,
        )
    except PlanError:
        return None


def _predicted(model: _Model, demand: Demand, machine: Machine, rows: int, fit: Fit) -> GenerationPlan:
    """The plan for such batches, with how long they will take."""
    moved_cache_bytes = fit.cache_bytes if fit.cache_tier == "host" else 0
    # The cache grows: in the middle it has the mean of what it costs.
    tokens = demand.prompt_tokens + demand.new_tokens // 2
    step = _token_seconds(model, machine, rows, tokens)
    prompts = _prompt_seconds(model, demand, machine, rows, fit, step)
    seconds, lane = _pass_seconds(fit.weights, machine, step, moved_cache_bytes)
    prefill, _ = _pass_seconds(fit.weights, machine, prompts, 0)
    read = sum(b.weight_bytes for b in fit.weights.blocks if not b.weights_in_host)
    kept = sum(b.weight_bytes for b in fit.weights.blocks if b.weights_in_host)
    # Beside the first prompts' pass, which waits for each block of them.
    first = max(prefill, (read + kept) / machine.hardware.read_bytes_per_second)
    batches = -(-demand.num_texts // rows)
    new_tokens = demand.num_texts * demand.new_tokens
    total = first + (batches - 1) * prefill + batches * max(0, demand.new_tokens - 1) * seconds
    return GenerationPlan(
        batch_size=rows,
        micro_batch_size=fit.micro_batch_size,
        cache_tier=fit.cache_tier,
        cache_bytes=fit.cache_bytes,
        reserve_bytes=fit.reserve_bytes,
        weights_host_bytes=machine.host_memory_bytes - fit.reserve_bytes,
        read_bytes_per_token_step=read,
        predicted_prefill_seconds=first,
        predicted_later_prefill_seconds=prefill,
        predicted_seconds_per_token_step=seconds,
        predicted_tokens_per_second=new_tokens / total,
        limiting_lane=lane,
        reasons={"cache": fit.reason},
    )


def _token_seconds(model: _Model, machine: Machine, rows: int, tokens: int) -> dict[str, float]:
    """By block, of compute with one token of each text, behind so many others."""
    rate = machine.weight_bytes_per_second(rows)
    found = {
        shard.name: machine.hardware.seconds_per_block + model.multiplied_bytes(shard.name, rows) / rate
        for shard in model.shards
    }
    layers = [shard.name for shard in model.shards if shard.kind == "layer"]
    for name, window in zip(layers, model.cache.windows, strict=False):
        found[name] += machine.cache_seconds(rows, min(tokens, window or tokens))
    return found


def _prompt_seconds(
    model: _Model, demand: Demand, machine: Machine, rows: int, fit: Fit, step: Mapping[str, float]
) -> dict[str, float]:
    """By block, of compute with all prompts; of the head with one token of each, since no other's logits are wanted."""
    hardware = machine.hardware
    multiplied = multiplied_parameters(fit.weights.blocks, demand.prompt_tokens)
    parts = [fit.micro_batch_size] * (rows // fit.micro_batch_size)
    parts += [rows % fit.micro_batch_size] if rows % fit.micro_batch_size else []

    def layer(name: str) -> float:
        return sum(
            compute_seconds(hardware, multiplied[name], part * demand.prompt_tokens, what="forward") for part in parts
        )

    return {b.name: max(step[b.name], layer(b.name) if b.kind == "layer" else 0.0) for b in fit.weights.blocks}


def _pass_seconds(
    weights: Plan, machine: Machine, compute: Mapping[str, float], moved_cache_bytes: int
) -> tuple[float, str]:
    """Of one of many passes over the weights, played with the first blocks of the next read ahead, and its busiest lane."""
    hardware, blocks = machine.hardware, weights.blocks
    num_layers = max(1, sum(block.kind == "layer" for block in blocks))
    tasks: list[Task] = []
    computed: list[int] = []
    computed_reads: list[int] = []

    def add(lane: str, block: BlockPlan, seconds: float, after: Sequence[int]) -> int:
        tasks.append(Task(lane, block.name, seconds, tuple(dict.fromkeys(after))))
        return len(tasks) - 1

    def ahead(of: Sequence[int]) -> list[int]:
        return [of[-1 - weights.prefetch_depth]] if len(of) > weights.prefetch_depth else []

    ends = []
    for _ in range(3):
        for block in blocks:
            came: list[int] = []
            if not block.weights_in_host:
                seconds = block.weight_bytes / hardware.read_bytes_per_second
                came = [add("ssd_read", block, seconds, ahead(computed_reads))]
            if hardware.link_bytes_per_second:
                moved = block.weight_bytes + (moved_cache_bytes // num_layers if block.kind == "layer" else 0)
                came = [add("h2d", block, moved / hardware.link_bytes_per_second, came + ahead(computed))]
            computed.append(add("gpu", block, compute[block.name], [*computed[-1:], *came]))
            if not block.weights_in_host:
                computed_reads.append(computed[-1])
        ends.append(computed[-1])
    layer_size = max((block.num_parameters for block in blocks if block.kind == "layer"), default=0)
    spans = play(tasks, lane_speeds(hardware, layer_size))
    lanes: dict[str, float] = {}
    for task in tasks[ends[1] + 1 :]:  # of the third pass
        lanes[task.lane] = lanes.get(task.lane, 0.0) + task.seconds
    lane = max(lanes, key=lambda lane: lanes[lane])
    # What was read ahead in the beginning is used up only slowly where two lanes are about as fast.
    return max(lanes[lane], spans[ends[2]].ended_seconds - spans[ends[1]].ended_seconds), lane


def _does_not_fit(
    model: _Model,
    demand: Demand,
    room: Room,
    rows: int,
    compute_dtype: str,
    wording: Wording,
    wanted: Literal["device", "host"] | None = None,
) -> PlanError:
    def fits(changed: Demand) -> bool:
        return _fit(model, changed, room, rows, compute_dtype, wanted) is not None

    def fitting(low: int, high: int, change: Callable[[int], Demand]) -> int:
        """The largest value from `low` on that fits, below `high`; low - 1 if none does."""
        low -= 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(change(middle)) else (low, middle)
        return low

    budget = f"host_memory = {format_bytes(room.host_memory_bytes)}"
    if room.gpu_memory_bytes is not None:
        budget += f" and gpu_memory = {format_bytes(room.gpu_memory_bytes)}"
    needed = model.cache_bytes(rows, demand.context) + model.beside_bytes(rows, 1, demand.prompt_tokens)
    whole = least_memory(model.shards).host_memory_bytes + (needed if room.on_host else 0)
    text = (
        f"{counted(rows, 'text')} of {demand.context} tokens (prompt {demand.prompt_tokens}, new "
        f"{demand.new_tokens}) need {format_bytes(needed)} beside the weights, more than {budget} leaves. "
    )
    most = fitting(1, demand.new_tokens, lambda n: dataclasses.replace(demand, new_tokens=n))
    if most >= 1:
        text += f"{demand.prompt_tokens + most} tokens fit: set {wording.new_tokens.format(most)} or less"
    else:
        prompt = fitting(1, demand.prompt_tokens, lambda n: dataclasses.replace(demand, prompt_tokens=n, new_tokens=1))
        if prompt < 1:
            text += "Not one token fits"
        else:
            text += f"{prompt + 1} tokens fit: shorten the prompt to {prompt} tokens"
    if rows > 1:
        text += f", {wording.fewer_texts}"
    return PlanError(f"{text}, or give {wording.host_memory.format(-(-whole * 6 // 5 // MEBIBYTE))} or more")
