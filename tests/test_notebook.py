"""The notebooks run from their first cell to their last, on tiny random models."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fuyou

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "recipes" / "notebooks"
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NUM_STEPS = 6


def make_tiny_model(folder: Path) -> None:
    """A Llama of four layers with a tokenizer of single bytes and a chat template, as a plain HF folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def read_notebook(name: str, parameters: str) -> Any:
    """A notebook with other values for what its cell of parameters sets."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])).source += f"\n{parameters}"
    return notebook


def execute(notebook: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell, by a kernel of its own, whose current folder is this one; CellExecutionError at the first error."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "caches"))
    NotebookClient(
        notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()


def outputs_as_text(notebook: Any) -> str:
    return "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output
    )


def outputs_as_html(notebook: Any) -> list[str]:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]


@pytest.mark.timeout(240)
def test_notebook_trains_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_model(tmp_path / "tiny")
    parameters = f"""
MODEL = {str(tmp_path / "tiny")!r}
WORK = Path({str(tmp_path / "work")!r})
HOST_MEMORY = "128MiB"
NUM_STEPS = {NUM_STEPS}
LEARNING_RATE = 1e-2
"""
    notebook = read_notebook("finetune_smollm2", parameters)
    notebook.cells.insert(
        -1,
        nbformat.v4.new_code_cell(
            "import json\n"
            "figures = {'before': loss_before, 'after': loss_after, 'equal': equal,\n"
            "           'committed': model.fuyou.committed_step, 'log': trainer.state.log_history}\n"
            "(WORK / 'figures.json').write_text(json.dumps(figures))"
        ),
    )
    execute(notebook, tmp_path, monkeypatch)

    figures = json.loads((tmp_path / "work" / "figures.json").read_text())
    # Every one of 257 tokens is about as likely for random weights.
    assert figures["before"] == pytest.approx(math.log(257), abs=0.3)
    assert figures["after"] < figures["before"] - 0.5
    assert figures["equal"] is True
    assert figures["committed"] == NUM_STEPS
    assert all(entry["grad_norm"] > 0 for entry in figures["log"] if "loss" in entry)
    text = outputs_as_text(notebook)
    assert f"held-out loss before {figures['before']:.3f} after {figures['after']:.3f}" in text
    assert "LlamaForCausalLM - new store" in text

    plain = LlamaForCausalLM.from_pretrained(tmp_path / "work" / "model")
    start = LlamaForCausalLM.from_pretrained(tmp_path / "tiny")
    moved = {name: not torch.equal(p, start.get_parameter(name)) for name, p in plain.named_parameters()}
    assert all(moved.values()), f"not trained: {[name for name, changed in moved.items() if not changed]}"


@pytest.mark.timeout(240)
def test_a_step_can_be_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = f"""
WORK = Path({str(tmp_path / "work")!r})
SIZES = {{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 128}}
HOST_MEMORY = "32MiB"
NUM_TOKENS = 32
"""
    notebook = read_notebook("inside_a_step", parameters)
    execute(notebook, tmp_path, monkeypatch)
    shown = outputs_as_html(notebook)
    assert [shown[0].count(lane) > 0 for lane in (">gpu<", ">ssd_write<", ">cpu<")] == [True] * 3
    assert "<b>step 4</b>" in shown[0]
    assert "<b>predicted</b>" in shown[1]
    assert "model.layers.3" in shown[2]
    text = outputs_as_text(notebook)
    losses = [float(line.split()[1]) for line in text.splitlines() if line.startswith("loss ")]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert "aten.mm.default" in text
    assert "all data is as it was written" in str(notebook.cells[-1].outputs)


@pytest.mark.timeout(240)
def test_a_model_can_be_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LlamaConfig(num_hidden_layers=4, hidden_size=512, intermediate_size=1024, vocab_size=512).save_pretrained(tmp_path)
    parameters = f"""
