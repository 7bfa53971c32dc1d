"""`fuyou bench step`: a whole training step beside its own parts, and beside the same model held in memory by torch.

The limit is what no schedule can beat: the longer of the step's transfers alone, and its compute and arithmetic
without transfers (on a CPU both share the cores), with the same layers computed again. What the machine makes of both
at once, when neither waits for the other, stands beside it: where transfers slow compute down (one memory, a drive that
a hypervisor serves with the same cores), no schedule comes to the limit. So does the plan's prediction.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuyou.bench import MIN_REPEATS, SHAPES, choose, existing_directory, llama, median_ratio, spread, take_turns
from fuyou.errors import ConfigError

if TYPE_CHECKING:
    from io_engine import Extent, Transfer

SUMMARY = "a training step beside its transfers alone, its compute alone, both at once, and torch in memory"

NUM_WARM_UP_STEPS = 2
NUM_COPIES = 8
COPY_BYTES = 16 << 20
"""Of a transfer of the limit; more of them under way than a step has."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("directories", nargs="*", help="a directory on each drive to measure (here)")
    parser.add_argument("--size", choices=SHAPES, default="206M", help="parameters of a Llama (206M)")
    parser.add_argument("--layers", type=int, default=None, help="layers of that width (the size's own)")
    parser.add_argument("--rows", type=int, default=2, help="rows of a micro-batch (2)")
    parser.add_argument("--micro-batches", type=int, default=1, help="micro-batches of a step (1)")
    parser.add_argument("--length", type=int, default=40, help="tokens of a row (40)")
    parser.add_argument("--device", default=None, help="cuda or cpu (cuda if there is one)")
    parser.add_argument(
        "--compute-dtype", choices=("bfloat16", "float32"), default=None, help="(bfloat16; float32 on a CPU)"
    )
    parser.add_argument("--host-memory", default="1GiB", metavar="SIZE", help="budget (1GiB)")
    parser.add_argument(
        "--without-torch", action="store_true", help="leave out torch in memory, which needs 16 B a parameter"
    )
    parser.add_argument("--repeats", type=int, default=MIN_REPEATS, help=f"rounds ({MIN_REPEATS})")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; blocks for minutes. Makes stores in a temporary folder of the directory."""
    for name in ("layers", "rows", "length", "micro_batches", "repeats"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    device, dtype = choose(options.device, options.compute_dtype)
    with contextlib.ExitStack() as stack:
        folders = [
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fuyou-bench-", dir=existing_directory(path))))
            for path in options.directories or ["."]
        ]
        return _measure(folders, options, device, dtype)


def _measure(folders: list[Path], options: argparse.Namespace, device: str, dtype: Any) -> dict[str, Any]:
    import torch
    from transformers import LlamaForCausalLM

    import fuyou
    from fuyou.memory import anonymous_bytes
    from fuyou.planner import simulate_plan

    num_rows = options.rows * options.micro_batches
    config = llama(options.size, options.length)
    config.num_hidden_layers = options.layers or config.num_hidden_layers
    hardware = fuyou.measure_hardware(folders, device, dtype)
    ids = torch.randint(0, 256, (num_rows, options.length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids.to(device), "labels": ids.to(device)}

    def streamed(name: str, host_memory: str, like: Any = None, **durability: Any) -> Any:
        offload = fuyou.OffloadConfig(
            store=[folder / name for folder in folders],
            device=device,
            compute_dtype=dtype,
            host_memory=host_memory,
            micro_batch_size=options.rows,
            **durability,
        )
        # With the batch known, as from a recipe: windows of updates are chosen by how long compute takes.
        plan = fuyou.plan_model(
            config, offload=offload, batch_size=num_rows, sequence_length=options.length, max_grad_norm=1e9
        )
        if like is not None:
            plan = dataclasses.replace(plan, blocks=tuple(map(_with_activations_of, plan.blocks, like.blocks)))
        offload = dataclasses.replace(offload, plan=plan)
        model = fuyou.from_config(config, offload=offload, seed=0)
        return model, fuyou.AdamW(model, lr=1e-4, max_grad_norm=1e9)

    losses: dict[str, list[float]] = {"step": [], "in_memory": []}
    allocations = [0]

    def step_of(model: Any, stepper: Any, name: str | None) -> None:
        before = _device_allocations(device)
        if hasattr(model, "fuyou"):
            loss = model(**batch).loss
            loss.backward()
        else:
            loss = torch.zeros(())
            for part in ids.to(device).split(options.rows):
                partial_loss = model(input_ids=part, labels=part).loss / options.micro_batches
                partial_loss.backward()
                loss = loss + partial_loss.detach().cpu()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        stepper.step()
        stepper.zero_grad()
        if device != "cpu":
            torch.cuda.synchronize()
        if name == "step":
            allocations.append(_device_allocations(device) - before)
        if name is not None:
            losses[name].append(float(loss.detach()))

    ours, optimizer = streamed("store", options.host_memory, durability="step")
    with contextlib.ExitStack() as stack:
        stack.enter_context(ours.fuyou)
        peak_bytes = 0
        for _ in range(NUM_WARM_UP_STEPS):  # what is kept in memory is there afterwards
            step_of(ours, optimizer, None)
            peak_bytes = max(peak_bytes, ours.fuyou.step_metrics()["peak_host_bytes"])
        ours.fuyou.flush()
        alone_bytes = anonymous_bytes()
        # All in host memory, and what would be written is dropped: compute and arithmetic as in a step, no transfer.
        whole, whole_optimizer = streamed(
            "memory", "64GiB", like=ours.fuyou.plan, durability="checkpoint", commit_every_steps=1000
        )
        stack.enter_context(whole.fuyou)
        for _ in range(NUM_WARM_UP_STEPS):
            step_of(whole, whole_optimizer, None)
        whole.fuyou.flush()
        copies = _Copies(ours, options.micro_batches)
        # Nothing may be written there any more: what is committed from here on was never on the drive.
        with _no_writes(whole), copies, concurrent.futures.ThreadPoolExecutor(1) as thread:

            def at_once() -> None:
                transfers = thread.submit(copies.run)
                step_of(whole, whole_optimizer, None)
                transfers.result()

            contestants = {
                "step": lambda: step_of(ours, optimizer, "step"),
                "transfers": copies.run,
                "compute": lambda: step_of(whole, whole_optimizer, None),
                "at_once": at_once,
            }
            if not options.without_torch:
                plain: Any = LlamaForCausalLM(config)
                plain.to(device=device, dtype=getattr(torch, dtype)).train()
                plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4, fused=True)
                contestants["in_memory"] = lambda: step_of(plain, plain_optimizer, "in_memory")
            for call in contestants.values():
                call()
            freed = ours.fuyou._executor.freed_memory
            if freed.limit_bytes is not None:
                # It is of the whole process, in which the others' memory is now: the step would give back all that it frees.
                freed.limit_bytes += max(0, anonymous_bytes() - alone_bytes)
            seconds = take_turns(contestants, options.repeats)
            whole.fuyou.abandon()
        metrics = ours.fuyou.step_metrics()
        predicted = ours.fuyou.plan
        moved = copies.bytes_read, copies.bytes_written
    limit = [max(a, b) for a, b in zip(seconds["transfers"], seconds["compute"], strict=True)]
    simulated = simulate_plan(
        predicted, hardware, ids.numel(), options.length, num_micro_batches=options.micro_batches
    ).seconds
    return {
        "ratio": median_ratio(seconds["step"], limit),
        "beside_at_once": median_ratio(seconds["step"], seconds["at_once"]),
        "beside_in_memory": None if options.without_torch else median_ratio(seconds["in_memory"], seconds["step"]),
        "size": options.size,
        "num_parameters": predicted.num_parameters,
        "num_layers": config.num_hidden_layers,
        "num_micro_batches": options.micro_batches,
        "num_tokens": ids.numel(),
        "tokens_per_second": ids.numel() / statistics.median(seconds["step"]),
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "compute_dtype": dtype,
        "host_memory": options.host_memory,
        "bytes_read": moved[0],
        "bytes_written": moved[1],
        "predicted_seconds": simulated,
        "prediction_error": simulated / statistics.median(seconds["step"]) - 1,
        "limiting_lane": metrics["limiting_lane"],
        "peak_gpu_bytes": metrics["peak_gpu_bytes"],
        # Of our steps behind the first, which grows torch's cache; what stands between them may shrink it.
        "device_allocations": sum(allocations[2:]),
        # Before torch's own model and the one without transfers were made.
        "peak_host_bytes": peak_bytes,
        "learns": all(values[-1] < values[0] for values in losses.values() if values),
        "torch": torch.__version__,
    } | {name: {"seconds": statistics.median(values), "spread": spread(values)} for name, values in seconds.items()}


def describe(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [
        f"step / limit        {result['ratio']:.3f}   (the longer of transfers alone and compute alone)",
        f"step / both at once  {result['beside_at_once']:.3f}   (no waiting for each other: what this machine overlaps)",
    ]
    if result["beside_in_memory"] is not None:
        lines.append(f"torch in memory / step  {result['beside_in_memory']:.3f}")
    lines += [
        f"{result['size']} parameters, {result['num_tokens']} tokens, {result['compute_dtype']} on {result['device']}, "
        f"{result['tokens_per_second']:.0f} tokens/s, limited by {result['limiting_lane']}",
        f"predicted {result['predicted_seconds']:.3f} s ({100 * result['prediction_error']:+.0f} %)",
    ]
    for name, text in (
        ("step", "step"),
        ("transfers", "transfers alone"),
        ("compute", "compute and Adam alone"),
        ("at_once", "both at once"),
        ("in_memory", "torch in memory"),
    ):
        if name in result:
            lines.append(f"{text:<24}{result[name]['seconds']:.3f} s  +-{100 * result[name]['spread']:.0f} %")
    return "\n".join(lines)


def _with_activations_of(block: Any, other: Any) -> Any:
    """The block with the other plan's choice for activations, which then need no transfer.

    Else the step without transfers, with all memory, would compute less than the step beside which it stands.
    """
    places = other.activations
    if isinstance(places, str):
        return dataclasses.replace(block, activations="host" if places == "ssd" else places)
    return dataclasses.replace(block, activations={n: "host" if p == "ssd" else p for n, p in places.items()})


def _device_allocations(device: str) -> int:
    """Calls that took memory from the device so far."""
    import torch

    return 0 if device == "cpu" else int(torch.cuda.memory_stats(device)["num_device_alloc"])


class _NoWrites:
    """An engine whose writes are done at once, and leave the file as it was."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def write(self, extent: Extent, array: Any) -> Transfer:
        """Done."""
        from io_engine import Transfer

        transfer = Transfer("write", extent, array, 0.0)
        transfer.mark_done(None, 0.0)
        return transfer

    def sync(self, _path: str) -> None:
        """Nothing was written."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@contextlib.contextmanager
def _no_writes(model: Any) -> Iterator[None]:
    """Inside, a model's steps move nothing to the drive."""
    tracing = model.fuyou._engine
    engine, tracing._engine = tracing._engine, _NoWrites(tracing._engine)
    try:
        yield
    finally:
        tracing._engine = engine


