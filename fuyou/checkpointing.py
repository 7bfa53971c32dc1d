"""Checkpoints of a store that no run has open: made, restored and removed from the command line."""

from __future__ import annotations

import re

from fuyou.store_contents import Directories, opened_store
from io_engine import Checkpoint, Store, StoreError

OF_A_STEP = re.compile(r"step-\d+")
"""Names that a run gives; `prune_checkpoints` removes no others."""


def step_name(step: int) -> str:
    """The name of a checkpoint that nobody named."""
    return f"step-{step}"


def keep_checkpoint(store: Directories, name: str | None = None) -> Checkpoint:
    """Keep what is committed as a checkpoint (None: named by its step); blocks until it is on the drive.

    StoreError if there is one of that name, if nothing was committed yet, or if the store is in use; StoreCorruptError
    if its data are damaged; OSError, with nothing written, if the space is short; ValueError for an unusable name.
    """
    with opened_store(store) as (opened, _):
        if not opened.state.get("filled"):
            raise StoreError(f"the store in {opened.directories[0]} was never filled: there is nothing to keep")
        name = step_name(opened.step) if name is None else name
        if any(checkpoint.name == name for checkpoint in opened.checkpoints):
            raise StoreError(f"there is a checkpoint {name!r} already: give another --name, or remove it first")
        return opened.checkpoint(name)


def restore_checkpoint(store: Directories, name: str) -> Checkpoint:
    """Make a checkpoint the committed state; blocks until it is. The later steps are lost, the checkpoint stays.

    StoreError if there is none of that name or the store is in use, StoreCorruptError if the checkpoint is damaged.
    """
    with opened_store(store) as (opened, _):
        return opened.restore(name)


def remove_checkpoint(store: Directories, name: str) -> None:
    """Delete a checkpoint; StoreError if there is none of that name or the store is in use."""
    with opened_store(store) as (opened, _):
        opened.remove_checkpoint(name)


def prune_checkpoints(store: Store, num_kept: int) -> None:
    """Remove the oldest checkpoints that were named by their step, until so many are left."""
    of_steps = [checkpoint.name for checkpoint in store.checkpoints if OF_A_STEP.fullmatch(checkpoint.name)]
    for name in of_steps[: max(0, len(of_steps) - num_kept)]:
        store.remove_checkpoint(name)
