"""Shared by the tests of the command line: a tiny recipe, run here or in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import yaml

from fuyou.cli import main

NUM_STEPS = 5


def write_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe of a tiny Llama on bytes; `changes` are dotted paths with __ for the dot."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        lines = ({"prompt": f"{number} + 1 = ", "completion": f"{number + 1}!"} for number in range(12))
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values: dict[str, Any] = {
        "model": {"config": {**TINY_LLAMA, "attention_dropout": 0.1}},
        "data": {"file": str(rows), "tokenizer": "bytes", "max_length": 16, "eval_fraction": 0.25},
        "offload": {
            "store": str(folder / "store"),
            "device": "cpu",
            "host_memory": "64MiB",
            "compute_dtype": "float32",
        },
        "optimizer": {"learning_rate": 1e-3},
        "training": {
            "max_steps": NUM_STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "warmup_steps": 2,
        },
        "output": {"dir": str(folder / "out")},
    }
    for path, value in changes.items():
        section, _, key = path.partition("__")
        values.setdefault(section, {})[key] = value
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    return recipe


TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of the run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


def same_numbers(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What must be equal, bit for bit, in two runs of one recipe."""
    return [
        (line["step"], line["loss"], line["grad_norm"], line["learning_rate"], line["num_tokens"]) for line in lines
    ]


def train(recipe: Path, *options: str) -> int:
    """`fuyou train` in this process, without output."""
    return main(["train", str(recipe), "--quiet", *options])


class TrainingProcess:
    """`fuyou train --json` in a process of its own, which can be stopped after a step."""

    def __init__(self, recipe: Path, *options: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fuyou", "train", str(recipe), "--json", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Both: torch's own number of threads is MKL's where that is set.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        # A process that hangs must not hang the tests.
        self._guard = threading.Timer(120.0, self._process.kill)
        self._guard.start()

    def wait_for_step(self, step: int) -> None:
        """Reads output until that step is reported."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = json.loads(line)
            if event["event"] == "step" and event["step"] >= step:
                return
        raise AssertionError(f"ended before step {step}: {self._process.communicate()[1]}")

    def end_by(self, number: signal.Signals) -> tuple[int, str]:
        """Sends a signal and returns the exit code and what was written to stderr."""
        self._process.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        """The exit code and what was written to stderr."""
        _, errors = self._process.communicate()
        self._guard.cancel()
        return self._process.returncode, errors

    def __enter__(self) -> TrainingProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._guard.cancel()
        self._process.kill()
        self._process.communicate()
