"""Adapters of a recipe's `lora:` section, by unmodified peft."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fuyou.errors import ConfigError

_NAMES_OF_MODULES = ("target_modules", "modules_to_save", "exclude_modules")


def lora_config(fields: Mapping[str, Any]) -> Any:
    """peft's LoraConfig of a recipe's fields; ConfigError for what peft refuses."""
    import peft

    try:
        return peft.LoraConfig(task_type="CAUSAL_LM", **fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lora: {_first_line(error)}") from None


def add_adapters(model: nn.Module, fields: Mapping[str, Any], *, seed: int, base_name: str | None) -> Any:
    """peft's model around `model`, its adapters initialised from `seed`; the caller's random numbers are left alone.

    `base_name` is what the saved adapter calls its base. ConfigError for names of modules that the model has not.
    """
    import peft

    config = lora_config(fields)
    modules = [name for name, _ in model.named_modules()]
    for field in _NAMES_OF_MODULES:
        named = fields.get(field)
        for name in named if isinstance(named, list) else ():
            if not any(module == name or module.endswith(f".{name}") for module in modules):
                raise _unknown(field, name, modules)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            wrapped: Any = peft.get_peft_model(model, config)
        except ValueError as error:
            raise ConfigError(f"lora: {_first_line(error)}") from None
    wrapped.peft_config["default"].base_model_name_or_path = base_name
    return wrapped


def _unknown(field: str, name: str, modules: list[str]) -> ConfigError:
    endings = sorted({module.rpartition(".")[2] for module in modules} - {""})
    endings = [ending for ending in endings if not ending.isdecimal()]
    near = difflib.get_close_matches(name, endings, n=3, cutoff=0.0)
    return ConfigError(f"lora.{field}: the model has no module {name!r}; the nearest are {', '.join(near)}")


def _first_line(error: BaseException) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:400]