class _Copies:
    """The transfers of one of a model's steps, between buffers and the store's own extents, with no work between.

    Writes go to the slots that the next step writes anyway.
    """

    def __init__(self, model: Any, num_micro_batches: int) -> None:
        runtime = model.fuyou
        self._num_micro_batches = num_micro_batches
        self._engine, self._store, self._runtime = runtime._engine, runtime.store, runtime
        self.bytes_read = self.bytes_written = 0

    def __enter__(self) -> _Copies:
        from io_engine import BufferPool
        from io_engine.buffers import size_class_bytes

        self._pool = BufferPool(NUM_COPIES * size_class_bytes(COPY_BYTES), name="copies")
        self._buffers = [self._pool.acquire(COPY_BYTES) for _ in range(NUM_COPIES)]
        return self

    def __exit__(self, *_: object) -> None:
        for buffer in self._buffers:
            buffer.release()
        self._pool.close()

    def run(self) -> None:
        """What a forward pass moves, then a backward pass; blocks until all is done, sync included."""
        self._runtime.flush()
        self.bytes_read = self.bytes_written = 0
        paths: set[str] = set()
        for reads, writes in self._tasks():
            mixed: list[tuple[str, Extent]] = []
            ratio = len(writes) / max(1, len(reads))
            for number, extent in enumerate(reads):
                mixed.append(("read", extent))
                mixed += [("write", e) for e in writes[int(number * ratio) : int((number + 1) * ratio)]]
            mixed += [("write", e) for e in writes[int(len(reads) * ratio) :]]
            self._move(mixed)
            self.bytes_read += sum(e.num_bytes for e in reads)
            self.bytes_written += sum(e.num_bytes for e in writes)
            paths |= {segment.path for extent in writes for segment in extent.segments}
        for path in paths:
            self._engine.sync(path)

    def _tasks(self) -> tuple[tuple[list[Extent], list[Extent]], ...]:
        """Reads and writes of the two passes of a step with this plan that is not clipped."""
        forward: tuple[list[Extent], list[Extent]] = ([], [])
        backward: tuple[list[Extent], list[Extent]] = ([], [])
        for block in self._runtime.plan.blocks:
            layout = self._runtime.layouts[block.name]
            slot = self._store.active_slot(layout.weight_name)
            weights = _pieces(self._store.extent(layout.weight_name, slot))
            states = _pieces(self._store.extent(layout.state_name, slot))
            if not block.weights_in_host:
                forward[0].extend(weights)
                backward[0].extend(weights * (block.num_weight_reads() - 1))
            update = forward if block.update_window == "forward" else backward
            update[0].extend([] if block.states_in_host else states)
            for name in (layout.weight_name, layout.state_name):
                update[1].extend(_pieces(self._store.extent(name, 1 - slot)))
            if block.gradient == "spill":
                scratch = self._store.scratch(f"{block.name}/gradient", layout.gradient_bytes)
                spilled = _pieces(scratch.sub(0, block.spilled_bytes(self._num_micro_batches)))
                backward[1].extend(spilled)
                forward[0].extend(spilled if update is forward else [])
        return forward, backward

    def _move(self, tasks: list[tuple[str, Extent]]) -> None:
        under_way: list[Any] = []
        for number, (kind, extent) in enumerate(tasks):
            if len(under_way) == len(self._buffers):
                under_way.pop(0).wait()
            array = self._buffers[number % len(self._buffers)].array[: extent.num_bytes]
            under_way.append(getattr(self._engine, kind)(extent, array))
        for transfer in under_way:
            transfer.wait()


def _pieces(extent: Extent) -> list[Extent]:
    return [
        extent.sub(begin, min(COPY_BYTES, extent.num_bytes - begin)) for begin in range(0, extent.num_bytes, COPY_BYTES)
    ]
