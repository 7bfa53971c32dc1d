"""Measuring this machine: the parts of a step alone and beside each other, in the form in which a step runs them.

Rates of single kernels do not tell how long a step takes: products of few rows are slower than large ones, an update is
more than Adam's arithmetic, and compute, updates and transfers take cores and memory from each other. So what is timed
here are a decoder layer, an update with its norm and checksums, transfers, and all of these side by side.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import functools
import itertools
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fuyou.costs import num_update_workers
from fuyou.counters import Counters
from fuyou.hardware import (
    ComputeSample,
    Directories,
    HardwareProfile,
    available_host_bytes,
    drives_of,
    keep_profile,
    num_cores,
    versions_of,
)
from fuyou.memory import bound_process_memory
from fuyou.plan import Activations
from io_engine import BufferPool, DirectoryProbe, Extent, PosixEngine, piece_digest, probe_directory
from optim import ShardLayout
from optim.kernels import MOMENT_DTYPES, AdamWScalars, warm_up
from optim.norm import TILE_ELEMENTS, tile_sums
from optim.states import ParameterUpdate, update_part

VOCABULARY = 64
if TYPE_CHECKING:
    from fuyou.runtime import Runtime

LEAST_FREE_BYTES = 4 * 2**30
"""Of host memory, for the larger layer to be timed."""
CACHE_BYTES = 64 * 2**20
"""Written between two repeats: in a step a layer's weights have come from the drive, and are in no cache."""
CHUNK_ELEMENTS, NUM_CHUNKS = 2**21, 4
"""Of the updates: the optimizer's records, several in turn so that none is in cache."""
UPDATE_TILE_ELEMENTS = 256 * 1024
REQUEST_BYTES, NUM_REQUESTS = 16 * 2**20, 4


@dataclasses.dataclass(frozen=True)
class _Effort:
    """How much is measured, for how long."""

    widths: tuple[tuple[int, int], ...]
    """Of the layers that are timed, with their numbers of heads: a small one and one beyond every cache."""
    tokens: tuple[int, ...]
    """Of the micro-batches that they are timed with."""
    rounds: int = 3
    """In which everything has its turn: machines, above all virtual ones, are faster and slower by turns of seconds."""
    seconds: float = 0.15
    """Of a round, for each of these; at least once however slow the machine is."""
    together_seconds: float = 0.25
    """Of a round, for which works are repeated side by side."""
    file_bytes: int = 256 * 2**20
    drive_seconds: float = 0.5
    """Of reading, of writing and of both, at both ends: a tenth of a second of one drive said 1.7 to 2.65 GB/s."""
    retry_until_seconds: float = 0.0
    """Of time.perf_counter: until then what was disturbed is measured again, and layers have another round."""


EFFORTS = {
    "cpu": _Effort(((512, 8), (1536, 16)), (16, 64, 256)),
    "cuda": _Effort(((1024, 16), (4096, 32)), (256, 2048, 8192)),
    "quick": _Effort(((64, 4), (128, 4)), (8, 32), 1, 0.01, 0.02, 64 * 2**20, 0.0),
}
"""By kind of device; "quick" is for tests, whose plans need figures but not good ones."""


def _effort(device: str) -> _Effort:
    """FUYOU_QUICK_MEASUREMENT=1 asks for figures in a second or two, which are worth no more than that."""
    if os.environ.get("FUYOU_QUICK_MEASUREMENT") == "1":
        return EFFORTS["quick"]
    return EFFORTS["cpu" if device == "cpu" else "cuda"]


MOST_OTHERS, MOST_RETRYING_SECONDS = 0.1, 35.0
"""Share of the cores that other processes may have taken during a measurement, and how long into it all any is repeated."""
_Result = TypeVar("_Result")


def undisturbed(effort: _Effort, measure: Callable[[], _Result]) -> _Result:
    """What a measurement finds while other processes are quiet, or in the quietest of several attempts.

    Products are made by all cores at once and wait for the slowest: one busy process makes small ones many times slower,
    which is no property of this machine.
    """
    attempts: list[tuple[float, _Result]] = []
    while True:
        before = Counters.now()
        found = measure()
        share = before.others_share(Counters.now(), num_cores())
        attempts.append((share, found))
        if share <= MOST_OTHERS or time.perf_counter() > effort.retry_until_seconds:
            return min(attempts, key=lambda attempt: attempt[0])[1]


