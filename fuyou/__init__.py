"""Fine-tune language models that fit neither in the GPU's memory nor in the host's, with weights and states on NVMe."""

from __future__ import annotations

import importlib

# The three packages are top-level ones; a file of the same name beside the user's script would be imported instead.
for _name, _attribute in (("io_engine", "PosixEngine"), ("optim", "OffloadedAdamW")):
    _module = importlib.import_module(_name)
    if not hasattr(_module, _attribute):
        raise ImportError(
            f"{getattr(_module, '__file__', None) or list(getattr(_module, '__path__', []))} is in the way of fuyou's "
            f"package {_name!r}: rename it, or run from another folder"
        )

from fuyou.config import OffloadConfig, format_bytes, parse_bytes  # noqa: E402
from fuyou.errors import ConfigError, DataError, FuyouError, ModelError, PlanError  # noqa: E402
from fuyou.executor.step import micro_batch_seed  # noqa: E402
from fuyou.hardware import HardwareProfile, measure_hardware  # noqa: E402
from fuyou.opening import adamw as AdamW  # noqa: E402, N812
from fuyou.opening import (  # noqa: E402
    from_config,
    from_pretrained,
    inspect_store,
    open_store_model,
    plan_model,
    verify_store,
)
from fuyou.plan import Plan  # noqa: E402
from fuyou.trainer_callback import FuyouCallback  # noqa: E402

__version__ = "0.1.0"

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
