"""The step as tasks on lanes, played through: when each lane would be busy, and how long a steady step would take.

A lane works on one task at a time, in the order in which tasks became ready. How fast it works depends on who else is
busy: reads and writes share the drives, on a CPU compute and Adam share the cores. Between two ends of tasks all speeds
are constant, so the play jumps from end to end; it takes milliseconds. Pure arithmetic: no torch, nothing measured.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from fuyou.costs import BACKWARD_FLOPS, FORWARD_FLOPS, RECOMPUTE_FLOPS, num_update_workers
from fuyou.hardware import ComputeSample, HardwareProfile
from fuyou.html import lanes_picture
from fuyou.plan import BlockPlan

RECORD_PARAMETERS = 2 * 2**20
"""Of one record of states, as in `optim.layout`."""
MOST_PIECES, MOST_PIECES_OF_STEP = 8, 256
"""Into which a block's update is cut at most, and those of all blocks together (2 each at the least), so that large models
cost little more time here than small ones; one block's share of their step is small."""
KEPT = ("keep", "host", "ssd")
"""Policies for the activations of a whole layer under which its matrix products are not computed again."""
RECORDS_AHEAD = 2
"""Records on their way into memory while one is updated, as the optimizer does it."""


class Buffers(NamedTuple):
    """How many of each kind may be under way, beside what stays in memory; 0: as many as are wanted."""

    weights: int = 0
    gradients: int = 0
    records: int = 6
    """Records between the beginning of their read and the end of their write."""


AMPLE = Buffers()
Speeds = Callable[[frozenset[str]], Mapping[str, float]]
"""From the busy lanes to the share of its own full speed at which each works."""


class Task(NamedTuple):
    """Work of `seconds` on one lane at full speed, once all tasks `after` (numbers in their list, each once) have ended."""

    lane: str
    name: str
    seconds: float
    after: tuple[int, ...] = ()


class SimulatedSpan(NamedTuple):
    """When a task was worked on, in seconds from the beginning."""

    lane: str
    name: str
    started_seconds: float
    ended_seconds: float


@dataclasses.dataclass(frozen=True)
class SimulatedStep:
    """A steady step: from the end of one step's backward pass to the end of the next one's."""

    seconds: float
    """The mean of two: in some plans a longer step and a shorter one take turns, since each begins as the other has ended."""
    lane_seconds: dict[str, float]
    """Per lane, the seconds in which it was busy, of the same two."""
    spans: tuple[SimulatedSpan, ...]
    """Of the shorter of the two, in seconds from its beginning."""

    @property
    def limiting_lane(self) -> str:
        """The lane that was busy longest."""
        return max(self.lane_seconds, key=lambda lane: self.lane_seconds[lane])

    def _repr_html_(self) -> str:
        spans: dict[str, list[tuple[float, float, str]]] = {}
        for s in self.spans:
            spans.setdefault(s.lane, []).append((s.started_seconds, s.ended_seconds, s.name))
        return lanes_picture("predicted", self.seconds, spans, self.lane_seconds)


def play(tasks: Sequence[Task], speeds: Speeds) -> list[SimulatedSpan]:
    """Play tasks, listed behind those they wait for; returns a span for each, in the order of the list."""
    started, ended = _play(tasks, speeds)
    return [SimulatedSpan(t.lane, t.name, started[n], ended[n]) for n, t in enumerate(tasks)]


