"""`FuyouCallback`: what an unmodified `transformers.Trainer` needs to know about a streamed model."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from fuyou.errors import ConfigError


class FuyouCallback(TrainerCallback):  # type: ignore[misc]
    """Moves gradient clipping into the optimizer, logs its figures, commits before the run ends.

    Trainer clips `p.grad`, which a streamed model does not have: its `max_grad_norm` is handed to the optimizer, and
    the true global norm goes into the logs.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the combination; refuse what would silently do something else."""
        model, optimizer = kwargs["model"], _unwrapped(kwargs.get("optimizer"))
        runtime = getattr(model, "fuyou", None)
        if runtime is None:
            raise ConfigError("FuyouCallback needs a model of fuyou.from_pretrained")
        if runtime.optimizer is None or optimizer is not runtime.optimizer:
            raise ConfigError(
                "pass the model's own optimizer: Trainer(..., optimizers=(fuyou.AdamW(model, ...), None)); Trainer's would "
                "update nothing"
            )
        if args.fp16:
            raise ConfigError("fp16=True needs a gradient scaler, which is not supported: use bf16=True or neither")
        if args.label_smoothing_factor:
            raise ConfigError("label_smoothing_factor computes the loss outside of the model: not supported yet, set it to 0")
        if args.gradient_checkpointing:
            raise ConfigError("gradient_checkpointing=True: layers are recomputed already, set it to False")
        if args.max_grad_norm and args.max_grad_norm > 0:
            if optimizer.max_grad_norm is None:
                raise ConfigError(
                    f"max_grad_norm={args.max_grad_norm} in TrainingArguments, but the optimizer was made without clipping: "
                    f"fuyou.AdamW(model, ..., max_grad_norm={args.max_grad_norm}), or max_grad_norm=0 in TrainingArguments"
                )
            optimizer.max_grad_norm = args.max_grad_norm
            args.max_grad_norm = 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the true gradient norm and what the step moved."""
        runtime = getattr(kwargs.get("model"), "fuyou", None)
        metrics = runtime.step_metrics() if runtime is not None else {}
        if logs is None or not metrics or "loss" not in logs:
            return
        logs["grad_norm"] = metrics["grad_norm"]
        logs["fuyou/bytes_read"] = metrics["bytes_read"]
        logs["fuyou/bytes_written"] = metrics["bytes_written"]
        logs["fuyou/peak_host_bytes"] = metrics["peak_host_bytes"]
        logs["fuyou/committed_step"] = metrics["committed_step"]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Commit the last step."""
        runtime = getattr(kwargs.get("model"), "fuyou", None)
        if runtime is not None:
            runtime.flush()


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
