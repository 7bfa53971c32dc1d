"""How many texts are generated at once, where their keys and values wait, and how fast that will be: pure arithmetic.

A token of every text of a batch costs one pass over the weights, so that the largest batch that fits is the fastest
unless its cache takes memory from weights that would be kept there; candidates are compared by their predicted rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from fuyou.config import format_bytes
from fuyou.errors import ConfigError, PlanError
from fuyou.hardware import HardwareProfile
from fuyou.plan import Plan
from fuyou.plan_search import LEAST_GAIN
from fuyou.planner import MEBIBYTE, ShardSize, least_memory, make_plan

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
    return CacheShape(2 * kv_heads * head_dim * itemsize, windows)


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
    """Of the first batch."""
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
                f"{self.batch_size} text{'s' * (self.batch_size > 1)} at once ({self.reasons['batch_size']}), "
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
class Machine:
    """What limits generation here."""

    hardware: HardwareProfile
    host_memory_bytes: int
    gpu_memory_bytes: int | None
    """None where the host computes."""
    weight_bytes_per_second: Callable[[int], float]
    """Weights multiplied with so many tokens at once, on the device; measured."""

    @property
    def on_host(self) -> bool:
        """Whether host memory holds what is computed with."""
        return self.hardware.device == "cpu"


class _Model:
    """Sizes of a model, and what a batch of texts takes beside the weights."""

    def __init__(self, shards: Sequence[ShardSize], cache: CacheShape, vocabulary_size: int, itemsize: int) -> None:
        self.shards, self.cache, self.vocabulary_size = shards, cache, vocabulary_size
        layers = [shard for shard in shards if shard.kind == "layer"] or shards
        self.width_bytes = max((shard.width for shard in layers), default=0) * itemsize
        # Twice: a product's outputs and what is made of them next.
        self.layer_bytes_per_token = 2 * max((shard.activation_bytes_per_token for shard in layers), default=0)
        self.weight_bytes = sum(shard.weight_bytes for shard in shards)
        self.num_multiplied = sum(shard.num_parameters - shard.num_idle_parameters for shard in shards)

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

    def candidate(rows: int, context_of: Demand) -> GenerationPlan | None:
        return _candidate(model, context_of, machine, rows, compute_dtype)

    sizes = [batch_size] if batch_size is not None else _powers(demand.num_texts)
    found = [plan for rows in sizes if (plan := candidate(min(rows, demand.num_texts), demand)) is not None]
    if not found:
        raise _does_not_fit(model, demand, machine, sizes[0], lambda d: candidate(sizes[0], d) is not None)
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


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    sizes = [1]
    while sizes[-1] * 2 < most:
        sizes.append(sizes[-1] * 2)
    return [*sizes, most] if most > 1 else sizes


def _candidate(model: _Model, demand: Demand, machine: Machine, rows: int, compute_dtype: str) -> GenerationPlan | None:
    """The plan for batches of so many rows; None if it does not fit."""
    micro_batch = max(1, min(rows, MAX_PREFILL_TOKENS // max(1, demand.prompt_tokens)))
    cache_bytes = model.cache_bytes(rows, demand.context)
    while True:
        beside = model.beside_bytes(rows, micro_batch, demand.prompt_tokens)
        tier: Literal["device", "host"] = "device"
        reserve = cache_bytes + beside if machine.on_host else 0
        reason = "beside what computes with them"
        if machine.gpu_memory_bytes is not None:
            free = machine.gpu_memory_bytes - least_memory(model.shards).device - beside
            if free < cache_bytes:
                tier, reserve = "host", cache_bytes
                reason = f"gpu_memory leaves {format_bytes(max(0, free))} beside weights and hidden states"
                # Two layers' of it are on the device at a time: one in use, one on its way in.
                free -= 2 * cache_bytes // max(1, len(model.cache.windows))
            if free < 0:
                if micro_batch == 1:
                    return None
                micro_batch = (micro_batch + 1) // 2
                continue
        weights = _weights_plan(model, machine, compute_dtype, machine.host_memory_bytes - reserve)
        if weights is not None:
            break
        if micro_batch == 1:
            return None
        micro_batch = (micro_batch + 1) // 2
    read = sum(b.weight_bytes for b in weights.blocks if not b.weights_in_host)
    seconds, prefill, lane = _seconds(model, demand, machine, rows, read, cache_bytes if tier == "host" else 0)
    # Weights that stay in memory come in with the first batch.
    first = max(prefill, model.weight_bytes / machine.hardware.read_bytes_per_second)
    batches = -(-demand.num_texts // rows)
    new_tokens = demand.num_texts * demand.new_tokens
    total = first + (batches - 1) * prefill + batches * max(0, demand.new_tokens - 1) * seconds
    return GenerationPlan(
        batch_size=rows,
        micro_batch_size=micro_batch,
        cache_tier=tier,
        cache_bytes=cache_bytes,
        reserve_bytes=reserve,
        weights_host_bytes=machine.host_memory_bytes - reserve,
        read_bytes_per_token_step=read,
        predicted_prefill_seconds=first,
        predicted_seconds_per_token_step=seconds,
        predicted_tokens_per_second=new_tokens / total,
        limiting_lane=lane,
        reasons={"cache": reason},
    )


def _weights_plan(model: _Model, machine: Machine, compute_dtype: str, host_memory_bytes: int) -> Plan | None:
    if host_memory_bytes <= 0:
        return None
    try:
        return make_plan(
            model.shards,
            device=machine.hardware.device,
            compute_dtype=compute_dtype,
            moment_dtype="float32",
            host_memory_bytes=host_memory_bytes,
            host_memory_reason="",
            gpu_memory_bytes=machine.gpu_memory_bytes,
            micro_batch_size=None,
            clipping=False,
            num_cores=machine.hardware.num_cores,
        )
    except PlanError:
        return None


def _seconds(
    model: _Model, demand: Demand, machine: Machine, rows: int, read_bytes: int, moved_cache_bytes: int
) -> tuple[float, float, str]:
    """Of a token step and of the prompts' pass, and the lane that limits the former: lanes work side by side."""
    hardware = machine.hardware
    step = {
        "ssd_read": read_bytes / hardware.read_bytes_per_second,
        "gpu": len(model.shards) * hardware.seconds_per_block
        + model.weight_bytes / machine.weight_bytes_per_second(rows),
    }
    if hardware.link_bytes_per_second:
        step["h2d"] = (model.weight_bytes + moved_cache_bytes) / hardware.link_bytes_per_second
    flops = 2.0 * model.num_multiplied * rows * demand.prompt_tokens
    prefill = max(*(s for lane, s in step.items()), flops / hardware.compute_flops_per_second)
    lane = max(step, key=lambda name: step[name])
    return step[lane], prefill, lane