def measure_hardware(directories: Directories, device: str, compute_dtype: str = "bfloat16") -> HardwareProfile:
    """Measure compute, updates and the drives under `directories` (or their nearest existing parents), alone and together.

    Blocks for up to a minute; takes half a GiB of memory and of each drive meanwhile (2 GiB for a GPU). Several drives work
    side by side, so that their rates add up; directories of one file system count once. The result is kept for
    `cached_hardware`. OSError for a directory that cannot be written.
    """
    # As when a model is opened: what large temporaries cost then depends on it.
    bound_process_memory()
    paths = drives_of(directories)
    effort = _effort(device)
    if effort is not EFFORTS["quick"]:
        effort = dataclasses.replace(effort, retry_until_seconds=time.perf_counter() + MOST_RETRYING_SECONDS)
    num_workers = num_update_workers(device, num_cores())
    on_cpu = device == "cpu"
    drives = _probe(paths, effort)
    updates = _update_rates(effort, compute_dtype, num_workers)
    profile = HardwareProfile(
        device=device,
        num_cores=num_cores(),
        compute_flops_per_second=_product_rate(device, compute_dtype),
        adam_parameters_per_second=updates["float32"],
        read_bytes_per_second=0.0,
        write_bytes_per_second=0.0,
        mixed_bytes_per_second=0.0,
        host_memory_bytes=available_host_bytes(),
        io_reason="; ".join(dict.fromkeys(drive.reason for drive in drives)),
        link_bytes_per_second=0.0 if on_cpu else _link_rate(device),
        gpu_memory_bytes=None if on_cpu else _free_gpu_bytes(device),
        num_drives=len(paths),
        seconds_per_block=_seconds_per_block(paths[0], device, compute_dtype),
        compute_samples=tuple(_compute_samples(effort, paths[0], device, compute_dtype)),
        update_parameters_per_second=updates,
        gradient_parameters_per_second=_embedding_gradient_rate(effort, device, compute_dtype),
        speeds_together=_speeds_together(effort, paths, device, compute_dtype, num_workers),
        commit_seconds=max(_commit_seconds(path) for path in paths),
        measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=versions_of(device),
    )
    # At both ends: a drive, too, is not as fast all the time.
    probes = [drives, _probe(paths, effort)]
    rates = {
        name: statistics.mean(sum(getattr(drive, name) for drive in probe) for probe in probes)
        for name in ("read_bytes_per_second", "write_bytes_per_second", "mixed_bytes_per_second")
    }
    profile = dataclasses.replace(profile, **rates)
    keep_profile(profile, paths, device, compute_dtype)
    return profile


def _probe(paths: Sequence[Path], effort: _Effort) -> list[DirectoryProbe]:
    return [probe_directory(path, num_bytes=effort.file_bytes, seconds=effort.drive_seconds) for path in paths]


# ---------------------------------------------------------------------------------------------------- compute


class _Layer:
    """A decoder layer of a Llama with random weights in memory, forward, forward again and backward."""

    def __init__(self, width: int, num_heads: int, num_tokens: int, compute_dtype: str) -> None:
        import torch
        from transformers import LlamaForCausalLM

        dtype = getattr(torch, compute_dtype)
        model: Any = LlamaForCausalLM(_llama(width, num_heads, num_tokens))
        model.to(dtype=dtype).train()
        self._layer = model.model.layers[0]
        self._hidden = torch.full((1, num_tokens, width), 0.01, dtype=dtype).requires_grad_()
        positions = torch.arange(num_tokens)[None]
        rotary = model.model.rotary_emb(self._hidden, positions)
        self._arguments = {"position_embeddings": rotary, "position_ids": positions}

    def __call__(self) -> float:
        """Once; returns 1."""
        import torch

        with torch.no_grad():
            self._layer(self._hidden, **self._arguments)
        result = self._layer(self._hidden, **self._arguments)
        result = result[0] if isinstance(result, tuple) else result
        result.backward(torch.full_like(result, 0.01))
        return 1.0


POLICIES: tuple[Activations, ...] = ("recompute", "host", "ssd")


