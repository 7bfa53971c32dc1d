"""A call of a training model in parts: rows and tokens of a batch, and the losses and outputs that stand for a pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fuyou.errors import DataError, ModelError
from fuyou.plan import StepShape

if TYPE_CHECKING:
    from fuyou.executor.record import ForwardRecord


def split_batch(arguments: Mapping[str, Any], micro_batch_size: int | None) -> list[tuple[Mapping[str, Any], float]]:
    """Micro-batches of at most micro_batch_size rows, each with its loss's weight: its share of the label tokens.

    One without label tokens has weight 0, and no loss that is a number.
    """
    total = int(num_label_tokens(arguments["labels"]).sum())
    parts = batch_rows(arguments, micro_batch_size)
    if len(parts) == 1:
        return [(arguments, 1.0 if total else 0.0)]
    calls: list[tuple[Mapping[str, Any], float]] = []
    for part in parts:
        here = int(num_label_tokens(part["labels"]).sum())
        # With a given number of items the model's loss is a sum over it already.
        weight = 1.0 if here and arguments.get("num_items_in_batch") is not None else here / max(total, 1)
        calls.append((part, weight))
    return calls


def batch_rows(arguments: Mapping[str, Any], micro_batch_size: int | None) -> list[dict[str, Any]]:
    """The batch in parts of at most micro_batch_size rows; what has no row for each of its is in every part."""
    rows, size = num_rows(arguments), micro_batch_size
    if size is None or rows <= size:
        return [dict(arguments)]
    return [
        {
            name: value[start : start + size]
            if isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == rows
            else value
            for name, value in arguments.items()
        }
        for start in range(0, rows, size)
    ]


def check_tokens(arguments: Mapping[str, Any], vocabulary_size: int, *, look_at_values: bool) -> None:
    """DataError for a batch without tokens, with labels of another shape, or (if asked) with tokens that the model lacks."""
    ids, labels = arguments.get("input_ids"), arguments.get("labels")
    if isinstance(ids, torch.Tensor) and ids.numel() == 0:
        raise DataError(f"input_ids of shape {tuple(ids.shape)} hold no tokens")
    if isinstance(labels, torch.Tensor) and isinstance(ids, torch.Tensor) and labels.shape != ids.shape:
        raise DataError(f"labels of shape {tuple(labels.shape)} do not match input_ids of shape {tuple(ids.shape)}")
    if not look_at_values:
        return
    for name, tensor, low in (("input_ids", ids, 0), ("labels", labels, -100)):
        if isinstance(tensor, torch.Tensor) and not tensor.is_floating_point():
            least, most = int(tensor.min()), int(tensor.max())
            if least < low or most >= vocabulary_size:
                raise DataError(
                    f"{name} range from {least} to {most}, the model's vocabulary has {vocabulary_size} tokens: is this the "
                    "model's tokenizer?"
                )


def loss_output(output_type: type, loss: torch.Tensor) -> Any:
    """An output of the model's class that has a loss and nothing else: logits are gone block by block."""
    if output_type in (type(None), tuple):
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(loss=loss)
    return output_type(loss=loss)


def shape_of(calls: Iterable[Mapping[str, Any]]) -> StepShape:
    """Of micro-batches with these arguments."""
    shape = StepShape()
    for arguments in calls:
        for name in ("input_ids", "inputs_embeds", "labels"):
            value = arguments.get(name)
            if isinstance(value, torch.Tensor) and value.ndim >= 2:
                rows, length = value.shape[:2]
                shape = shape.plus(StepShape(int(rows * length), 1, int(length)))
                break
    return shape


class Loss(torch.autograd.Function):
    """The loss of a forward pass; its backward runs the model's."""

    @staticmethod
    def forward(
        ctx: Any,
        _anchor: torch.Tensor,
        run: Callable[[ForwardRecord, float], None],
        record: ForwardRecord,
        value: torch.Tensor,
    ) -> torch.Tensor:
        ctx.run, ctx.record = run, record
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.run(ctx.record, float(gradient))
        return None, None, None, None


