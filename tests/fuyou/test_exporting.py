"""Exports: plain checkpoints, whole at every moment."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import fuyou
from fuyou.blocks import Block, find_blocks
from fuyou.cli import main
from fuyou.exporting import export_checkpoint
from fuyou.master_export import export_distributed
from fuyou.tokenizing import save_tokenizer
from io_engine import Store, StoreCorruptError
from optim.states import StateFiles
from tests.fuyou.test_data import word_tokenizer
from tests.tiny_models import tiny_batches, tiny_model, tiny_model_config


def export(model: Any, folder: Path, fail_at: int | None = None) -> list[str]:
    """Export an in-memory model; returns the blocks as they were asked for. KeyboardInterrupt at block `fail_at`."""
    weights = dict(model.named_parameters())
    asked: list[str] = []

    @contextlib.contextmanager
    def read_block(block: Block) -> Iterator[dict[str, torch.Tensor]]:
        if len(asked) == fail_at:
            raise KeyboardInterrupt
        asked.append(block.name)
        yield {name: weights[name].detach().clone() for name in block.parameters}

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


# --- for torch.distributed.checkpoint ----------------------------------------------------------------------------------

HYPERPARAMETERS: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.1}


def trained_store(name: str, dtype: str, folder: Path, trainable: list[str] | None = None) -> Any:
    """A streamed model after two steps, its optimizer, and three steps' batches."""
    config = tiny_model_config(name)
    config.attention_dropout = 0.0
    offload = fuyou.OffloadConfig(store=folder, device="cpu", host_memory="64MiB", compute_dtype=dtype)
    model = fuyou.from_config(config, offload=offload, seed=3, trainable=trainable)
    optimizer = fuyou.AdamW(model, **HYPERPARAMETERS)
    todo = [step[0] for step in tiny_batches(config, 3, 1, batch_size=2, seed=4)]
    for batch in todo[:2]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, todo


