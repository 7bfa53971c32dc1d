"""The same adapters trained by Fuyou and by plain peft and torch in memory: held-out loss of both, and the loaded adapter.

The model and the text are the quick start's (run `scripts/quickstart` once, its work folder is used); the same rows in
the same order. 1 if Fuyou's held-out loss ends more than 2 % away from peft's, or if the adapter that it saved gives other
logits in plain peft than in the store's model. Interrupted, it goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
from compare_moments import MAX_LENGTH, NUM_HELD_OUT_PAIRS, Batch, evaluate, tokens_of_pair
from quickstart_data import docstring_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

import fuyou

LIMIT_SHARE = 0.02
LEARNING_RATE = 2e-4
MAX_GRAD_NORM = 1.0


def main() -> int:
    """Train twice and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("quickstart-run"), help="the quick start's folder")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of two rows (100)")
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    base = options.work / "base"
    if not base.is_dir():
        sys.exit(f"compare_lora: no model in {base}: run scripts/quickstart first")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [tokens_of_pair(tokenizer, pair) for pair in docstring_pairs()]
    rows = [row for row in rows if row["input_ids"].shape[1] <= MAX_LENGTH]
    held_out, train = rows[:NUM_HELD_OUT_PAIRS], rows[NUM_HELD_OUT_PAIRS:]
    steps = [train[2 * number : 2 * number + 2] for number in range(options.steps)]
    dtype = getattr(torch, options.compute_dtype)

    parts = options.work / f"compare-lora-{options.compute_dtype}"
    parts.mkdir(exist_ok=True)
    plain = _adapted(AutoModelForCausalLM.from_pretrained(base, dtype=dtype))
    results = parts / "plain.json"
    if not results.exists():
        before = evaluate(plain, held_out)
        _train_plain(plain, steps, parts / "plain.pt")
        results.write_text(json.dumps({"steps": len(steps), "before": before, "after": evaluate(plain, held_out)}))
    found = json.loads(results.read_text())
    if found["steps"] != len(steps):
        sys.exit(f"compare_lora: {results} is of {found['steps']} steps: remove {parts}")
    before, expected = found["before"], found["after"]
    del plain

    saved = parts / "adapter"
    offload = fuyou.OffloadConfig(
        store=parts / "store", host_memory="1GiB", compute_dtype=options.compute_dtype, micro_batch_size=1
    )
    model = _adapted(fuyou.from_pretrained(base, offload=offload, trainable=()))
    with model.fuyou:
        optimizer = fuyou.AdamW(model, lr=LEARNING_RATE, weight_decay=0.0, max_grad_norm=MAX_GRAD_NORM)
        while optimizer.step_count < len(steps):
            model(**_joined(steps[optimizer.step_count])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            _say("fuyou", optimizer.step_count, len(steps))
        got = evaluate(model, held_out)
        model.save_pretrained(saved)
        model.eval()
        with torch.no_grad():
            ours = model(input_ids=held_out[0]["input_ids"]).logits
            loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), saved)
            theirs = loaded.eval()(input_ids=held_out[0]["input_ids"]).logits
    share = abs(got - expected) / expected
    result = {
        "steps": options.steps,
        "compute_dtype": options.compute_dtype,
        "held_out_before": before,
        "held_out_peft": expected,
        "held_out_fuyou": got,
        "apart": share,
        "adapter_gives_equal_logits": bool(torch.equal(ours, theirs)),
    }
    print(json.dumps(result))
    shutil.rmtree(parts)
    return int(share > LIMIT_SHARE or not result["adapter_gives_equal_logits"])


def _adapted(model: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def _train_plain(model: Any, steps: list[list[Batch]], kept: Path) -> None:
    """As one writes it with peft and torch: rows one by one, their gradients added by their share of the label tokens."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    done = 0
    if kept.exists():
        done, values, states = torch.load(kept)
        optimizer.load_state_dict(states)
        with torch.no_grad():
            for parameter, value in zip(trained, values, strict=True):
                parameter.copy_(value)
    for rows in steps[done:]:
        counts = [int((row["labels"][:, 1:] != -100).sum()) for row in rows]
        for row, count in zip(rows, counts, strict=True):
            (model(**row).loss * (count / sum(counts))).backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        _say("peft", done, len(steps))
        if done % 10 == 0:
            torch.save((done, [p.detach() for p in trained], optimizer.state_dict()), kept)


def _say(whose: str, step: int, num_steps: int) -> None:
    if step % 10 == 0:
        print(f"{whose}: step {step} of {num_steps}", file=sys.stderr, flush=True)


def _joined(rows: list[Batch]) -> Batch:
    length = max(row["input_ids"].shape[1] for row in rows)

    def padded(tensor: torch.Tensor, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, length - tensor.shape[1]), value=value)

    return {
        "input_ids": torch.cat([padded(row["input_ids"], 0) for row in rows]),
        "attention_mask": torch.cat([padded(torch.ones_like(row["input_ids"]), 0) for row in rows]),
        "labels": torch.cat([padded(row["labels"], -100) for row in rows]),
    }


if __name__ == "__main__":
    sys.exit(main())
