"""Breadth: every causal LM that transformers maps trains to the bits of plain torch, or is refused with a reason.

Tiny configs are made by shrinking each type's default one. Types whose tiny config does not run in plain transformers
either are skipped with the reason.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import fuyou
from tests.reference import ReferenceTrainer
from tests.tiny_models import tiny_batches

# Fields of configs, under all the names that they go by, and their values in a tiny model.
_SIZES: dict[int, str] = {
    128: "vocab_size vocab_size_per_layer_input max_position_embeddings n_positions max_seq_len mamba_d_ssm context_length",
    96: "intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size d_ff feed_forward_size dim_ff "
    "block_ff_dim dense_intermediate_size ffn_size d_inner dff",
    64: "hidden_size d_model n_embd dim word_embed_proj_dim embedding_size input_embedding_size attention_hidden_size "
    "lru_width embedding_dim dim_model hidden_dim",
    48: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size",
    32: "q_lora_rank kv_lora_rank expert_ffn",
    16: "head_dim attention_head_dim v_head_dim qk_nope_head_dim qk_head_dim kv_channels global_head_dim swa_head_dim "
    "dim_head d_kv d_head mamba_d_state mamba_d_head mamba_head_dim mamba_headdim state_size hidden_size_per_layer_input "
    "linear_key_head_dim linear_value_head_dim index_head_dim attention_chunk_size",
    9: "sliding_window",
    8: "qk_rope_head_dim attention_window_size laurel_rank time_step_rank mamba_dt_rank index_topk mamba_n_heads "
    "mamba_num_heads n_mamba_heads rotary_dim local_attn_chunk_length",
    4: "num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts num_mem_heads linear_num_value_heads",
    3: "num_hidden_layers n_layer num_layers n_layers decoder_layers num_decoder_layers encoder_layers",
    2: "num_key_value_heads num_experts_per_tok moe_topk moe_k num_experts_per_token top_k_experts moe_top_k "
    "mamba_expand linear_num_key_heads index_n_heads zero_expert_num eos_token_id",
    1: "n_group topk_group first_k_dense_replace n_shared_experts num_shared_experts bos_token_id mamba_n_groups",
    0: "pad_token_id pad_id num_kv_shared_layers",
}
_TINY = {name: value for value, names in _SIZES.items() for name in names.split()}
# None there means something else than the default of a number.
_SET_THOUGH_NONE = {"pad_token_id", "bos_token_id", "eos_token_id", "time_step_rank"}
_DROPOUTS = {
    "attention_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "hidden_dropout",
    "dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "activation_dropout",
}
_LATENT = {"num_key_value_heads": 4, "head_dim": 8, "qk_head_dim": 24}
_DECODER = {"is_decoder": True}
_CONV = {"layer_types": ["conv", "full_attention", "conv"]}
_FAMILIES: list[tuple[str, dict[str, Any]]] = [
    (
        "deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3 axk1 axk2 longcat_flash youtu dots3_note_text",
        _LATENT,
    ),
    ("ministral hunyuan_v1_dense hunyuan_v1_moe nemotron", {"num_key_value_heads": 2, "head_dim": 16}),
    (
        "bert bert-generation camembert data2vec-text electra ernie megatron-bert rembert roberta roberta-prelayernorm "
        "roc_bert roformer xlm-roberta xlm-roberta-xl xmod",
        _DECODER,
    ),
    ("qwen3_5_text qwen3_5_moe_text qwen3_next qwen4_exp_text", {"num_hidden_layers": 4}),
]
_CHANGES: dict[str, dict[str, Any]] = {name: changes for names, changes in _FAMILIES for name in names.split()} | {
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2},
    "diffllama": {"attention_dropout": 0.0},
    "falcon": {"num_kv_heads": 2},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gpt_neo": {"attention_types": [[["global"], 3]]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "expand": 2},
    "bamba": {"attn_layer_indices": [1]},
    "nemotron_h": {"n_groups": 1, "hybrid_override_pattern": "M*E", "layers_block_type": None},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "reformer": {**_DECODER, "axial_pos_embds": False, "attn_layers": ["local"] * 3},
    "big_bird": {**_DECODER, "attention_type": "original_full"},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]},
    "xlstm": {"qk_dim_factor": 0.5, "num_blocks": 3},
    "zamba": {
        "use_mamba_kernels": False,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "num_hidden_layers": 5,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"],
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "mamba_ngroups": 1,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "num_mem_blocks": 1,
        "hybrid_layer_ids": [1],
    },
    "lfm2": {**_CONV, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**_CONV, "num_dense_layers": 1},
    "zaya": {"num_experts_per_tok": 1},
}

REFUSED = {
    "hrm_text": "not found for certain",
    "zamba": "shared by several blocks",
    "openai-gpt": "not initialised by its model's _init_weights",
    "reformer": "autograd function of its own",
    "prophetnet": "outside of the block that owns",
    "inkling2_text": "outside of the block that owns",
}
"""What cannot be streamed, and the reason given."""
REFUSED_IN_EVALUATION = {"rwkv": "writes into weights"}
SLOW_IN_PLAIN_TORCH = {"kimi_linear": "its plain implementation takes minutes for a tiny model"}
MOST_PARAMETERS = 40_000_000
SAMPLE = (
    "bert",
    "bloom",
    "cohere2",
    "ctrl",
    "deepseek_v3",
    "falcon",
    "gemma4_text",
    "gpt_oss",
    "gptj",
    "mamba",
    "mpt",
    "olmo2",
    "qwen3_next",
    "zamba2",
)
"""Tied biases, ALiBi, parallel blocks, latent attention, per-layer embeddings, sinks, state spaces, linear attention."""


def tiny_config(model_type: str) -> Any:
    """The type's default config, shrunk; with dropout where it has it."""
    return _shrunk(CONFIG_MAPPING[model_type], _CHANGES.get(model_type, {}))


