"""The plan of a run: everything decided before the first step, each choice with its reason. Data only; no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

from fuyou.config import counted, format_bytes
from fuyou.errors import ConfigError
from fuyou.html import table

Activations = str | dict[int, str]
"""See `BlockPlan.activations`."""
ACTIVATION_PLACES: Final = ("recompute", "keep", "host", "ssd")


class StepShape(NamedTuple):
    """How much is computed in a step."""

    num_tokens: int = 0
    """Of all micro-batches, padding included."""
    num_micro_batches: int = 0
    sequence_length: int = 0
    """Of the longest rows."""

    def plus(self, other: StepShape) -> StepShape:
        """Both in one step."""
        return StepShape(
            self.num_tokens + other.num_tokens,
            self.num_micro_batches + other.num_micro_batches,
            max(self.sequence_length, other.sequence_length),
        )

    def about(self) -> StepShape:
        """Nearly this one (1 % off at most), of which there are few."""
        step = 1 << max(0, self.num_tokens.bit_length() - 7)
        return self._replace(num_tokens=(self.num_tokens + step // 2) // step * step)


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """What is decided for one block."""

    name: str
    kind: str
    num_parameters: int
    trainable: bool
    weight_bytes: int
    state_bytes: int
    gradient_bytes: int
    weights_in_host: bool
    """Keep the weights in host memory (the drive still gets every step that is committed)."""
    states_in_host: bool
    """Keep the optimizer states in host memory (the drive still gets every step that is committed)."""
    update_window: Literal["backward", "forward"]
    """When its update runs: as soon as its gradient is whole, or on the way to its next forward pass."""
    gradient: Literal["host", "spill", "free"]
    """Where the gradient is kept until the step; "free": nowhere, its memory is free when the early update is through."""
    activations: Activations = "recompute"
    """What becomes of what a layer computes until its backward pass: "recompute" keeps its input alone and computes the
    layer again; "keep" (on the device), "host" (pooled host memory) and "ssd" (scratch files) let the outputs of matrix
    products and attention wait there. Or one of these words by number of operation, "recompute" for those not named;
    `model.fuyou.list_ops` lists the numbers. No choice changes a bit of the result."""
    weights_on_device: bool = False
    """Keep the weights in the GPU's memory while nothing changes them: always, if the block is frozen; else from its forward
    to its backward pass, if its update is late (an early one needs them in host memory then)."""
    num_borrowers: int = 0
    """Other blocks that compute with its weights too (tied embeddings)."""
    width: int = 0
    """Elements of a token between layers; 0: not a layer, or not known."""
    input_bytes_per_token: int = 0
    """Of a layer's input, which is kept whatever else is computed again."""
    activation_bytes_per_token: int = 0
    """What activations="host" lets wait; 0: not known."""
    in_backward: bool = True
    """Whether the backward pass comes to it; it ends at the lowest block in which something is trained."""
    num_idle_parameters: int = 0
    """Of experts that one token does not meet: read and updated, but not computed with."""

    def __post_init__(self) -> None:
        if isinstance(self.activations, Mapping):
            # JSON makes strings of the numbers.
            object.__setattr__(self, "activations", {_op_number(n): place for n, place in self.activations.items()})
            places = list(self.activations.values())
        else:
            places = [self.activations]
        wrong = [place for place in places if place not in ACTIVATION_PLACES]
        if wrong:
            raise ConfigError(
                f'plan: activations={wrong[0]!r} of {self.name}: choose "recompute", "keep", "host" or "ssd", or one of them '
                "for each number of an operation"
            )
        if self.kind != "layer" and any(place != "recompute" for place in places):
            raise ConfigError(
                f'plan: activations={self.activations!r} of {self.name}: only decoder layers have a choice, leave "recompute"'
            )

    def stays_on_device(self) -> bool:
        """Whether its backward pass, and all that borrow its weights, find them on the device."""
        return self.weights_on_device and (not self.trainable or self.update_window == "forward")

    def spilled_bytes(self, num_micro_batches: int | None) -> int:
        """What the gradient takes where it is spilled: one micro-batch's, in bfloat16, has no more bits than that.

        `num_micro_batches` None: not known.
        """
        is_narrow = num_micro_batches == 1 and self.num_borrowers == 0
        return min(self.gradient_bytes, self.weight_bytes) if is_narrow else self.gradient_bytes

    def num_weight_reads(self) -> int:
        """How often a steady step reads the weights from the drive."""
        if self.weights_in_host or (self.stays_on_device() and not self.trainable):
            return 0
        if self.stays_on_device():
            return 1
        # Forward and backward pass, and once for each borrower. The epilogue's backward pass follows its forward pass at
        # once, and an update finds its weights still in memory.
        return (2 if self.in_backward and self.kind != "epilogue" else 1) + self.num_borrowers


