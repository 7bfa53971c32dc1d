"""`FuyouCallback`: what an unmodified `transformers.Trainer` needs to know about a streamed model.

Resuming: every commit of the store carries what Trainer's own checkpoints hold beside weights and states, which are in the
store. When a Trainer is made, a folder `checkpoint-<committed step>` is written for it if there is none, so that
`train(resume_from_checkpoint=True)` continues at the last committed step, also after a crash between two of Trainer's saves.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
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
        self._written_step: int | None = None
        """Of the folder written here: its scheduler's state is that before the scheduler's last step."""

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse arguments (ConfigError); write Trainer's checkpoint folder for the store's last commit if it is missing."""
        _check_arguments(args)
        runtime = getattr(kwargs.get("model"), "fuyou", None)
        if runtime is not None:
            runtime.adopt_forward_later()  # trl puts its own on the model after this, and may evaluate before it trains
        optimizer = getattr(runtime, "optimizer", None)
        if optimizer is not None and _COMMITTED in optimizer.extra:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{optimizer.step_count}"
            if not folder.exists():
                _write_checkpoint(folder, optimizer, kwargs["model"])
                logger.warning(
                    f"the store continues at step {optimizer.step_count}: train(resume_from_checkpoint=True) does, too, with "
                    f"{folder}, written from the store's last commit"
                )
            if (folder / _MARK).exists():
                self._written_step = optimizer.step_count

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
        changed = runtime.changed_adapter()
        if changed is not None:
            raise ConfigError(
                f"{changed} has other values than the store, which stands at step {optimizer.step_count}: adapters were loaded, "
                "perhaps from a checkpoint of another step, after fuyou.AdamW was made. Resume from "
                f"checkpoint-{optimizer.step_count}, or load them before fuyou.AdamW, with a new store"
            )
        runtime.adopt_forward()
        if state.global_step != optimizer.step_count:
            logger.warning(
                f"the store continues at step {optimizer.step_count} while Trainer counts from step {state.global_step}: data "
                "and learning rates begin anew. To continue, train(resume_from_checkpoint=True); for a new run name another store"
            )
        elif self._written_step is not None and state.global_step == self._written_step:
            _catch_up(_unwrapped_scheduler(kwargs["lr_scheduler"]))
        self._written_step = None
        runtime.checkpoint_to_load = None
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            kept = [
                c
                for c in runtime.store.checkpoints
                if c.name == BEST and c.step == _step_of(state.best_model_checkpoint)
            ]
            if not kept:
                raise ConfigError(
                    f"load_best_model_at_end=True: the best checkpoint so far is {state.best_model_checkpoint}, and the store has "
                    "not kept that step: set it to False, or begin a new run with it"
                )
            runtime.checkpoint_to_load = BEST
        if self._max_grad_norm is not None and not args.max_grad_norm:
            args.max_grad_norm = self._max_grad_norm  # an earlier train() ended with an exception, before on_train_end
        if args.max_grad_norm and args.max_grad_norm > 0:
            if optimizer.max_grad_norm is None:
                raise ConfigError(
                    f"max_grad_norm={args.max_grad_norm} in TrainingArguments, but the optimizer was made without clipping: "
                    f"fuyou.AdamW(model, ..., max_grad_norm={args.max_grad_norm}), or max_grad_norm=0 in TrainingArguments"
                )
            optimizer.max_grad_norm = args.max_grad_norm
            self._max_grad_norm, args.max_grad_norm = args.max_grad_norm, 0.0
        _let_trainer_look(model, optimizer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the commit of this step carry Trainer's state."""
        optimizer = _unwrapped(kwargs["optimizer"])
        optimizer.commit_extra(
            {_COMMITTED: _state_after(state, optimizer, _unwrapped_scheduler(kwargs["lr_scheduler"]))}
        )

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
        """Commit: a checkpoint of Trainer's goes with a store that is as far. Keep the best for the end, if it is asked for."""
        runtime = getattr(kwargs.get("model"), "fuyou", None)
        if runtime is None:
            return
        runtime.flush()
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and _step_of(best) == state.global_step:
            runtime.store.checkpoint(BEST)
            runtime.checkpoint_to_load = BEST

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Commit the last step; go back to the best, if it is asked for; give TrainingArguments its max_grad_norm back."""
        if self._max_grad_norm is not None:
            args.max_grad_norm, self._max_grad_norm = self._max_grad_norm, None
        model = kwargs.get("model")
        runtime = getattr(model, "fuyou", None)
        if runtime is not None:
            runtime.flush()
            _end_look(model)
            # Trainer loads adapters past the model's own load_state_dict.
            name, runtime.checkpoint_to_load = runtime.checkpoint_to_load, None
            if name is not None:
                runtime.restore_checkpoint(name)


BEST = "trainer-best"
"""Name of the store's checkpoint of the step of Trainer's best checkpoint."""
_COMMITTED = "trainer"
"""Key of Trainer's state in a commit."""
_MARK = "fuyou_checkpoint.json"
"""File of a folder that was written here: which step of which store it goes with."""


def _state_after(state: Any, optimizer: OffloadedAdamW, scheduler: Any) -> dict[str, Any]:
    """JSON of what Trainer saves beside weights and states, as of the step that is about to be taken.

    The scheduler's state is that before its step, which follows the optimizer's. Left out: the log, which grows and is
    taken from Trainer's last checkpoint instead; a scheduler's state that is no JSON.
    """
    figures = dataclasses.asdict(state) | {"global_step": state.global_step + 1, "log_history": []}
    schedule = {"scheduler": scheduler.state_dict(), "groups": optimizer.state_dict()["param_groups"]}
    try:
        json.dumps(schedule, allow_nan=False)
    except (TypeError, ValueError):
        schedule = {}
    return {"state": figures, "random": _random_states(), **schedule}


def _write_checkpoint(folder: Path, optimizer: OffloadedAdamW, model: Any) -> None:
    """Trainer's files for the last commit, complete or not there at all. The weights stay in the store, adapters beside."""
    committed = optimizer.extra[_COMMITTED]
    last = get_last_checkpoint(str(folder.parent)) if folder.parent.is_dir() else None
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        state = TrainerState(**committed["state"])
        if last is not None:
            earlier = TrainerState.load_from_json(os.path.join(last, "trainer_state.json"))
            state.log_history = [entry for entry in earlier.log_history if entry.get("step", 0) <= state.global_step]
        state.save_to_json(str(partial / "trainer_state.json"))
        if "scheduler" in committed:
            groups = [group | {"betas": tuple(group["betas"])} for group in committed["groups"]]
            torch.save({"state": {}, "param_groups": groups}, partial / "optimizer.pt")
            torch.save(committed["scheduler"], partial / "scheduler.pt")
        torch.save(_loaded_random_states(committed["random"]), partial / "rng_state.pth")
        if hasattr(model, "peft_config"):
            model.save_pretrained(partial)  # Trainer loads them into the model, which has these very values
            _take_over_frozen_adapters(partial, last, optimizer)
        else:
            # Trainer wants a file of weights; with none in it nothing is loaded into a model whose store has them.
            save_file({}, partial / "model.safetensors", metadata={"format": "pt"})
        mark = {"step": optimizer.step_count, "weights": "in the store"}
        (partial / _MARK).write_text(json.dumps(mark) + "\n")
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _take_over_frozen_adapters(folder: Path, last: str | None, optimizer: OffloadedAdamW) -> None:
    """Adapters that are not trained (trl's copy for reference) are as an earlier checkpoint has them, not as made anew.

    ConfigError if there is none: the copy would be of the adapter as it is now.
    """
    for frozen in [entry for entry in folder.iterdir() if entry.is_dir()]:
        earlier = None if last is None else Path(last) / frozen.name
        if earlier is None or not earlier.is_dir():
            raise ConfigError(
                f"the store stands at step {optimizer.step_count}, and no checkpoint of Trainer's in {folder.parent} holds the "
                f"adapter {frozen.name!r} that is not trained: a copy made now would not be that of the run's beginning. Set "
                "save_steps so that one is written early, or begin a new run in another store"
            )
        shutil.rmtree(frozen)
        shutil.copytree(earlier, frozen)


def _catch_up(scheduler: Any) -> None:
    """The scheduler's step that Trainer makes behind the optimizer's, of schedulers that it steps there."""
    if type(scheduler).__name__ not in ("ReduceLROnPlateau", "GreedyLR"):
        scheduler.step()


def _random_states() -> dict[str, Any]:
    """The states that Trainer keeps, as JSON."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, _text(keys), *rest],
        "cpu": _text(torch.random.get_rng_state().numpy()),
    }
    if torch.cuda.is_available():
        states["cuda"] = _text(torch.cuda.random.get_rng_state().numpy())
    return states


def _loaded_random_states(states: dict[str, Any]) -> dict[str, Any]:
    """Undo `_random_states`: what Trainer finds in rng_state.pth."""
    version, keys, gauss = states["python"]
    kind, words, *rest = states["numpy"]
    return {
        "python": (version, tuple(keys), gauss),
        "numpy": (kind, np.frombuffer(base64.b64decode(words), np.uint32).copy(), *rest),
    } | {
        device: torch.from_numpy(np.frombuffer(base64.b64decode(states[device]), np.uint8).copy())
        for device in ("cpu", "cuda")
        if device in states
    }


def _text(array: Any) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _check_arguments(args: Any) -> None:
    if args.fp16:
        raise ConfigError("fp16=True needs a gradient scaler, which is not supported: use bf16=True or neither")
    if args.gradient_checkpointing or getattr(args, "activation_checkpointing", False):
        raise ConfigError("gradient checkpointing: layers are recomputed already, set it to False")
    if getattr(args, "torch_compile", False):
        raise ConfigError("torch_compile=True: weights change their place under compiled code, set it to False")
    for name in ("deepspeed", "fsdp"):
        if getattr(args, name, None):
            raise ConfigError(
                f"{name}: it would take the model apart, whose weights stream from the store; leave it out"
            )
    if args.n_gpu > 1:
        raise ConfigError(
            f"Trainer would copy the model to {args.n_gpu} GPUs (DataParallel), and a streamed one runs on one: set "
            "CUDA_VISIBLE_DEVICES=0"
        )


def _step_of(folder: str) -> int:
    """Of a checkpoint of Trainer's; -1 for a folder of another name."""
    number = Path(folder).name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdecimal() else -1


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


def _unwrapped_scheduler(scheduler: Any) -> Any:
    """The scheduler inside accelerate's wrapper; schedulers have an `optimizer` themselves."""
    return getattr(scheduler, "scheduler", scheduler)
