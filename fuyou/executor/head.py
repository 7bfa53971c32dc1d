"""The loss of a language model's head, a chunk of tokens at a time: all logits of a micro-batch never exist at once.

The head's `forward` hands on a stand-in for the logits, which remembers what the model does to each of them (a scale, a
soft cap); the model's loss function then gets the logits of one chunk after the other and runs each one's backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fuyou.errors import ConfigError, ModelError

_REMEDY = "leave out loss_chunk_tokens (a new run in another directory, where one was begun with it)"


def check_chunkable(model: nn.Module) -> None:
    """ConfigError with the reason if the model's loss cannot be computed in chunks.

    What the model does between head and loss is seen, and refused, when it does it.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    head = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear:
        reason = f"its head is {'missing' if head is None else f'of type {type(head).__name__}'}, not a linear layer"
    elif model.loss_function is not ForCausalLMLoss:
        reason = (
            f"its loss is {getattr(model.loss_function, '__name__', 'its own')}, not the causal one of transformers"
        )
    else:
        return
    raise ConfigError(
        f"loss_chunk_tokens: the loss of {type(model).__name__} cannot be computed in chunks, {reason}: {_REMEDY}"
    )


class _Logits:
    """Stands for logits that are not computed yet; knows what is done to each of them."""

    def __init__(self, hidden: torch.Tensor, steps: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = ()) -> None:
        self._hidden, self._steps = hidden, steps

    def _then(self, step: Callable[[torch.Tensor], torch.Tensor]) -> _Logits:
        return _Logits(self._hidden, (*self._steps, step))

    def __truediv__(self, other: Any) -> _Logits:
        return self._then(lambda logits: logits / _number(other))

    def __mul__(self, other: Any) -> _Logits:
        return self._then(lambda logits: logits * _number(other))

    __rmul__ = __mul__

    def contiguous(self) -> _Logits:
        """As of a tensor; chunks are."""
        return self

    def float(self) -> _Logits:
        """As of a tensor."""
        return self._then(torch.Tensor.float)

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> _Logits:
        if function is torch.tanh and len(args) == 1 and not kwargs:
            logits: _Logits = args[0]
            return logits._then(torch.tanh)
        raise _refusal(getattr(function, "__name__", str(function)))

    def __getattr__(self, name: str) -> Any:
        raise _refusal(name)

    def __getitem__(self, _index: Any) -> Any:
        raise _refusal("a part of them")


def _refusal(what: str) -> ModelError:
    return ModelError(
        f"loss_chunk_tokens: this model uses its logits otherwise than for the loss ({what}), so that they must exist whole: "
        f"{_REMEDY}"
    )


def _number(value: Any) -> float:
    if isinstance(value, int | float):
        return value
    raise _refusal(f"with a {type(value).__name__}")


class ChunkedHead:
    """Computes the loss of `model` in chunks of `chunk_tokens` while `running`; otherwise the model does as always."""

    def __init__(self, model: nn.Module, chunk_tokens: int) -> None:
        check_chunkable(model)
        self._chunk_tokens = chunk_tokens
        causal: Any = model
        head: Any = causal.get_output_embeddings()
        self._head: nn.Linear = head
        self._plain_head: Callable[[torch.Tensor], torch.Tensor] = head.forward
        self._plain_loss: Callable[..., torch.Tensor] = causal.loss_function
        self._running: tuple[float, Callable[[], contextlib.AbstractContextManager[Any]]] | None = None
        head.forward = self._forward
        causal.loss_function = self._loss

    @contextlib.contextmanager
    def running(
        self, weight: float, in_backward: Callable[[], contextlib.AbstractContextManager[Any]]
    ) -> Iterator[None]:
        """Inside, the loss's backward pass down to the head's input runs with the loss, for the gradient `weight`.

        The head's weights must be bound and the sums of its gradients open. `in_backward` makes the context for the chunks'
        backward passes.
        """
        self._running = (weight, in_backward)
        try:
            yield
        finally:
            self._running = None

    def _forward(self, hidden: torch.Tensor) -> Any:
        return self._plain_head(hidden) if self._running is None else _Logits(hidden)

    def _loss(self, logits: Any, labels: torch.Tensor | None, vocab_size: int, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(logits, _Logits):
            return self._plain_loss(logits, labels, vocab_size, *args, **kwargs)
        if args:
            raise _refusal("its loss gets more than logits, labels and vocab_size by position")
        assert self._running is not None
        weight, in_backward = self._running
        hidden, steps = logits._hidden, logits._steps
        targets = kwargs.pop("shift_labels", None)
        if targets is None:
            assert labels is not None
            # Each token's logits are for the next one.
            targets = nn.functional.pad(labels, (0, 1), value=kwargs.get("ignore_index", -100))[..., 1:]
        targets = targets.reshape(-1).to(hidden.device)
        if kwargs.get("num_items_in_batch") is None:
            kwargs["num_items_in_batch"] = (targets != kwargs.get("ignore_index", -100)).sum()
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        trained = hidden.requires_grad or any(p.requires_grad for p in self._head.parameters())
        gradient = torch.empty_like(flat) if hidden.requires_grad else None
        total = torch.zeros((), device=hidden.device)
        for start in range(0, flat.shape[0], self._chunk_tokens):
            rows = slice(start, start + self._chunk_tokens)
            inputs = flat[rows].requires_grad_(gradient is not None)
            values = self._plain_head(inputs)
            for step in steps:
                values = step(values)
            loss = self._plain_loss(values, None, vocab_size, shift_labels=targets[rows], **kwargs)
            del values
            if trained:
                with in_backward():
                    torch.autograd.backward(loss, torch.tensor(weight, dtype=loss.dtype, device=loss.device))
            if gradient is not None:
                assert inputs.grad is not None
                gradient[rows] = inputs.grad
            total += loss.detach()
            del inputs, loss
        if not trained:
            return total
        if gradient is None:
            return total.requires_grad_()
        return _Done.apply(hidden, total, gradient.view(hidden.shape), weight)  # type: ignore[no-untyped-call]


class _Done(torch.autograd.Function):
    """A loss whose backward pass down to `hidden` has run, for the gradient `weight`."""

    @staticmethod
    def forward(
        ctx: Any, _hidden: torch.Tensor, loss: torch.Tensor, gradient: torch.Tensor, weight: float
    ) -> torch.Tensor:
        ctx.gradient, ctx.weight = gradient, weight
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, given: torch.Tensor) -> Any:
        if float(given) != torch.tensor(ctx.weight, dtype=given.dtype).item():
            raise _refusal("it scales its loss")
        return ctx.gradient, None, None, None