def _shrunk(config_class: Any, changes: dict[str, Any]) -> Any:
    default = config_class().to_dict()
    values: dict[str, Any] = {}
    for name, value in default.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in _TINY and (is_number or (value is None and name in _SET_THOUGH_NONE)):
            values[name] = _TINY[name]
        elif name in _DROPOUTS and isinstance(value, float):
            values[name] = 0.1
    for name, sub_class in (getattr(config_class, "sub_configs", None) or {}).items():
        # AutoConfig stands for "any": the default is small enough, or the type is skipped for its size.
        if hasattr(sub_class, "model_type"):
            values[name] = _shrunk(sub_class, _CHANGES.get(sub_class.model_type, {})).to_dict()
    return config_class(**values | changes)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        # Models of all ages: what they warn about is not ours.
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


def runnable_config(model_type: str) -> Any:
    """A tiny config that plain transformers trains; skips otherwise."""
    if model_type in SLOW_IN_PLAIN_TORCH:
        pytest.skip(SLOW_IN_PLAIN_TORCH[model_type])
    try:
        config = tiny_config(model_type)
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        num_parameters = sum(p.numel() for p in made.parameters())
        if num_parameters <= MOST_PARAMETERS:
            plain = AutoModelForCausalLM.from_config(copy.deepcopy(config))
            plain(**tiny_batches(config, 1, 1)[0][0], use_cache=False).loss.backward()
    except Exception as error:
        pytest.skip(f"the shrunk config does not run in plain transformers: {type(error).__name__}: {str(error)[:150]}")
    if num_parameters > MOST_PARAMETERS:
        pytest.skip(f"not shrunk by this file's rules: {num_parameters:,} parameters")
    return config


def train(model_type: str, folder: Path) -> None:
    """Two steps of two micro-batches, float32, clipping: losses, norms, masters and logits equal plain torch's bits."""
    config = runnable_config(model_type)
    offload = fuyou.OffloadConfig(
        store=folder / "store", device="cpu", compute_dtype="float32", micro_batch_size=2, host_memory="1GiB"
    )
    model = fuyou.from_config(copy.deepcopy(config), offload=offload, seed=7)
    try:
        model.save_pretrained(folder / "start")
        plain, info = type(model).from_pretrained(folder / "start", dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        for parameter in plain.parameters():
            # Loaded weights lie as they do in the file; small matrix products depend on the alignment.
            parameter.data = parameter.data.clone()
        options: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.1, "max_grad_norm": 0.5}
        reference = ReferenceTrainer(plain, compute_dtype="float32", seed=7, **options)
        optimizer = fuyou.AdamW(model, **options)
        batches = tiny_batches(config, 2, 2, seed=3)
        for micro_batches in batches:
            try:
                expected = reference.step(micro_batches)
            except FloatingPointError as error:
                pytest.skip(f"plain torch trains this tiny model to NaN: {error}")
            model(**{k: torch.cat([m[k] for m in micro_batches]) for k in micro_batches[0]}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.last_step is not None
            assert (model.fuyou.step_metrics()["loss"], optimizer.last_step.grad_norm) == expected
        for name, master in reference.masters().items():
            assert torch.equal(optimizer.state_of(name).master.flatten(), master.flatten()), name
        inputs = {k: v for k, v in batches[0][0].items() if k != "labels"} | {"use_cache": False}
        with torch.no_grad():
            assert torch.equal(model.eval()(**inputs).logits, plain.eval()(**inputs).logits)
    finally:
        model.fuyou.abandon()


def check(model_type: str, folder: Path) -> None:
    """Equal, or refused for the reason in the tables above."""
    reason = REFUSED.get(model_type) or REFUSED_IN_EVALUATION.get(model_type)
    if reason is None:
        train(model_type, folder)
        return
    with pytest.raises(fuyou.ModelError, match=reason):
        train(model_type, folder)


@pytest.mark.parametrize("model_type", [name for name in SAMPLE if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES])
def test_sample_of_types(model_type: str, tmp_path: Path) -> None:
    """Types that differ in what is before, between and behind the layers."""
    train(model_type, tmp_path)


@pytest.mark.parametrize("model_type", [name for name in REFUSED if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES])
def test_refused_types(model_type: str, tmp_path: Path) -> None:
    """One sentence, before anything wrong was computed."""
    check(model_type, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_type(model_type: str, tmp_path: Path) -> None:
    """All that transformers maps to causal language modelling."""
    check(model_type, tmp_path)
