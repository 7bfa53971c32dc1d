"""Tiny random causal LMs of many architectures, and batches for them: seconds, not minutes, on two cores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

Batch = dict[str, torch.Tensor]

VOCAB_SIZE: Final = 128
PAD_ID: Final = 0
SLIDING_WINDOW: Final = 9
"""Shorter than the sequences of `tiny_batches`, so that the window cuts something off."""

# Three layers: a first, a middle and a last one.
_LLAMA_LIKE: Final[dict[str, Any]] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
    "tie_word_embeddings": False,
    "pad_token_id": PAD_ID,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_IDS: Final[dict[str, Any]] = {"pad_token_id": PAD_ID, "bos_token_id": 1, "eos_token_id": 2}


def _llama() -> PreTrainedConfig:
    return LlamaConfig(**_LLAMA_LIKE)


def _llama_tied() -> PreTrainedConfig:
    return LlamaConfig(**_LLAMA_LIKE | {"tie_word_embeddings": True})


def _qwen2() -> PreTrainedConfig:
    # max_window_layers: the first layer attends to everything, the others within the window.
    window = {"use_sliding_window": True, "sliding_window": SLIDING_WINDOW, "max_window_layers": 1}
    return Qwen2Config(**_LLAMA_LIKE | window | {"tie_word_embeddings": True})


def _qwen3() -> PreTrainedConfig:
    return Qwen3Config(**_LLAMA_LIKE, head_dim=16)


def _mistral() -> PreTrainedConfig:
    return MistralConfig(**_LLAMA_LIKE, head_dim=16, sliding_window=SLIDING_WINDOW)


def _gemma2() -> PreTrainedConfig:
    tied = _LLAMA_LIKE | {"tie_word_embeddings": True, "num_hidden_layers": 4}
    return Gemma2Config(**tied, head_dim=16, query_pre_attn_scalar=16, sliding_window=SLIDING_WINDOW)


def _phi3() -> PreTrainedConfig:
    return Phi3Config(**_LLAMA_LIKE, resid_pdrop=0.1, embd_pdrop=0.1, sliding_window=SLIDING_WINDOW)


def _gpt2() -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=64,
        n_embd=64,
        n_layer=3,
        n_head=4,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.1,
        **_IDS,
    )


def _opt() -> PreTrainedConfig:
    # word_embed_proj_dim other than hidden_size: the model then has projections between embedding and layers.
    return OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        word_embed_proj_dim=32,
        ffn_dim=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        dropout=0.1,
        attention_dropout=0.1,
        **_IDS,
    )


def _gpt_neox() -> PreTrainedConfig:
    return GPTNeoXConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        **_IDS,
    )


_ROUTER: Final[dict[str, Any]] = {"output_router_logits": True, "router_aux_loss_coef": 0.02}


def _mixtral() -> PreTrainedConfig:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": SLIDING_WINDOW}
    return MixtralConfig(**_LLAMA_LIKE | experts | _ROUTER | {"router_jitter_noise": 0.01})


def _qwen3_moe() -> PreTrainedConfig:
    # The middle layer is dense: blocks of one model need not be alike.
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "mlp_only_layers": [1],
    }
    return Qwen3MoeConfig(**_LLAMA_LIKE | experts | _ROUTER | {"head_dim": 16})


_CONFIGS: Final = {
    "llama": _llama,
    "llama_tied": _llama_tied,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma2": _gemma2,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
}
TINY_MODEL_NAMES: Final = tuple(_CONFIGS)


def tiny_model_config(name: str, attn_implementation: str | None = None) -> PreTrainedConfig:
    """A new config of the architecture: hidden size 64, 3 or 4 layers, dropout 0.1 where it has dropout.

    Sliding windows are shorter than `tiny_batches`' sequences; mixtures of experts have their auxiliary loss
    on. Attention is sdpa unless asked otherwise; eager for gemma2, whose soft cap sdpa cannot do.
    """
    config = _CONFIGS[name]()
    config._attn_implementation = attn_implementation or ("eager" if name == "gemma2" else "sdpa")
    return config


def tiny_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A plain model of that config in training mode, with its random weights in `dtype`."""
    torch.manual_seed(seed)
    from_config: Callable[[PreTrainedConfig], Any] = AutoModelForCausalLM.from_config
    model: PreTrainedModel = from_config(tiny_model_config(name)).to(dtype)
    model.train()
    return model


def tiny_batches(
    config: PreTrainedConfig,
    num_steps: int,
    num_micro_batches: int,
    batch_size: int = 2,
    sequence_length: int = 24,
    seed: int = 0,
    padding: bool = True,
) -> list[list[Batch]]:
    """Batches by step and micro-batch: input_ids, attention_mask, labels, int64[batch_size, sequence_length].

    Texts repeat a short random pattern: there is something to learn. With `padding`, rows have unequal
    lengths of at least 4, padded on the right, with label -100 on the pads.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab_size = config.get_text_config().vocab_size

    def batch() -> Batch:
        patterns = torch.randint(3, vocab_size, (batch_size, 5), generator=generator)
        input_ids = patterns.repeat(1, -(-sequence_length // 5))[:, :sequence_length].contiguous()
        attention_mask = torch.ones_like(input_ids)
        if padding:
            lengths = torch.randint(4, sequence_length + 1, (batch_size, 1), generator=generator)
            attention_mask = (torch.arange(sequence_length) < lengths).long()
        is_pad = attention_mask == 0
        labels = input_ids.masked_fill(is_pad, -100)
        return {
            "input_ids": input_ids.masked_fill(is_pad, PAD_ID),
            "attention_mask": attention_mask,
            "labels": labels,
        }

    return [[batch() for _ in range(num_micro_batches)] for _ in range(num_steps)]
