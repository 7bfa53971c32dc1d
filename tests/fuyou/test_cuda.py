"""The step on a CUDA device; each test is skipped, with the reason, where there is none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import fuyou
from tests.tiny_models import tiny_batches, tiny_model_config

pytestmark = pytest.mark.gpu
NUM_STEPS, NUM_MICRO_BATCHES = 4, 3
MEBIBYTE = 2**20


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()


def joined(micro_batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.cat([m[key] for m in micro_batches]) for key in micro_batches[0]}


class Outcome:
    """Losses, norms and masters of a short training."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        device: str,
        dtype: str = "float32",
        max_grad_norm: float | None = 0.5,
        host_memory: str = "256MiB",
        dropout: bool = True,
        late: bool = False,
    ) -> None:
        config = tiny_model_config(name)
        if not dropout:
            for field in ("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "dropout"):
                if hasattr(config, field):
                    setattr(config, field, 0.0)
        # router_jitter_noise draws from the device's generator too.
        if not dropout and hasattr(config, "router_jitter_noise"):
            config.router_jitter_noise = 0.0
        offload = fuyou.OffloadConfig(
            store=folder, device=device, compute_dtype=dtype, micro_batch_size=2, host_memory=host_memory
        )
        if late:
            plan = fuyou.plan_model(
                config, offload=offload, batch_size=2, sequence_length=8, max_grad_norm=max_grad_norm or 1.0
            )
            blocks = tuple(dataclasses.replace(b, update_window="forward") for b in plan.blocks)
            offload = dataclasses.replace(offload, plan=dataclasses.replace(plan, blocks=blocks))
        model = fuyou.from_config(config, offload=offload, seed=7)
        optimizer = fuyou.AdamW(model, lr=3e-3, weight_decay=0.1, max_grad_norm=max_grad_norm)
        self.losses: list[float] = []
        self.norms: list[float] = []
        with model.fuyou:
            for micro_batches in tiny_batches(config, NUM_STEPS, NUM_MICRO_BATCHES, seed=3):
                model(**joined(micro_batches)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                assert optimizer.last_step is not None
                self.losses.append(model.fuyou.step_metrics()["loss"])
                self.norms.append(optimizer.last_step.grad_norm)
            self.masters = {n: optimizer.state_of(n).master for n, _ in model.named_parameters()}
            self.window = model.fuyou.step_metrics()["update_window"]

    def assert_equal(self, other: Outcome) -> None:
        assert self.losses == other.losses
        assert self.norms == other.norms
        for name, master in self.masters.items():
            assert torch.equal(master, other.masters[name]), name


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "gemma2", "qwen3_moe"])
def test_same_trajectory_as_on_the_host(name: str, max_grad_norm: float | None, tmp_path: Path) -> None:
    """Within rounding, dropout off: the two devices draw other masks."""
    options: dict[str, Any] = {"max_grad_norm": max_grad_norm, "dropout": False}
    host = Outcome(tmp_path / "host", name, device="cpu", **options)
    cuda = Outcome(tmp_path / "cuda", name, device="cuda", **options)
    assert cuda.losses == pytest.approx(host.losses, rel=1e-4)
    assert cuda.norms == pytest.approx(host.norms, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "mixtral"])
def test_no_plan_changes_a_bit(name: str, dtype: str, tmp_path: Path) -> None:
    """All in host memory or nothing kept; updates in either window ."""
    roomy = Outcome(tmp_path / "roomy", name, device="cuda", dtype=dtype, max_grad_norm=None)
    tight = Outcome(tmp_path / "tight", name, device="cuda", dtype=dtype, max_grad_norm=None, host_memory="3MiB")
    late = Outcome(tmp_path / "late", name, device="cuda", dtype=dtype, max_grad_norm=None, late=True)
    assert roomy.window == tight.window == "backward"
    assert late.window == "forward"
    roomy.assert_equal(tight)
    roomy.assert_equal(late)


def test_runs_repeat(tmp_path: Path) -> None:
    """Dropout's masks come from the seed, whatever was drawn in between."""
    first = Outcome(tmp_path / "first", "gpt2", device="cuda")
    torch.rand(1000, device="cuda")
    first.assert_equal(Outcome(tmp_path / "second", "gpt2", device="cuda"))


