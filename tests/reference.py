"""The plain in-memory trainer that defines "the same trajectory": it imports nothing of this project.

One optimizer step, for a model whose weights are in the compute dtype:

1. per micro-batch i: seed torch, forward, `loss_i.backward(w_i)`; gradients are in the compute dtype;
2. per parameter: its gradients added up in float32, in the order of the micro-batches. A weight that is both
   input embedding and output head has two gradients per micro-batch: first the head's of all micro-batches,
   then the embedding's;
3. the norm: float64 sums of squares over tiles of 65,536 elements, 32 interleaved lanes each;
4. above the limit, all gradients times float32(max_norm / (norm + 1e-6));
5. `torch.optim.AdamW(fused=True)` on float32 masters, padded with zeros to a multiple of 64 elements;
6. weights := the masters, rounded half up to bfloat16 where the model computes in bfloat16.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

_PADDING_ELEMENTS = 64
_TILE_ELEMENTS = 65_536
_NUM_LANES = 32


def micro_batch_seed(seed: int, step: int, micro_batch: int) -> int:
    """What torch is seeded with before the forward of a micro-batch; steps and micro-batches count from 0."""
    digest = hashlib.sha256(f"fuyou:{seed}:{step}:{micro_batch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") & (2**63 - 1)


def sum_of_squares(gradient: NDArray[np.float32]) -> float:
    """A parameter's part in the norm, added one by one in the order that defines it."""
    total = 0.0
    for start in range(0, gradient.size, _TILE_ELEMENTS):
        tile = gradient[start : start + _TILE_ELEMENTS].astype(np.float64)
        rows = np.zeros((-(-tile.size // _NUM_LANES), _NUM_LANES))
        rows.reshape(-1)[: tile.size] = tile * tile
        # cumsum adds strictly one after the other; sum does not.
        total += float(np.cumsum(np.cumsum(rows, axis=0)[-1])[-1])
    return total


def round_half_up_to_bfloat16(master: torch.Tensor) -> torch.Tensor:
    """float32 -> bfloat16 of the same shape: (bits + 0x8000) >> 16."""
    high = (master.contiguous().view(torch.int32) + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16)


def target_weights(micro_batches: Sequence[dict[str, torch.Tensor]]) -> list[float]:
    """Each micro-batch's share of the predicted tokens: all but a row's first and those labelled -100."""
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches]
    return [count / sum(counts) for count in counts]


class ReferenceTrainer:
    """Trains a plain causal LM in memory, in place.

    The model's weights must be in `compute_dtype` already. It is put into training mode. `weight_decay` is a
    number or a function of the parameter's name. `lr` may be set between steps. Equal bits need an equal
    `torch.get_num_threads()`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        compute_dtype: str = "bfloat16",
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Callable[[str], float] = 0.0,
        max_grad_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        self.model = model.train()
        self.compute_dtype = getattr(torch, compute_dtype)
        self.lr = lr
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.step_count = 0
        # named_parameters gives a tied weight once, under its first name.
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, parameter in self._parameters.items():
            # peft's adapters are float32 beside a bfloat16 base: then master and weight are the same numbers.
            is_adapter = hasattr(model, "peft_config") and parameter.dtype == torch.float32
            if parameter.dtype != self.compute_dtype and not is_adapter:
                raise ValueError(f"{name} is {parameter.dtype}: convert the model to {compute_dtype} first")
        self._masters = {name: _padded(p.detach()) for name, p in self._parameters.items()}

        decay_of = weight_decay if callable(weight_decay) else lambda _name: weight_decay
        groups = [{"params": [master], "weight_decay": decay_of(name)} for name, master in self._masters.items()]
        self._optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)

        self._head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call, unused-ignore]
        embedding, head = model.get_input_embeddings(), self._head
        self._tied_name: str | None = None
        if head is not None and embedding.weight is head.weight and head.weight.requires_grad:
            self._tied_name = next(name for name, p in self._parameters.items() if p is head.weight)

    def step(
        self, micro_batches: Sequence[dict[str, torch.Tensor]], weights: Sequence[float] | None = None
    ) -> tuple[float, float]:
        """One optimizer step; returns (loss, norm of the gradients before clipping).

        `weights` multiply the micro-batches' losses; None: each one's share of the predicted tokens.
        FloatingPointError, before anything is changed, if the norm is not finite.
        """
        if weights is None:
            weights = target_weights(micro_batches)
        loss, gradients = self._gradients(micro_batches, weights)

        norm = math.sqrt(sum_in_order([sum_of_squares(gradients[name].numpy()) for name in sorted(gradients)]))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm of step {self.step_count} is {norm}")
        if self.max_grad_norm is not None:
            coefficient = self.max_grad_norm / (norm + 1e-6)
            if coefficient < 1.0:
                for gradient in gradients.values():
                    gradient *= torch.tensor(coefficient, dtype=torch.float32)

        for group in self._optimizer.param_groups:
            group["lr"] = self.lr
        for name, master in self._masters.items():
            # Without a gradient torch leaves the master, its moments and its step count alone.
            master.grad = _padded(gradients[name]) if name in gradients else None
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

        for name in gradients:
            parameter = self._parameters[name]
            master = self._unpadded(name, self._masters[name])
            parameter.data.copy_(round_half_up_to_bfloat16(master) if parameter.dtype == torch.bfloat16 else master)
        self.step_count += 1
        return loss, norm

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of the trained weights, in the compute dtype."""
        return {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def masters(self) -> dict[str, torch.Tensor]:
        """Copies of the float32 masters, in the shapes of the weights."""
        return {name: self._unpadded(name, master).clone() for name, master in self._masters.items()}

    def moments(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Copies of (first, second) moments, float32 in the weights' shapes; zeros before a first update."""
        moments = {}
        for name, master in self._masters.items():
            state = self._optimizer.state.get(master, {})
            first, second = (state.get(key, torch.zeros_like(master)) for key in ("exp_avg", "exp_avg_sq"))
            moments[name] = (self._unpadded(name, first).clone(), self._unpadded(name, second).clone())
        return moments

    def _gradients(
        self, micro_batches: Sequence[dict[str, torch.Tensor]], weights: Sequence[float]
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """The weighted loss, and flat float32 gradients by name of the parameters that got one."""
        sums: dict[str, torch.Tensor] = {}
        embedding_gradients: list[torch.Tensor] = []
        losses: list[float] = []
        head = self._head
        leaves = dict(self._parameters)
        tied_weight = None
        if self._tied_name is not None:
            # A second leaf over the same memory: the head's gradient then comes apart from the embedding's.
            tied_weight = head.weight
            head.weight = leaves[self._tied_name] = torch.nn.Parameter(tied_weight.data)
        try:
            for index, (batch, weight) in enumerate(zip(micro_batches, weights, strict=True)):
                torch.manual_seed(micro_batch_seed(self.seed, self.step_count, index))
                loss = self.model(**batch, use_cache=False).loss
                torch.autograd.backward(loss, torch.tensor(weight, dtype=loss.dtype))
                losses.append(weight * float(loss.detach()))
                for name, leaf in leaves.items():
                    _add_to(sums, name, _taken_gradient(leaf))
                if tied_weight is not None and (gradient := _taken_gradient(tied_weight)) is not None:
                    embedding_gradients.append(gradient)
        finally:
            if tied_weight is not None:
                head.weight = tied_weight
        for gradient in embedding_gradients:
            assert self._tied_name is not None
            _add_to(sums, self._tied_name, gradient)
        return sum_in_order(losses), sums

    def _unpadded(self, name: str, flat: torch.Tensor) -> torch.Tensor:
        parameter = self._parameters[name]
        return flat[: parameter.numel()].view(parameter.shape)


def sum_in_order(values: Sequence[float]) -> float:
    """One after the other: the built-in sum compensates its rounding from Python 3.12 on."""
    total = 0.0
    for value in values:
        total += value
    return total


def _padded(tensor: torch.Tensor) -> torch.Tensor:
    """A flat float32 copy, never a view: masters and weights are updated apart."""
    padded = torch.zeros(-(-tensor.numel() // _PADDING_ELEMENTS) * _PADDING_ELEMENTS)
    padded[: tensor.numel()] = tensor.reshape(-1)
    return padded


def _taken_gradient(leaf: torch.nn.Parameter) -> torch.Tensor | None:
    gradient, leaf.grad = leaf.grad, None
    return gradient


def _add_to(sums: dict[str, torch.Tensor], name: str, gradient: torch.Tensor | None) -> None:
    if gradient is None:
        return
    flat = gradient.reshape(-1)
    if name in sums:
        sums[name] += flat.float()
    else:
        # to(copy=True): in float32 the sum must not share memory with autograd's tensor.
        sums[name] = flat.to(torch.float32, copy=True)
