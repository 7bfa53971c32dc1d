"""A base shared by several runs: the numbers of runs with weights of their own, and nobody who writes it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import fuyou
from fuyou.cli import main
from io_engine import PosixEngine, Store, StoreError, StoreLockedError
from tests.fuyou.command_line import metrics, same_numbers, train, write_recipe
from tests.tiny_models import tiny_batches, tiny_model_config

# transformers warns of an attribute of its own that peft reads.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def open_run(
    folder: Path, store: str, base: str | None = "base", rank: int = 4, name: str = "llama", **options: Any
) -> Any:
    """A streamed model of random weights, always the same, with adapters, and its optimizer."""
    offload = fuyou.OffloadConfig(
        store=folder / store,
        base=None if base is None else folder / base,
        **{"device": "cpu", "host_memory": "64MiB", "micro_batch_size": 2, **options},
    )
    model = fuyou.from_config(tiny_model_config(name), offload=offload, seed=7, trainable=() if base is None else None)
    torch.manual_seed(rank)
    try:
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        return wrapped, fuyou.AdamW(wrapped, lr=1e-2, max_grad_norm=0.05)
    except BaseException:
        model.fuyou.abandon()
        raise


BATCHES = [step[0] for step in tiny_batches(tiny_model_config("llama"), 4, 1, seed=3)]


def step(model: Any, optimizer: Any) -> float:
    """One step on the batch that follows from its number."""
    model(**BATCHES[optimizer.step_count]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(model.fuyou.step_metrics()["loss"])


def adapters(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_runs_at_once_are_those_with_weights_of_their_own(tmp_path: Path) -> None:
    """Step by step in turns; then resumed, exported and opened again. The base's files stay as they are, byte by byte."""
    expected: dict[int, tuple[list[float], dict[str, torch.Tensor]]] = {}
    for rank in (4, 2):
        model, optimizer = open_run(tmp_path, f"own{rank}", None, rank)
        with model.fuyou:
            expected[rank] = [step(model, optimizer) for _ in range(4)], adapters(model)
            assert model.fuyou.step_metrics()["bytes_read"] == 0  # all of the base is in host memory
            model.fuyou.export(str(tmp_path / f"merged-own{rank}"), merge=True)

    runs = {rank: open_run(tmp_path, f"run{rank}", "base", rank) for rank in (4, 2)}
    before = contents(tmp_path / "base")
    losses = {rank: [] for rank in runs}
    for _ in range(2):
        for rank, run in runs.items():
            losses[rank].append(step(*run))
    for model, _ in runs.values():
        model.fuyou.close()
    for rank in runs:
        model, optimizer = open_run(tmp_path, f"run{rank}", None, rank)  # the store knows its base
        with model.fuyou:
            assert "resumed at step 2" in model.fuyou.resumed
            assert f"base in {tmp_path / 'base'}" in model.fuyou.resumed
            losses[rank] += [step(model, optimizer) for _ in range(2)]
            assert model.fuyou.step_metrics()["bytes_read"] == 0
            got = adapters(model)
            model.fuyou.export(str(tmp_path / f"merged{rank}"), merge=True)
        assert losses[rank] == expected[rank][0]
        assert all(torch.equal(value, expected[rank][1][name]) for name, value in got.items())
        merged, own = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto").state_dict()
            for name in (f"merged{rank}", f"merged-own{rank}")
        )
        assert all(torch.equal(merged[name], own[name]) for name in own)
    assert contents(tmp_path / "base") == before

    sizes = {name: fuyou.inspect_store(tmp_path / name)["size_bytes"] for name in ("base", "run4", "own4")}
    assert sizes["base"] + sizes["run4"] == pytest.approx(sizes["own4"], rel=0.05)
    alone = fuyou.open_store_model(tmp_path / "run2", host_memory="64MiB")
    with alone.fuyou, torch.no_grad():
        alone.eval()
        ids = BATCHES[0]["input_ids"]
        merged_logits = (
            AutoModelForCausalLM.from_pretrained(tmp_path / "merged2", dtype="auto").eval()(input_ids=ids).logits
        )
        torch.testing.assert_close(alone(input_ids=ids).logits, merged_logits, rtol=0.05, atol=0.02)


ONE_STEP = """
import sys
from pathlib import Path
from tests.fuyou.test_base_store import open_run, step
model, optimizer = open_run(Path(sys.argv[1]), "there", "base", 4)
print("open", flush=True)
sys.stdin.readline()
print(step(model, optimizer), flush=True)
sys.stdin.readline()
model.fuyou.close()
"""


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path) -> None:
    """Both train on it; meanwhile nobody may open it to write, and each run's own store is its own."""
    model, optimizer = open_run(tmp_path, "here")
    with (
        model.fuyou,
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", "import torch; torch.set_num_threads(1)" + ONE_STEP, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as other,
    ):
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        here = step(model, optimizer)
        other.stdin.write("\n")
        other.stdin.flush()
        assert float(other.stdout.readline()) == here
        model.fuyou.close()
        with PosixEngine(1) as engine, pytest.raises(StoreLockedError, match="the base of a run that is under way"):
            Store.open(tmp_path / "base", engine=engine)
        with pytest.raises(StoreLockedError, match=f"process {other.pid}"):
            open_run(tmp_path, "there")
        other.communicate("\n")
    assert other.returncode == 0
    assert fuyou.verify_store(tmp_path / "base") == []


