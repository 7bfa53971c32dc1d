"""Finding the decoder layers and assigning every parameter to one block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BartConfig, PreTrainedConfig

from fuyou import ConfigError, ModelError
from fuyou.blocks import ModelBlocks, find_blocks, meta_model
from tests.tiny_models import TINY_MODEL_NAMES, tiny_model, tiny_model_config


def blocks_of(config: PreTrainedConfig, path: str | None = None) -> tuple[nn.Module, ModelBlocks]:
    with meta_model(config, torch.float32) as model:
        return model, find_blocks(model, path)


@pytest.mark.parametrize("name", TINY_MODEL_NAMES)
def test_every_parameter_is_in_one_block(name: str) -> None:
    """In the order of named_parameters, layers in order, between one prologue and one epilogue."""
    config = tiny_model_config(name)
    model, found = blocks_of(config)
    owned = [parameter for block in found.blocks for parameter in block.parameters]
    assert sorted(owned) == sorted(parameter for parameter, _ in model.named_parameters())
    assert [b.kind for b in found.blocks] == ["prologue", *["layer"] * config.num_hidden_layers, "epilogue"]
    assert [b.name for b in found.layers] == [f"{found.path}.{i}" for i in range(config.num_hidden_layers)]
    for block in found.layers:
        assert all(parameter.startswith(f"{block.name}.") for parameter in block.parameters)
        assert not block.borrows
    order = {parameter: i for i, (parameter, _) in enumerate(model.named_parameters())}
    for block in found.blocks:
        assert list(block.parameters) == sorted(block.parameters, key=order.__getitem__)
    assert found.path in found.reason


@pytest.mark.parametrize(
    ("name", "borrows"), [("llama", ()), ("llama_tied", ("prologue",)), ("gpt2", ("prologue",)), ("opt", ("prologue",))]
)
def test_tied_weights_are_owned_by_the_prologue(name: str, borrows: tuple[str, ...]) -> None:
    """And lent to the epilogue."""
    _, found = blocks_of(tiny_model_config(name))
    assert found.blocks[-1].borrows == borrows
    assert not any("lm_head" in parameter for parameter in found.blocks[0].parameters)


def test_prologue_is_what_runs_first() -> None:
    """By running it: a norm of the embeddings, positions and projections too."""
    _, found = blocks_of(tiny_model_config("opt"))
    assert set(found.blocks[0].parameters) == {
        "model.decoder.embed_tokens.weight",
        "model.decoder.embed_positions.weight",
        "model.decoder.project_in.weight",
    }
    config = BartConfig(
        vocab_size=64,
        d_model=32,
        decoder_layers=2,
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        max_position_embeddings=32,
    )
    _, found = blocks_of(config)
    assert "model.decoder.layernorm_embedding.weight" in found.blocks[0].parameters


def test_real_models_are_not_changed() -> None:
    """Neither weights, nor buffers, nor mode, nor hooks, nor random numbers."""
    model = tiny_model("gpt2").eval()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    find_blocks(model)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: i for name, (i, _) in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
    assert not model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_meta_model_takes_no_memory_and_leaves_torch_alone() -> None:
    """70 billion parameters in moments; ties kept, buffers real, modes and random numbers as they were."""
    config = AutoConfig.for_model(
        "llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=4, tie_word_embeddings=True
    )
    register = nn.Module.register_parameter
    state = torch.get_rng_state()
    with meta_model(config, torch.bfloat16) as model:
        assert all(p.is_meta for p in model.parameters())
        assert not any(buffer.is_meta for buffer in model.buffers())
        assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]
    assert nn.Module.register_parameter is register
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_given_paths() -> None:
    """Used as they are; a wrong one is the caller's error."""
    config = tiny_model_config("gpt2")
    _, found = blocks_of(config, "transformer.h")
    assert found.path == "transformer.h"
    assert "given" in found.reason
    for wrong, message in (("transformer.layers", "no such module"), ("transformer.wte", "expected a ModuleList")):
        with pytest.raises(ConfigError, match=message):
            blocks_of(config, wrong)


class _Ambiguous(nn.Module):
    """Two lists of equal standing."""

    config = tiny_model_config("llama")

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.b = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))


def test_doubt_is_an_error_that_says_what_to_write() -> None:
    """Two candidates, or none."""
    with pytest.raises(ModelError, match=r"OffloadConfig\(blocks=\"a\"\)"):
        find_blocks(_Ambiguous())
    with pytest.raises(ModelError, match="lists of modules: none"):
        find_blocks(nn.Linear(2, 2))


def test_encoder_decoder_models_are_refused() -> None:
    """Their decoder needs the encoder's output."""
    model: Any = tiny_model("llama")
    model.config.is_encoder_decoder = True
    with pytest.raises(ModelError, match="encoder-decoder"):
        find_blocks(model)


def test_shared_layers_are_refused() -> None:
    """A weight that several layers use cannot be brought in once; activation functions may be shared."""
    model: Any = tiny_model("llama")
    activation = nn.SiLU()
    for layer in model.model.layers:
        layer.mlp.act_fn = activation
    find_blocks(model)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.up_proj\.weight is shared by several blocks"):
        find_blocks(model)
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(ModelError, match="same module in several layers"):
        find_blocks(model)


def test_quantized_configs_are_refused() -> None:
    """Before anything is made."""
    config = tiny_model_config("llama")
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ModelError, match="quantized"):
        blocks_of(config)


def test_unknown_weights_are_refused_not_guessed() -> None:
    """AutoModelForCausalLM's classes only: what the finder gets is what is trained."""
    model = AutoModelForCausalLM.from_config(tiny_model_config("llama"))
    model.extra = nn.Parameter(torch.ones(3))
    found = find_blocks(model)
    assert "extra" in found.blocks[0].parameters + found.blocks[-1].parameters