MODEL = {str(tmp_path)!r}
ROWS_PER_STEP, SEQUENCE_LENGTH = 4, 128
BUDGETS, DRIVES = ["1GiB", "2GiB"], [1, 2]
"""
    notebook = read_notebook("plan_a_model", parameters)
    execute(notebook, tmp_path, monkeypatch)
    machine, plan, budgets, schedules = outputs_as_html(notebook)
    assert "hardware of cuda" in machine
    assert "in 6 blocks, bfloat16 on cuda" in plan
    assert budgets.count("tokens/s, limited by") == 4
    assert [name in schedules for name in ("zero-infinity", "paper", "fuyou")] == [True] * 3
    assert "host_memory" in outputs_as_text(notebook)
    assert not (tmp_path / "not-made").exists()


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell.id for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")] == []


TRAINING_CELL = """
import time, torch, transformers, fuyou

torch.manual_seed(0)
batches = torch.randint(128, (6, 2, 24))
config = transformers.LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, attention_dropout=0.1
)
offload = fuyou.OffloadConfig(store=STORE, host_memory="32MiB", durability="step")
model = fuyou.from_config(config, offload=offload, seed=1)
optimizer = fuyou.AdamW(model, lr=1e-3, max_grad_norm=0.5)


def wait(*_):
    print("in the middle", flush=True)
    time.sleep(60)


while optimizer.step_count < 6:
    if optimizer.step_count == LONG_STEP and not model.fuyou.resumed.startswith("resumed"):
        model.model.layers[2].register_forward_pre_hook(wait)
    ids = batches[optimizer.step_count]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(model.fuyou.resumed)
"""

LAST_CELL = """
import threading

model.save_pretrained(OUT)
model.fuyou.close()
print([thread.name for thread in threading.enumerate() if thread.name not in THREADS])
"""


@pytest.mark.slow
def test_an_interrupted_cell_can_be_run_again(tmp_path: Path) -> None:
    """The kernel is interrupted in the middle of a step; the same cell again goes on, with the bits of an unbroken run."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=str(tmp_path))
    client = manager.blocking_client()
    client.start_channels()

    def run(code: str, interrupt_at: str | None = None) -> tuple[str, str]:
        """What the cell prints, and the name of the error with which it ends."""
        printed: list[str] = []

        def shown(message: Any) -> None:
            printed.append(str(message["content"].get("text", "")))
            if interrupt_at is not None and interrupt_at in printed[-1]:
                manager.interrupt_kernel()

        reply = client.execute_interactive(code, timeout=120, output_hook=shown)
        return "".join(printed), reply["content"].get("ename", "")

    try:
        client.wait_for_ready(timeout=60)
        run("import threading\nTHREADS = [thread.name for thread in threading.enumerate()]")
        run(f"STORE, OUT, LONG_STEP = {str(tmp_path / 'cut')!r}, {str(tmp_path / 'cut-out')!r}, 3")
        printed, error = run(TRAINING_CELL, interrupt_at="in the middle")
        assert "in the middle" in printed
        assert error == "KeyboardInterrupt"
        printed, error = run(TRAINING_CELL)
        assert error == ""
        assert re.search("resumed at step [23]", printed)  # the third may have been on its way to the drive
        assert run(TRAINING_CELL)[1] == "StoreLockedError"  # it is open, and nothing is wrong with it
        assert "[]\n" in run(LAST_CELL)[0]
        run(f"STORE, OUT, LONG_STEP = {str(tmp_path / 'whole')!r}, {str(tmp_path / 'whole-out')!r}, 9")
        assert run(TRAINING_CELL)[1] == ""
        assert "[]\n" in run(LAST_CELL)[0]
        # While the kernel lives: the stores are nobody's.
        for name in ("cut", "whole"):
            model = fuyou.open_store_model(tmp_path / name, host_memory="32MiB")
            assert model.fuyou.committed_step == 6
            model.fuyou.close()
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    cut, whole = (LlamaForCausalLM.from_pretrained(tmp_path / f"{name}-out").state_dict() for name in ("cut", "whole"))
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
