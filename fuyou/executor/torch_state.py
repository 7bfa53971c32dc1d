"""The state of torch that belongs to a micro-batch and not to the thread: random numbers and autocast."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch


class Autocast(NamedTuple):
    """A thread's autocast."""

    is_enabled: bool
    dtype: torch.dtype
    keeps_casts: bool
    """Whether casts of weights are kept until autocast is left."""


def micro_batch_seed(seed: int, step: int, micro_batch: int) -> int:
    """Seed of torch's generators for one micro-batch of one step, so that runs repeat whatever ran in between.

    The first eight bytes, little-endian, of sha256("fuyou:{seed}:{step}:{micro_batch}"), without the sign bit.
    """
    digest = hashlib.sha256(f"fuyou:{seed}:{step}:{micro_batch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") & (2**63 - 1)


class TorchState:
    """Reads and sets the calling thread's state for compute on one device."""

    def __init__(self, torch_device: torch.device) -> None:
        self._torch_device = torch_device

    def seeded(self, seed: int) -> tuple[torch.Tensor, ...]:
        """The generators' state after torch.manual_seed(seed); leaves them as they are."""
        outer = self.get_rng()
        torch.manual_seed(seed)
        state = self.get_rng()
        self.set_rng(outer)
        return state

    def get_rng(self) -> tuple[torch.Tensor, ...]:
        """The host's generator, and the device's if it has one of its own."""
        if self._torch_device.type == "cuda":
            return torch.get_rng_state(), torch.cuda.get_rng_state(self._torch_device)
        return (torch.get_rng_state(),)

    def set_rng(self, state: tuple[torch.Tensor, ...]) -> None:
        """What `get_rng` gave."""
        torch.set_rng_state(state[0])
        if len(state) > 1:
            torch.cuda.set_rng_state(state[1], self._torch_device)

    def get_autocast(self) -> Autocast:
        """As it is now."""
        device_type = self._torch_device.type
        return Autocast(
            torch.is_autocast_enabled(device_type),
            torch.get_autocast_dtype(device_type),
            torch.is_autocast_cache_enabled(),
        )

    def set_autocast(self, autocast: Autocast) -> None:
        """What `get_autocast` gave."""
        device_type = self._torch_device.type
        torch.set_autocast_enabled(device_type, autocast.is_enabled)
        torch.set_autocast_dtype(device_type, autocast.dtype)
        torch.set_autocast_cache_enabled(autocast.keeps_casts)

    def autocast(self, autocast: Autocast) -> torch.autocast:
        """A context in which autocast is on and of a dtype as in this, but keeps no casts of weights."""
        # They would be of weights that have been replaced since.
        return torch.autocast(
            self._torch_device.type, dtype=autocast.dtype, enabled=autocast.is_enabled, cache_enabled=False
        )

    @contextlib.contextmanager
    def casts_let_go(self) -> Iterator[None]:
        """Inside, an autocast that somebody else entered keeps no casts of weights: each would outlive its block's stay."""
        kept = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(kept)