def test_random_numbers_of_the_caller_are_left_alone(tmp_path: Path) -> None:
    """On the device too."""
    state = torch.cuda.get_rng_state()
    Outcome(tmp_path, "gpt2", device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_device_memory_does_not_grow_with_the_layers(max_grad_norm: float | None, tmp_path: Path) -> None:
    """A few blocks are on the device at once, although the host issues work far ahead of it."""

    def peak_bytes(num_layers: int) -> int:
        config = AutoConfig.for_model(
            "llama",
            vocab_size=1024,
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=num_layers,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
        offload = fuyou.OffloadConfig(
            store=tmp_path / str(num_layers), device="cuda", compute_dtype="bfloat16", host_memory="2GiB"
        )
        model = fuyou.from_config(config, offload=offload)
        optimizer = fuyou.AdamW(model, max_grad_norm=max_grad_norm)
        with model.fuyou:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            ids = torch.randint(0, 1024, (2, 256), device="cuda")
            for _ in range(2):
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before

    few, many = peak_bytes(4), peak_bytes(16)
    one_block_bytes = 17_000_000 * 2
    assert many < few + 2 * one_block_bytes
    assert many < 12 * one_block_bytes + 64 * MEBIBYTE


@pytest.mark.parametrize("host_memory", ["3MiB", "256MiB"])
def test_steady_steps_allocate_no_device_memory(host_memory: str, tmp_path: Path) -> None:
    """Weights go into slots that are there, the rest into what torch's allocator has."""
    config = tiny_model_config("llama")
    offload = fuyou.OffloadConfig(
        store=tmp_path, device="cuda", compute_dtype="bfloat16", micro_batch_size=2, host_memory=host_memory
    )
    model = fuyou.from_config(config, offload=offload)
    optimizer = fuyou.AdamW(model, max_grad_norm=1e9)
    batch = joined(tiny_batches(config, 1, NUM_MICRO_BATCHES)[0])
    counts = []
    with model.fuyou:
        for _ in range(8):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            counts.append(torch.cuda.memory_stats()["num_device_alloc"])
    assert counts[-1] == counts[3]


@pytest.mark.parametrize("chunk", [1, 16])
def test_loss_in_chunks(chunk: int, tmp_path: Path) -> None:
    """Runs backward passes inside the forward pass; within rounding of the loss in one."""
    config = tiny_model_config("llama")
    found = []
    for tokens in (None, chunk):
        offload = fuyou.OffloadConfig(
            store=tmp_path / str(tokens), device="cuda", compute_dtype="float32", loss_chunk_tokens=tokens
        )
        model = fuyou.from_config(config, offload=offload, seed=7)
        optimizer = fuyou.AdamW(model, max_grad_norm=1e9)
        with model.fuyou:
            model(**joined(tiny_batches(config, 1, 2)[0])).loss.backward()
            optimizer.step()
            found.append((model.fuyou.step_metrics()["loss"], optimizer.last_step.grad_norm))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_an_error_on_the_device_thread_comes_through(tmp_path: Path) -> None:
    """Backward runs on autograd's thread there; what fails in it is raised in the caller's."""
    config = tiny_model_config("llama")
    offload = fuyou.OffloadConfig(store=tmp_path, device="cuda", compute_dtype="float32", micro_batch_size=2)
    model = fuyou.from_config(config, offload=offload)
    optimizer = fuyou.AdamW(model, max_grad_norm=0.5)
    batch = joined(tiny_batches(config, 1, 2)[0])
    loss = model(**batch).loss

    def fail(*_args: Any) -> None:
        raise RuntimeError("in the middle of backward")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle of backward"):
        loss.backward()
    handle.remove()
    optimizer.zero_grad()
    model(**batch).loss.backward()
    optimizer.step()
    assert optimizer.step_count == 1
    model.fuyou.close()


def test_outputs_equal_plain_transformers(tmp_path: Path) -> None:
    """Evaluation on the device."""
    from transformers import AutoModelForCausalLM

    config = tiny_model_config("llama")
    offload = fuyou.OffloadConfig(store=tmp_path / "store", device="cuda", compute_dtype="bfloat16")
    model = fuyou.from_config(config, offload=offload).eval()
    batch = joined(tiny_batches(config, 1, 1)[0])
    with model.fuyou, torch.no_grad():
        model.save_pretrained(tmp_path / "out")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).to("cuda").eval()
        expected = plain(**{key: value.to("cuda") for key, value in batch.items()})
        assert torch.equal(model(**batch).logits, expected.logits)


@pytest.mark.parametrize("place", [None, "offloaded"])
def test_tokens_equal_plain_transformers_wherever_keys_wait(place: str | None, tmp_path: Path) -> None:
    """On the device or in host memory; prompts whole and in vertical micro-batches."""
    from transformers import AutoModelForCausalLM

    offload = fuyou.OffloadConfig(store=tmp_path / "store", device="cuda", compute_dtype="float32")
    model = fuyou.from_config(tiny_model_config("llama"), offload=offload).eval()
    ids = torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(1)).to("cuda")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6}
    with model.fuyou:
        model.save_pretrained(tmp_path / "out")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).to("cuda").eval()
        for options in ({"do_sample": False}, {"do_sample": True, "top_k": 40}):
            torch.manual_seed(4)
            expected = plain.generate(**inputs, **options)
            for rows_at_once in (None, 2):
                model.fuyou.prefill_micro_batch_size = rows_at_once
                torch.manual_seed(4)
                assert torch.equal(model.generate(**inputs, **options, cache_implementation=place), expected)
