"""AdamW on float32 masters for a model in memory that computes in bfloat16: what a streamed model is compared with, and how."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.reference import round_half_up_to_bfloat16, sum_in_order, sum_of_squares


class MasterAdamW(torch.optim.Optimizer):
    """Steps 2 to 6 of tests/reference.py, for a training loop of somebody else's; imports nothing of fuyou.

    Gradients are added up in float32, pass after pass; `p.grad` is always None. `norms` are those before clipping.
    """

    def __init__(self, model: nn.Module, *, lr: float, max_grad_norm: float | None = None) -> None:
        self._names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self._masters = {p: p.detach().float().clone() for p in self._names}
        self._sums: dict[torch.Tensor, torch.Tensor] = {}
        self._max_grad_norm = max_grad_norm
        self._adam = torch.optim.AdamW(self._masters.values(), lr=lr, weight_decay=0.0, fused=True)
        self.norms: list[float] = []
        super().__init__(list(self._names), {"lr": lr})
        for parameter in self._names:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.to(torch.float32, copy=True)
        parameter.grad = None
        self._sums[parameter] = self._sums[parameter] + gradient if parameter in self._sums else gradient

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Clip by the norm of all sums, update the masters, round them to the weights."""
        assert closure is None
        by_name = sorted(self._sums, key=lambda parameter: self._names[parameter])
        norm = math.sqrt(sum_in_order([sum_of_squares(self._sums[p].reshape(-1).numpy()) for p in by_name]))
        self.norms.append(norm)
        if self._max_grad_norm is not None and self._max_grad_norm / (norm + 1e-6) < 1.0:
            for gradient in self._sums.values():
                gradient *= torch.tensor(self._max_grad_norm / (norm + 1e-6), dtype=torch.float32)
        for group in self._adam.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        for parameter, master in self._masters.items():
            master.grad = self._sums.get(parameter)
        self._adam.step()
        for parameter, master in self._masters.items():
            parameter.copy_(round_half_up_to_bfloat16(master))
        self._sums.clear()


def assert_equal_weights(model: Any, plain: Any, folder: Path) -> None:
    """Bit for bit, by a model exported from the store."""
    model.save_pretrained(folder / "end")
    exported = AutoModelForCausalLM.from_pretrained(folder / "end", dtype="auto")
    for (name, parameter), wanted in zip(exported.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, wanted), name
