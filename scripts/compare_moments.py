"""Loss curves of one fine-tuning with float32, bfloat16 and int8 moments; writes docs/moments.json and docs/moments.svg.

The model and the text are the quick start's (run `scripts/quickstart` once, its work folder is used); the same rows in
the same order, so that nothing but the moments differs. Needs matplotlib for the picture.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from quickstart_data import docstring_pairs
from transformers import AutoTokenizer, logging

import fuyou

NUM_HELD_OUT_PAIRS = 40
MAX_LENGTH = 128
LEARNING_RATE = 5e-5
WARMUP_STEPS = 10
MOMENT_DTYPES = ("float32", "bfloat16", "int8")
Batch = dict[str, torch.Tensor]


def main() -> int:
    """Train once with each type of moments; 1 if one of the two ends more than 1 % above float32's held-out loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("quickstart-run"), help="the quick start's folder")
    parser.add_argument("--store", type=Path, help="folder for the stores (in the work folder)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of one row (200)")
    parser.add_argument("--evaluate", type=int, default=25, help="steps between evaluations (25)")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="where the results go (docs)")
    options = parser.parse_args()
    if not (options.work / "base").is_dir():
        sys.exit(f"compare_moments: no model in {options.work / 'base'}: run scripts/quickstart first")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.work / "base")
    rows = [
        row
        for row in (tokens_of_pair(tokenizer, pair) for pair in docstring_pairs())
        if row["input_ids"].shape[1] <= MAX_LENGTH
    ]
    held_out, train = rows[:NUM_HELD_OUT_PAIRS], rows[NUM_HELD_OUT_PAIRS : NUM_HELD_OUT_PAIRS + options.steps]
    result: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "model": "SmolLM2-135M-Instruct, all weights, float32 compute, max_grad_norm 1.0",
        "steps": options.steps,
        "rows_per_step": 1,
        "learning_rate": LEARNING_RATE,
        "curves": {},
    }
    for moment_dtype in MOMENT_DTYPES:
        store = (options.store or options.work) / f"moments-{moment_dtype}"
        shutil.rmtree(store, ignore_errors=True)
        result["curves"][moment_dtype] = _train(options, store, moment_dtype, train, held_out)
        shutil.rmtree(store)
        (options.out / "moments.json").write_text(json.dumps(result, indent=1) + "\n")
    _draw(result, options.out / "moments.svg")
    final = {name: curve["held_out"][-1][1] for name, curve in result["curves"].items()}
    print(json.dumps(final))
    return int(any(loss > 1.01 * final["float32"] for loss in final.values()))


def tokens_of_pair(tokenizer: Any, pair: Any) -> Batch:
    """A question and its answer in the chat template, a row of one; only the answer's tokens are labels."""
    question = [{"role": "user", "content": pair.question}]
    answer = [{"role": "assistant", "content": pair.answer}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template(question + answer, return_dict=False)
    labels = [-100] * len(prompt) + ids[len(prompt) :]
    return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}


def _train(
    options: argparse.Namespace, store: Path, moment_dtype: Any, train: list[Batch], held_out: list[Batch]
) -> dict[str, Any]:
    offload = fuyou.OffloadConfig(
        store=store, device="cpu", compute_dtype="float32", moment_dtype=moment_dtype, host_memory="3GiB"
    )
    model = fuyou.from_pretrained(options.work / "base", offload=offload, seed=0)
    curve: dict[str, Any] = {"training": [], "held_out": []}
    started_seconds = time.monotonic()
    with model.fuyou:
        optimizer = fuyou.AdamW(model, lr=LEARNING_RATE, weight_decay=0.01, max_grad_norm=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / options.steps)
        )
        for step, batch in enumerate(train):
            if step % options.evaluate == 0:
                curve["held_out"].append((step, evaluate(model, held_out)))
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            curve["training"].append(model.fuyou.step_metrics()["loss"])
        curve["held_out"].append((len(train), evaluate(model, held_out)))
    curve["seconds"] = time.monotonic() - started_seconds
    print(f"{moment_dtype}: held-out loss {curve['held_out']} in {curve['seconds']:.0f} s", flush=True)
    return curve


@torch.no_grad()
def evaluate(model: Any, rows: list[Batch]) -> float:
    """Mean over the answers' tokens, rows padded into one batch: a padded label counts for nothing."""
    model.eval()
    total, num_tokens = 0.0, 0
    for batch in _padded(rows, 20):
        count = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * count
        num_tokens += count
    model.train()
    return total / num_tokens


def _padded(rows: list[Batch], size: int) -> Iterator[Batch]:
    for begin in range(0, len(rows), size):
        part = rows[begin : begin + size]
        length = max(row["input_ids"].shape[1] for row in part)
        yield {
            name: torch.cat(
                [torch.nn.functional.pad(row[name], (0, length - row[name].shape[1]), value=pad) for row in part]
            )
            for name, pad in (("input_ids", 0), ("labels", -100))
        }


def _draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, curve in result["curves"].items():
        left.plot(*zip(*curve["held_out"], strict=True), marker="o", markersize=3, label=name)
        losses = curve["training"]
        smooth = [sum(losses[max(0, i - 19) : i + 1]) / len(losses[max(0, i - 19) : i + 1]) for i in range(len(losses))]
        right.plot(range(1, len(losses) + 1), smooth, label=name)
    left.set(xlabel="step", ylabel="loss", title="held out")
    right.set(xlabel="step", title="training, mean of 20 steps")
    left.legend(title="moments")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
