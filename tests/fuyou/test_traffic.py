"""Bytes per trainable parameter and step: by the engine's own counters, and by the kernel's of the drive."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import fuyou
from fuyou.plan import Plan

BFLOAT16_LIMIT, FLOAT32_LIMIT, SPILLED_LIMIT = 26.5, 28.5, 8.1
NUM_STEPS = 5


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config() -> LlamaConfig:
    """10.7M parameters: padding to 64 elements and 4096 bytes vanishes."""
    return LlamaConfig(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=3,
        num_attention_heads=8,
        tie_word_embeddings=False,
        max_position_embeddings=64,
    )


def edited_plan(
    folder: Path, dtype: str, max_grad_norm: float | None, moment_dtype: Any = "float32", **changes: Any
) -> Plan:
    """A roomy plan in which every block is changed."""
    plan = fuyou.plan_model(
        config(),
        offload=fuyou.OffloadConfig(
            store=folder,
            device="cpu",
            host_memory="2GiB",
            compute_dtype=dtype,
            moment_dtype=moment_dtype,
            durability="step",  # a profile of this machine might say otherwise
        ),
        batch_size=2,
        sequence_length=8,
        max_grad_norm=max_grad_norm,
    )
    # All windows alike, whatever a profile of this machine makes of them: late updates would begin in the flush below.
    alike: dict[str, Any] = {"update_window": "backward"} | changes
    return dataclasses.replace(plan, blocks=tuple(dataclasses.replace(b, **alike) for b in plan.blocks))


class Measured:
    """Steps of a run, in bytes per parameter: the mean of all but the first two, and what the last one's metrics say."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        max_grad_norm: float | None,
        num_steps: int = NUM_STEPS,
        drive: Callable[[], tuple[int, int]] = lambda: (0, 0),
        micro_batch_size: int | None = None,
    ) -> None:
        model = fuyou.from_config(
            config(),
            offload=fuyou.OffloadConfig(
                store=folder,
                device="cpu",
                compute_dtype=plan.compute_dtype,
                moment_dtype=plan.moment_dtype,
                plan=plan,
                micro_batch_size=micro_batch_size,
            ),
        )
        with model.fuyou:
            optimizer = fuyou.AdamW(model, max_grad_norm=max_grad_norm)
            parameters = model.fuyou.plan.num_parameters
            before, drive_before = model.fuyou.bytes_moved, drive()
            moved, spilled = [], []
            for _ in range(num_steps):
                ids = torch.randint(0, 256, (2, 8))
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                # Without it, the last writes of a step are counted with the next one; it moves nothing itself here.
                if model.fuyou.step_metrics()["update_window"] == "backward":
                    model.fuyou.flush()
                moved.append(sum(model.fuyou.bytes_moved))
                spilled.append(model.fuyou.step_metrics()["bytes_spilled"])
            metrics = model.fuyou.step_metrics()
            model.fuyou.flush()
            after, drive_after = model.fuyou.bytes_moved, drive()
        # The first two steps fill what is kept in memory.
        self.total = (moved[-1] - moved[1]) / (num_steps - 2) / parameters
        self.spilled = sum(spilled[2:]) / (num_steps - 2) / parameters
        self.last_step = (metrics["bytes_read"] + metrics["bytes_written"]) / parameters
        self.engine_bytes = after[0] - before[0], after[1] - before[1]
        self.drive_bytes = drive_after[0] - drive_before[0], drive_after[1] - drive_before[1]


NOTHING_KEPT = {"weights_in_host": False, "states_in_host": False}


def test_clipping_off(tmp_path: Path) -> None:
    """bfloat16: weights 2 x 2 read and 2 written, states 10 read and 10 written."""
    measured = Measured(tmp_path / "s", edited_plan(tmp_path, "bfloat16", None, **NOTHING_KEPT), None)
    assert 25.5 < measured.total <= BFLOAT16_LIMIT
    assert measured.spilled == 0


def test_gradients_held_in_memory(tmp_path: Path) -> None:
    plan = edited_plan(tmp_path, "bfloat16", 1.0, **NOTHING_KEPT)
    assert {b.gradient for b in plan.blocks} == {"host"}
    measured = Measured(tmp_path / "s", plan, 1.0)
    assert 25.5 < measured.total <= BFLOAT16_LIMIT
    assert measured.spilled == 0
    assert measured.last_step == pytest.approx(measured.total, rel=0.05)