def _op_number(text: Any) -> int:
    try:
        if isinstance(text, (int, str)) and int(text) >= 0:
            return int(text)
    except ValueError:
        pass
    raise ConfigError(f"plan: activations name operation {text!r}: operations have numbers from 0")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a steady step is expected to take and to move."""

    seconds: float
    lane_seconds: dict[str, float]
    limiting_lane: str
    bytes_read: int
    bytes_written: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything the executor needs to know; it makes no choices of its own."""

    device: str
    compute_dtype: str
    micro_batch_size: int | None
    durability: Literal["step", "checkpoint"]
    """"checkpoint": only one step in `commit_every_steps` goes to the drive, and what is flushed; everything trained is in
    host memory."""
    prefetch_depth: int
    """How many blocks' weights are read ahead of their turn; those that are in memory anyway are not counted."""
    num_update_workers: int
    num_io_threads: int
    host_memory_bytes: int
    weight_pool_bytes: int
    gradient_pool_bytes: int
    record_pool_bytes: int
    activation_pool_bytes: int
    blocks: tuple[BlockPlan, ...]
    reasons: dict[str, str]
    moment_dtype: str = "float32"
    gpu_memory_bytes: int | None = None
    """Limit of torch's allocator on the GPU; None: none, or no GPU."""
    max_clipped_share: float = 0.25
    """Early updates are made while at most this share of the last steps was clipped, which makes them anew."""
    commit_every_steps: int = 1
    """Steps from commit to commit."""
    overhead_bytes: int = 0
    """Part of host_memory_bytes left to Python, torch's temporaries and the allocator."""
    compute_bytes: int = 0
    """Estimate of what a micro-batch in compute takes, on the device (on a CPU beside host_memory_bytes); 0: not known."""
    prediction: Prediction | None = None

    def __post_init__(self) -> None:
        pools = (
            self.weight_pool_bytes,
            self.gradient_pool_bytes,
            self.record_pool_bytes,
            self.activation_pool_bytes,
            self.overhead_bytes,
        )
        if min(pools) < 0 or self.prefetch_depth < 0 or self.num_update_workers < 1 or self.num_io_threads < 1:
            raise ConfigError("plan: pools and prefetch_depth must be at least 0, numbers of threads at least 1")
        if sum(pools) > self.host_memory_bytes:
            raise ConfigError(
                f"plan: its pools and overhead take {format_bytes(sum(pools))}, more than host_memory_bytes = "
                f"{format_bytes(self.host_memory_bytes)}"
            )
        for b in self.blocks:
            if b.update_window not in ("backward", "forward"):
                raise ConfigError(
                    f'plan: update_window={b.update_window!r} of {b.name}: choose "backward" or "forward"'
                )
            if b.gradient not in ("host", "spill", "free"):
                raise ConfigError(f'plan: gradient={b.gradient!r} of {b.name}: choose "host", "spill" or "free"')
            if b.trainable and b.gradient == "free" and b.update_window == "forward":
                raise ConfigError(
                    f'plan: the gradient of {b.name} is needed in the forward window: choose "host" or "spill", not "free"'
                )
        self._check_durability()
        if not 0.0 <= self.max_clipped_share <= 1.0:
            raise ConfigError(f"plan: max_clipped_share={self.max_clipped_share!r} must be between 0 and 1")

    def _check_durability(self) -> None:
        if self.durability not in ("step", "checkpoint") or self.commit_every_steps < 1:
            raise ConfigError(
                f"plan: durability={self.durability!r}, commit_every_steps={self.commit_every_steps!r}: choose "
                '"step" or "checkpoint", and a whole number above zero'
            )
        if self.durability == "step":
            if self.commit_every_steps != 1:
                raise ConfigError(
                    f'plan: commit_every_steps={self.commit_every_steps}: durability="step" commits every step, set it to 1'
                )
            return
        for b in self.blocks:
            in_memory = b.weights_in_host and b.states_in_host and b.gradient == "host"
            if b.trainable and not (in_memory and b.update_window == "forward"):
                raise ConfigError(
                    f'plan: durability="checkpoint" needs weights_in_host, states_in_host, gradient="host" and '
                    f'update_window="forward" of {b.name}, as of every trained block: the drive has no state of the last '
                    'step to go back to. Set them, or durability="step"'
                )

    @property
    def pool_bytes(self) -> int:
        """All pools together: the most that buffers take."""
        return self.weight_pool_bytes + self.gradient_pool_bytes + self.record_pool_bytes + self.activation_pool_bytes

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, tied ones once."""
        return sum(b.num_parameters for b in self.blocks)

    def describe(self, *, reasons: bool = True) -> str:
        """The plan for people: one line a choice, with its reason if `reasons`."""
        num_trainable = sum(b.trainable for b in self.blocks)
        num_early = sum(b.trainable and b.update_window == "backward" for b in self.blocks)
        stored = sum(b.weight_bytes * (2 if b.trainable else 1) + 2 * b.state_bytes for b in self.blocks)
        num_on_device = sum(b.weights_on_device for b in self.blocks)
        on_device = f", weights of {num_on_device} of {len(self.blocks)} blocks stay there" if num_on_device else ""
        lines = [
            f"{self.num_parameters / 1e6:.1f}M parameters in {len(self.blocks)} blocks, {self.compute_dtype} on {self.device}",
            f"  store          {format_bytes(stored)} (weights, master, moments; two slots)",
            f"  host memory    {format_bytes(self.host_memory_bytes)}: weights {format_bytes(self.weight_pool_bytes)}, "
            f"gradients {format_bytes(self.gradient_pool_bytes)}, records {format_bytes(self.record_pool_bytes)}, "
            f"activations {format_bytes(self.activation_pool_bytes)}, left to Python and torch "
            f"{format_bytes(self.host_memory_bytes - self.pool_bytes)}",
            *(
                []
                if self.gpu_memory_bytes is None
                else [f"  gpu memory     {format_bytes(self.gpu_memory_bytes)}{on_device}"]
            ),
            *(
                [f"  in compute     about {format_bytes(self.compute_bytes)} beside that while a block works"]
                if self.compute_bytes and self.gpu_memory_bytes is None
                else []
            ),
            f"  kept in host   weights of {sum(b.weights_in_host for b in self.blocks)} and states of "
            f"{sum(b.states_in_host for b in self.blocks)} of {len(self.blocks)} blocks",
            f"  updates        of {num_early} blocks in the backward pass, of {num_trainable - num_early} on the way to their next "
            f"forward pass; {counted(self.num_update_workers, 'worker')}",
            f"  durability     {self.durability}"
            + (
                f", a commit every {counted(self.commit_every_steps, 'step')}"
                if self.durability == "checkpoint"
                else ""
            ),
        ]
        if self.prediction is not None:
            p = self.prediction
            lanes = ", ".join(f"{lane} {seconds:.2f} s" for lane, seconds in p.lane_seconds.items() if seconds)
            lines += [
                f"  a step         about {p.seconds:.2f} s ({lanes}), limited by {p.limiting_lane}",
                f"  drive traffic  {format_bytes(p.bytes_read)} read, {format_bytes(p.bytes_written)} written a step",
            ]
        if reasons:
            lines += [f"  because        {field}: {reason}" for field, reason in self.reasons.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The description as a table, for notebooks."""
        first, *lines = self.describe(reasons=False).splitlines()
        rows = [(line[:16].strip(), line[16:].strip()) for line in lines]
        return table([first, ""], [*rows, *((f"why {field}", reason) for field, reason in self.reasons.items())])

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON; `from_json` gives an equal plan back (and leaves out what `fuyou plan --json` reports beside)."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The plan that `to_json` described, perhaps edited; ConfigError if a field is unknown or missing."""
        try:
            blocks = tuple(BlockPlan(**block) for block in data["blocks"])
            prediction = data.get("prediction")
            return cls(
                **{
                    **{name: value for name, value in data.items() if name != "report"},
                    "blocks": blocks,
                    "prediction": None if prediction is None else Prediction(**prediction),
                }
            )
        except (TypeError, KeyError) as error:
            raise ConfigError(f"plan: not a plan of this version ({error})") from None
