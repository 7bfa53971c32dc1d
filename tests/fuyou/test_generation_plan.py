"""Plans of generation: sizes of caches against real ones, what fits, what is refused with which number, which batch."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from fuyou.errors import PlanError
from fuyou.generation_plan import (
    CacheShape,
    Demand,
    GenerationPlan,
    Machine,
    Room,
    cache_shape,
    fit_generation,
    make_generation_plan,
)
from fuyou.hardware import HardwareProfile
from fuyou.planner import ShardSize, make_plan
from tests.tiny_models import TINY_MODEL_NAMES, tiny_model_config

MIB = 2**20


@pytest.mark.parametrize("name", TINY_MODEL_NAMES)
def test_a_caches_size_is_that_of_transformers_own(name: str) -> None:
    config = tiny_model_config(name)
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False
    from_config: Any = AutoModelForCausalLM.from_config
    model = from_config(config).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(input_ids=torch.ones((2, 14), dtype=torch.long), past_key_values=cache, use_cache=True)
    found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    shape = cache_shape(config, 4)
    # Windows are cut to one less than they are, and where a config does not name its layers' kinds, none is cut.
    assert found <= 2 * shape.row_bytes(14)
    if getattr(config, "sliding_window", None) is None:
        assert found == 2 * shape.row_bytes(14)


def shards(num_layers: int = 8, layer_bytes: int = 4 * MIB) -> list[ShardSize]:
    def shard(name: str, kind: str, num_bytes: int) -> ShardSize:
        return ShardSize(
            name=name,
            kind=kind,
            num_parameters=num_bytes // 2,
            trainable=False,
            weight_bytes=num_bytes,
            state_bytes=0,
            gradient_bytes=0,
            record_bytes=0,
            gradient_chunk_bytes=0,
            width=512 if kind == "layer" else 0,
            activation_bytes_per_token=8192 if kind == "layer" else 0,
        )

    return [
        shard("prologue", "prologue", 2 * MIB),
        *(shard(f"layers.{i}", "layer", layer_bytes) for i in range(num_layers)),
        shard("epilogue", "epilogue", 2 * MIB),
    ]


CACHE = CacheShape(layer_bytes_per_token=2048, windows=(None,) * 8)


def machine(host: int = 256 * MIB, gpu: int | None = None, read: float = 1e9, weights: float = 1e12) -> Machine:
    hardware = HardwareProfile(
        device="cpu" if gpu is None else "cuda",
        num_cores=2,
        compute_flops_per_second=1e12,
        adam_parameters_per_second=1e9,
        read_bytes_per_second=read,
        write_bytes_per_second=1e9,
        mixed_bytes_per_second=1e9,
        host_memory_bytes=host,
        link_bytes_per_second=0.0 if gpu is None else 1e10,
    )
    return Machine(hardware, host, gpu, lambda _rows: weights)


def plan(demand: Demand, on: Machine, **options: Any) -> GenerationPlan:
    return make_generation_plan(shards(), CACHE, demand, on, vocabulary_size=1000, compute_dtype="bfloat16", **options)


def test_arithmetic_of_a_token_step_by_hand() -> None:
    """Of 36 MiB of weights nothing fits beside three blocks: all is read, at 1 GB/s, for one token of 4 texts."""
    found = plan(Demand(4, 10, 20), machine(host=19 * MIB))
    assert found.batch_size == 4
    assert found.read_bytes_per_token_step == 36 * MIB
    assert found.predicted_seconds_per_token_step == pytest.approx(36 * MIB / 1e9)
    assert found.limiting_lane == "ssd_read"
    total = found.predicted_prefill_seconds + 19 * found.predicted_seconds_per_token_step
    assert found.predicted_tokens_per_second == pytest.approx(4 * 20 / total)
    # 4 texts of 30 tokens, 8 layers of 2,048 bytes a token, and one layer while it grows.
    assert found.cache_bytes == 4 * 30 * 9 * 2048
    assert found.weights_host_bytes + found.reserve_bytes == 19 * MIB
    assert "4 texts at once (all there are)" in found.describe()


def test_weights_kept_in_memory_are_not_counted_as_read() -> None:
    roomy = plan(Demand(4, 10, 20), machine(host=1024 * MIB))
    assert roomy.read_bytes_per_token_step == 0
    assert roomy.limiting_lane == "gpu"
    # Once they must come in.
    assert roomy.predicted_prefill_seconds == pytest.approx(36 * MIB / 1e9)
    slow = machine(host=1024 * MIB)
    slow = dataclasses.replace(slow, hardware=dataclasses.replace(slow.hardware, seconds_per_block=0.25))
    # Ten blocks, and what multiplying with 36 MiB of weights takes.
    assert plan(Demand(4, 10, 20), slow).predicted_seconds_per_token_step == pytest.approx(2.5 + 36 * MIB / 1e12)


def test_the_reserve_is_taken_from_the_weights_exactly() -> None:
    """What is left for weights is planned by the planner of training, with the same bytes."""
    on = machine(host=64 * MIB)
    found = plan(Demand(16, 100, 100), on)
    weights = make_plan(
        shards(), device="cpu", compute_dtype="bfloat16", moment_dtype="float32",
        host_memory_bytes=found.weights_host_bytes, host_memory_reason="", gpu_memory_bytes=None, micro_batch_size=None,
        clipping=False, num_cores=2,
    )  # fmt: skip
    read = sum(b.weight_bytes for b in weights.blocks if not b.weights_in_host)
    assert found.read_bytes_per_token_step == read


def test_a_larger_batch_is_taken_only_while_it_is_faster() -> None:
    """With a drive that is slow, memory is worth more to weights than to texts which would push them out."""
    demand = Demand(256, 500, 500)
    slow = plan(demand, machine(host=128 * MIB, read=1e6))
    fast = plan(demand, machine(host=128 * MIB, read=1e10))
    assert slow.batch_size < fast.batch_size
    for on, found in ((machine(host=128 * MIB, read=1e6), slow), (machine(host=128 * MIB, read=1e10), fast)):
        for rows in (1, 2, 4):
            other = plan(demand, on, batch_size=rows)
            assert other.predicted_tokens_per_second <= found.predicted_tokens_per_second * 1.03


def test_prompts_run_in_parts_where_a_whole_batch_of_them_does_not_fit() -> None:
    demand = Demand(64, 2000, 10)
    found = plan(demand, machine(host=4096 * MIB), batch_size=64)
    assert found.micro_batch_size == 8  # 16,384 tokens through a layer at once are enough
    # A few MiB more than one row at a time needs.
    least = next(mib for mib in range(1000, 4096, 50) if fits(demand, machine(host=mib * MIB), batch_size=64))
    assert plan(demand, machine(host=least * MIB), batch_size=64).micro_batch_size < 8


def fits(demand: Demand, on: Machine, **options: Any) -> bool:
    try:
        plan(demand, on, **options)
    except PlanError:
        return False
    return True


@pytest.mark.parametrize("on", [machine(host=40 * MIB), machine(host=64 * MIB, gpu=24 * MIB)], ids=["host", "gpu"])
def test_a_refusal_names_the_number_of_tokens_that_fits(on: Machine) -> None:
    """That many fit, one more does not."""
    demand = Demand(1, 50, 2_000_000)
    with pytest.raises(PlanError, match="need .* beside the weights") as refused:
        plan(demand, on)
    match = re.search(r"(\d+) tokens fit: set --max-new-tokens to (\d+) or less", str(refused.value))
    assert match is not None
    total, most = map(int, match.groups())
    assert total == 50 + most
    assert plan(dataclasses.replace(demand, new_tokens=most), on).batch_size == 1
    with pytest.raises(PlanError):
        plan(dataclasses.replace(demand, new_tokens=most + 1), on)


def test_a_refusal_of_a_prompt_and_of_a_model() -> None:
    with pytest.raises(PlanError, match="shorten the prompt to") as refused:
        plan(Demand(1, 2_000_000, 5), machine(host=40 * MIB))
    match = re.search(r"shorten the prompt to (\d+) tokens", str(refused.value))
    assert match is not None
    assert plan(Demand(1, int(match[1]), 1), machine(host=40 * MIB)).batch_size == 1
    with pytest.raises(PlanError, match="Not one token fits"):
        plan(Demand(1, 5, 5), machine(host=4 * MIB))
    with pytest.raises(PlanError, match="take a smaller --batch-size"):
        plan(Demand(4096, 500, 500), machine(host=40 * MIB), batch_size=4096)


def test_the_cache_waits_in_host_memory_where_the_device_has_no_room() -> None:
    demand = Demand(16, 500, 500)
    roomy = plan(demand, machine(host=2048 * MIB, gpu=4096 * MIB), batch_size=16)
    assert (roomy.cache_tier, roomy.reserve_bytes) == ("device", 0)
    tight = plan(demand, machine(host=2048 * MIB, gpu=256 * MIB), batch_size=16)
    assert tight.cache_tier == "host"
    assert tight.reserve_bytes == tight.cache_bytes == 16 * 1000 * 9 * 2048
    # It then crosses the bus with the weights, each token.
    assert tight.predicted_seconds_per_token_step > roomy.predicted_seconds_per_token_step
    assert "keys and values in host memory" in tight.describe()


def test_a_cache_that_the_caller_places_stays_there_or_is_refused() -> None:
    """With the number of tokens that fits where it is wanted."""
    options: dict[str, Any] = {"vocabulary_size": 1000, "compute_dtype": "bfloat16"}
    room = Room("cuda", 2, 2048 * MIB, 256 * MIB)
    demand = Demand(16, 500, 500)
    assert fit_generation(shards(), CACHE, demand, room, **options).cache_tier == "host"
    with pytest.raises(PlanError, match=r"(\d+) tokens fit: set max_new_tokens=\d+ or less") as refused:
        fit_generation(shards(), CACHE, demand, room, cache_tier="device", **options)
    match = re.search(r"max_new_tokens=(\d+)", str(refused.value))
    assert match is not None
    fewer = dataclasses.replace(demand, new_tokens=int(match[1]))
    assert fit_generation(shards(), CACHE, fewer, room, cache_tier="device", **options).reserve_bytes == 0
    roomy = Room("cuda", 2, 2048 * MIB, 4096 * MIB)
    wanted = fit_generation(shards(), CACHE, demand, roomy, cache_tier="host", **options)
    assert (wanted.cache_tier, wanted.reserve_bytes) == ("host", wanted.cache_bytes)


def test_a_token_step_by_hand_where_the_cores_limit_it() -> None:
    """Products of a token each, a cache that is read, and prompts in parts; embeddings are looked up."""
    on = dataclasses.replace(
        machine(host=1024 * MIB, weights=1e9), cache_seconds=lambda rows, tokens: 1e-6 * rows * tokens
    )
    hardware = dataclasses.replace(on.hardware, seconds_per_block=0.0, compute_flops_per_second=1e9)
    found = plan(Demand(4, 10, 20), dataclasses.replace(on, hardware=hardware))
    # In the middle of 20 tokens there are 20 in each of eight caches; 2 MiB of the 36 are an embedding.
    assert found.predicted_seconds_per_token_step == pytest.approx(34 * MIB / 1e9 + 8 * 4 * 20 * 1e-6)
    # 40 tokens of prompts: two operations for each of 2 Mi parameters of a layer, and attention over half of the length.
    layers = 8 * 2 * 40 * (2 * MIB + 10 * 512) / 1e9
    assert found.predicted_later_prefill_seconds == pytest.approx(layers + 2 * MIB / 1e9, rel=1e-6)
    assert found.predicted_prefill_seconds == found.predicted_later_prefill_seconds


def test_reading_and_computing_overlap_as_far_as_blocks_are_read_ahead() -> None:
    """Both take as long: a step takes a little longer than either, by what does not overlap."""
    on = machine(host=28 * MIB, read=1e9, weights=1e9)
    hardware = dataclasses.replace(on.hardware, seconds_per_block=0.0)
    found = plan(Demand(1, 10, 20), dataclasses.replace(on, hardware=hardware))
    longest = max(found.read_bytes_per_token_step, 34 * MIB) / 1e9  # nothing is multiplied with the embedding
    assert longest <= found.predicted_seconds_per_token_step * (1 + 1e-9) < 1.3 * longest
