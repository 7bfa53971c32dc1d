"""The planner: cases worked out by hand, monotonic in memory, and its least budget really trains."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import fuyou
from fuyou.costs import num_update_workers, state_bytes_per_parameter, weight_bytes_per_parameter
from fuyou.hardware import HardwareProfile
from fuyou.opening import shards_of
from fuyou.plan import Plan
from fuyou.plan_search import pooled_bytes
from fuyou.planner import (
    MIN_ACTIVATION_BYTES,
    ShardSize,
    least_memory,
    make_plan,
    overhead_bytes,
    predict,
    simulate_plan,
    traffic,
)
from fuyou.planning import check_plan
from tests.tiny_models import tiny_model_config

MIB = 2**20

HARDWARE = HardwareProfile(
    device="cpu",
    num_cores=4,
    compute_flops_per_second=1e9,
    adam_parameters_per_second=1e9,
    read_bytes_per_second=2e9,
    write_bytes_per_second=1e9,
    mixed_bytes_per_second=1e9,
    host_memory_bytes=2**33,
)


def shard(
    name: str, millions: int, kind: str = "layer", borrowed: tuple[str, ...] = (), borrowed_bytes: int = 0
) -> ShardSize:
    """A bfloat16 block of `millions` x 2**20 parameters, its states in records of 20 MiB."""
    n = millions * MIB
    return ShardSize(
        name=name,
        kind=kind,
        num_parameters=n,
        trainable=True,
        weight_bytes=2 * n,
        state_bytes=10 * n,
        gradient_bytes=4 * n,
        record_bytes=10 * min(n, 2 * MIB),
        gradient_chunk_bytes=4 * min(n, 2 * MIB),
        borrowed=borrowed,
        borrowed_bytes=borrowed_bytes,
    )


UNTIED = [
    shard("prologue", 4, "prologue"),
    *(shard(f"layers.{i}", 6) for i in range(8)),
    shard("epilogue", 4, "epilogue"),
]
TIED = [*UNTIED[:-1], shard("epilogue", 1, "epilogue", ("prologue",), 8 * MIB)]


def plan(shards: list[ShardSize], host_mib: int, *, clipping: bool = True) -> Plan:
    return make_plan(
        shards,
        device="cpu",
        compute_dtype="bfloat16",
        moment_dtype="float32",
        host_memory_bytes=host_mib * MIB,
        host_memory_reason="as given",
        gpu_memory_bytes=None,
        micro_batch_size=None,
        clipping=clipping,
        num_cores=4,
        hardware=HARDWARE,
    )


def test_costs_by_hand() -> None:
    assert [weight_bytes_per_parameter(d) for d in ("bfloat16", "float32")] == [2, 4]
    assert [state_bytes_per_parameter(d, "float32") for d in ("bfloat16", "float32")] == [10, 8]
    assert [state_bytes_per_parameter(d, "bfloat16") for d in ("bfloat16", "float32")] == [6, 4]
    assert [state_bytes_per_parameter(d, "int8") for d in ("bfloat16", "float32")] == [4 + 1 / 32, 2 + 1 / 32]
    assert [num_update_workers("cpu", n) for n in (1, 2, 8)] == [1, 2, 8]
    assert [num_update_workers("cuda", n) for n in (1, 2, 8)] == [1, 1, 6]


def test_least_memory_by_hand() -> None:
    """One layer's weights and gradient, a record with room for a spilled gradient's chunk."""
    least = least_memory(UNTIED)
    assert (least.weights, least.gradients, least.records) == (12 * MIB, 24 * MIB, 28 * MIB)
    assert least.activations == MIN_ACTIVATION_BYTES == MIB // 4
    assert least.pool_bytes == 64 * MIB + MIB // 4
    assert least.host_memory_bytes == 78 * MIB  # six fifths, in whole MiB
    assert least.host_memory_bytes - overhead_bytes(least.host_memory_bytes) >= least.pool_bytes


def test_least_memory_of_tied_weights_by_hand() -> None:
    """The embedding's gradient stays open all along, beside the widest other; the head needs both weights."""
    least = least_memory(TIED)
    assert least.gradients == (16 + 24) * MIB
    assert least.weights == 12 * MIB  # a layer; the epilogue with the embedding takes 2 + 8