@pytest.mark.parametrize(("micro_batch_size", "itemsize"), [(1, 4), (2, 2)])
@pytest.mark.parametrize("max_grad_norm", [1.0, 1e9])
def test_gradients_spilled(max_grad_norm: float, micro_batch_size: int, itemsize: int, tmp_path: Path) -> None:
    """Counted apart: float32 sums, or one micro-batch's in bfloat16; read back only where early updates do not stand."""
    plan = edited_plan(tmp_path, "bfloat16", max_grad_norm, **NOTHING_KEPT, gradient="spill")
    measured = Measured(tmp_path / "s", plan, max_grad_norm, micro_batch_size=micro_batch_size)
    times = 2 if max_grad_norm == 1.0 else 1
    limit = SPILLED_LIMIT / 8 * itemsize * times
    assert 7.9 / 8 * itemsize * times < measured.spilled <= limit
    assert measured.total <= BFLOAT16_LIMIT + limit
    assert 25.5 < measured.total - measured.spilled <= BFLOAT16_LIMIT


@pytest.mark.parametrize(("moment_dtype", "limit"), [("bfloat16", 18.0), ("int8", 14.2)])
@pytest.mark.parametrize("max_grad_norm", [pytest.param(None, marks=pytest.mark.slow), 1.0])
def test_low_bit_moments(moment_dtype: str, limit: float, max_grad_norm: float | None, tmp_path: Path) -> None:
    """Weights 2 x 2 read and 2 written; low halves 2, m and v 2 x 2 or 2 x 1 (and scales) each way; within 2 %."""
    plan = edited_plan(tmp_path, "bfloat16", max_grad_norm, moment_dtype, **NOTHING_KEPT)
    measured = Measured(tmp_path / "s", plan, max_grad_norm)
    assert measured.total == pytest.approx(limit, rel=0.02)


@pytest.mark.parametrize("max_grad_norm", [pytest.param(None, marks=pytest.mark.slow), 1.0])
def test_float32(max_grad_norm: float | None, tmp_path: Path) -> None:
    """The master is the weight: 4 x 2 read and 4 written, m and v 8 read and 8 written."""
    plan = edited_plan(tmp_path, "float32", max_grad_norm, **NOTHING_KEPT)
    measured = Measured(tmp_path / "s", plan, max_grad_norm)
    assert 27.5 < measured.total <= FLOAT32_LIMIT


# Steps that are always clipped are updated in the next forward pass, and what is written then is not counted in full.
@pytest.mark.parametrize("max_grad_norm", [pytest.param(None, marks=pytest.mark.slow), 1e9])
@pytest.mark.parametrize(("weights", "states", "saved"), [(True, False, 4), (False, True, 10), (True, True, 14)])
def test_less_with_what_is_kept_in_memory(
    weights: bool, states: bool, saved: int, max_grad_norm: float | None, tmp_path: Path
) -> None:
    plan = edited_plan(tmp_path, "bfloat16", max_grad_norm, weights_in_host=weights, states_in_host=states)
    measured = Measured(tmp_path / "s", plan, max_grad_norm)
    assert measured.total == pytest.approx(26 - saved, abs=0.5)
    assert measured.total >= 11.5  # every step is still written through


def kernel_counters(path: Path) -> Callable[[], tuple[int, int]] | None:
    """Bytes read and written by this process according to the kernel, or None if it does not tell."""

    def read() -> tuple[int, int]:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(fields["read_bytes"]), int(fields["write_bytes"])

    try:
        before = read()[1]
        with open(path / "probe", "wb") as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
        return read if read()[1] - before >= 2**20 else None
    except (OSError, KeyError, ValueError):
        return None


def test_the_kernel_counts_the_same(tmp_path: Path) -> None:
    """What the engine says it moved is what went to and from the drive: no page cache in between, no write twice."""
    counters = kernel_counters(tmp_path)
    if counters is None:
        pytest.skip("/proc/self/io does not count this file system's transfers (tmpfs, or a kernel without it)")
    plan = edited_plan(tmp_path, "bfloat16", None, **NOTHING_KEPT)
    measured = Measured(tmp_path / "s", plan, None, drive=counters)
    for drive_bytes, engine_bytes in zip(measured.drive_bytes, measured.engine_bytes, strict=True):
        assert engine_bytes > 2**28
        # Manifests and the file system's own blocks come on top.
        assert engine_bytes <= drive_bytes <= 1.05 * engine_bytes
