"""trl's SFTTrainer or DPOTrainer over LoRA adapters, streamed and in memory: the same script, of which three lines differ.

The model and the text are the quick start's (run `scripts/quickstart` once, its work folder is used). For DPO each
question's own answer is chosen and another question's rejected. Prints the losses of both; 1 if they are more than 2e-4
apart (relative), or if the held-out loss has not fallen. Needs trl (extra trl).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from quickstart_data import Pair, docstring_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer, logging
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import fuyou

Row = dict[str, list[dict[str, str]]]

TOLERANCE = 2e-4
MOST_CHARACTERS = 320
"""Of an answer, so that a step takes seconds on a CPU."""


def main() -> int:
    """Train twice and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trainer", choices=TRAINERS)
    parser.add_argument("--work", type=Path, default=Path("quickstart-run"), help="the quick start's folder")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of two rows (20)")
    options = parser.parse_args()
    base = options.work / "base"
    if not base.is_dir():
        sys.exit(f"compare_trl: no model in {base}: run scripts/quickstart first")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    pairs = [pair for pair in docstring_pairs() if len(pair.answer) <= MOST_CHARACTERS]
    histories = {}
    for streamed in (False, True):
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            histories[streamed] = _run(
                options.trainer, str(base), pairs, Path(folder), options.steps, streamed=streamed
            )
    keys = [key for key in ("loss", "eval_loss", "rewards/margins") if _of(histories[False], key)]
    figures = {key: [_of(histories[streamed], key) for streamed in (False, True)] for key in keys}
    apart = max(abs(a - b) / abs(a) for key in ("loss", "eval_loss") for a, b in zip(*figures[key], strict=True))
    in_memory, streamed_ones = figures["eval_loss"]
    print(
        json.dumps(
            {
                "trainer": options.trainer,
                "steps": options.steps,
                "apart": apart,
                **{key: {"in memory": plain, "streamed": ours} for key, (plain, ours) in figures.items()},
            }
        )
    )
    return int(apart > TOLERANCE or not streamed_ones[-1] < streamed_ones[0] or len(in_memory) < 2)


def _of(history: list[dict[str, Any]], key: str) -> list[float]:
    return [entry[key] for entry in history if key in entry]


def _arguments(folder: Path, num_steps: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"),
        "max_steps": num_steps,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": num_steps,
        "eval_on_start": True,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def _completions(pairs: list[Pair]) -> list[Row]:
    """What SFTTrainer takes."""
    return [
        {
            "prompt": [{"role": "user", "content": pair.question}],
            "completion": [{"role": "assistant", "content": pair.answer}],
        }
        for pair in pairs
    ]


def _preferences(pairs: list[Pair]) -> list[Row]:
    """What DPOTrainer takes: each question's answer, and the next question's as the one to reject."""
    return [
        {
            "prompt": [{"role": "user", "content": pair.question}],
            "chosen": [{"role": "assistant", "content": pair.answer}],
            "rejected": [{"role": "assistant", "content": other.answer}],
        }
        for pair, other in zip(pairs, [*pairs[1:], pairs[0]], strict=True)
    ]


TRAINERS: dict[str, tuple[Any, Any, Callable[[list[Pair]], list[Row]]]] = {
    "sft": (SFTTrainer, SFTConfig, _completions),
    "dpo": (DPOTrainer, DPOConfig, _preferences),
}


def _run(
    kind: str, base: str, pairs: list[Pair], folder: Path, num_steps: int, *, streamed: bool
) -> list[dict[str, Any]]:
    """The trainer's log of some steps."""
    trainer_class, config_class, rows_of = TRAINERS[kind]
    rows = rows_of(pairs[: 8 + 2 * num_steps])
    model, optimizer, callbacks = _model(base, folder, streamed=streamed)
    trainer = trainer_class(
        model=model,
        args=config_class(**_arguments(folder, num_steps)),
        train_dataset=Dataset.from_list(rows[8:]),
        eval_dataset=Dataset.from_list(rows[:8]),
        processing_class=AutoTokenizer.from_pretrained(base),
        optimizers=(optimizer, None),
        callbacks=callbacks,
    )
    try:
        trainer.train()
    finally:
        if streamed:
            model.fuyou.close()
    history: list[dict[str, Any]] = trainer.state.log_history
    return history


def _model(base: str, folder: Path, *, streamed: bool) -> tuple[Any, Any, Any]:
    """The model with its adapters, and what the trainer is given: the three lines that differ."""
    torch.manual_seed(0)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    if not streamed:
        return get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora), None, None
    offload = fuyou.OffloadConfig(
        store=folder / "store", base=folder / "base", host_memory="1GiB", compute_dtype="float32"
    )
    model = get_peft_model(fuyou.from_pretrained(base, offload=offload), lora)  # 1
    optimizer = fuyou.AdamW(model, lr=5e-4, weight_decay=0.0, max_grad_norm=1.0)  # 2
    return model, optimizer, [fuyou.FuyouCallback()]  # 3


if __name__ == "__main__":
    sys.exit(main())
