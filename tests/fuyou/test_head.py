"""The head's loss in chunks of tokens: equal to plain torch that does the same chunks, near to plain torch without."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, LlamaForCausalLM

import fuyou
from fuyou.errors import ConfigError, ModelError
from tests.reference import ReferenceTrainer, micro_batch_seed
from tests.tiny_models import VOCAB_SIZE, Batch, tiny_batches, tiny_model_config

CHUNK = 7
OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class ChunkedReference(ReferenceTrainer):
    """Plain torch; the head's loss and gradients are computed for CHUNK tokens after another, and summed in float32."""

    def _gradients(
        self, micro_batches: Sequence[Batch], weights: Sequence[float]
    ) -> tuple[float, dict[str, torch.Tensor]]:
        head, leaves = self._head, dict(self._parameters)
        tied = head.weight if self._tied_name is not None else None
        if tied is not None:
            head.weight = leaves[self._tied_name] = torch.nn.Parameter(tied.data)
        sums: dict[str, torch.Tensor] = {}
        embedding: list[torch.Tensor] = []
        given: list[torch.Tensor] = []
        hook = head.register_forward_pre_hook(lambda _module, arguments: given.append(arguments[0]))
        total = 0.0
        for index, (batch, weight) in enumerate(zip(micro_batches, weights, strict=True)):
            torch.manual_seed(micro_batch_seed(self.seed, self.step_count, index))
            rest = {key: value for key, value in batch.items() if key != "labels"}
            output = self.model(**rest, use_cache=False)
            (hidden,) = given
            given.clear()
            targets = functional.pad(batch["labels"][:, 1:], (0, 1), value=-100).flatten()
            flat = hidden.detach().flatten(0, 1)
            pieces, loss = [], torch.zeros(())
            for rows, wanted in zip(flat.split(CHUNK), targets.split(CHUNK), strict=True):
                piece = rows.clone().requires_grad_()
                logits = self._finished(functional.linear(piece, head.weight, head.bias))
                part = functional.cross_entropy(logits.float(), wanted, reduction="sum") / (targets != -100).sum()
                part.backward(torch.tensor(weight))
                pieces.append(piece.grad)
                loss += part.detach()
                self._take(leaves, sums)
            roots, gradients = [hidden], [torch.cat(pieces).view_as(hidden)]
            if getattr(output, "aux_loss", None) is not None:
                roots.append(self.model.config.router_aux_loss_coef * output.aux_loss)
                gradients.append(torch.tensor(weight))
                loss += roots[1].detach()
            torch.autograd.backward(roots, gradients)
            self._take(leaves, sums)
            if tied is not None and tied.grad is not None:
                embedding.append(tied.grad.float().flatten())
                tied.grad = None
            total += weight * float(loss)
        hook.remove()
        if tied is not None:
            head.weight = tied
            for gradient in embedding:
                sums[self._tied_name] += gradient
        return total, sums

    def _finished(self, logits: torch.Tensor) -> torch.Tensor:
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @staticmethod
    def _take(leaves: dict[str, torch.Tensor], sums: dict[str, torch.Tensor]) -> None:
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                gradient, leaf.grad = leaf.grad.float().flatten(), None
                sums[name] = sums[name] + gradient if name in sums else gradient


def streamed(folder: Path, config: Any, **offload: Any) -> Any:
    options = {"device": "cpu", "compute_dtype": "float32", "micro_batch_size": 2, "host_memory": "96MiB"} | offload
    return fuyou.from_config(config, offload=fuyou.OffloadConfig(store=folder, **options), seed=7)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("llama", "float32"), ("llama", "bfloat16"), ("llama_tied", "float32"), ("gemma2", "bfloat16")),
        *(("opt", "float32"), ("gpt2", "float32"), ("mixtral", "float32")),
    ],
)
def test_equals_plain_torch_that_does_the_same_chunks(tmp_path: Path, name: str, dtype: str) -> None:
    config = tiny_model_config(name)
    model = streamed(tmp_path / "store", config, compute_dtype=dtype, loss_chunk_tokens=CHUNK)
    model.save_pretrained(tmp_path / "start")
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "start", dtype=getattr(torch, dtype), attn_implementation=config._attn_implementation
    )
    expected = ChunkedReference(plain, compute_dtype=dtype, max_grad_norm=0.5, seed=7, **OPTIONS)
    optimizer = fuyou.AdamW(model, max_grad_norm=0.5, **OPTIONS)
    with model.fuyou:
        for micro_batches in tiny_batches(config, 3, 3, seed=3):
            loss = model(**{key: torch.cat([m[key] for m in micro_batches]) for key in micro_batches[0]}).loss
            loss.backward()
            optimizer.step()
            assert (model.fuyou.step_metrics()["loss"], optimizer.last_step.grad_norm) == expected.step(micro_batches)
            optimizer.zero_grad()
        for parameter, master in expected.masters().items():
            assert torch.equal(optimizer.state_of(parameter).master.flatten(), master.flatten()), parameter