def summed_as_called(losses: Sequence[torch.Tensor], parts_of_calls: Sequence[int]) -> torch.Tensor:
    """The loss of calls that ran together, of so many micro-batches each: the bits of a caller's own sum over the calls.

    `losses` are the micro-batches' weighted ones. Within a call they are added in float64, calls in float32, as Trainer
    adds what each returns.
    """
    remaining = iter(losses)
    calls = [sum(itertools.islice(remaining, parts), torch.zeros_like(losses[0])).float() for parts in parts_of_calls]
    return sum(calls[1:], start=calls[0])


class Outputs(torch.autograd.Function):
    """A forward pass's outputs; their backward runs the model's, once, with the gradients of all of them."""

    @staticmethod
    def forward(
        ctx: Any,
        _anchor: torch.Tensor,
        run: Callable[[ForwardRecord, Sequence[torch.Tensor | None]], None],
        record: ForwardRecord,
        values: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        ctx.run, ctx.record = run, record
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        ctx.run(ctx.record, gradients)
        return None, None, None, None


def joined_outputs(parts: Sequence[Sequence[Any]], weights: Sequence[float]) -> list[Any]:
    """The leaves of all parts' outputs as those of one: see `Runtime.outputs_mode`."""
    if len(parts) == 1:
        return list(parts[0])
    joined: list[Any] = []
    for leaves in zip(*parts, strict=True):
        if not isinstance(leaves[0], torch.Tensor):
            joined.append(leaves[0])
        elif leaves[0].ndim:
            joined.append(torch.cat(leaves))
        else:
            # A part without label tokens has no loss that is a number.
            counted = [leaf * weight for leaf, weight in zip(leaves, weights, strict=True) if weight]
            joined.append(sum(counted[1:], start=counted[0]) if counted else leaves[0])
    return joined


class LossWithoutOptimizer(torch.autograd.Function):
    """A loss before there is an optimizer: a number to look at, an explanation for who calls backward()."""

    @staticmethod
    def forward(_ctx: Any, _anchor: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(_ctx: Any, *_gradients: torch.Tensor) -> Any:
        raise ModelError(
            "this model has no optimizer that takes its gradients block by block: call fuyou.AdamW(model, lr=...) before "
            "the forward pass (and give it to Trainer as optimizers=(optimizer, None))"
        )


class QueuedLoss(torch.autograd.Function):
    """The zero that stands for a micro-batch which will run with the last one of its step."""

    @staticmethod
    def forward(ctx: Any, _anchor: torch.Tensor, scales: list[float]) -> torch.Tensor:
        ctx.scales = scales
        return torch.zeros((), device=_anchor.device)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.scales.append(float(gradient))
        return None, None


def sync_gradients() -> bool:
    """False while accelerate (or Trainer) accumulates: this micro-batch is not its step's last."""
    from accelerate.state import GradientState

    return bool(GradientState._shared_state.get("sync_gradients", True))


def num_label_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Per row, the labels that a causal loss counts: the first has nothing before it."""
    return (labels[:, 1:] != -100).sum(dim=1)


def num_rows(arguments: Mapping[str, Any]) -> int:
    """Sequences in a batch."""
    for name in ("labels", "input_ids", "inputs_embeds"):
        value = arguments.get(name)
        if isinstance(value, torch.Tensor):
            return int(value.shape[0])
    raise DataError("the model was called with neither input_ids nor inputs_embeds")


def num_tokens(arguments: Mapping[str, Any]) -> int:
    mask = arguments.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return int(mask.sum())
    ids = arguments.get("input_ids")
    if isinstance(ids, torch.Tensor):
        return int(ids.numel())
    embeddings = arguments["inputs_embeds"]
    return int(embeddings.shape[0] * embeddings.shape[1])