def _play(tasks: Sequence[Task], speeds: Speeds) -> tuple[list[float], list[float]]:
    """When each task begins and when it ends."""
    names = list(dict.fromkeys(task.lane for task in tasks))
    numbers = {name: number for number, name in enumerate(names)}
    lanes = [numbers[task.lane] for task in tasks]
    waiting = [len(task.after) for task in tasks]
    followers: list[list[int]] = [[] for _ in tasks]
    for number, task in enumerate(tasks):
        for before in task.after:
            followers[before].append(number)
    ready: list[list[int]] = [[] for _ in names]
    running: dict[int, int] = {}  # lane -> task
    left = [task.seconds for task in tasks]  # at full speed
    done = [1e-12 * max(1.0, seconds) for seconds in left]  # what is left of a task that has ended, or less
    started, ended = [0.0] * len(tasks), [0.0] * len(tasks)
    known_speeds: dict[int, list[float]] = {}  # the busy lanes as bits -> by lane
    now, num_left, busy = 0.0, len(tasks), 0
    for number, count in enumerate(waiting):
        if count == 0:
            heapq.heappush(ready[lanes[number]], number)
    while num_left:
        for lane, queue in enumerate(ready):
            if queue and lane not in running:
                running[lane] = number = heapq.heappop(queue)
                started[number] = now
                busy |= 1 << lane
        assert running  # a task waits for one behind it in the list
        speed = known_speeds.get(busy)
        if speed is None:
            shares = speeds(frozenset(names[lane] for lane in running))
            speed = known_speeds[busy] = [shares.get(name, 1.0) for name in names]
        passed = min([left[number] / speed[lane] for lane, number in running.items()])
        now += passed
        for lane, number in list(running.items()):
            left[number] -= passed * speed[lane]
            if left[number] > done[number]:
                continue
            del running[lane]
            busy ^= 1 << lane
            ended[number] = now
            num_left -= 1
            for follower in followers[number]:
                waiting[follower] -= 1
                if waiting[follower] == 0:
                    heapq.heappush(ready[lanes[follower]], follower)
    return started, ended


def multiplied_parameters(blocks: Sequence[BlockPlan], sequence_length: int) -> dict[str, int]:
    """Multiplications of one token's forward pass, by block: nothing is multiplied with the embedding, but a tied head is.

    Attention counts half of sequence_length x width twice (scores and values, masked by half), 0 without a length. Of
    experts only those count that a token meets.
    """
    borrowed = sum(b.num_parameters * b.num_borrowers for b in blocks)
    return {
        b.name: 0
        if b.kind == "prologue"
        else b.num_parameters
        - b.num_idle_parameters
        + (borrowed if b.kind == "epilogue" else sequence_length * b.width)
        for b in blocks
    }


def simulate_step(
    blocks: Sequence[BlockPlan],
    hardware: HardwareProfile,
    *,
    num_tokens: int,
    num_micro_batches: int = 1,
    moment_dtype: str = "float32",
    prefetch_depth: int = 2,
    commit_every_steps: int = 1,
    sequence_length: int = 0,
    updates_after_backward: bool = False,
    buffers: Buffers = AMPLE,
    with_spans: bool = True,
) -> SimulatedStep:
    """Simulate training with a plan's blocks until it is steady, and return that step; no step is clipped.

    `num_tokens` are those of all micro-batches together, padding included, since that is computed with too.
    Where not every step is written, each has its share of the writes of one that is. Without a `sequence_length` attention
    scores are left out. With `updates_after_backward` no update of a late window begins before the backward pass has ended
    and no forward pass before all have: how others do it, never our executor. `with_spans`=False leaves the spans empty.
    """
    builder = _StepBuilder(
        blocks,
        hardware,
        num_tokens=num_tokens,
        num_micro_batches=num_micro_batches,
        moment_dtype=moment_dtype,
        prefetch_depth=prefetch_depth,
        commit_every_steps=commit_every_steps,
        sequence_length=sequence_length,
        updates_after_backward=updates_after_backward,
        buffers=buffers,
    )
    ends = [builder.add_step() for _ in range(4)]
    started, ended = _play(builder.tasks, lane_speeds(hardware, builder.layer_size))

    begin, middle, end = (ended[number] for number in ends[1:])
    lanes = dict.fromkeys(("gpu", "h2d", "d2h", "ssd_read", "ssd_write", "cpu"), 0.0)
    for task, task_started, task_ended in zip(builder.tasks, started, ended, strict=True):
        if task_ended > begin and task_started < end:
            lanes[task.lane] += (min(task_ended, end) - max(task_started, begin)) / 2
    seconds = (end - begin) / 2
    if not with_spans:
        return SimulatedStep(seconds, lanes, ())
    begin, end = (begin, middle) if middle - begin < end - middle else (middle, end)
    spans = (
        SimulatedSpan(task.lane, task.name, max(task_started, begin) - begin, min(task_ended, end) - begin)
        for task, task_started, task_ended in zip(builder.tasks, started, ended, strict=True)
        if task_ended > begin and task_started < end and task_ended > task_started
    )
    return SimulatedStep(seconds, lanes, tuple(spans))


