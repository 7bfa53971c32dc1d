"""Checkpoints of many layouts, streamed into a store: the same weights as plain transformers loads, or one clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import fuyou
from tests.tiny_models import tiny_model, tiny_model_config


def offload(folder: Path, dtype: str = "float32") -> fuyou.OffloadConfig:
    return fuyou.OffloadConfig(store=folder / "store", device="cpu", compute_dtype=dtype, host_memory="64MiB")


def checkpoint(name: str, folder: Path, dtype: torch.dtype = torch.float32, max_shard_size: str = "40KB") -> Path:
    """Random weights in several safetensors files, written by plain transformers."""
    tiny_model(name, dtype, seed=4).save_pretrained(folder / "checkpoint", max_shard_size=max_shard_size)
    return folder / "checkpoint"


def streamed_weights(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all weights, read from the store block by block."""
    weights = {}
    for block in model.fuyou.blocks.blocks:
        if block.parameters:
            with model.fuyou._block_on_host(block) as tensors:
                weights |= {name: tensor.clone() for name, tensor in tensors.items()}
    return weights


def assert_weights_equal(model: Any, plain: Any) -> None:
    weights = streamed_weights(model)
    expected = dict(plain.named_parameters())
    assert weights.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(weights[name], parameter), name


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "mixtral", "qwen3_moe"])
def test_equals_plain_loading(name: str, stored_dtype: torch.dtype, compute_dtype: str, tmp_path: Path) -> None:
    """Sharded files; experts one tensor each in the file, one fused tensor in the module; dtypes converted."""
    folder = checkpoint(name, tmp_path, stored_dtype)
    assert len(list(folder.glob("*.safetensors"))) > 2
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, compute_dtype))
    model = fuyou.from_pretrained(folder, offload=offload(tmp_path, compute_dtype))
    with model.fuyou:
        assert_weights_equal(model, plain)


def test_single_file(tmp_path: Path) -> None:
    """A checkpoint without an index."""
    folder = checkpoint("llama", tmp_path, max_shard_size="1GB")
    assert (folder / "model.safetensors").is_file()
    model = fuyou.from_pretrained(folder, offload=offload(tmp_path))
    with model.fuyou:
        assert_weights_equal(model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def test_checkpoint_of_the_base_model(tmp_path: Path) -> None:
    """Names without the prefix "model." of a tied model, saved without its head."""
    plain = tiny_model("llama_tied", seed=4)
    plain.model.save_pretrained(tmp_path / "checkpoint", max_shard_size="40KB")
    # The base model's config names its class; AutoModelForCausalLM does not mind, and neither may we.
    model = fuyou.from_pretrained(tmp_path / "checkpoint", offload=offload(tmp_path))
    with model.fuyou:
        assert_weights_equal(model, plain)


def test_same_outputs_as_plain(tmp_path: Path) -> None:
    """Evaluation of a loaded model gives plain transformers' logits, with and without a mask, bit for bit."""
    folder = checkpoint("gpt2", tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = fuyou.from_pretrained(folder, offload=offload(tmp_path)).eval()
    ids = torch.arange(3, 27).view(2, 12)
    with model.fuyou, torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
        mask = (torch.arange(12) < torch.tensor([[12], [7]])).long()
        expected = plain(input_ids=ids, attention_mask=mask, labels=ids)
        found = model(input_ids=ids, attention_mask=mask, labels=ids)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.loss, expected.loss)


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], wanted: str) -> None:
    """Change the tensors of the file that holds the weight `wanted`."""
    name = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][wanted]
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def _missing_weight(folder: Path) -> None:
    _rewrite(folder, lambda tensors: tensors.pop(Q_PROJ), Q_PROJ)


def _wrong_shape(folder: Path) -> None:
    _rewrite(folder, lambda tensors: tensors.update({Q_PROJ: torch.ones(64, 32)}), Q_PROJ)


def _not_finite(folder: Path) -> None:
    _rewrite(folder, lambda tensors: tensors[Q_PROJ].view(-1)[5].fill_(float("nan")), Q_PROJ)


def _quantized_weight(folder: Path) -> None:
    _rewrite(folder, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(torch.float8_e4m3fn)}), Q_PROJ)


