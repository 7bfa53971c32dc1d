"""Fine-tune language models that fit neither in the GPU's memory nor in the host's, with weights and states on NVMe."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fuyou.config import OffloadConfig, format_bytes, parse_bytes
    from fuyou.errors import ConfigError, DataError, FuyouError, ModelError, PlanError
    from fuyou.executor.torch_state import micro_batch_seed
    from fuyou.hardware import HardwareProfile
    from fuyou.measuring import measure_hardware
    from fuyou.opening import (
        adamw as AdamW,
    )
    from fuyou.opening import (
        from_config,
        from_pretrained,
        open_store_model,
        plan_model,
    )
    from fuyou.plan import Plan
    from fuyou.store_contents import inspect_store, verify_store
    from fuyou.trainer_callback import FuyouCallback

__version__ = "0.1.0"

_HOMES = {
    "AdamW": ("fuyou.opening", "adamw"),
    "ConfigError": ("fuyou.errors", "ConfigError"),
    "DataError": ("fuyou.errors", "DataError"),
    "FuyouCallback": ("fuyou.trainer_callback", "FuyouCallback"),
    "FuyouError": ("fuyou.errors", "FuyouError"),
    "HardwareProfile": ("fuyou.hardware", "HardwareProfile"),
    "ModelError": ("fuyou.errors", "ModelError"),
    "OffloadConfig": ("fuyou.config", "OffloadConfig"),
    "Plan": ("fuyou.plan", "Plan"),
    "PlanError": ("fuyou.errors", "PlanError"),
    "format_bytes": ("fuyou.config", "format_bytes"),
    "from_config": ("fuyou.opening", "from_config"),
    "from_pretrained": ("fuyou.opening", "from_pretrained"),
    "inspect_store": ("fuyou.store_contents", "inspect_store"),
    "measure_hardware": ("fuyou.measuring", "measure_hardware"),
    "micro_batch_seed": ("fuyou.executor.torch_state", "micro_batch_seed"),
    "open_store_model": ("fuyou.opening", "open_store_model"),
    "parse_bytes": ("fuyou.config", "parse_bytes"),
    "plan_model": ("fuyou.opening", "plan_model"),
    "verify_store": ("fuyou.store_contents", "verify_store"),
}

__all__ = [
    "AdamW",
    "ConfigError",
    "DataError",
    "FuyouCallback",
    "FuyouError",
    "HardwareProfile",
    "ModelError",
    "OffloadConfig",
    "Plan",
    "PlanError",
    "format_bytes",
    "from_config",
    "from_pretrained",
    "inspect_store",
    "measure_hardware",
    "micro_batch_seed",
    "open_store_model",
    "parse_bytes",
    "plan_model",
    "verify_store",
]


def _check_not_shadowed() -> None:
    """Our packages are top-level ones; a file of the same name beside the user's script would be imported instead."""
    for name, member in (("io_engine", "posix_engine"), ("optim", "offloaded_adamw")):
        spec = importlib.util.find_spec(name)
        folders = [] if spec is None else list(spec.submodule_search_locations or [])
        if not any((Path(folder) / f"{member}.py").is_file() for folder in folders):
            where = "missing" if spec is None else f"hidden by {spec.origin or folders}"
            raise ImportError(
                f"fuyou's package {name!r} is {where}: rename that file or folder, or run from another one"
            )


_check_not_shadowed()


def __getattr__(name: str) -> Any:
    # Imported at first use: torch and transformers take seconds, which `fuyou --help` need not wait for.
    if name not in _HOMES:
        raise AttributeError(f"module 'fuyou' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