def lane_speeds(hardware: HardwareProfile, layer_size: int = 0) -> Speeds:
    """How lanes slow each other on this machine, while layers of so many multiplied parameters are computed.

    Reads and writes at once get the measured mixed rate, each in proportion to its own. Whatever else is busy at once
    has the share of its speed that was measured for that; without a measurement, on a CPU, compute wants all cores and
    updates their workers, and both get their share of what there is.
    """
    drive = min(
        1.0, hardware.mixed_bytes_per_second / (hardware.read_bytes_per_second + hardware.write_bytes_per_second)
    )
    on_cpu = hardware.device == "cpu"
    workers = num_update_workers("cpu", hardware.num_cores)
    cores = hardware.num_cores / (hardware.num_cores + workers)
    small = 1.0 - _share_of_large(_layer_sizes(hardware.compute_samples), layer_size)
    works = {"cpu": "cpu", "ssd_read": "io", "ssd_write": "io"} | ({"gpu": "gpu"} if on_cpu else {})

    def speeds(busy: frozenset[str]) -> dict[str, float]:
        found = dict.fromkeys(busy, 1.0)
        if {"ssd_read", "ssd_write"} <= busy:
            found["ssd_read"] = found["ssd_write"] = drive
        together = "+".join(sorted({works[lane] for lane in busy if lane in works}))
        if together in hardware.speeds_together:
            shares = dict(hardware.speeds_together[together])
            if "gpu_small" in shares and "gpu" in shares:
                shares["gpu"] += small * (shares["gpu_small"] - shares["gpu"])
            return {lane: speed * shares.get(works.get(lane, ""), 1.0) for lane, speed in found.items()}
        if not hardware.speeds_together and on_cpu and {"gpu", "cpu"} <= busy:
            found["gpu"] = found["cpu"] = cores
        return found

    return speeds


def compute_seconds(
    hardware: HardwareProfile,
    multiplied_parameters: int,
    num_tokens: float,
    *,
    what: str,
    activations: str = "recompute",
) -> float:
    """Seconds of a block's pass over one micro-batch of so many tokens: "forward", "backward" of a layer, and "backward
    alone" of what is not computed again.

    A parameter's share of the measured layers' times, between these by the block's size, and between micro-batches by
    their tokens; beyond the measured tokens in proportion to them, beyond the measured sizes as the nearest.
    """
    if not hardware.compute_samples:
        flops = FORWARD_FLOPS if what == "forward" else BACKWARD_FLOPS
        if what == "backward" and activations not in KEPT:
            flops += RECOMPUTE_FLOPS
        return flops * num_tokens * multiplied_parameters / hardware.compute_flops_per_second
    if not multiplied_parameters or not num_tokens:
        return 0.0
    each: list[float] = []
    for layer in _layers(hardware.compute_samples):
        points = sorted((s.num_tokens, _seconds(s, what, activations) / s.multiplied_parameters) for s in layer)
        each.append(_between(points, num_tokens))
    share = _share_of_large(_layer_sizes(hardware.compute_samples), multiplied_parameters)
    return multiplied_parameters * (each[0] + share * (each[-1] - each[0]))


def _seconds(sample: ComputeSample, what: str, activations: str) -> float:
    if what == "backward alone":
        # Computing again takes what computing took.
        return max(0.0, sample.backward_seconds - sample.forward_seconds)
    # "keep" leaves on a CPU what "host" copies to pooled memory.
    place = {"recompute": "", "keep": "host_", "host": "host_", "ssd": "ssd_"}[activations]
    seconds: float = getattr(sample, f"{place}{what}_seconds")
    return seconds


def _layers(samples: Sequence[ComputeSample]) -> list[list[ComputeSample]]:
    """The samples of the small layer and those of the large one, which were measured with as many numbers of tokens."""
    ordered = sorted(samples, key=lambda sample: sample.multiplied_parameters)
    count = len({sample.num_tokens for sample in samples})
    return [layer for layer in (ordered[:count], ordered[count:]) if layer]


def _layer_sizes(samples: Sequence[ComputeSample]) -> list[float]:
    return [sum(s.multiplied_parameters for s in layer) / len(layer) for layer in _layers(samples)]


def _share_of_large(sizes: Sequence[float], size: float) -> float:
    """Where a size lies between the smallest and the largest, by their logarithms: 0 to 1; 1 where there is no telling."""
    if not size or not sizes or sizes[-1] <= sizes[0]:
        return 1.0
    return min(1.0, max(0.0, math.log(size / sizes[0]) / math.log(sizes[-1] / sizes[0])))


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """The broken line through the points at x; the first one's height before it, in proportion to x behind the last."""
    if x <= points[0][0]:
        return points[0][1]
    if x >= points[-1][0]:
        return points[-1][1] * x / points[-1][0]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    raise AssertionError("x lies between the first and the last point")


