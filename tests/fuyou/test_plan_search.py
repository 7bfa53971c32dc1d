"""The plan that is chosen against every plan there is, on small models and random machines, by simulated time."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence

import pytest

from fuyou.hardware import HardwareProfile
from fuyou.plan import BlockPlan, Plan
from fuyou.plan_search import best_count, pooled_bytes, spread
from fuyou.planner import PlanInputs, buffers_of, least_memory, predict
from tests.fuyou.test_planner import MIB, shard

NUM_TOKENS = 8192


def test_the_count_with_the_shortest_time() -> None:
    for most, best in itertools.product((0, 1, 5, 40), (0, 1, 3, 17, 40)):
        tried: list[int] = []

        def seconds(number: int, best: int = best, tried: list[int] = tried) -> float:
            tried.append(number)
            return 10 + abs(number - best)

        found = best_count(most, seconds)
        assert abs(found - min(best, most)) <= max(1, most // 32)
        assert len(tried) == len(set(tried)) <= 13
    # Not worth it: a hundredth.
    assert best_count(4, lambda number: 1 - 0.002 * number) == 0
    assert best_count(4, lambda number: 1 - 0.002 * number, known=3) == 3


def test_spread_is_even() -> None:
    assert spread(range(10), 2) == [2, 7]
    assert spread(range(3), 3) == [0, 1, 2]
    assert spread(range(5), 0) == []


def random_inputs(chance: random.Random, num_layers: int) -> PlanInputs:
    """A machine whose lanes are not too far apart, and memory for a part of what could be kept."""
    shards = tuple(
        dataclasses.replace(
            shard(f"layers.{n}", 24), width=1024, input_bytes_per_token=2048, activation_bytes_per_token=14336
        )
        for n in range(num_layers)
    )
    parameters = sum(s.num_parameters for s in shards)
    read = 10 ** chance.uniform(8.5, 9.7)
    write = read * chance.uniform(0.3, 1.0)
    hardware = HardwareProfile(
        device="cuda",
        num_cores=8,
        compute_flops_per_second=8 * parameters * NUM_TOKENS / (parameters * 26 / read) / chance.uniform(0.2, 3),
        adam_parameters_per_second=10 ** chance.uniform(8.7, 9.7),
        read_bytes_per_second=read,
        write_bytes_per_second=write,
        mixed_bytes_per_second=chance.uniform(max(read, write), read + write),
        host_memory_bytes=2**40,
        link_bytes_per_second=read * chance.uniform(2, 6),
    )
    # Beside the comfort of buffers.
    least = least_memory(shards).host_memory_bytes + 500 * MIB
    return PlanInputs(
        shards=shards,
        device="cuda",
        compute_dtype="bfloat16",
        moment_dtype="float32",
        host_memory_bytes=least + int(chance.uniform(0, 1) * 16 * parameters),
        host_memory_reason="as given",
        gpu_memory_bytes=None,
        micro_batch_size=None,
        clipping=chance.random() < 0.5,
        num_cores=8,
        durability="step",
        hardware=hardware,
        boundary_bytes=NUM_TOKENS * 2048 * num_layers,
        num_tokens=NUM_TOKENS,
    )


def kept_bytes(block: BlockPlan) -> int:
    """Memory beyond the least that a block's choices take."""
    taken = pooled_bytes(block.weight_bytes) if block.weights_in_host else 0
    taken += pooled_bytes(block.state_bytes) if block.states_in_host else 0
    taken += pooled_bytes(block.gradient_bytes) if block.gradient == "host" else 0
    return taken + (NUM_TOKENS * block.activation_bytes_per_token if block.activations == "host" else 0)


def taken_bytes(blocks: Sequence[BlockPlan], spare_bytes: int) -> int:
    """The same of all, and room for what waits anywhere on its way there, if the pool has no more than `spare_bytes`."""
    waiting = sum(NUM_TOKENS * b.activation_bytes_per_token for b in blocks if b.activations == "host")
    passing = max(
        (NUM_TOKENS * b.activation_bytes_per_token for b in blocks if b.activations != "recompute"), default=0
    )
    return sum(map(kept_bytes, blocks)) + max(0, pooled_bytes(passing) - spare_bytes - waiting)


def all_choices(block: BlockPlan, clipping: bool) -> Iterator[BlockPlan]:
    for weights, states, late, activations in itertools.product(
        (False, True), (False, True), (False, True), ("recompute", "host", "ssd")
    ):
        for gradient in ("spill", "host") if clipping else (("host",) if late else ("free",)):
            yield dataclasses.replace(
                block,
                weights_in_host=weights,
                states_in_host=states,
                update_window="forward" if late else "backward",
                activations=activations,
                gradient=gradient,
            )


def loss_against_all(inputs: PlanInputs) -> float:
    """Time of the chosen plan by the time of the best there is."""
    plan: Plan = inputs.plan()
    hardware = inputs.hardware
    assert hardware is not None
    assert plan.prediction is not None
    boundary = inputs.boundary_bytes or 0
    spare = boundary - inputs.least().activations
    recomputed = [dataclasses.replace(b, activations="recompute") for b in plan.blocks]
    free = plan.activation_pool_bytes - boundary + sum(map(kept_bytes, recomputed))
    assert taken_bytes(plan.blocks, spare) <= free
    buffers = buffers_of(plan)
    best = min(
        predict(blocks, hardware, NUM_TOKENS, plan.prefetch_depth, buffers=buffers).seconds
        for blocks in itertools.product(*(list(all_choices(b, inputs.clipping)) for b in plan.blocks))
        if taken_bytes(blocks, spare) <= free
    )
    return plan.prediction.seconds / best


@pytest.mark.parametrize("seed", range(1))
def test_chosen_plans_against_every_plan(seed: int) -> None:
    assert loss_against_all(random_inputs(random.Random(seed), 2)) <= 1.05


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(100, 140))
def test_chosen_plans_against_every_plan_of_many_machines(seed: int) -> None:
    assert loss_against_all(random_inputs(random.Random(seed), 2)) <= 1.05