def _does_not_fit(
    model: _Model, demand: Demand, machine: Machine, rows: int, fits: Callable[[Demand], bool]
) -> PlanError:
    def fitting(low: int, high: int, change: Callable[[int], Demand]) -> int:
        """The largest value from `low` on that fits, below `high`; low - 1 if none does."""
        low -= 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(change(middle)) else (low, middle)
        return low

    budget = f"host_memory = {format_bytes(machine.host_memory_bytes)}"
    if machine.gpu_memory_bytes is not None:
        budget += f" and gpu_memory = {format_bytes(machine.gpu_memory_bytes)}"
    needed = model.cache_bytes(rows, demand.context) + model.beside_bytes(rows, 1, demand.prompt_tokens)
    whole = least_memory(model.shards).host_memory_bytes + (needed if machine.on_host else 0)
    text = (
        f"{rows} {'text' if rows == 1 else 'texts'} of {demand.context} tokens (prompt {demand.prompt_tokens}, new "
        f"{demand.new_tokens}) need {format_bytes(needed)} beside the weights, more than {budget} leaves. "
    )
    most = fitting(1, demand.new_tokens, lambda n: dataclasses.replace(demand, new_tokens=n))
    if most >= 1:
        text += f"{demand.prompt_tokens + most} tokens fit: set --max-new-tokens to {most} or less"
    else:
        prompt = fitting(1, demand.prompt_tokens, lambda n: dataclasses.replace(demand, prompt_tokens=n, new_tokens=1))
        if prompt < 1:
            text += "Not one token fits"
        else:
            text += f"{prompt + 1} tokens fit: shorten the prompt to {prompt} tokens"
    if rows > 1:
        text += ", take a smaller --batch-size"
    return PlanError(f'{text}, or give --host-memory "{-(-whole * 6 // 5 // MEBIBYTE)}MiB" or more')
