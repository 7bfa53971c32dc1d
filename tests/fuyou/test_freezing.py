"""Training a part of a model: which parameters are meant, what the rest no longer costs, and the plan of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fuyou
from fuyou.blocks import meta_model
from fuyou.freezing import freeze
from tests.fuyou.command_line import TINY_LLAMA, metrics, train, write_recipe
from tests.tiny_models import tiny_batches, tiny_model_config


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(name: str, patterns: list[str]) -> set[str]:
    with meta_model(tiny_model_config(name), torch.bfloat16) as model:
        freeze(model, patterns)
        return {n for n, p in model.named_parameters() if p.requires_grad}


def test_patterns_mean_whole_names_of_parameters_or_of_modules_around_them() -> None:
    assert trained("llama", ["lm_head"]) == {"lm_head.weight"}
    assert trained("llama", ["lm_head.weight", r"model\.norm.*"]) == {"lm_head.weight", "model.norm.weight"}
    layers = trained("llama", ["model.layers.[12]"])
    assert layers == trained("llama", ["model.layers.1.*", "model.layers.2.*"])
    assert {name.split(".")[2] for name in layers} == {"1", "2"}
    # A tied weight is meant by either of its names.
    assert trained("llama_tied", ["lm_head"]) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["model.layer.1.*"], r"'model\.layer\.1\.\*' matches no .* model\.layers\.1"),
        (["lm_head", "model.layers.9"], r"'model\.layers\.9' matches no .* model\.layers"),
        (["layers"], "matches no"),
        (["model.layers.[1.*"], "no regular expression"),
        ("lm_head", "a list of patterns"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(patterns: Any, message: str, tmp_path: Path) -> None:
    """Also beside others that do match; before a store is made."""
    offload = fuyou.OffloadConfig(store=tmp_path / "store", device="cpu", host_memory="64MiB")
    with pytest.raises(fuyou.ConfigError, match=message):
        fuyou.from_config(tiny_model_config("llama"), offload=offload, trainable=patterns)
    assert not (tmp_path / "store").exists()


def test_by_hand_and_by_pattern_are_the_same_run(tmp_path: Path) -> None:
    """requires_grad_(False) before fuyou.AdamW; also a run that goes on with other parameters trained."""
    batches = tiny_batches(tiny_model_config("llama"), 2, 1, seed=3)
    exported = []
    for by_hand in (False, True):
        offload = fuyou.OffloadConfig(store=tmp_path / str(by_hand), device="cpu", host_memory="64MiB")
        patterns = None if by_hand else ["model.layers.2", "lm_head"]
        model = fuyou.from_config(tiny_model_config("llama"), offload=offload, seed=7, trainable=patterns)
        if by_hand:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name == "lm_head.weight" or name.startswith("model.layers.2."))
        with model.fuyou:
            optimizer = fuyou.AdamW(model, lr=1e-2, max_grad_norm=0.5)
            for micro_batches in batches:
                model(**micro_batches[0]).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            exported.append({name: optimizer.state_of(name).master for name in ("lm_head.weight",)})
        states = {s["name"]: s["state_bytes"] for s in fuyou.inspect_store(tmp_path / str(by_hand))["shards"]}
        assert [name for name, size in states.items() if size] == ["model.layers.2", "epilogue"]
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])
    again = fuyou.from_config(tiny_model_config("llama"), offload=offload, trainable=["model.layers.1", "lm_head"])
    with again.fuyou:
        optimizer = fuyou.AdamW(again, lr=1e-2)
        assert torch.equal(optimizer.state_of("lm_head.weight").master, exported[1]["lm_head.weight"])
        again(**batches[0][0]).loss.backward()
        optimizer.step()
        again.fuyou.flush()
        assert again.fuyou.committed_step == 3


def test_frozen_blocks_are_read_once_and_planned_so(tmp_path: Path) -> None:
    """Below the lowest trained block the weights come for the forward pass alone; nothing frozen is written."""
    config = tiny_model_config("llama")
    offload = fuyou.OffloadConfig(store=tmp_path / "store", device="cpu", host_memory="64MiB", durability="step")
    trainable = ["model.layers.1"]
    plan = fuyou.plan_model(config, offload=offload, batch_size=2, sequence_length=24, trainable=trainable)
    assert [b.trainable for b in plan.blocks] == [False, False, True, False, False]
    assert [b.in_backward for b in plan.blocks] == [False, False, True, True, True]
    changes: dict[str, Any] = {"weights_in_host": False, "states_in_host": False, "update_window": "backward"}
    blocks = tuple(dataclasses.replace(b, **changes) for b in plan.blocks)
    # No room to keep weights that happen to be there still.
    pool = 2 * max(b.weight_bytes for b in blocks)
    offload = dataclasses.replace(offload, plan=dataclasses.replace(plan, blocks=blocks, weight_pool_bytes=pool))
    model = fuyou.from_config(config, offload=offload, seed=7, trainable=trainable)
    with model.fuyou:
        optimizer = fuyou.AdamW(model, lr=1e-2)
        moved = []
        for micro_batches in tiny_batches(config, 4, 1, seed=3):
            model(**micro_batches[0]).loss.backward()
            optimizer.step()
            model.fuyou.flush()
            moved.append(model.fuyou.bytes_moved)
        spans = {span.name for trace in model.fuyou.trace.steps for span in trace.spans}
    weights = [b.weight_bytes for b in blocks]
    read = weights[0] + weights[1] + 2 * weights[2] + 2 * weights[3] + weights[4] + blocks[2].state_bytes
    assert sum(b.num_weight_reads() * b.weight_bytes for b in blocks) + blocks[2].state_bytes == read
    last = [after - before for before, after in zip(moved[-2], moved[-1], strict=True)]
    assert last == [read, weights[2] + blocks[2].state_bytes]
    assert "layer 0 backward" not in spans
    assert "layer 1 backward" in spans


def test_recipe_trains_a_part_and_resumes(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, offload__store=str(tmp_path / "one"))
    options = ["--set", "trainable=[model.layers.1, lm_head]"]
    assert train(recipe, *options) == 0
    states = {s["name"]: s["state_bytes"] for s in fuyou.inspect_store(tmp_path / "one")["shards"]}
    assert [name for name, size in states.items() if size] == ["model.layers.1", "epilogue"]
    whole = metrics(tmp_path)
    options += ["--set", f"offload.store={tmp_path / 'two'}", "--set", f"output.dir={tmp_path / 'again' / 'out'}"]
    assert train(recipe, *options, "--steps", "2") == 0
    assert train(recipe, *options) == 0
    assert [line["loss"] for line in metrics(tmp_path / "again")] == [line["loss"] for line in whole]


def test_recipe_refuses_patterns_that_match_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert TINY_LLAMA["num_hidden_layers"] == 2
    recipe = write_recipe(tmp_path)
    assert train(recipe, "--set", "trainable=[model.layers.2]") == 2
    assert "model.layers.1" in capsys.readouterr().err
    assert train(recipe, "--set", "trainable=[]") == 2
    assert not (tmp_path / "store").exists()
