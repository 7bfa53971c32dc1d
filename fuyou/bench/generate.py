"""`fuyou bench generate`: generation from a streamed model beside a bare loop that reads the same bytes.

Where the drive is the lane that limits, no token can be there before its weights are: the limit is the time that bare
system calls take for what a token step reads, as often as there are token steps. The plan's prediction stands beside it,
for the prompts and for a token step, also where host memory holds all weights and nothing is read: the mean of what is
predicted by this machine's rates before and after, since drives are not as fast all the time.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuyou.bench import MIN_REPEATS, SHAPES, choose, existing_directory, llama, median_ratio, spread, take_turns
from fuyou.bench.io import NUM_THREADS, Task, bare_calls, open_direct
from fuyou.config import counted

if TYPE_CHECKING:
    from fuyou.generation_plan import GenerationPlan
    from io_engine import Extent

SUMMARY = "generation from a streamed model beside a bare loop that reads the same bytes"

REQUEST_BYTES = 32 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("directory", nargs="?", default=".", help="a directory on the drive to measure (here)")
    parser.add_argument("--size", choices=SHAPES, default="567M", help="parameters of a Llama (567M)")
    parser.add_argument("--rows", type=int, default=1, help="texts generated at once (1)")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt (16)")
    parser.add_argument("--new-tokens", type=int, default=4, help="of each text (4)")
    parser.add_argument("--device", default=None, help="cuda or cpu (cuda if there is one)")
    parser.add_argument(
        "--compute-dtype", choices=("bfloat16", "float32"), default=None, help="(bfloat16; float32 on a CPU)"
    )
    parser.add_argument("--host-memory", default="512MiB", metavar="SIZE", help="budget (512MiB)")
    parser.add_argument("--measured", action="store_true", help="rates of this machine that are known, not new ones")
    parser.add_argument("--repeats", type=int, default=MIN_REPEATS, help=f"rounds ({MIN_REPEATS})")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; blocks for minutes. Makes a store in a temporary folder of the directory. PlanError."""
    device, dtype = choose(options.device, options.compute_dtype)
    directory = existing_directory(options.directory)
    with tempfile.TemporaryDirectory(prefix="fuyou-bench-", dir=directory) as folder:
        return _measure(Path(folder), options, device, dtype)


def _measure(folder: Path, options: argparse.Namespace, device: str, dtype: Any) -> dict[str, Any]:
    import torch
    from transformers import StoppingCriteriaList

    import fuyou
    from fuyou.generation import default_offload, plan_generation
    from fuyou.generation_plan import Demand
    from fuyou.inference import find_source, opened

    config = llama(options.size, options.prompt + options.new_tokens)
    config.eos_token_id = None
    if not options.measured:
        fuyou.measure_hardware(folder, device, dtype)
    offload = fuyou.OffloadConfig(store=folder / "store", device=device, compute_dtype=dtype)
    fuyou.from_config(config, offload=offload, seed=0, trainable=()).fuyou.close()
    source = find_source(str(folder / "store"))

    def planned() -> GenerationPlan:
        return plan_generation(
            source,
            Demand(options.rows, options.prompt, options.new_tokens),
            default_offload(source, device=device, host_memory=options.host_memory),
            batch_size=options.rows,
            say=lambda _line: None,
        )

    plan = planned()
    ids = torch.randint(0, 256, (options.rows, options.prompt), generator=torch.Generator().manual_seed(0))
    with (
        opened(source, device=device, host_memory=plan.weights_host_bytes) as model,
        _BareReads(model, options.new_tokens) as reads,
    ):
        runtime = model.fuyou
        runtime.follow_generation_plan(plan)
        moved: list[int] = []
        prefills: list[float] = []
        steps: list[float] = []

        def generate() -> None:
            before, times = runtime.bytes_moved[0], [time.perf_counter()]

            def hear(tokens: Any, _scores: Any, **_kwargs: Any) -> Any:
                times.append(time.perf_counter())
                return torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)

            heard = StoppingCriteriaList([hear])
            model.generate(ids.to(device), max_new_tokens=options.new_tokens, do_sample=False, stopping_criteria=heard)
            moved.append(runtime.bytes_moved[0] - before)
            prefills.append(times[1] - times[0])
            steps.append((times[-1] - times[1]) / max(1, len(times) - 2))

        # Where nothing is read there is no limit of that kind.
        limit = {"limit": reads.run} if reads.num_bytes else {}
        seconds = take_turns({"generate": generate, **limit}, options.repeats)
    plans = [plan]
    if not options.measured:
        fuyou.measure_hardware(folder, device, dtype)
        plans.append(planned())
    # Of a later batch: weights that stay in memory came in during the untimed turn.
    predicted_prefill = statistics.mean(p.predicted_later_prefill_seconds for p in plans)
    predicted_step = statistics.mean(p.predicted_seconds_per_token_step for p in plans)
    predicted = predicted_prefill + (options.new_tokens - 1) * predicted_step
    median = statistics.median(seconds["generate"])
    prefill, step = statistics.median(prefills[1:]), statistics.median(steps[1:])
    return {
        "ratio": median_ratio(seconds["limit"], seconds["generate"]) if limit else None,
        "size": options.size,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "rows": options.rows,
        "prompt_tokens": options.prompt,
        "new_tokens": options.new_tokens,
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "compute_dtype": dtype,
        "host_memory": options.host_memory,
        "tokens_per_second": options.rows * options.new_tokens / median,
        "seconds_per_token_step": step,
        "predicted_seconds_per_token_step": predicted_step,
        "token_step_error": predicted_step / step - 1,
        "prefill_seconds": prefill,
        "predicted_prefill_seconds": predicted_prefill,
        "prefill_error": predicted_prefill / prefill - 1,
        "bytes_read_per_token_step": statistics.median(moved) / options.new_tokens,
        "planned_bytes_per_token_step": plan.read_bytes_per_token_step,
        "predicted_seconds": predicted,
        "prediction_error": predicted / median - 1,
        "limiting_lane": plan.limiting_lane,
        "torch": torch.__version__,
    } | {
        name: {
            "seconds": statistics.median(values),
            "spread": spread(values),
            "bytes_per_second": reads.num_bytes / statistics.median(values),
        }
        for name, values in seconds.items()
    }


