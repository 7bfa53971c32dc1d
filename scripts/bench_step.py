"""Seconds of a training step with everything on the drive, beside those of the same model held in GPU memory.

Measured in turns in one process, so that what else the machine does falls on both. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fuyou

# About 206M parameters, tied.
CONFIG = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 14,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def main() -> int:
    """Measure and print; 1 if a loss is not finite or the two models do not learn alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda or cpu (cuda)")
    parser.add_argument("--store", type=Path, help="folder on the drive to measure (a temporary one)")
    parser.add_argument("--repeats", type=int, default=9, help="measured steps of each (9)")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step (8)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row (1024)")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="decoder layers (14)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_step: no CUDA device: use --device cpu")
    with tempfile.TemporaryDirectory(prefix="fuyou-bench-", dir=options.store) as folder:
        result = _measure(Path(folder), options)
    print(json.dumps(result))
    return 0 if result["losses_agree"] else 1


def _measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    config = LlamaConfig(**{**CONFIG, "num_hidden_layers": options.layers})
    offload = fuyou.OffloadConfig(store=folder / "store", device=options.device, micro_batch_size=options.rows)
    ours = fuyou.from_config(config, offload=offload, seed=0)
    with ours.fuyou:
        ours.save_pretrained(str(folder / "start"))
        plain = LlamaForCausalLM.from_pretrained(folder / "start", dtype=torch.bfloat16).to(options.device).train()
        our_optimizer = fuyou.AdamW(ours, lr=1e-4, max_grad_norm=1.0)
        # Adam in bfloat16 right on the weights: less arithmetic and memory than ours, so a limit for ours.
        plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, config.vocab_size, (options.rows, options.length), generator=generator)
        batch = {"input_ids": ids.to(options.device), "labels": ids.to(options.device)}

        def our_step() -> float:
            loss = ours(**batch).loss
            loss.backward()
            our_optimizer.step()
            our_optimizer.zero_grad()
            return float(loss.detach())

        def plain_step() -> float:
            loss = plain(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            plain_optimizer.step()
            plain_optimizer.zero_grad()
            return float(loss.detach())

        steps: dict[str, Callable[[], float]] = {"fuyou": our_step, "in_memory": plain_step}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        losses: dict[str, list[float]] = {name: [] for name in steps}
        for repeat in range(options.repeats + 2):
            for name, step in steps.items():
                begin = time.perf_counter()
                losses[name].append(step())
                if options.device == "cuda":
                    torch.cuda.synchronize()
                # The first two warm up allocators, kernels and the drive.
                if repeat >= 2:
                    seconds[name].append(time.perf_counter() - begin)
        ours.fuyou.flush()
        metrics = ours.fuyou.step_metrics()
        num_parameters = sum(p.numel() for p in ours.parameters())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "benchmark": "step",
        "ratio": medians["in_memory"] / medians["fuyou"],
        "seconds": medians["fuyou"],
        "in_memory_seconds": medians["in_memory"],
        "seconds_range": [min(seconds["fuyou"]), max(seconds["fuyou"])],
        "in_memory_seconds_range": [min(seconds["in_memory"]), max(seconds["in_memory"])],
        "tokens_per_second": ids.numel() / medians["fuyou"],
        "num_parameters": num_parameters,
        "rows": options.rows,
        "length": options.length,
        "repeats": options.repeats,
        "predicted_seconds": metrics.get("predicted_seconds"),
        "limiting_lane": metrics.get("limiting_lane"),
        "bytes_read": metrics.get("bytes_read"),
        "bytes_written": metrics.get("bytes_written"),
        "peak_gpu_bytes": metrics.get("peak_gpu_bytes"),
        "peak_host_bytes": metrics.get("peak_host_bytes"),
        "losses": [losses["fuyou"][-1], losses["in_memory"][-1]],
        # Different masters and rounding, the same first loss, and both learn the one batch.
        "losses_agree": abs(losses["fuyou"][0] - losses["in_memory"][0]) < 0.05
        and all(values[-1] < values[0] for values in losses.values()),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit that is measured, with a + if files differ from it; None without git."""
    try:
        where = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": True}
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **where).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain"], **where).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


if __name__ == "__main__":
    sys.exit(main())