def _compute_samples(effort: _Effort, drive: Path, device: str, compute_dtype: str) -> Iterator[ComputeSample]:
    """Layers in the engine itself: what it does around a layer takes its time too, more than the layer where that is small."""
    with tempfile.TemporaryDirectory(prefix=".fuyou-measuring-", dir=drive) as folder:
        # Where memory is short a step of such layers would not fit either.
        count = len(effort.widths) if available_host_bytes() >= LEAST_FREE_BYTES else 1
        for number, (width, num_heads) in enumerate(effort.widths[:count]):
            with _EngineLayer(Path(folder) / str(number), width, num_heads, device, compute_dtype, effort) as layer:
                times: dict[tuple[int, Activations, str], list[float]] = collections.defaultdict(list)
                for turn, num_tokens, policy in itertools.product(range(effort.rounds), effort.tokens, POLICIES):
                    if turn > 0 and time.perf_counter() > effort.retry_until_seconds:
                        break
                    found = undisturbed(effort, functools.partial(layer.times, num_tokens, policy, effort.seconds))
                    for what, seconds in found.items():
                        times[num_tokens, policy, what] += seconds
                for num_tokens in effort.tokens:
                    multiplied = layer.num_parameters + num_tokens * width
                    middles = (
                        statistics.mean(_middle(times[num_tokens, policy, what]))
                        for policy in POLICIES
                        for what in ("forward", "backward")
                    )
                    yield ComputeSample(multiplied, num_tokens, *middles)