@pytest.mark.parametrize("made", ["granite", "cohere", "llama"])
@pytest.mark.parametrize("chunk", [1, 5, 10_000])
def test_near_to_plain_torch(tmp_path: Path, made: str, chunk: int) -> None:
    """In float64 terms: the loss and the norm of all gradients; scaled logits, a number of items given by the caller."""
    llama = tiny_model_config("llama").to_dict()
    fields = {k: llama[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    config: Any = tiny_model_config("llama")
    if made == "granite":
        config = GraniteConfig(**fields, logits_scaling=3.0, tie_word_embeddings=False)
    elif made == "cohere":
        config = CohereConfig(**fields, logit_scale=0.25, bos_token_id=1, eos_token_id=2)
    config.attention_dropout = 0.0
    model = streamed(tmp_path / "store", config, loss_chunk_tokens=chunk, micro_batch_size=None)
    model.save_pretrained(tmp_path / "start")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float64)
    optimizer = fuyou.AdamW(model, lr=1e-3, max_grad_norm=1e9)
    batch = tiny_batches(tiny_model_config("llama"), 1, 1, batch_size=4, seed=3)[0][0]
    with model.fuyou:
        for items in ({}, {"num_items_in_batch": torch.tensor(50)}):
            plain.zero_grad()
            loss, expected = model(**batch, **items).loss, plain(**batch, **items).loss
            (2 * loss).backward()
            (2 * expected).backward()
            norm = torch.cat([p.grad.flatten() for p in plain.parameters()]).norm()
            assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
            assert optimizer.grad_norm() == pytest.approx(float(norm), rel=1e-4)
            optimizer.zero_grad()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.num_elements = max(self.num_elements, *sizes, 0)
        return made


@pytest.mark.parametrize("chunk", [None, 16])
def test_all_logits_exist_at_once_only_without_chunks(tmp_path: Path, chunk: int | None) -> None:
    config = tiny_model_config("llama")
    config.vocab_size, config.max_position_embeddings = 4096, 256
    with streamed(tmp_path, config, loss_chunk_tokens=chunk).fuyou as runtime:
        fuyou.AdamW(runtime._model, lr=1e-3)
        ids = torch.arange(256)[None]
        with Largest() as largest:
            runtime._model(input_ids=ids, labels=ids).loss.backward()
    # The head's weights and their gradient (64 x 4096, and padding) are larger than a chunk's logits.
    assert largest.num_elements >= 64 * 4096
    assert (largest.num_elements < 2 * 64 * 4096) == (chunk is not None)
    assert (largest.num_elements >= 256 * 4096) == (chunk is None)


def test_a_frozen_head_and_a_head_alone(tmp_path: Path) -> None:
    for number, trainable in enumerate((["lm_head.*"], ["model.layers.2.*"])):
        losses, norms = [], []
        for chunk in (None, CHUNK):
            folder = tmp_path / f"{number}{chunk}"
            offload = fuyou.OffloadConfig(
                store=folder, device="cpu", compute_dtype="float32", host_memory="96MiB", loss_chunk_tokens=chunk
            )
            model = fuyou.from_config(tiny_model_config("llama"), offload=offload, seed=7, trainable=trainable)
            optimizer = fuyou.AdamW(model, lr=1e-3, max_grad_norm=1e9)
            with model.fuyou:
                loss = model(**tiny_batches(tiny_model_config("llama"), 1, 1, seed=3)[0][0]).loss
                loss.backward()
                losses.append(float(loss.detach()))
                norms.append(optimizer.grad_norm())
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_evaluation_and_outputs_have_all_logits(tmp_path: Path) -> None:
    model = streamed(tmp_path, tiny_model_config("llama"), loss_chunk_tokens=CHUNK)
    fuyou.AdamW(model, lr=1e-3)
    batch = tiny_batches(tiny_model_config("llama"), 1, 1, seed=3)[0][0]
    with model.fuyou:
        with torch.no_grad():
            assert model(**batch).logits.shape[-1] == VOCAB_SIZE
        outputs = model(input_ids=batch["input_ids"])
        assert outputs.logits.shape[-1] == VOCAB_SIZE
        outputs.logits.sum().backward()


def test_fixed_when_a_run_is_created(tmp_path: Path) -> None:
    config = tiny_model_config("llama")
    streamed(tmp_path, config, loss_chunk_tokens=CHUNK).fuyou.close()
    with pytest.raises(ConfigError, match="loss_chunk_tokens=8 conflicts with the run's loss_chunk_tokens=7"):
        streamed(tmp_path, config, loss_chunk_tokens=8)
    model = streamed(tmp_path, config)
    with model.fuyou:
        assert model.fuyou._executor._chunked_head._chunk_tokens == CHUNK
    with pytest.raises(ConfigError, match="loss_chunk_tokens=0: expected a whole number"):
        dataclasses.replace(model.fuyou.config, loss_chunk_tokens=0)


@pytest.mark.parametrize("use", ["reads", "scales the loss", "a tensor"])
def test_models_that_use_their_logits_otherwise_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    plain = LlamaForCausalLM.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.pop("labels")
        hidden = self.model(*args, **kwargs).last_hidden_state
        logits = self.lm_head(hidden)
        if use == "reads":
            logits = logits[..., :-1, :]
        if use == "a tensor":
            logits = logits * torch.ones(VOCAB_SIZE)
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=VOCAB_SIZE)
        return {"loss": loss * 0.5}

    model = streamed(tmp_path, tiny_model_config("llama"), loss_chunk_tokens=CHUNK)
    fuyou.AdamW(model, lr=1e-3)
    batch = tiny_batches(tiny_model_config("llama"), 1, 1, seed=3)[0][0]
    with model.fuyou:
        monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
        with pytest.raises(ModelError, match="loss_chunk_tokens: this model uses its logits otherwise"):
            model(**batch)
        monkeypatch.setattr(LlamaForCausalLM, "forward", plain)
        model(**batch).loss.backward()  # nothing is left over


def test_other_losses_are_refused_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "loss_function", property(lambda _self: print))
    with pytest.raises(ConfigError, match="its loss is print, not the causal one"):
        streamed(tmp_path / "store", tiny_model_config("llama"), loss_chunk_tokens=CHUNK)
    assert not (tmp_path / "store").exists()