def describe(result: dict[str, Any]) -> str:
    """The result for people."""
    step_bytes = result["bytes_read_per_token_step"]
    share = "none: nothing is read" if result["ratio"] is None else f"{result['ratio']:.3f}"
    lines = [
        f"rate / limit        {share}   (a bare loop that reads the same bytes)",
        f"{result['size']} parameters, {counted(result['rows'], 'text')} of "
        f"{result['prompt_tokens']} + {result['new_tokens']} tokens, "
        f"{result['compute_dtype']} on {result['device']}, host_memory {result['host_memory']}",
        f"{result['tokens_per_second']:.3g} tokens/s; a token step reads {step_bytes / 1e6:.0f} MB and takes "
        f"{result['seconds_per_token_step']:.3f} s, limited by {result['limiting_lane']}",
        f"predicted {result['predicted_seconds']:.3f} s ({100 * result['prediction_error']:+.0f} %), a token step "
        f"{result['predicted_seconds_per_token_step']:.3f} s ({100 * result['token_step_error']:+.0f} %), the prompts "
        f"{result['predicted_prefill_seconds']:.3f} s of {result['prefill_seconds']:.3f} "
        f"({100 * result['prefill_error']:+.0f} %)",
    ]
    for name, text in (("generate", "generate"), ("limit", "bare reads")):
        if (row := result.get(name)) is None:
            continue
        lines.append(
            f"{text:<24}{row['seconds']:.3f} s  +-{100 * row['spread']:.0f} %   {row['bytes_per_second'] / 1e9:.2f} GB/s"
        )
    return "\n".join(lines)


class _BareReads:
    """What generating reads from the drive, by threads that do nothing but system calls."""

    def __init__(self, model: Any, num_token_steps: int) -> None:
        from io_engine import BufferPool

        runtime = model.fuyou
        self._requests: list[Extent] = []
        for block in runtime.plan.blocks:
            if not block.weights_in_host:
                self._requests += _requests(runtime.store.extent(runtime.layouts[block.name].weight_name))
        self._requests *= num_token_steps
        self.num_bytes = sum(extent.num_bytes for extent in self._requests)
        self._folders: dict[str, list[Extent]] = {}
        for extent in self._requests:
            self._folders.setdefault(os.path.dirname(extent.path), []).append(extent)
        num_buffers = 2 * NUM_THREADS * max(1, len(self._folders)) if self._requests else 1
        self._pool = BufferPool(num_buffers * REQUEST_BYTES, name="bare reads")

    def __enter__(self) -> _BareReads:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._pool)
            num_buffers = self._pool.budget_bytes // REQUEST_BYTES
            self._arrays = [stack.enter_context(self._pool.acquire(REQUEST_BYTES)).array for _ in range(num_buffers)]
            self._descriptors = {
                path: open_direct(path, stack) for path in sorted({extent.path for extent in self._requests})
            }
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self) -> None:
        """Read everything once; blocks."""
        arrays = iter(self._arrays)
        with ThreadPoolExecutor(len(self._arrays) // 2) as threads:
            calls = []
            for extents in self._folders.values():
                tasks = iter(extents)  # shared by the threads of this drive
                for _ in range(NUM_THREADS):
                    pair = list(itertools.islice(arrays, 2))
                    calls.append(threads.submit(self._read, tasks, pair))
            for call in calls:
                call.result()

    def _read(self, extents: Any, arrays: Sequence[Any]) -> None:
        for extent in extents:
            bare_calls(self._descriptors[extent.path], iter([Task("read", extent)]), arrays)


def _requests(whole: Extent) -> list[Extent]:
    return [
        part.sub(begin, min(REQUEST_BYTES, part.num_bytes - begin))
        for part in whole.segments
        for begin in range(0, part.num_bytes, REQUEST_BYTES)
    ]
