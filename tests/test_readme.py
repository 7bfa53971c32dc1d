"""What README.md shows as Python runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import fuyou
from tests.tiny_models import tiny_batches, tiny_model_config

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another model, store and budget; what it takes for granted (batches, rows, Trainer's arguments) is given."""
    monkeypatch.chdir(tmp_path)
    config = tiny_model_config("llama")
    AutoModelForCausalLM.from_config(config).save_pretrained("tiny")
    found = re.search(r"```python\n(import fuyou.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    code = found[1]
    for old, new in {"Qwen/Qwen3-8B": "tiny", "/mnt/nvme/run1": "store", "48GiB": "64MiB"}.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    batches = [step[0] for step in tiny_batches(config, 3, 1, batch_size=2, seed=1)]
    arguments = TrainingArguments(
        output_dir="out-trainer", max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    rows = [{name: value[0] for name, value in batch.items()} for batch in batches]
    given: dict[str, Any] = {"batches": batches, "rows": rows, "arguments": arguments, "Trainer": Trainer}
    exec(compile(code, str(README), "exec"), given)
    assert fuyou.inspect_store("store")["step"] == 3 + 1
    trained, start = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).state_dict() for name in ("out", "tiny")
    )
    assert any(not torch.equal(trained[name], start[name]) for name in start)
