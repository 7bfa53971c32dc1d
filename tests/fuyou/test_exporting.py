"""Exports: plain checkpoints, whole at every moment."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import fuyou
from fuyou.blocks import Block, find_blocks
from fuyou.exporting import export_checkpoint
from tests.tiny_models import tiny_model


def export(model: Any, folder: Path, fail_at: int | None = None) -> list[str]:
    """Export an in-memory model; returns the blocks as they were asked for. KeyboardInterrupt at block `fail_at`."""
    weights = dict(model.named_parameters())
    asked: list[str] = []

    def read_block(block: Block) -> dict[str, torch.Tensor]:
        if len(asked) == fail_at:
            raise KeyboardInterrupt
        asked.append(block.name)
        return {name: weights[name].detach().clone() for name in block.parameters}

    export_checkpoint(model, find_blocks(model), read_block, folder)
    return asked


def assert_holds(folder: Path, model: Any) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert type(loaded) is type(model)
    expected = dict(model.named_parameters())
    found = dict(loaded.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert parameter.dtype == expected[name].dtype
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "opt", "mixtral", "qwen3_moe"])
def test_plain_transformers_loads_an_equal_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Weights, dtype, class and configs."""
    model = tiny_model(name, dtype, seed=2)
    model.generation_config = GenerationConfig(temperature=0.25, do_sample=True, pad_token_id=0)
    blocks = export(model, tmp_path / "out")
    assert len(blocks) == len(set(blocks)) == len(list((tmp_path / "out").glob("*.safetensors")))
    assert_holds(tmp_path / "out", model)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.25
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in (tmp_path / "out").glob("*.safetensors")}


def test_over_an_earlier_export(tmp_path: Path) -> None:
    """The new weights, none of the old files, and what else was in the folder."""
    export(tiny_model("llama", seed=1), tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    for seed in (2, 3):
        model = tiny_model("llama", seed=seed)
        blocks = export(model, tmp_path / "out")
        assert_holds(tmp_path / "out", model)
        assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(blocks)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not list((tmp_path / "out").glob("*.partial"))


def test_over_a_single_file(tmp_path: Path) -> None:
    """Loaders prefer model.safetensors to an index: it must go."""
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "out")
    model = tiny_model("llama", seed=2)
    export(model, tmp_path / "out")
    assert_holds(tmp_path / "out", model)


@pytest.mark.parametrize("fail_at", [0, 1, 4])
@pytest.mark.parametrize("single_file", [False, True])
def test_interrupted_exports_leave_the_earlier_one_whole(fail_at: int, single_file: bool, tmp_path: Path) -> None:
    """At any block."""
    earlier = tiny_model("llama", seed=1)
    if single_file:
        earlier.save_pretrained(tmp_path / "out")
    else:
        export(earlier, tmp_path / "out")
    before = {p.name for p in (tmp_path / "out").iterdir()}
    with pytest.raises(KeyboardInterrupt):
        export(tiny_model("llama", seed=2), tmp_path / "out", fail_at=fail_at)
    assert {p.name for p in (tmp_path / "out").iterdir()} == before
    assert_holds(tmp_path / "out", earlier)


def test_a_kill_between_the_files_leaves_the_earlier_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing cleans up after a kill: new files under new names, the old index naming the old ones."""
    earlier, later = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    export(earlier, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_args, **_kwargs: None)
        with pytest.raises(KeyboardInterrupt):
            export(later, tmp_path / "out", fail_at=3)
    assert_holds(tmp_path / "out", earlier)
    export(later, tmp_path / "out")
    assert_holds(tmp_path / "out", later)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    """Said, not overwritten."""
    (tmp_path / "out").write_text("mine")
    with pytest.raises(fuyou.ModelError, match="is a file"):
        export(tiny_model("llama"), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_indexes_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    """What an index of unknown origin calls its weight files is not deleted outside of the folder."""
    (tmp_path / "out").mkdir()
    (tmp_path / "precious.safetensors").write_text("mine")
    index = {"weight_map": {"a": "../precious.safetensors", "b": str(tmp_path / "precious.safetensors")}}
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps(index))
    export(tiny_model("llama"), tmp_path / "out")
    assert (tmp_path / "precious.safetensors").read_text() == "mine"


def test_from_a_store(tmp_path: Path) -> None:
    """A streamed model's export, with the generation config of the checkpoint that it came from."""
    plain = tiny_model("llama", torch.bfloat16, seed=5)
    plain.generation_config = GenerationConfig(temperature=0.5, do_sample=True)
    plain.save_pretrained(tmp_path / "checkpoint")
    config = fuyou.OffloadConfig(store=tmp_path / "store", device="cpu", host_memory="64MiB")
    model = fuyou.from_pretrained(tmp_path / "checkpoint", offload=config)
    with model.fuyou:
        model.save_pretrained(tmp_path / "first")
    with fuyou.from_pretrained(
        tmp_path / "checkpoint", offload=dataclasses.replace(config, resume="must")
    ).fuyou as runtime:
        runtime.export(str(tmp_path / "second"))
    for folder in ("first", "second"):
        assert_holds(tmp_path / folder, plain)
        assert json.loads((tmp_path / folder / "generation_config.json").read_text())["temperature"] == 0.5
