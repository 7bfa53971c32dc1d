"""The operations of one block and what a plan may say about their outputs. Data only; no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final

from fuyou.errors import ConfigError
from fuyou.plan import Activations

RECOMPUTE: Final = "recompute"
_WORTH_KEEPING: Final = (
    "aten.mm.",
    "aten.addmm.",
    "aten.bmm.",
    "aten.baddbmm.",
    "aten._grouped_mm.",
    "aten._scaled_mm.",
    "aten.convolution.",
    "aten._scaled_dot_product_",
    "aten._flash_attention_forward.",
    "aten._efficient_attention_forward.",
)
"""Products of matrices and attention: the operations whose outputs take much longer to compute than to read back."""


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation of a block's forward pass for one micro-batch."""

    number: int
    """Its place in the order of computation, from 0: what a plan names it by."""
    name: str
    """As torch names it, for example "aten.mm.default"."""
    output_bytes: int
    """Bytes of the memory that its outputs take for this micro-batch."""
    pooled_bytes: int
    """What they take from the pool if they wait in host memory: each is rounded up to a class of sizes."""
    eligible: bool
    """Whether a plan may choose where its outputs wait for the backward pass."""
    reason: str
    """Why it is not eligible, or what is done unless the plan says otherwise."""
    always_kept: bool = False
    """Its outputs wait on the device whenever the block has outputs that wait somewhere."""

    @property
    def is_worth_keeping(self) -> bool:
        """Whether a plan that names no operations means this one."""
        return self.name.startswith(_WORTH_KEEPING)


def all_recomputed(activations: Activations) -> bool:
    """Whether nothing but a block's input waits for its backward pass."""
    places = [activations] if isinstance(activations, str) else activations.values()
    return all(place == RECOMPUTE for place in places)


def place_of(op_number: int, op_name: str, activations: Activations) -> str:
    """What the plan says about an operation: "recompute", "keep", "host" or "ssd"."""
    if isinstance(activations, str):
        return activations if op_name.startswith(_WORTH_KEEPING) else RECOMPUTE
    return activations.get(op_number, RECOMPUTE)


def check_activations(block: str, activations: Activations, ops: Sequence[Op]) -> None:
    """ConfigError if the plan names an operation that the block does not have, or one that is not eligible."""
    for number, place in activations.items() if isinstance(activations, Mapping) else ():
        if place == RECOMPUTE:
            continue
        if not 0 <= number < len(ops):
            what = f"the block has {len(ops)}, from 0"
        elif not ops[number].eligible:
            what = f"the outputs of {ops[number].name} have no place to choose: {ops[number].reason}"
        else:
            continue
        raise ConfigError(
            f"plan: activations of {block} say {place!r} for operation {number}, but {what}. model.fuyou.list_ops(**batch) "
            "lists the operations of each block"
        )


def planned_bytes(ops: Sequence[Op], activations: Activations) -> dict[str, int]:
    """Bytes that wait in each place for one micro-batch between its forward and backward pass.

    Keys "keep", "host" (what the pool gives for them) and "ssd". The block's input, which always waits in host memory, is
    not counted.
    """
    planned = {"keep": 0, "host": 0, "ssd": 0}
    for op in ops if not all_recomputed(activations) else ():
        place = "keep" if op.always_kept else place_of(op.number, op.name, activations)
        if place != RECOMPUTE and (op.always_kept or op.eligible):
            planned[place] += op.pooled_bytes if place == "host" else op.output_bytes
    return planned