def _truncated(folder: Path) -> None:
    file = max(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def _garbage(folder: Path) -> None:
    max(folder.glob("*.safetensors")).write_bytes(b"\xff" * 5000)


def _missing_file(folder: Path) -> None:
    max(folder.glob("*.safetensors")).unlink()


def _broken_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')


def _only_pickles(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"old")


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _quantized_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing_weight, f"{Q_PROJ} is missing"),
        (_wrong_shape, r"shape \(64, 32\) in the checkpoint"),
        (_not_finite, "NaN or infinity"),
        (_quantized_weight, "stored as F8_E4M3"),
        (_truncated, "not a readable safetensors file"),
        (_garbage, "not a readable safetensors file"),
        (_missing_file, "named by the index are missing"),
        (_broken_index, "not a safetensors index"),
        (_only_pickles, "no model.safetensors"),
        (_no_config, "config.json"),
        (_quantized_config, "quantized checkpoint"),
    ],
)
def test_damaged_checkpoints_are_refused_and_leave_nothing_usable(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    """One ModelError; the same store can then be filled from the whole checkpoint."""
    whole = checkpoint("llama", tmp_path)
    shutil.copytree(whole, tmp_path / "damaged")
    damage(tmp_path / "damaged")
    with pytest.raises(fuyou.ModelError, match=message):
        fuyou.from_pretrained(tmp_path / "damaged", offload=offload(tmp_path))
    if (tmp_path / "store").exists() and any((tmp_path / "store").iterdir()):
        assert not fuyou.inspect_store(tmp_path / "store")["filled"]
    model = fuyou.from_pretrained(whole, offload=offload(tmp_path))
    with model.fuyou:
        assert_weights_equal(model, AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32))


def test_a_model_without_a_head_is_not_given_a_random_one(tmp_path: Path) -> None:
    """Plain transformers would only warn."""
    tiny_model("llama", seed=4).model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(fuyou.ModelError, match=r"lm_head\.weight is missing"):
        fuyou.from_pretrained(tmp_path / "checkpoint", offload=offload(tmp_path))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no/such/folder-here", "local folder"),
        ("./absent", "no such folder"),
        ("file", "is a file"),
        ("empty", "no config.json in it; name the folder"),
    ],
)
def test_paths_that_are_no_folder(path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what was tried."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(fuyou.ModelError, match=message):
        fuyou.from_pretrained(path, offload=offload(tmp_path))


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "opt", "qwen3_moe"])
def test_random_weights_are_those_of_the_seed(name: str, tmp_path: Path) -> None:
    """Equal for equal seeds, other for others, spread as transformers spreads them, the caller's generator untouched."""
    config = tiny_model_config(name)
    state = torch.get_rng_state()
    models = [
        fuyou.from_config(config, seed=seed, offload=offload(tmp_path / str(number)))
        for number, seed in enumerate((3, 3, 4))
    ]
    assert torch.equal(torch.get_rng_state(), state)
    first, second, third = (streamed_weights(model) for model in models)
    for model in models:
        model.fuyou.close()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], third[k]) for k in first)
    for parameter_name, parameter in tiny_model(name, seed=0).named_parameters():
        found = first[parameter_name]
        assert found.shape == parameter.shape
        assert float(found.std(correction=0)) == pytest.approx(float(parameter.detach().std(correction=0)), rel=0.2)
        assert float(found.mean()) == pytest.approx(float(parameter.detach().mean()), abs=0.01)


def test_tied_padding_row_stays_zero(tmp_path: Path) -> None:
    """The head does not initialise the weight again that it shares with the embedding."""
    model = fuyou.from_config(tiny_model_config("llama_tied"), offload=offload(tmp_path))
    with model.fuyou:
        assert not streamed_weights(model)["model.embed_tokens.weight"][0].any()


def test_loading_holds_one_block_at_a_time(tmp_path: Path) -> None:
    """Seen at each hand-over: no parameter but the block's own has memory of its own."""
    from fuyou.blocks import find_blocks, meta_model
    from fuyou.building import load_blocks, random_blocks, replace_by_placeholders

    folder = checkpoint("qwen3_moe", tmp_path)
    config = AutoConfig.from_pretrained(folder)
    with meta_model(config, torch.float32) as model:
        blocks = find_blocks(model)
    replace_by_placeholders(model, torch.float32, torch.device("cpu"))
    seen: list[str] = []

    def write(block: Any, values: dict[str, torch.Tensor]) -> None:
        assert set(values) == set(block.parameters)
        held = {n for n, p in model.named_parameters() if p.untyped_storage().nbytes() > p.element_size()}
        assert held <= set(block.parameters)
        seen.append(block.name)

    load_blocks(model, blocks, folder, torch.float32, write)
    expected = [block.name for block in blocks.blocks if block.parameters]
    assert seen == expected
    seen.clear()
    random_blocks(model, blocks, 0, write)
    assert seen == expected


def test_export_keeps_the_layout_of_files(tmp_path: Path) -> None:
    """Loaded and exported, experts are one tensor each again, under the names that they had."""
    folder = checkpoint("qwen3_moe", tmp_path)
    model = fuyou.from_pretrained(folder, offload=offload(tmp_path))
    with model.fuyou:
        model.save_pretrained(tmp_path / "export")

    def names(path: Path) -> set[str]:
        found: set[str] = set()
        for file in path.glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                found |= set(opened.keys())
        return found

    assert names(tmp_path / "export") == names(folder)
