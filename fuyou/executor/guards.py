"""What a streamed model refuses: uses of weights that are on the drive, and methods that would take placeholders for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fuyou.errors import ModelError
from fuyou.executor.bound import BoundWeights
from optim import ShardLayout


def guard_other_modules(
    model: nn.Module,
    layers: Sequence[nn.Module],
    parameters: Mapping[str, nn.Parameter],
    layouts: Mapping[str, ShardLayout],
    bound: BoundWeights,
    reach_epilogue: Callable[[], None],
) -> None:
    """Make the use of a module outside the layers whose weights are not there an error, never a wrong result.

    `reach_epilogue` is called when weights of the epilogue alone are missing: a micro-batch that skipped the last
    layers has come to it.
    """
    inside = {module for layer in layers for module in layer.modules()}
    owners = {slot.name: shard for shard, layout in layouts.items() for slot in layout.parameters}
    names = {id(p): name for name, p in parameters.items()}

    def check(module: nn.Module, _args: Any, *, shards: frozenset[str]) -> None:
        missing = {shard for shard in shards if shard not in bound}
        if missing == {"epilogue"}:
            reach_epilogue()
            missing = {shard for shard in shards if shard not in bound}
        if missing:
            raise ModelError(
                f"{type(module).__name__} was called while its weights (block {', '.join(sorted(missing))}) were on the "
                "drive: call the whole model (model(...)); if that was done, this model's order of computation cannot "
                "be streamed"
            )

    for module in model.modules():
        own = [p for p in module._parameters.values() if p is not None]
        if own and module not in inside:
            shards = frozenset(owners[names[id(p)]] for p in own)
            module.register_forward_pre_hook(functools.partial(check, shards=shards))


def guard_methods(model: nn.Module, zero_grad: Callable[[bool], None]) -> None:
    """Methods that would work on placeholders as if they were weights, or wrap the layers, say what to do instead."""

    like = next(model.parameters())

    def refuse(message: str) -> Callable[..., Any]:
        def refused(*_args: Any, **_kwargs: Any) -> Any:
            raise ModelError(message)

        return refused

    def apply(function: Callable[[torch.Tensor], torch.Tensor], *_args: Any, **_kwargs: Any) -> nn.Module:
        probe = torch.zeros(1, dtype=like.dtype, device=like.device)
        # What wraps the model may be "moved" to where it is.
        if function(probe) is not probe:
            raise ModelError(
                "the dtype and device of a streamed model cannot be changed: choose device and compute_dtype in OffloadConfig"
            )
        return model

    replacements = {
        "zero_grad": zero_grad,
        "_apply": apply,
        "gradient_checkpointing_enable": refuse(
            "gradient checkpointing: a streamed model computes its layers again in the backward pass already; leave it off"
        ),
    }
    for name, function in replacements.items():
        object.__setattr__(model, name, function)