@pytest.mark.parametrize(("name", "dtype"), [("llama", "float32"), ("llama_tied", "float32"), ("gpt2", "bfloat16")])
def test_dcp_loads_into_plain_torch_whose_next_step_is_ours(name: str, dtype: str, tmp_path: Path) -> None:
    """Masters and both moments to the bit; loss and weights of the next step as floats agree (float32 compute)."""
    streamed, ours, todo = trained_store(name, dtype, tmp_path / "store")
    with streamed.fuyou:
        names = [n for n, _ in streamed.named_parameters()]
        expected = {n: ours.state_of(n) for n in names}
    assert main(["export", str(tmp_path / "store"), str(tmp_path / "out"), "--format", "dcp"]) == 0
    config = AutoConfig.from_pretrained(tmp_path / "out")
    plain: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    theirs = torch.optim.AdamW(plain.parameters(), **HYPERPARAMETERS)
    weights, states = get_state_dict(plain, theirs)
    wanted = {"model": weights, "optim": {"state": states["state"]}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is distributed
        dcp.load(wanted, checkpoint_id=str(tmp_path / "out"), no_dist=True)
    set_state_dict(plain, theirs, model_state_dict=weights, optim_state_dict=states)
    for n, parameter in plain.named_parameters():
        state = theirs.state[parameter]
        assert torch.equal(parameter.detach(), expected[n].master), n
        assert torch.equal(state["exp_avg"], expected[n].exp_avg), n
        assert torch.equal(state["exp_avg_sq"], expected[n].exp_avg_sq), n
        assert float(state["step"]) == expected[n].step == 2
    if dtype == "bfloat16":
        return
    loss = plain(**todo[2]).loss
    loss.backward()
    theirs.step()
    offload = fuyou.OffloadConfig(store=tmp_path / "store", device="cpu", host_memory="64MiB", compute_dtype=dtype)
    again = fuyou.from_config(streamed.config, offload=offload)
    with again.fuyou:
        optimizer = fuyou.AdamW(again, **HYPERPARAMETERS)
        our_loss = again(**todo[2]).loss
        our_loss.backward()
        optimizer.step()
        torch.testing.assert_close(our_loss, loss.detach(), rtol=1e-6, atol=1e-6)
        for n, parameter in plain.named_parameters():
            torch.testing.assert_close(optimizer.state_of(n).master, parameter.detach(), rtol=1e-5, atol=1e-6)


def test_dcp_of_frozen_parameters_has_weights_only(tmp_path: Path) -> None:
    streamed, ours, _ = trained_store("llama", "bfloat16", tmp_path / "store", [r"model\.layers\.1\..*"])
    with streamed.fuyou:
        moved = ours.state_of("model.layers.1.mlp.up_proj.weight")
        streamed.save_pretrained(str(tmp_path / "plain"))
    assert export_distributed(tmp_path / "store", tmp_path / "out") == 2
    metadata = dcp.FileSystemReader(tmp_path / "out").read_metadata()
    keys = set(metadata.state_dict_metadata)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert {key for key in keys if key.startswith("model.")} == {f"model.{n}" for n in plain.state_dict()}
    assert {key.split(".")[4] for key in keys if key.startswith("optim.")} == {"1"}
    loaded = {f"model.{n}": torch.zeros_like(v) for n, v in plain.state_dict().items()}
    moment = {"optim.state.model.layers.1.mlp.up_proj.weight.exp_avg": torch.zeros_like(moved.exp_avg)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(loaded | moment, checkpoint_id=str(tmp_path / "out"), no_dist=True)
    assert torch.equal(next(iter(moment.values())), moved.exp_avg)
    for n, value in plain.state_dict().items():
        # The masters of what was trained are finer than the exported weights.
        torch.testing.assert_close(loaded[f"model.{n}"], value, rtol=0 if ".1." not in n else 2**-7, atol=0)


def test_dcp_over_what_is_there_and_of_what_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, and nothing is left of an export that failed."""
    trained_store("llama", "bfloat16", tmp_path / "store")[0].fuyou.close()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(fuyou.ModelError, match="not an empty folder"):
        export_distributed(tmp_path / "store", tmp_path / "full")
    snapshot = Store.peek(tmp_path / "store")
    name = "model.layers.1/state"
    file_index, offset, _ = snapshot.extents[name].slots[snapshot.slots[name]][0]
    with open(sorted((tmp_path / "store").glob("extents-*.bin"))[file_index], "r+b") as file:
        file.seek(offset)
        file.write(b"\xff\x01\xff")
    with pytest.raises(StoreCorruptError, match=name):
        export_distributed(tmp_path / "store", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dcp_holds_one_parameter_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is read once, and the one before was let go by then."""
    trained_store("llama_tied", "bfloat16", tmp_path / "store")[0].fuyou.close()
    alive: list[Any] = []
    num_read = 0
    real = StateFiles.read

    def read(*args: Any) -> Any:
        nonlocal num_read
        num_read += 1
        # The last one is on its way through the writer at most. Arrays and not tensors: storages outlive these.
        assert sum(reference() is not None for reference in alive) <= 1
        arrays = real(*args)
        alive.extend(map(weakref.ref, arrays))
        return arrays

    monkeypatch.setattr(StateFiles, "read", read)
    export_distributed(tmp_path / "store", tmp_path / "out")
    assert num_read == len(list(tiny_model("llama_tied").parameters()))


@pytest.mark.parametrize(("name", "dtype"), [("llama_tied", "bfloat16"), ("mixtral", "float32")])
def test_masters_as_a_plain_checkpoint(name: str, dtype: str, tmp_path: Path) -> None:
    """The float32 values that Adam updates, under the names of a checkpoint; frozen parameters as they are."""
    streamed, ours, _ = trained_store(name, dtype, tmp_path / "store", [r"model\.layers\.1\..*"])
    with streamed.fuyou:
        streamed.save_pretrained(str(tmp_path / "weights"))
        expected = {n: ours.state_of(n).master for n, p in streamed.named_parameters() if p.requires_grad}
    assert main(["export", str(tmp_path / "store"), str(tmp_path / "out"), "--masters"]) == 0
    weights, masters = (
        dict(AutoModelForCausalLM.from_pretrained(tmp_path / f, dtype="auto").named_parameters())
        for f in ("weights", "out")
    )
    assert masters.keys() == weights.keys()
    assert expected
    for n, parameter in masters.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, expected[n] if n in expected else weights[n].float()), n
    assert main(["export", str(tmp_path / "store"), str(tmp_path / "no"), "--masters", "--format", "dcp"]) == 2


def test_exports_have_the_tokenizer_of_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If it is still there."""
    tiny_model("llama").save_pretrained(tmp_path / "start")
    tokenizer = word_tokenizer().tokenizer
    tokenizer.save_pretrained(tmp_path / "start")
    offload = fuyou.OffloadConfig(store=tmp_path / "store", device="cpu", host_memory="64MiB")
    fuyou.from_pretrained(tmp_path / "start", offload=offload).fuyou.close()
    assert main(["export", str(tmp_path / "store"), str(tmp_path / "with")]) == 0
    assert f"with the tokenizer of {tmp_path / 'start'}\n" in capsys.readouterr().out
    found = AutoTokenizer.from_pretrained(tmp_path / "with")
    assert found.get_vocab() == tokenizer.get_vocab()
    assert found.chat_template == tokenizer.chat_template
    (tmp_path / "start").rename(tmp_path / "gone")
    assert main(["export", str(tmp_path / "store"), str(tmp_path / "without"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokenizer"] is None
    kept = tmp_path / "store" / "tokenizer"  # as fuyou train leaves it
    tokenizer.save_pretrained(kept)
    assert main(["export", str(tmp_path / "store"), str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokenizer"] == str(kept)
    assert AutoTokenizer.from_pretrained(tmp_path / "again").get_vocab() == tokenizer.get_vocab()


def test_what_was_only_exported_does_not_stay_in_memory(tmp_path: Path) -> None:
    """Though the plan keeps it there once it is computed with."""
    offload = fuyou.OffloadConfig(store=tmp_path / "store", device="cpu", host_memory="256MiB")
    model = fuyou.from_config(tiny_model_config("llama"), offload=offload, seed=0)
    model.eval()
    assert all(block.weights_in_host for block in model.fuyou.plan.blocks)
    with model.fuyou, torch.no_grad():
        (pool,) = (pool for pool in model.fuyou._pools if pool.name == "weights")
        model.save_pretrained(str(tmp_path / "first"))
        assert pool.used_bytes == 0
        logits = model(input_ids=torch.arange(8)[None]).logits
        used_bytes = pool.used_bytes
        assert used_bytes > 0
        model.save_pretrained(str(tmp_path / "second"))
        assert pool.used_bytes == used_bytes
        assert torch.equal(model(input_ids=torch.arange(8)[None]).logits, logits)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor is anybody asked whether it may be."""
    config = {
        "model_type": "theirs",
        "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    offload = fuyou.OffloadConfig(store=tmp_path / "store", device="cpu", host_memory="64MiB")
    with pytest.raises(fuyou.ModelError, match=r"config\.json"):
        fuyou.from_pretrained(tmp_path, offload=offload)
    assert save_tokenizer(str(tmp_path), tmp_path / "out") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "theirs.py"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["llama_tied", "mixtral"])
def test_load_state_dict_compares(name: str, tmp_path: Path) -> None:
    """What the store holds is accepted, in the names of a checkpoint; anything else is refused and changes nothing."""
    offload = fuyou.OffloadConfig(store=tmp_path / "store", device="cpu", compute_dtype="float32", host_memory="64MiB")
    model: Any = fuyou.from_config(tiny_model_config(name), offload=offload, seed=1)
    with model.fuyou:
        model.save_pretrained(tmp_path / "start")
        index = json.loads((tmp_path / "start" / "model.safetensors.index.json").read_text())["weight_map"]
        weights = {key: load_file(tmp_path / "start" / file)[key] for key, file in index.items()}
        model.load_state_dict(weights)
        assert model.load_state_dict({"none": torch.zeros(1)}, strict=False).unexpected_keys == ["none"]
        with pytest.raises(fuyou.ModelError, match="missing"):
            model.load_state_dict({})
        key = next(k for k in weights if "layers.1" in k)
        weights[key].flatten()[-1] += 1e-3
        with pytest.raises(fuyou.ModelError, match=key.replace(".", r"\.")):
            model.load_state_dict(weights)
        weights[key].flatten()[-1] -= 1e-3
        assert "model.norm.weight" in model.state_dict()
