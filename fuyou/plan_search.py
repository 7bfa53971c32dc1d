"""The search for what stays in host memory, when updates run and which activations wait, by simulating steps."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from fuyou.plan import BlockPlan
from io_engine.buffers import size_class_bytes

LEAST_GAIN = 0.02
"""A change that shortens the step by less is not made: it would cost memory for nothing sure."""
PRICES = ((1.0, 1.0), (1.0, 4.0), (4.0, 1.0))
"""Of a byte read and of a byte written, tried when memory is given away: drives read and write at different rates, and
updates are in one window only. The first is the traffic itself."""
NUM_ROUNDS = 2
"""Over what can be changed; the second sees what the first has found of the rest."""

NUMS_FIRST = (1, 2, 4)
MOST_POLISHED, MOST_TRIALS = 12, 400
"""Blocks up to which each is tried by itself, and how many plans at most: a second or less."""


def pooled_bytes(num_bytes: int) -> int:
    """What a buffer takes from a pool; 0 for none."""
    return size_class_bytes(num_bytes) if num_bytes else 0


def spread(numbers: Sequence[int], count: int) -> list[int]:
    """`count` of the numbers, evenly spread."""
    return [numbers[(2 * i + 1) * len(numbers) // (2 * count)] for i in range(count)]


def best_count(most: int, seconds: Callable[[int], float], known: int = 0) -> int:
    """The number from 0 to `most` with the shortest time, `known` unless the gain is worth it.

    The time falls while work moves into idle lanes and rises when those are full: a coarse look, then around the best.
    """
    step = max(1, most // 6)
    found = {number: seconds(number) for number in sorted({known, *range(0, most + 1, step), most})}
    while step > max(1, most // 32):
        step //= 2
        best = min(found, key=lambda n: (found[n], n))
        for number in (best - step, best + step):
            if 0 <= number <= most and number not in found:
                found[number] = seconds(number)
    best = min(found, key=lambda n: (found[n], n))
    return best if found[best] < found[known] * (1 - LEAST_GAIN) else known


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is chosen; everything else follows."""

    prices: tuple[float, float] = PRICES[0]
    num_first: int = 0
    """Of the first blocks that are trained, all of whose updates are late: early ones come last in the backward pass, and the
    next forward pass would wait for their writes."""
    num_late: int = 0
    """Of the others, spread over the model."""
    num_swapped: int = 0


@dataclasses.dataclass(frozen=True)
class Found:
    """What follows from a candidate: the blocks, and what they take of the free memory, by pool."""

    blocks: list[BlockPlan]
    weight_bytes: int
    gradient_bytes: int
    record_bytes: int
    """Negative where records need less room than before."""
    activation_bytes: int
    free_bytes: int
    """Taken by nothing."""
    counted: str = ""
    """Of the candidate's prices, for people."""


@dataclasses.dataclass(frozen=True)
class _Choice:
    """Something that may be kept in host memory: a change to block number `block` and what it costs and saves."""

    block: int
    change: dict[str, Any]
    memory_bytes: int
    read_bytes: int
    written_bytes: int