class _EngineLayer:
    """A streamed Llama of one layer with everything in memory; nothing is updated."""

    def __init__(
        self, folder: Path, width: int, num_heads: int, device: str, compute_dtype: str, effort: _Effort
    ) -> None:
        import torch

        import fuyou

        config = _llama(width, num_heads, effort.tokens[-1])
        self._model = fuyou.from_config(
            config,
            offload=fuyou.OffloadConfig(
                store=folder,
                device=device,
                compute_dtype=compute_dtype,  # type: ignore[arg-type]
                host_memory="64GiB",  # as much as it takes, which is less
                # Never used: nothing is updated.
                moment_dtype="int8",
                durability="checkpoint",
                micro_batch_size=1,
            ),
        )
        self._runtime: Runtime = self._model.fuyou
        try:
            self._optimizer = fuyou.AdamW(self._model)
        except BaseException:
            self._runtime.abandon()
            raise
        self._evict = torch.ones(CACHE_BYTES // 4) if device == "cpu" else None
        layer = next(b for b in self._runtime.plan.blocks if b.kind == "layer")
        self._name, self.num_parameters = layer.name, layer.num_parameters
        self._warm: set[tuple[int, Activations]] = set()

    def __enter__(self) -> _EngineLayer:
        return self

    def __exit__(self, *_: object) -> None:
        self._runtime.abandon()

    def times(self, num_tokens: int, policy: Activations, least_seconds: float) -> dict[str, list[float]]:
        """Seconds of the layer's "forward" and "backward" spans, each of one of two micro-batches."""
        import torch

        self._runtime.choose_activations({self._name: policy})
        ids = torch.arange(2 * num_tokens).reshape(2, num_tokens) % VOCABULARY
        found: dict[str, list[float]] = {"forward": [], "backward": []}
        until = time.perf_counter() + least_seconds
        while not found["forward"] or time.perf_counter() < until:
            if self._evict is not None:
                self._evict += 1.0
            self._model(input_ids=ids, labels=ids).loss.backward()
            spans = self._runtime.take_spans()
            self._optimizer.zero_grad()
            if (num_tokens, policy) not in self._warm:  # the first pass finds out what there is to keep
                self._warm.add((num_tokens, policy))
                until = time.perf_counter() + least_seconds
                continue
            for what, seconds in found.items():
                seconds += [
                    s.ended_seconds - s.started_seconds
                    for s in spans
                    if s.lane == "gpu" and s.name == f"layer 0 {what}"
                ]
        return found


def _middle(values: Sequence[float]) -> list[float]:
    """Without the smallest and the largest quarter: the first micro-batch differs from the second."""
    ordered = sorted(values)
    return ordered[len(ordered) // 4 : max(1, -(-3 * len(ordered) // 4))]


def _llama(width: int, num_heads: int, most_tokens: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=1,
        num_attention_heads=num_heads,
        max_position_embeddings=most_tokens,
        tie_word_embeddings=False,
    )


def _embedding_gradient_rate(effort: _Effort, device: str, compute_dtype: str) -> float:
    """Parameters per second of an embedding's gradient, which is as large as the embedding however few tokens there are."""
    import torch

    table = torch.nn.Embedding(2**14, 512, device=device, dtype=getattr(torch, compute_dtype))
    total = torch.ones(table.weight.shape, dtype=torch.float32, device=device)
    ids = torch.arange(effort.tokens[0], device=device)

    def work() -> float:
        table(ids).sum().backward()
        gradient = table.weight.grad
        assert gradient is not None
        total.add_(gradient)
        table.weight.grad = None
        if device != "cpu":
            torch.cuda.synchronize(device)
        return table.weight.numel()

    work()
    return statistics.median(
        rate for _ in range(effort.rounds) for rate in undisturbed(effort, lambda: _timed(effort, work))
    )


def _seconds_per_block(drive: Path, device: str, compute_dtype: str) -> float:
    """Of token steps of a streamed model whose layers are next to nothing, all in memory: the median, by its blocks."""
    import torch
    from transformers import LlamaConfig

    import fuyou

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=16,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    seconds: list[float] = []
    with tempfile.TemporaryDirectory(prefix=".fuyou-measuring-", dir=drive) as folder:
        options: dict[str, Any] = {"device": device, "compute_dtype": compute_dtype, "host_memory": "128MiB"}
        model = fuyou.from_config(config, offload=fuyou.OffloadConfig(store=folder, **options), seed=0, trainable=())
        with model.fuyou as runtime, torch.no_grad():
            model.eval()
            token, cache = torch.zeros((1, 1), dtype=torch.long, device=device), None
            for _ in range(12):
                started = time.perf_counter()
                cache = model(input_ids=token, past_key_values=cache, use_cache=True).past_key_values
                if device != "cpu":
                    torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - started)
            return statistics.median(seconds) / len(runtime.plan.blocks)


def _product_rate(device: str, compute_dtype: str) -> float:
    """Operations per second: best of five products of (256 x n) and (n x n) matrices."""
    import torch

    n = 1024 if device == "cpu" else 8192
    dtype = torch.bfloat16 if compute_dtype == "bfloat16" else torch.float32
    a = torch.ones((256 if device == "cpu" else n, n), dtype=dtype, device=device)
    b = torch.ones((n, n), dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        if device != "cpu":
            torch.cuda.synchronize()
        started = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2.0 * a.shape[0] * n * n / best


def _free_gpu_bytes(device: str) -> int:
    import torch

    return int(torch.cuda.mem_get_info(torch.device(device))[0])


def _link_rate(device: str) -> float:
    """Bytes per second each way while pinned memory is copied both ways at once: best of five times 256 MiB."""
    import torch

    num_bytes = 256 * 2**20
    hosts = [torch.ones(num_bytes, dtype=torch.uint8).pin_memory() for _ in range(2)]
    devices = [torch.ones(num_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
    into, out_of = torch.cuda.Stream(device), torch.cuda.Stream(device)
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        with torch.cuda.stream(into):
            devices[0].copy_(hosts[0], non_blocking=True)
        with torch.cuda.stream(out_of):
            hosts[1].copy_(devices[1], non_blocking=True)
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return num_bytes / best


# ---------------------------------------------------------------------------------------------------- updates


class _Updates:
    """Updates of records by all workers as the optimizer makes them: the gradient's norm, Adam, checksums of the result."""

    def __init__(self, compute_dtype: str, moment_dtype: str, num_workers: int) -> None:
        layout = ShardLayout.of("measured", {"weight": (CHUNK_ELEMENTS,)}, compute_dtype, CHUNK_ELEMENTS, moment_dtype)
        self._layout, self._num_workers = layout, num_workers
        self._records = [np.zeros(layout.full_record_bytes, np.uint8) for _ in range(NUM_CHUNKS)]
        self._weights = [np.zeros(layout.weight_bytes, np.uint8) for _ in range(NUM_CHUNKS)]
        self._gradients = [np.full(CHUNK_ELEMENTS, 0.1, np.float32) for _ in range(NUM_CHUNKS)]
        scalars = AdamWScalars.at_step(lr=1e-5, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1)
        self._update = ParameterUpdate(scalars, 1)
        self._workers = ThreadPoolExecutor(num_workers)
        self._turn = itertools.cycle(range(NUM_CHUNKS))
        self()

    def __call__(self) -> float:
        """Update one record; returns its parameters."""
        number = next(self._turn)
        record, stored, gradient = self._records[number], self._weights[number], self._gradients[number]
        views = self._layout.views(record, 0)
        weights = stored.view(np.float32 if views.low is None else np.uint16)

        def update(begin: int) -> None:
            end = begin + UPDATE_TILE_ELEMENTS
            update_part(
                weights[begin:end],
                views.part(begin, end),
                gradient[begin:end],
                self._update,
                1.0,
                first_element=begin,
            )

        def norm(begin: int) -> None:
            tile_sums(gradient[begin : begin + 4 * TILE_ELEMENTS])

        self._map(norm, range(0, CHUNK_ELEMENTS, 4 * TILE_ELEMENTS))
        self._map(update, range(0, CHUNK_ELEMENTS, UPDATE_TILE_ELEMENTS))
        self._map(piece_digest, [record, stored])
        return CHUNK_ELEMENTS

    def _map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> None:
        if self._num_workers == 1:
            for item in items:
                function(item)
        else:
            list(self._workers.map(function, items))

    def close(self) -> None:
        self._workers.shutdown()


def _update_rates(effort: _Effort, compute_dtype: str, num_workers: int) -> dict[str, float]:
    """Parameters per second with all workers, by the data type of the moments: medians."""
    rates: dict[str, list[float]] = {moments: [] for moments in MOMENT_DTYPES}
    with contextlib.ExitStack() as stack:
        works = {}
        for moments in MOMENT_DTYPES:
            warm_up(moments)
            works[moments] = stack.enter_context(contextlib.closing(_Updates(compute_dtype, moments, num_workers)))
        for _, (moments, work) in itertools.product(range(effort.rounds), works.items()):
            rates[moments] += undisturbed(effort, functools.partial(_timed, effort, work))
    return {moments: statistics.median(found) for moments, found in rates.items()}


def _timed(effort: _Effort, work: Callable[[], float]) -> list[float]:
    """Units per second of some repeats."""
    rates: list[float] = []
    until = time.perf_counter() + effort.seconds
    while len(rates) < 2 or time.perf_counter() < until:
        started = time.perf_counter()
        units = work()
        rates.append(units / (time.perf_counter() - started))
    return rates


# -------------------------------------------------------------------------------------------------- transfers


class _Transfers:
    """Reads and writes by turns on a file of each drive, a few under way, until closed."""

    def __init__(self, drives: Sequence[Path], file_bytes: int) -> None:
        self._file_bytes = file_bytes
        self._engine = PosixEngine()
        self._pool = BufferPool(len(drives) * NUM_REQUESTS * REQUEST_BYTES, name="measuring")
        self._files: list[Path] = []
        self._under_way: list[Any] = []
        self._turn = 0
        self._buffers = [self._pool.acquire(REQUEST_BYTES) for _ in range(len(drives) * NUM_REQUESTS)]
        try:
            for drive in drives:
                descriptor, name = tempfile.mkstemp(prefix=".fuyou-measuring-", suffix=".bin", dir=drive)
                os.close(descriptor)
                self._files.append(Path(name))
                self._engine.preallocate(name, file_bytes)
        except BaseException:
            self.close()
            raise

    def __call__(self) -> float:
        """Bytes of one more request; waits for the one that has its buffer."""
        if len(self._under_way) == len(self._buffers):
            self._under_way.pop(0).wait()
        file = self._files[self._turn % len(self._files)]
        position = self._turn // len(self._files)
        writes = position % 2 == 1
        # Reads of the first half beside writes of the second, so that none meets another.
        half = self._file_bytes // 2
        offset = position // 2 * REQUEST_BYTES % half + (half if writes else 0)
        extent = Extent(str(file), offset, REQUEST_BYTES)
        array = self._buffers[self._turn % len(self._buffers)].array
        self._under_way.append(self._engine.write(extent, array) if writes else self._engine.read(extent, array))
        self._turn += 1
        return REQUEST_BYTES

    def close(self) -> None:
        for transfer in self._under_way:
            with contextlib.suppress(OSError):
                transfer.wait()
        for buffer in self._buffers:
            buffer.release()
        self._pool.close()
        for file in self._files:
            file.unlink(missing_ok=True)
        self._engine.close()


def _commit_seconds(drive: Path) -> float:
    """What makes a step durable, without the bytes: a small file written, synced and renamed, and its folder synced.

    Behind a file that was written to, as in a step. Median of five.
    """
    seconds = []
    with tempfile.TemporaryDirectory(prefix=".fuyou-measuring-", dir=drive) as folder:
        data = Path(folder) / "data"
        for number in range(5):
            with data.open("wb") as file:
                file.write(bytes(REQUEST_BYTES // 4))
                file.flush()
            started = time.perf_counter()
            for path, content in ((data, None), (Path(folder) / "manifest", b"x" * 4096)):
                with path.open("r+b" if content is None else "wb") as file:
                    if content is not None:
                        file.write(content)
                        file.flush()
                    os.fsync(file.fileno())
            (Path(folder) / "manifest").rename(Path(folder) / f"manifest-{number}")
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


# --------------------------------------------------------------------------------------------------- together


def _speeds_together(
    effort: _Effort, drives: Sequence[Path], device: str, compute_dtype: str, num_workers: int
) -> dict[str, dict[str, float]]:
    """By the works that run side by side ("cpu+gpu+io"), each one's share of its own speed.

    "gpu_small" is that of the small layer's compute, whose many short products lose more. A GPU computes by itself, so
    that only the optimizer and the drive slow each other beside one.
    """
    with contextlib.ExitStack() as stack:
        others: dict[str, Callable[[], float]] = {
            "cpu": stack.enter_context(contextlib.closing(_Updates(compute_dtype, "float32", num_workers))),
            "io": stack.enter_context(contextlib.closing(_Transfers(drives, effort.file_bytes))),
        }
        found: dict[str, dict[str, float]] = {}
        if device != "cpu":
            _shares(effort, others, {}, found)
            return found
        for name, (width, num_heads) in (("gpu_small", effort.widths[0]), ("gpu", effort.widths[-1])):
            compute = _Layer(width, num_heads, effort.tokens[1], compute_dtype)
            compute()
            shares: dict[str, dict[str, float]] = {}
            _shares(effort, others, {"gpu": compute}, shares)
            for names, share in shares.items():
                if name == "gpu_small":
                    found[names] = {name: share["gpu"]} if "gpu" in share else {}
                else:
                    found[names] |= share
        return found


def _shares(
    effort: _Effort,
    others: Mapping[str, Callable[[], float]],
    compute: Mapping[str, Callable[[], float]],
    found: dict[str, dict[str, float]],
) -> None:
    """Add each work's share of its own speed, by the works that run beside it."""
    works = {**others, **compute}
    groups = [names for count in range(1, len(works) + 1) for names in itertools.combinations(sorted(works), count)]
    rates: dict[tuple[tuple[str, ...], str], list[float]] = collections.defaultdict(list)
    for _, names in itertools.product(range(effort.rounds), groups):
        measure = functools.partial(_rates, effort, {name: works[name] for name in names})
        for name, rate in undisturbed(effort, measure).items():
            rates[names, name].append(rate)
    for names in groups[len(works) :]:
        found["+".join(names)] = {name: min(1.0, sum(rates[names, name]) / sum(rates[(name,), name])) for name in names}


def _rates(effort: _Effort, works: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Units per second of each work while all are repeated side by side, each on a thread of its own but for compute."""
    found: dict[str, float] = {}
    begin = threading.Barrier(len(works))

    def repeat(name: str) -> None:
        begin.wait()
        units, started = 0.0, time.perf_counter()
        while (now := time.perf_counter()) < started + effort.together_seconds or not units:
            units += works[name]()
        found[name] = units / (max(now, time.perf_counter()) - started)

    # On the main thread it has the threads that torch has made for it already.
    here = "gpu" if "gpu" in works else next(iter(works))
    with ThreadPoolExecutor(len(works)) as threads:
        others = [threads.submit(repeat, name) for name in works if name != here]
        repeat(here)
        for other in others:
            other.result()
    return found