class _StepBuilder:
    """Lists the tasks of step after step, each waiting for what it needs from those before."""

    def __init__(
        self,
        blocks: Sequence[BlockPlan],
        hardware: HardwareProfile,
        *,
        num_tokens: int,
        num_micro_batches: int,
        moment_dtype: str,
        prefetch_depth: int,
        commit_every_steps: int,
        sequence_length: int,
        updates_after_backward: bool,
        buffers: Buffers,
    ) -> None:
        self._buffers = buffers
        self._weight_ends: list[tuple[int, ...]] = []
        """By read of weights, what ends the use of their buffer."""
        self._gradient_ends: list[tuple[int, ...]] = []
        self._last_spill: int | None = None
        self.tasks: list[Task] = []
        self._blocks, self._hardware = blocks, hardware
        self._tokens, self._micro_batches = num_tokens, max(1, num_micro_batches)
        self._updates_per_second = hardware.update_parameters_per_second.get(
            moment_dtype, hardware.adam_parameters_per_second
        )
        self._depth = prefetch_depth
        self._commit_every_steps = commit_every_steps
        self._all_late = updates_after_backward
        self._computes: list[int] = []
        self._before_backward: list[int | None] = []
        """What the newest backward computation waits for beside its activations."""
        self._computed_reads: list[int] = []
        """Of these, the last of each visit with weights that had been read."""
        self._last_read: int | None = None
        self._written_records: list[int] = []
        self._adams: list[int] = []
        self._commit: int | None = None
        self._uncommitted: list[int] = []
        """Writes since the last commit."""
        self._written: dict[str, int] = {}
        """By block, the write of its latest weights."""
        self._updated: dict[str, int] = {}
        """By block, the end of their arithmetic, which is all that weights kept in host memory wait for."""
        self._gradients: dict[str, int] = {}
        """By block with a late update, what brought its gradient to where it waits."""
        self._saved: dict[str, int] = {}
        """By block, what brought the activations of its forward pass to where they wait."""
        self._multiplied = multiplied_parameters(blocks, sequence_length)
        self.layer_size = max([self._multiplied[b.name] for b in blocks if b.kind == "layer"], default=0)
        self._known_seconds: dict[tuple[int, str, str], float] = {}

    def add_step(self) -> int:
        """One more step; returns the number of its last task in the backward pass."""
        for block in self._blocks:
            in_host = self._read_weights(block)
            uses: tuple[int, ...] = ()
            if block.name in self._gradients:
                in_host = self._update(block, [in_host, self._gradients.pop(block.name)])
                # They are written from where they are computed with.
                uses = (self._written[block.name],)
            frozen = block.weights_on_device and not block.trainable
            weights = in_host if frozen else self._upload_weights(block, in_host)
            self._compute(block, "forward", weights)
            if block.kind == "layer":
                self._save_activations(block)
            if block.kind == "epilogue":  # its backward pass follows at once
                self._compute(block, "backward", weights)
            self._end_visit(block, (self._computes[-1], *uses))
        # Every late update of the last step has been made: it is committed before an early one of this step is.
        if self._uncommitted and self._hardware.commit_seconds:
            seconds = self._hardware.commit_seconds / self._commit_every_steps
            self._commit = self._add("ssd_write", "commit", seconds, self._uncommitted)
        self._uncommitted = []
        for block in reversed([block for block in self._blocks if block.in_backward]):
            is_epilogue = block.kind == "epilogue"
            reads = not is_epilogue and not block.stays_on_device()
            weights = self._upload_weights(block, self._read_weights(block)) if reads else self._computes[-1]
            if not is_epilogue:
                saved = self._saved_activations(block) if block.kind == "layer" else None
                self._compute(block, "backward", weights, saved)
            uses = (self._computes[-1],)
            if block.trainable:
                self._gradient(block, weights)
                if block.update_window == "backward":
                    uses = (self._written[block.name],)
            if reads:
                self._end_visit(block, uses)
            elif is_epilogue and block.trainable and block.update_window == "backward":
                self._end_visit(block, uses, is_still_there=True)
        end = self._computes[-1]
        if self._all_late:
            late = [b for b in reversed(self._blocks) if b.name in self._gradients]
            updates = [self._update(b, [end, self._gradients.pop(b.name)]) for b in late]
            self._computes.append(self._add("gpu", "updates", 0.0, [*updates, *self._written.values()]))
        return end

    def _add(self, lane: str, name: str, seconds: float, after: Iterable[int | None]) -> int:
        known = set(after)
        known.discard(None)
        self.tasks.append(Task(lane, name, seconds, tuple(known)))  # type: ignore[arg-type]  # no None is left
        return len(self.tasks) - 1

    def _ahead_in(self, computed: Sequence[int]) -> int | None:
        """What frees the buffer of what comes in next: the block before the last `depth` ones has been computed."""
        return computed[-1 - self._depth] if len(computed) > self._depth else None

    def _read_weights(self, block: BlockPlan) -> int:
        """Bring the weights to host memory, as far ahead as buffers allow; the last task of that."""
        if block.num_weight_reads() == 0:  # they need neither a read nor a buffer
            return self._add("ssd_read", f"{block.name} weights", 0.0, (self._updated.get(block.name),))
        seconds = block.weight_bytes / self._hardware.read_bytes_per_second
        waits = [self._ahead_in(self._computed_reads), self._written.get(block.name)]
        count = self._buffers.weights
        if count and len(self._weight_ends) >= count:
            waits += self._weight_ends[-count]
        return self._add("ssd_read", f"{block.name} weights", seconds, waits)

    def _upload_weights(self, block: BlockPlan, in_host: int) -> int:
        """Bring them to the device, where there is one; the last task of that."""
        if self._hardware.device == "cpu":
            return in_host
        seconds = self._link_seconds(block.weight_bytes)
        return self._add("h2d", f"{block.name} weights", seconds, (in_host, self._ahead_in(self._computes)))

    def _end_visit(self, block: BlockPlan, uses: tuple[int, ...], *, is_still_there: bool = False) -> None:
        """What was read for the block is in use until all of these have ended.

        `is_still_there`: it is what the visit before this one read.
        """
        if block.num_weight_reads():
            if is_still_there:
                self._weight_ends.pop()
            self._weight_ends.append(uses)
            self._computed_reads.append(self._computes[-1])

    def _link_seconds(self, num_bytes: int) -> float:
        rate = self._hardware.link_bytes_per_second
        return num_bytes / rate if rate else 0.0

    def _compute(self, block: BlockPlan, what: str, weights: int, saved: int | None = None) -> None:
        # Of single operations some are computed again, some wait: nearer to "recompute".
        activations = block.activations if isinstance(block.activations, str) else "recompute"
        kind = what if block.kind == "layer" or what == "forward" else "backward alone"
        multiplied, tokens = self._multiplied[block.name], self._tokens / self._micro_batches
        key = (multiplied, kind, activations)
        each = self._known_seconds.get(key)
        if each is None:  # most blocks are alike
            each = compute_seconds(self._hardware, multiplied, tokens, what=kind, activations=activations)
            self._known_seconds[key] = each
        seconds = self._micro_batches * each
        if block.kind == "prologue" and block.trainable and what == "backward" and tokens:
            rate = self._hardware.gradient_parameters_per_second
            seconds += self._micro_batches * block.num_parameters / rate if rate else 0.0
        waits = [self._computes[-1] if self._computes else None, weights]
        count = self._buffers.gradients
        if what == "backward":
            if block.trainable and count and len(self._gradient_ends) >= count:
                waits += self._gradient_ends[-count]
            self._before_backward = waits
        self._computes.append(self._add("gpu", f"{block.name} {what}", seconds, [*waits, saved]))

    def _save_activations(self, block: BlockPlan) -> None:
        """The layer's input, and what else is not computed again, leave the device."""
        task = self._computes[-1]
        if self._hardware.device != "cpu":
            task = self._add("d2h", f"{block.name} activations", self._link_seconds(self._moved(block)), (task,))
        if block.activations == "ssd":
            seconds = self._tokens * block.activation_bytes_per_token / self._hardware.write_bytes_per_second
            task = self._add("ssd_write", f"{block.name} activations", seconds, (task,))
        self._saved[block.name] = task

    def _saved_activations(self, block: BlockPlan) -> int:
        """Bring them back, as far ahead as weights; the last task of that."""
        task = self._saved.pop(block.name)
        ahead = self._ahead_in(self._computes)
        if block.activations == "ssd":
            seconds = self._tokens * block.activation_bytes_per_token / self._hardware.read_bytes_per_second
            task = self._add("ssd_read", f"{block.name} activations", seconds, (task, ahead))
        if self._hardware.device != "cpu":
            seconds = self._link_seconds(self._moved(block))
            task = self._add("h2d", f"{block.name} activations", seconds, (task, ahead))
        return task

    def _moved(self, block: BlockPlan) -> int:
        """Bytes of a layer's activations that cross the link, each way."""
        swapped = block.activation_bytes_per_token if block.activations in ("host", "ssd") else 0
        return self._tokens * (block.input_bytes_per_token + swapped)

    def _gradient_bytes(self, block: BlockPlan) -> int:
        """Of a gradient that leaves the device, or is spilled: schemes that update behind the backward pass sum in float32."""
        return block.gradient_bytes if self._all_late else block.spilled_bytes(self._micro_batches)

    def _gradient(self, block: BlockPlan, weights: int) -> None:
        """The gradient leaves the device; an early update begins, or it waits for a late one."""
        gradient = self._computes[-1]
        if self._hardware.device != "cpu":
            gradient = self._add(
                "d2h", f"{block.name} gradient", self._link_seconds(self._gradient_bytes(block)), (gradient,)
            )
        # Gradients are taken in one after the other, each until it is spilled.
        waits = [gradient] if self._last_spill is None else [gradient, self._last_spill]
        spilled = gradient
        if block.gradient == "spill":
            seconds = self._gradient_bytes(block) / self._hardware.write_bytes_per_second
            spilled = self._last_spill = self._add("ssd_write", f"{block.name} gradient", seconds, waits)
        if block.update_window == "backward":
            self._update(block, [weights, *waits], ahead=self._before_backward)
            if block.gradient != "host":
                self._gradient_ends.append((spilled, self._updated[block.name]))
        else:
            self._gradients[block.name] = spilled
            if block.gradient == "spill":
                self._gradient_ends.append((spilled,))

    def _update(self, block: BlockPlan, after: Sequence[int], ahead: Sequence[int | None] | None = None) -> int:
        """States in, Adam, states and weights out, record by record; returns what makes the weights new.

        With `ahead` the first records are read behind that.
        """
        hardware = self._hardware
        read_bytes = 0 if block.states_in_host else block.state_bytes
        if block.gradient == "spill" and block.update_window == "forward":
            read_bytes += self._gradient_bytes(block)
        most = min(MOST_PIECES, max(2, MOST_PIECES_OF_STEP // len(self._blocks)))
        num_records = -(-block.num_parameters // RECORD_PARAMETERS)
        pieces = min(most, num_records)
        pieces_ahead = 0 if ahead is None else RECORDS_AHEAD * pieces // num_records
        read_seconds = read_bytes / pieces / hardware.read_bytes_per_second
        adam_seconds = block.num_parameters / pieces / self._updates_per_second
        written_bytes = (block.weight_bytes + block.state_bytes) / self._commit_every_steps
        write_seconds = written_bytes / pieces / hardware.write_bytes_per_second
        adam = written = 0
        for piece in range(pieces):
            # Records are read in their order and when it is the block's turn, a few ahead of the arithmetic.
            begin = ahead if ahead is not None and piece < pieces_ahead else after
            waits = (self._last_read, self._written_before(), self._updated_before(), self._commit, *begin)
            read = self._add("ssd_read", f"{block.name} states", read_seconds, waits)
            self._last_read = read
            adam = self._add("cpu", f"{block.name} update", adam_seconds, (read, *after))
            written = self._add("ssd_write", f"{block.name} states", write_seconds, (adam,))
            self._adams.append(adam)
            self._written_records.append(written)
            self._uncommitted.append(written)
        self._written[block.name], self._updated[block.name] = written, adam
        return adam

    def _written_before(self) -> int | None:
        """The write that frees the buffer of the record that is read next."""
        count = self._buffers.records
        return self._written_records[-count] if len(self._written_records) >= count else None

    def _updated_before(self) -> int | None:
        """The update behind which the next record's read is asked for."""
        return self._adams[-RECORDS_AHEAD] if len(self._adams) >= RECORDS_AHEAD else None