class Search:
    """Tries candidates over blocks of which nothing is kept yet (or all that is trained, which then never is late).

    Without `seconds` (a step's time with such blocks) nothing is tried: what saves most traffic per byte is kept, and
    more memory never means more traffic. `surplus_bytes` of the records' pool are free once nothing is spilled,
    `passing_bytes` of the activations' pool beside one input of a layer.
    """

    def __init__(
        self,
        blocks: Sequence[BlockPlan],
        *,
        free_bytes: int,
        surplus_bytes: int,
        passing_bytes: int,
        num_tokens: int,
        num_micro_batches: int,
        may_be_late: bool,
        seconds: Callable[[Sequence[BlockPlan]], float] | None,
    ) -> None:
        self._blocks = list(blocks)
        self._free_bytes, self._surplus_bytes, self._passing_bytes = free_bytes, surplus_bytes, passing_bytes
        self._num_tokens, self._num_micro_batches = num_tokens, max(1, num_micro_batches)
        self._seconds = seconds
        self._trainable = [n for n, b in enumerate(blocks) if b.trainable and b.in_backward] if may_be_late else []
        self._layers = [n for n, b in enumerate(blocks) if b.activation_bytes_per_token and b.in_backward]
        self._known: dict[Candidate, float] = {}
        self._tried: dict[tuple[BlockPlan, ...], float] = {}

    def best(self) -> Found:
        """What to keep and when to update, in the shortest time found; the simplest unless more is worth it."""
        chosen = Candidate()
        if self._seconds is not None:
            for _ in range(NUM_ROUNDS):
                before = chosen
                chosen = self._with_best_prices(chosen)
                chosen = self._with_best(chosen, "num_late", len(self._trainable) - chosen.num_first)
                chosen = self._with_best(chosen, "num_swapped", len(self._layers))
                if chosen == before:
                    break
            chosen = self._with_best_first(chosen)
        found = self.follow(chosen)
        assert found is not None
        if self._seconds is None or len(self._blocks) > MOST_POLISHED:
            return found
        return self._polished(found, self.time(chosen))

    def _polished(self, found: Found, seconds: float) -> Found:
        """Block by block the best choice for it; also from nothing chosen and the other way round, which may end elsewhere.

        Where blocks are few, each is a large part of the step, and rules for all of them alike miss much.
        """
        blocks, seconds = self._descended(found.blocks, seconds)
        others, needed = self._descended(self._blocks, self._trial(self._blocks), direction=-1)
        if self._is_better(needed, seconds):
            blocks = others
        weights, gradients, records, activations = self._taken(blocks)
        free = self._free_beside(blocks)
        return dataclasses.replace(
            found,
            blocks=blocks,
            weight_bytes=weights,
            gradient_bytes=gradients,
            record_bytes=records,
            activation_bytes=activations,
            free_bytes=free,
        )

    def _trial(self, blocks: Sequence[BlockPlan]) -> float:
        """Seconds of a step; infinity for a plan not tried before once there were enough."""
        assert self._seconds is not None
        key = tuple(blocks)
        if key not in self._tried:
            if len(self._tried) >= MOST_TRIALS:
                return math.inf
            self._tried[key] = self._seconds(blocks)
        return self._tried[key]

    def _is_better(self, needed: float, seconds: float) -> bool:
        return needed < seconds * (1 - LEAST_GAIN / 4)

    def _descended(
        self, blocks: list[BlockPlan], seconds: float, direction: Literal[1, -1] = 1
    ) -> tuple[list[BlockPlan], float]:
        """Each block changed beside those of the others until no change is better; and the seconds of a step then."""
        is_better = True
        while is_better:
            is_better = False
            for number in range(len(blocks))[::direction]:
                for tried in list(self._alternatives(self._blocks[number]))[::direction]:
                    if tried == blocks[number]:
                        continue
                    for changed in self._with_room([*blocks[:number], tried, *blocks[number + 1 :]], number):
                        needed = self._trial(changed)
                        if self._is_better(needed, seconds):
                            blocks, seconds, is_better = changed, needed, True
                            break
        return blocks, seconds

    def _with_room(self, blocks: list[BlockPlan], number: int) -> Iterator[list[BlockPlan]]:
        """These blocks, if memory does; else with one thing given up of another block than this one."""
        if self._free_beside(blocks) >= 0:
            yield blocks
            return
        for other, block in enumerate(blocks):
            first = self._blocks[other]
            lesser: list[dict[str, Any]] = []
            if block.weights_in_host and not first.weights_in_host:
                lesser.append({"weights_in_host": False})
            if block.states_in_host and not first.states_in_host:
                lesser.append({"states_in_host": False})
            if block.gradient == "host" and first.gradient == "spill":
                lesser.append({"gradient": "spill"})
            if block.activations == "host":
                lesser += [{"activations": "ssd"}, {"activations": "recompute"}]
            for change in lesser if other != number else ():
                changed = [*blocks[:other], dataclasses.replace(block, **change), *blocks[other + 1 :]]
                if self._free_beside(changed) >= 0:
                    yield changed

    def _alternatives(self, block: BlockPlan) -> Iterator[BlockPlan]:
        """All that could be chosen for a block of which nothing is kept yet."""
        is_trained = block.trainable and not block.states_in_host
        places = (
            ("recompute", "host", "ssd") if block.activation_bytes_per_token and block.in_backward else ("recompute",)
        )
        for weights, states, late, place in itertools.product(
            (True,) if block.weights_in_host else (False, True),
            (False, True) if is_trained else (block.states_in_host,),
            (False, True) if is_trained else (block.update_window == "forward",),
            places,
        ):
            gradients: tuple[Any, ...] = (block.gradient,)
            if is_trained:
                gradients = ("spill", "host") if block.gradient == "spill" else ("host",) if late else ("free",)
            for gradient in gradients:
                yield dataclasses.replace(
                    block,
                    weights_in_host=weights,
                    states_in_host=states,
                    update_window="forward" if late else "backward",
                    activations=place,
                    gradient=gradient,
                )

    def _taken(self, blocks: Sequence[BlockPlan]) -> tuple[int, int, int, int]:
        """Memory beyond what the blocks took at first: weights, gradients, records, activations."""
        weights = gradients = records = 0
        for block, first in zip(blocks, self._blocks, strict=True):
            if block.weights_in_host and not first.weights_in_host:
                weights += pooled_bytes(block.weight_bytes)
            if block.states_in_host and not first.states_in_host:
                records += pooled_bytes(block.state_bytes)
            if block.gradient == "host" and first.gradient != "host":
                gradients += pooled_bytes(block.gradient_bytes)
        if any(b.gradient == "spill" for b in self._blocks) and not any(b.gradient == "spill" for b in blocks):
            records -= self._surplus_bytes
        return weights, gradients, records, self._activation_bytes(blocks)

    def _activation_bytes(self, blocks: Sequence[BlockPlan]) -> int:
        """Of what is not computed again: all that waits in host memory, and one layer's of one micro-batch on its way."""
        waiting = sum(self._num_tokens * b.activation_bytes_per_token for b in blocks if b.activations == "host")
        widest = max((b.activation_bytes_per_token for b in blocks if b.activations in ("host", "ssd")), default=0)
        passing = pooled_bytes(-(-self._num_tokens // self._num_micro_batches) * widest)
        return max(waiting, passing - self._passing_bytes)

    def _free_beside(self, blocks: Sequence[BlockPlan]) -> int:
        return self._free_bytes - sum(self._taken(blocks))

    def _with_best_prices(self, chosen: Candidate) -> Candidate:
        tried = [chosen, *(dataclasses.replace(chosen, prices=prices) for prices in PRICES)]
        best = min(tried, key=self.time)
        return best if self.time(best) < self.time(chosen) * (1 - LEAST_GAIN) else chosen

    def _with_best_first(self, chosen: Candidate) -> Candidate:
        """The first blocks late, too, as many fewer of the others."""
        tried = [chosen]
        for num_first in NUMS_FIRST:
            if num_first <= len(self._trainable):
                num_late = min(chosen.num_late, len(self._trainable) - num_first)
                tried.append(dataclasses.replace(chosen, num_first=num_first, num_late=num_late))
        best = min(tried, key=self.time)
        return best if self.time(best) < self.time(chosen) * (1 - LEAST_GAIN) else chosen

    def _with_best(self, chosen: Candidate, field: str, most: int) -> Candidate:
        def changed(number: int) -> Candidate:
            values: dict[str, Any] = {field: number}
            return dataclasses.replace(chosen, **values)

        return changed(best_count(most, lambda number: self.time(changed(number)), getattr(chosen, field)))

    def time(self, candidate: Candidate) -> float:
        """Seconds of a step; infinity if memory does not do."""
        if candidate not in self._known:
            found = self.follow(candidate)
            assert self._seconds is not None
            self._known[candidate] = math.inf if found is None else self._seconds(found.blocks)
        return self._known[candidate]

    def follow(self, candidate: Candidate) -> Found | None:
        """What a candidate means; None if memory does not do."""
        blocks = list(self._blocks)
        free, gradients = self._free_bytes, 0
        # They are spread over the model: weights are read a few blocks ahead only, so that late updates of neighbours
        # would wait for each other. A gradient that clipping does not keep anyway needs a place until then.
        first = candidate.num_first
        for number in (*self._trainable[:first], *spread(self._trainable[first:], candidate.num_late)):
            change: dict[str, Any] = {"update_window": "forward"}
            if blocks[number].gradient == "free":
                change["gradient"] = "host"
                gradients += pooled_bytes(blocks[number].gradient_bytes)
            blocks[number] = dataclasses.replace(blocks[number], **change)
        free -= gradients
        # Layers of a model save alike per byte, so that their number is what there is to choose. What rounding to
        # whole buffers takes on top goes to scratch files; the executor sees to that.
        waiting = 0
        for number in spread(self._layers, candidate.num_swapped):
            needed = self._num_tokens * blocks[number].activation_bytes_per_token
            place = "host" if waiting + needed <= free else "ssd"
            if place == "host":
                waiting += needed
            blocks[number] = dataclasses.replace(blocks[number], activations=place)
        activations = self._activation_bytes(blocks)
        free -= activations
        if free < 0:
            return None
        found = self._keep(blocks, free, candidate.prices)
        return dataclasses.replace(found, gradient_bytes=found.gradient_bytes + gradients, activation_bytes=activations)

    def _keep(self, blocks: list[BlockPlan], free: int, prices: tuple[float, float]) -> Found:
        """Keep what saves most per byte of memory; a smaller thing behind a larger one that does not fit gets its chance."""

        def worth(choice: _Choice) -> float:
            return -(choice.read_bytes * prices[0] + choice.written_bytes * prices[1]) / choice.memory_bytes

        choices = sorted(_choices(blocks), key=worth)
        num_spilled = sum(b.gradient == "spill" for b in blocks)
        taken = {"weights_in_host": 0, "gradient": 0, "states_in_host": 0}
        while choices:
            choice = next((c for c in choices if c.memory_bytes <= free), None)
            if choice is None:
                break
            choices.remove(choice)
            free -= choice.memory_bytes
            blocks[choice.block] = dataclasses.replace(blocks[choice.block], **choice.change)
            (kind,) = choice.change
            taken[kind] += choice.memory_bytes
            if kind == "gradient":
                num_spilled -= 1
                if not num_spilled:
                    free += self._surplus_bytes
                    taken["states_in_host"] -= self._surplus_bytes
        read, written = prices
        counted = "" if read == written else f" (bytes {'written' if written > read else 'read'} count four times here)"
        return Found(blocks, taken["weights_in_host"], taken["gradient"], taken["states_in_host"], 0, free, counted)


def _choices(blocks: Sequence[BlockPlan]) -> Iterator[_Choice]:
    for number, block in enumerate(blocks):
        if block.gradient == "spill":
            num_bytes = block.gradient_bytes
            read = num_bytes if block.update_window == "forward" else 0
            yield _Choice(number, {"gradient": "host"}, pooled_bytes(num_bytes), read, num_bytes)
    for number, block in enumerate(blocks):
        saved = block.num_weight_reads() * block.weight_bytes
        if saved:
            yield _Choice(number, {"weights_in_host": True}, pooled_bytes(block.weight_bytes), saved, 0)
    for number, block in enumerate(blocks):
        if block.trainable and not block.states_in_host:
            yield _Choice(number, {"states_in_host": True}, pooled_bytes(block.state_bytes), block.state_bytes, 0)
