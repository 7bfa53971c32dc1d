"""The notebooks run from their first cell to their last, on tiny random models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
