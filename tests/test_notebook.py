"""The notebook runs from its first cell to its last, on a tiny random model instead of SmolLM2."""

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
NOTEBOOK = ROOT / "recipes" / "notebooks" / "finetune_smollm2.ipynb"
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


def read_notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs_as_text(notebook: Any) -> str:
    return "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output
    )


@pytest.mark.timeout(240)
def test_notebook_trains_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_model(tmp_path / "tiny")
    notebook = read_notebook()
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += f"""
MODEL = {str(tmp_path / "tiny")!r}
WORK = Path({str(tmp_path / "work")!r})
HOST_MEMORY = "128MiB"
NUM_STEPS = {NUM_STEPS}
LEARNING_RATE = 1e-2
"""
    notebook.cells.insert(
        -1,
        nbformat.v4.new_code_cell(
            "import json\n"
            "figures = {'before': loss_before, 'after': loss_after, 'equal': equal,\n"
            "           'committed': model.fuyou.committed_step, 'log': trainer.state.log_history}\n"
            "(WORK / 'figures.json').write_text(json.dumps(figures))"
        ),
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    NotebookClient(
        notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()

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


def test_notebook_is_committed_without_outputs() -> None:
    notebook = read_notebook()
    nbformat.validate(notebook)
    assert [cell.id for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")] == []
