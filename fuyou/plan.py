"""The plan of a run: everything decided before the first step, each choice with its reason. Data only; no torch."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from fuyou.config import format_bytes
from fuyou.errors import ConfigError


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
    """Keep the weights in host memory (every step still goes to the drive)."""
    states_in_host: bool
    """Keep the optimizer states in host memory (every step still goes to the drive)."""
    gradient: Literal["host", "spill"]
    """Where the gradient waits when updates are in the forward window."""
    activations: Literal["recompute"] = "recompute"
    num_borrowers: int = 0
    """Other blocks that compute with its weights too (tied embeddings)."""

    def num_weight_reads(self, update_window: str) -> int:
        """How often a steady step reads the weights from the drive."""
        if self.weights_in_host:
            return 0
        # Forward and backward pass, and once for each borrower. The epilogue's backward pass follows its forward pass
        # at once; only an update in the backward window needs its weights again.
        once = self.kind == "epilogue" and (update_window == "forward" or not self.trainable)
        return (1 if once else 2) + self.num_borrowers


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
    durability: str
    update_window: Literal["backward", "forward"]
    """When updates run: while the backward pass goes on, or on the way to each block's next forward pass."""
    prefetch_depth: int
    num_update_workers: int
    num_io_threads: int
    host_memory_bytes: int
    weight_pool_bytes: int
    gradient_pool_bytes: int
    record_pool_bytes: int
    activation_pool_bytes: int
    blocks: tuple[BlockPlan, ...]
    reasons: dict[str, str]
    overhead_bytes: int = 0
    """Part of host_memory_bytes left to Python, torch's temporaries and the allocator."""
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
        if any(b.gradient not in ("host", "spill") for b in self.blocks):
            raise ConfigError('plan: gradient of a block: choose "host" or "spill"')
        if self.update_window not in ("backward", "forward"):
            raise ConfigError(f'plan: update_window={self.update_window!r}: choose "backward" or "forward"')

    @property
    def pool_bytes(self) -> int:
        """All pools together: the most that buffers take."""
        return self.weight_pool_bytes + self.gradient_pool_bytes + self.record_pool_bytes + self.activation_pool_bytes

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, tied ones once."""
        return sum(b.num_parameters for b in self.blocks)

    def describe(self) -> str:
        """The plan for people: one line a choice, with its reason."""
        stored = sum(b.weight_bytes * (2 if b.trainable else 1) + 2 * b.state_bytes for b in self.blocks)
        lines = [
            f"{self.num_parameters / 1e6:.1f}M parameters in {len(self.blocks)} blocks, {self.compute_dtype} on {self.device}",
            f"  store          {format_bytes(stored)} (weights, master, moments; two slots)",
            f"  host memory    {format_bytes(self.host_memory_bytes)}: weights {format_bytes(self.weight_pool_bytes)}, "
            f"gradients {format_bytes(self.gradient_pool_bytes)}, records {format_bytes(self.record_pool_bytes)}, "
            f"activations {format_bytes(self.activation_pool_bytes)}, left to Python and torch "
            f"{format_bytes(self.host_memory_bytes - self.pool_bytes)}",
            f"  kept in host   weights of {sum(b.weights_in_host for b in self.blocks)} and states of "
            f"{sum(b.states_in_host for b in self.blocks)} of {len(self.blocks)} blocks",
            f"  updates        in the {self.update_window} window, {self.num_update_workers} workers",
            f"  durability     {self.durability}",
        ]
        if self.prediction is not None:
            p = self.prediction
            lanes = ", ".join(f"{lane} {seconds:.2f} s" for lane, seconds in p.lane_seconds.items() if seconds)
            lines += [
                f"  a step         about {p.seconds:.2f} s ({lanes}), limited by {p.limiting_lane}",
                f"  drive traffic  {format_bytes(p.bytes_read)} read, {format_bytes(p.bytes_written)} written a step",
            ]
        return "\n".join(lines + [f"  because        {field}: {reason}" for field, reason in self.reasons.items()])

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON; `from_json` gives an equal plan back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The plan that `to_json` described, perhaps edited; ConfigError if a field is unknown or missing."""
        try:
            blocks = tuple(BlockPlan(**block) for block in data["blocks"])
            prediction = data.get("prediction")
            return cls(
                **{
                    **data,
                    "blocks": blocks,
                    "prediction": None if prediction is None else Prediction(**prediction),
                }
            )
        except (TypeError, KeyError) as error:
            raise ConfigError(f"plan: not a plan of this version ({error})") from None