def test_gpu_memory_that_does_not_hold_three_blocks_is_refused() -> None:
    """Weights 2 bytes of 6 Mi each, gradients 4; the tied embedding's gradient stays, the head reads its weights."""
    assert least_memory(UNTIED).device == 3 * 12 * MIB + 3 * 24 * MIB
    assert least_memory(TIED).device == 3 * 12 * MIB + 8 * MIB + 16 * MIB + 3 * 24 * MIB
    options: dict[str, Any] = {
        "device": "cuda",
        "compute_dtype": "bfloat16",
        "moment_dtype": "float32",
        "host_memory_bytes": 512 * MIB,
        "host_memory_reason": "as given",
        "micro_batch_size": None,
        "clipping": True,
        "num_cores": 4,
    }
    with pytest.raises(fuyou.PlanError, match=r'gpu_memory = 107 MiB is 1 MiB short.*gpu_memory="135MiB"'):
        make_plan(UNTIED, gpu_memory_bytes=107 * MIB, **options)
    made = make_plan(UNTIED, gpu_memory_bytes=135 * MIB, **options)
    assert made.gpu_memory_bytes == 135 * MIB
    assert "135 MiB" in made.describe()
    # Without a GPU it limits nothing, and the plan says so.
    made = make_plan(UNTIED, gpu_memory_bytes=1, **(options | {"device": "cpu"}))
    assert made.gpu_memory_bytes is None
    assert "no GPU in use" in made.reasons["gpu_memory"]