@pytest.fixture(name="trained")
def _trained(tmp_path: Path) -> Path:
    """A folder with a base and a run of one step on it."""
    model, optimizer = open_run(tmp_path, "run")
    with model.fuyou:
        step(model, optimizer)
    return tmp_path


def test_a_base_that_does_not_fit_is_refused(trained: Path) -> None:
    """Nothing is made for the run that was refused."""
    with pytest.raises(StoreError, match=r"base=.* holds another model \(LlamaForCausalLM.*not this Qwen2ForCausalLM"):
        open_run(trained, "other", name="qwen2")
    with pytest.raises(StoreError, match="compute_dtype='bfloat16', this run asks for 'float32'"):
        open_run(trained, "other", compute_dtype="float32")
    with pytest.raises(StoreError, match="frozen_dtype='bfloat16', this run asks for 'nf4'"):
        open_run(trained, "other", frozen_dtype="nf4")
    with pytest.raises(StoreError, match=r"run holds the adapters of a run that reads another base"):
        open_run(trained, "other", base="run")
    model = fuyou.from_config(
        tiny_model_config("llama"), offload=fuyou.OffloadConfig(store=trained / "full", host_memory="64MiB"), seed=7
    )
    with model.fuyou:
        fuyou.AdamW(model)
    with pytest.raises(StoreError, match="holds a run that trains its weights"):
        open_run(trained, "other", base="full")
    assert not (trained / "other").exists()


def test_a_base_that_is_gone_moved_or_changed(trained: Path) -> None:
    """Where it went is remembered; another one in its place is not taken for it."""
    shutil.move(trained / "base", trained / "moved")
    with pytest.raises(StoreError, match="reads its weights from a base in .*/base, and there is no store"):
        open_run(trained, "run", None)
    for base in ("moved", None):
        model, _ = open_run(trained, "run", base)
        with model.fuyou:
            assert model.fuyou.committed_step == 1
            assert f"base in {trained / 'moved'}" in model.fuyou.resumed
    other, _ = open_run(trained, "second", "base")  # made anew, of the same weights
    other.fuyou.close()
    with pytest.raises(StoreError, match="is another store than the run in .*/run began with"):
        open_run(trained, "run", "base")
    with PosixEngine(1) as engine, Store.open(trained / "moved", engine=engine) as store:
        name = store.names()[0]
        store.commit(step=1, slots={}, checksums={name: "xxh3:0123456789abcdef"}, state=store.state)
    with pytest.raises(StoreError, match="has other weights than when the run in .*/run began"):
        open_run(trained, "run", "moved")


def test_nothing_of_a_base_is_trained(trained: Path) -> None:
    """Neither asked for at the beginning, nor later, nor by whoever opens the base itself."""
    config = tiny_model_config("llama")

    def options(store: str, **more: Any) -> Any:
        return fuyou.OffloadConfig(store=trained / store, host_memory="64MiB", device="cpu", **more)

    with pytest.raises(fuyou.ConfigError, match="nothing of a base is trained, and trainable="):
        fuyou.from_config(config, offload=options("new", base=trained / "base"), trainable=["lm_head"])
    for offload in (options("new", base=trained / "base"), options("base")):
        model = fuyou.from_config(config, offload=offload)
        with model.fuyou:
            model.requires_grad_(True)
            with pytest.raises(fuyou.ConfigError, match="are a base, which nobody writes"):
                fuyou.AdamW(model)
    with pytest.raises(fuyou.ConfigError, match="two stores"):
        options("base", base=[trained / "base"])
    own, _ = open_run(trained, "own", None)
    own.fuyou.close()
    with pytest.raises(StoreError, match=r"holds a run with weights of its own, and this one asks for the base"):
        open_run(trained, "own")


def test_by_recipe_and_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two recipes on one base, one after the other; what the commands say of a run on a base."""
    lora = {"lora__r": 4, "lora__lora_dropout": 0.1, "offload__base": str(tmp_path / "base")}
    recipes = {}
    for name in ("one", "two", "own"):
        (tmp_path / name).mkdir()
        own = {"offload__base": None} if name == "own" else {}
        recipes[name] = write_recipe(tmp_path / name, **lora | own)
        assert train(recipes[name]) == 0
    for name in ("one", "two"):
        assert same_numbers(metrics(tmp_path / name)) == same_numbers(metrics(tmp_path / "own"))
    capsys.readouterr()
    store = str(tmp_path / "one" / "store")
    assert main(["inspect", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["base"]["directories"] == [str(tmp_path / "base")]
    assert main(["verify", store]) == 0
    assert main(["export", store, str(tmp_path / "masters"), "--masters"]) == 1
    assert "beside a frozen base" in capsys.readouterr().err
    assert main(["export", store, str(tmp_path / "merged"), "--merge"]) == 0
    data = next((tmp_path / "base").glob("extents-*.bin"))
    with data.open("r+b") as file:
        file.write(b"damaged!")
    assert main(["verify", store]) == 1
    assert "extents-" in capsys.readouterr().out
    assert train(recipes["two"], "--set", "lora=null") == 2
    assert "nothing of a base is trained" in capsys.readouterr().err
