"""`FuyouCallback`: what an unmodified `transformers.Trainer` needs to know about a streamed model."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from fuyou.building import StreamedParameter
from fuyou.errors import ConfigError
from optim import OffloadedAdamW

logger = logging.get_logger(__name__)


class FuyouCallback(TrainerCallback):
    """Moves gradient clipping into the optimizer, puts its figures into the logs, commits before the run ends.

    Trainer clips `p.grad`, which a streamed model does not keep: its `max_grad_norm` is handed to the optimizer, which
    clips exactly, and Trainer's own look at the gradients gives the true global norm.
    """

    def __init__(self) -> None:
        self._max_grad_norm: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the combination; refuse (ConfigError) what would silently do something else."""
        model, optimizer = kwargs["model"], _unwrapped(kwargs.get("optimizer"))
        runtime = getattr(model, "fuyou", None)
        if runtime is None:
            raise ConfigError("FuyouCallback needs a model of fuyou.from_pretrained")
        if runtime.optimizer is None or optimizer is not runtime.optimizer:
            raise ConfigError(
                "pass the model's own optimizer: Trainer(..., optimizers=(fuyou.AdamW(model, ...), None)); Trainer's would "
                "update nothing"
            )
        _check_arguments(args)
        if state.global_step != optimizer.step_count:
            logger.warning(
                f"the store continues at step {optimizer.step_count} while Trainer counts from step {state.global_step}: data "
                "and learning rates begin anew. To begin a new run name another store"
            )
        if args.max_grad_norm and args.max_grad_norm > 0:
            if optimizer.max_grad_norm is None:
                raise ConfigError(
                    f"max_grad_norm={args.max_grad_norm} in TrainingArguments, but the optimizer was made without clipping: "
                    f"fuyou.AdamW(model, ..., max_grad_norm={args.max_grad_norm}), or max_grad_norm=0 in TrainingArguments"
                )
            optimizer.max_grad_norm = args.max_grad_norm
            self._max_grad_norm, args.max_grad_norm = args.max_grad_norm, 0.0
        _let_trainer_look(model, optimizer)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add what the last step moved to a step's logs."""
        runtime = getattr(kwargs.get("model"), "fuyou", None)
        metrics = runtime.step_metrics() if runtime is not None else {}
        if logs is None or not metrics or "loss" not in logs:
            return
        figures = {
            "grad_norm": metrics["grad_norm"],
            "fuyou/bytes_read": metrics["bytes_read"],
            "fuyou/bytes_written": metrics["bytes_written"],
            "fuyou/peak_host_bytes": metrics["peak_host_bytes"],
            "fuyou/committed_step": metrics["committed_step"],
        }
        logs.update(figures)
        # Trainer keeps a copy that it has made before this call.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Commit: a checkpoint of Trainer's goes with a store that is as far."""
        runtime = getattr(kwargs.get("model"), "fuyou", None)
        if runtime is not None:
            runtime.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Commit the last step; give TrainingArguments its max_grad_norm back."""
        if self._max_grad_norm is not None:
            args.max_grad_norm, self._max_grad_norm = self._max_grad_norm, None
        model = kwargs.get("model")
        runtime = getattr(model, "fuyou", None)
        if runtime is not None:
            runtime.flush()
            _end_look(model)


def _check_arguments(args: Any) -> None:
    if args.fp16:
        raise ConfigError("fp16=True needs a gradient scaler, which is not supported: use bf16=True or neither")
    if args.gradient_checkpointing or getattr(args, "activation_checkpointing", False):
        raise ConfigError("gradient checkpointing: layers are recomputed already, set it to False")
    if getattr(args, "torch_compile", False):
        raise ConfigError("torch_compile=True: weights change their place under compiled code, set it to False")
    if args.load_best_model_at_end:
        raise ConfigError(
            "load_best_model_at_end=True would load weights into a model that streams them from its store: set it to False "
            "and use the best checkpoint's folder, which plain transformers can load"
        )


def _let_trainer_look(model: Any, optimizer: OffloadedAdamW) -> None:
    """Let Trainer's norm of all `p.grad` be the true global norm: one parameter stands in for all of them."""
    first = True
    for parameter in model.parameters():
        if isinstance(parameter, StreamedParameter) and parameter.requires_grad:
            parameter.stand_in = functools.partial(_global_norm, optimizer) if first else _nothing
            first = False


def _end_look(model: Any) -> None:
    for parameter in model.parameters():
        if isinstance(parameter, StreamedParameter):
            parameter.stand_in = None


def _nothing() -> None:
    return None


def _global_norm(optimizer: OffloadedAdamW) -> torch.Tensor:
    """The norm of the gradients that wait for `step()`, as a vector of one element; zero if there are none."""
    return torch.tensor([optimizer.grad_norm()])


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