def test_large_budgets_leave_a_fixed_overhead() -> None:
    assert overhead_bytes(600 * MIB) == overhead_bytes(2**40) == 96 * MIB
    assert overhead_bytes(60 * MIB) == 10 * MIB
    big = least_memory([shard("layers.0", 512)])
    assert big.host_memory_bytes == -(-big.pool_bytes // MIB) * MIB + 96 * MIB


@pytest.mark.parametrize("clipping", [True, False])
@pytest.mark.parametrize("shards", [UNTIED, TIED])
def test_least_budget_is_named_and_fits(shards: list[ShardSize], clipping: bool) -> None:
    least = least_memory(shards).host_memory_bytes // MIB
    with pytest.raises(fuyou.PlanError) as caught:
        plan(shards, least - 1, clipping=clipping)
    assert f'host_memory="{least}MiB"' in str(caught.value)
    assert "1 MiB short" in str(caught.value)
    made = plan(shards, least, clipping=clipping)
    assert made.pool_bytes + made.overhead_bytes <= least * MIB
    assert not any(b.weights_in_host or b.states_in_host for b in made.blocks)
    assert all(b.gradient == ("spill" if clipping else "free") for b in made.blocks)


def test_everything_is_kept_where_there_is_room() -> None:
    made = plan(UNTIED, 4096)
    assert all(b.weights_in_host and b.states_in_host and b.gradient == "host" for b in made.blocks)
    read, written = traffic(made.blocks)
    assert (read, written) == (0, 12 * 56 * MIB)


def test_traffic_by_hand() -> None:
    """Bytes a parameter: weights 2 x 2 read, 2 written; states 10 + 10; spilled gradients 4 written, 4 read if late.

    The epilogue's backward pass follows its forward pass: its weights are read once.
    """
    twice = 2 * (56 + 52) * MIB
    early = plan(UNTIED, 120).blocks
    assert traffic(early) == (twice + 10 * 56 * MIB, (12 + 4) * 56 * MIB)
    late = [dataclasses.replace(b, update_window="forward") for b in early]
    assert traffic(late) == (twice + (10 + 4) * 56 * MIB, (12 + 4) * 56 * MIB)
    free = plan(UNTIED, 120, clipping=False)
    assert traffic(free.blocks) == (twice + 10 * 56 * MIB, 12 * 56 * MIB)


def test_traffic_of_tied_weights_by_hand() -> None:
    """The head reads the embedding once more, and its own, a norm, once."""
    made = plan(TIED, 150, clipping=False)
    assert made.blocks[0].num_borrowers == 1
    assert not any(b.weights_in_host or b.states_in_host for b in made.blocks)
    assert traffic(made.blocks)[0] == (4 + 10) * 53 * MIB + 2 * 4 * MIB - 2 * 1 * MIB


def test_prediction_by_hand() -> None:
    """Compute is by far the longest: the step is compute, and on a CPU Adam beside it."""
    made = plan(UNTIED, 120, clipping=False)
    predicted = predict(made.blocks, HARDWARE, num_tokens=100)
    layers, head, all_of = 48 * MIB, 4 * MIB, 56 * MIB
    compute = (8 * layers + 6 * head) * 100 / 1e9  # nothing is multiplied with the embedding
    assert predicted.limiting_lane == "gpu"
    # 4 cores and 4 update workers: while both are busy, each has half of what it wants.
    adam = all_of / 1e9
    assert predicted.seconds == pytest.approx(compute + adam, rel=0.01)
    assert predicted.lane_seconds["gpu"] == pytest.approx(predicted.seconds, rel=0.01)
    assert adam <= predicted.lane_seconds["cpu"] <= 2 * adam


def test_late_updates_where_the_forward_pass_leaves_the_drive_idle() -> None:
    """A GPU, a drive that is the limit of the backward pass alone: some updates move, as far as it helps."""
    fast = dataclasses.replace(HARDWARE, device="cuda", compute_flops_per_second=8e12, adam_parameters_per_second=1e12)
    options: dict[str, Any] = {
        "device": "cuda",
        "compute_dtype": "bfloat16",
        "moment_dtype": "float32",
        "host_memory_bytes": 500 * MIB,
        "host_memory_reason": "as given",
        "gpu_memory_bytes": None,
        "micro_batch_size": None,
        "num_cores": 4,
        "hardware": fast,
        "num_tokens": 15_000,
    }
    for clipping in (False, True):
        early = make_plan(UNTIED, clipping=clipping, **(options | {"num_tokens": None}))
        made = make_plan(UNTIED, clipping=clipping, **options)
        late = [number for number, b in enumerate(made.blocks) if b.update_window == "forward"]
        assert 0 < len(late) < len(made.blocks)
        assert all(made.blocks[number].gradient == "host" for number in late)
        assert all(b.update_window == "backward" for b in early.blocks)
        assert made.prediction is not None
        before = simulate_plan(early, fast, 15_000).seconds
        assert made.prediction.seconds < 0.98 * before
        assert made.pool_bytes + made.overhead_bytes <= 500 * MIB


@pytest.mark.parametrize("clipping", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shards", [UNTIED, TIED], ids=["untied", "tied"])
def test_more_memory_never_means_more_traffic(shards: list[ShardSize], clipping: bool) -> None:
    least = least_memory(shards).host_memory_bytes // MIB
    moved = []
    for host_mib in range(least, least + 1400, 3):
        made = plan(shards, host_mib, clipping=clipping)
        assert made.pool_bytes + made.overhead_bytes <= host_mib * MIB
        moved.append(sum(traffic(made.blocks)))
    assert all(later <= earlier for earlier, later in itertools.pairwise(moved))
    assert moved[-1] < moved[0]


@pytest.mark.parametrize("clipping", [True, False])
def test_pools_hold_what_is_kept(clipping: bool) -> None:
    """Beside what is kept, each pool still has the least, so that no step waits for itself."""
    least = least_memory(TIED)
    for host_mib in range(least.host_memory_bytes // MIB, 1400, 37):
        made = plan(TIED, host_mib, clipping=clipping)
        held = sum(pooled_bytes(b.gradient_bytes) for b in made.blocks if clipping and b.gradient == "host")
        weights = sum(pooled_bytes(b.weight_bytes) for b in made.blocks if b.weights_in_host)
        states = sum(pooled_bytes(b.state_bytes) for b in made.blocks if b.states_in_host)
        assert made.gradient_pool_bytes - held >= least.gradients
        assert made.weight_pool_bytes - weights >= least.weights
        assert made.record_pool_bytes - states >= 20 * MIB
        if host_mib * MIB - overhead_bytes(host_mib * MIB) >= least.pool_bytes + least.records:
            assert made.record_pool_bytes - states >= 2 * 20 * MIB
        assert made.activation_pool_bytes >= least.activations


@pytest.mark.parametrize("name", ["mixtral", "llama"])
def test_a_token_is_multiplied_with_the_experts_that_it_meets(name: str) -> None:
    config = tiny_model_config(name)
    layers = [s for s in shards_of(config) if s.kind == "layer"]
    num_idle = 0
    if name == "mixtral":  # of each expert an up, a gate and a down matrix
        num_unmet = config.num_local_experts - config.num_experts_per_tok
        assert num_unmet > 0
        num_idle = num_unmet * 3 * config.hidden_size * config.intermediate_size
    assert [s.num_idle_parameters for s in layers] == [num_idle] * len(layers)


def test_frozen_blocks_take_no_gradients_and_states() -> None:
    shards = [dataclasses.replace(s, trainable=False) if s.name != "epilogue" else s for s in UNTIED]
    least = least_memory(shards)
    assert least.gradients == 16 * MIB
    made = plan(shards, least.host_memory_bytes // MIB, clipping=False)
    assert [b.name for b in made.blocks if b.state_bytes] == ["epilogue"]
    assert traffic(made.blocks) == (2 * (56 + 52) * MIB + 10 * 4 * MIB, 12 * 4 * MIB)


def test_frozen_blocks_stay_on_the_gpu_where_its_memory_allows() -> None:
    """In half of what the blocks under way, a layer's graph and its tokens' logits leave; none where those are not known."""
    frozen = [
        dataclasses.replace(s, trainable=s.name == "layers.7", width=1024, activation_bytes_per_token=8192)
        if s.kind == "layer"
        else dataclasses.replace(s, trainable=False)
        for s in UNTIED
    ]
    options: dict[str, Any] = {
        "device": "cuda",
        "compute_dtype": "bfloat16",
        "moment_dtype": "float32",
        "host_memory_bytes": 256 * MIB,
        "host_memory_reason": "as given",
        "micro_batch_size": 2,
        "sequence_length": 256,
        "num_tokens": 2048,
        "clipping": True,
        "num_cores": 4,
    }
    tokens, vocabulary = 512, 4 * MIB // 1024
    compute = tokens * (4 * 8192 + 14 * vocabulary)
    room = least_memory(frozen).device + compute + 2 * (8 + 12 + 12) * MIB

    def kept(shards: list[ShardSize], gpu_memory_bytes: int, **changes: Any) -> list[str]:
        made = make_plan(shards, gpu_memory_bytes=gpu_memory_bytes, **(options | changes))
        return [b.name for b in made.blocks if b.weights_on_device]

    assert kept(frozen, room) == ["prologue", "layers.0", "layers.1"]
    assert kept(frozen, room - 1) == ["prologue", "layers.0", "epilogue"]
    assert len(kept(frozen, 2**34)) == 9
    assert kept(frozen, 2**34, num_tokens=None) == []
    assert kept(frozen, 2**34, device="cpu") == []
    unknown = [dataclasses.replace(s, activation_bytes_per_token=0) for s in frozen]
    assert kept(unknown, 2**34) == []
    made = make_plan(frozen, gpu_memory_bytes=room, **options)
    assert "weights of 3 frozen blocks" in made.reasons["weights_on_device"]
    # Nothing of them is read, so that no host memory goes to them either.
    assert not any(b.weights_in_host for b in made.blocks if b.weights_on_device)
    short = dataclasses.replace(made, gpu_memory_bytes=least_memory(frozen).device + 31 * MIB)
    config = fuyou.OffloadConfig(store="unused", compute_dtype="bfloat16")
    check_plan(made, frozen, config, device="cuda", clipping=True)
    with pytest.raises(fuyou.PlanError, match="weights_on_device of 32 MiB"):
        check_plan(short, frozen, config, device="cuda", clipping=True)


def test_reads_of_weights_that_stay_on_the_gpu_by_hand() -> None:
    """Frozen: none. Late: for the forward pass. Early: for both, since the update needs them in host memory."""
    early = plan(UNTIED, 120).blocks[1]
    on_gpu = dataclasses.replace(early, weights_on_device=True)
    frozen = dataclasses.replace(on_gpu, trainable=False)
    late = dataclasses.replace(on_gpu, update_window="forward")
    assert [b.num_weight_reads() for b in (early, on_gpu, late, frozen)] == [2, 2, 1, 0]


# --- with real models ------------------------------------------------------------------------------------------------


def small_llama(*, tied: bool) -> LlamaConfig:
    """1.3M parameters, an embedding that is wider than a layer."""
    return LlamaConfig(
        vocab_size=2048,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
    )


def train(
    config: LlamaConfig,
    folder: Path,
    host_memory: str,
    max_grad_norm: float | None,
    num_steps: int,
    plan: Plan | None = None,
    shape: tuple[int, int] = (2, 8),
) -> tuple[int, float]:
    """The committed step after so many, and the bytes that each but the first two moved."""
    torch.manual_seed(0)
    model = fuyou.from_config(
        config,
        offload=fuyou.OffloadConfig(
            store=folder, device="cpu", host_memory=host_memory, compute_dtype="float32", plan=plan
        ),
    )
    moved = 0
    with model.fuyou:
        optimizer = fuyou.AdamW(model, lr=1e-3, max_grad_norm=max_grad_norm)
        for step in range(num_steps):
            ids = torch.randint(0, config.vocab_size, shape)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step in (1, num_steps - 1):
                model.fuyou.flush()
                moved = sum(model.fuyou.bytes_moved) - moved
        # The flush has made late updates by themselves: their weights were read for them, and again for the forward pass.
        late = [b for b in model.fuyou.plan.blocks if b.trainable and b.update_window == "forward"]
        moved -= sum(b.weight_bytes for b in late if not b.weights_in_host)
        model.fuyou.flush()
        return model.fuyou.committed_step, moved / max(1, num_steps - 2)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_training_at_exactly_the_least_budget(tied: bool, max_grad_norm: float | None, tmp_path: Path) -> None:
    """Nothing waits for itself with the smallest pools; one MiB less is refused and leaves nothing on the drive."""
    config = small_llama(tied=tied)
    with pytest.raises(fuyou.PlanError) as caught:
        train(config, tmp_path / "store", "1MiB", max_grad_norm, 1)
    assert not (tmp_path / "store").exists()
    named = str(caught.value).split('host_memory="')[1].split('"')[0]
    with pytest.raises(fuyou.PlanError):
        train(config, tmp_path / "store", f"{int(named.removesuffix('MiB')) - 1}MiB", max_grad_norm, 1)
    assert not (tmp_path / "store").exists()
    assert train(config, tmp_path / "store", named, max_grad_norm, 3)[0] == 3


def test_a_model_opened_for_unknown_batches_has_room_for_a_long_one_first(tmp_path: Path) -> None:
    """A little above the least budget: 2,048 tokens' input of a layer before more buffers for anything else."""
    config = small_llama(tied=False)
    with pytest.raises(fuyou.PlanError) as caught:
        train(config, tmp_path / "store", "1MiB", None, 1)
    least_mib = int(str(caught.value).split('host_memory="')[1].split("MiB")[0])
    with pytest.raises(fuyou.PlanError, match="smaller micro_batch_size"):
        train(config, tmp_path / "least", f"{least_mib}MiB", None, 1, shape=(2, 1024))
    assert train(config, tmp_path / "store", f"{least_mib + 3}MiB", None, 1, shape=(2, 1024))[0] == 1


@pytest.mark.parametrize("max_grad_norm", [None, 1e9])
@pytest.mark.parametrize(
    ("tied", "extra_mib"),
    [
        (False, 0),
        pytest.param(False, 14, marks=pytest.mark.slow),
        pytest.param(False, 200, marks=pytest.mark.slow),
        pytest.param(True, 0, marks=pytest.mark.slow),
        (True, 14),
        (True, 200),
    ],
)
def test_predicted_traffic_is_what_is_measured(
    tied: bool, max_grad_norm: float | None, extra_mib: int, tmp_path: Path
) -> None:
    """In the steady state, where no step is clipped, within 2 %, from nothing kept to everything kept."""
    config = small_llama(tied=tied)
    offload = fuyou.OffloadConfig(store=tmp_path / "store", device="cpu", host_memory="1MiB", compute_dtype="float32")
    with pytest.raises(fuyou.PlanError) as caught:
        fuyou.plan_model(config, offload=offload, batch_size=2, sequence_length=8, max_grad_norm=max_grad_norm)
    least_mib = int(str(caught.value).split('host_memory="')[1].split("MiB")[0])
    host_memory = f"{least_mib + extra_mib}MiB"
    made = fuyou.plan_model(
        config,
        offload=fuyou.OffloadConfig(
            store=tmp_path, device="cpu", host_memory=host_memory, compute_dtype="float32", durability="step"
        ),
        batch_size=2,
        sequence_length=8,
        max_grad_norm=max_grad_norm,
        hardware=HARDWARE,
    )
    assert made.prediction is not None
    _, moved = train(config, tmp_path / "store", host_memory, max_grad_norm, 7, plan=made)
    assert moved == pytest.approx(made.prediction.bytes_read + made.prediction.bytes_written, rel=0.02)
