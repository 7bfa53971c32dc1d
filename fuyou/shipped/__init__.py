"""Data that comes with fuyou: profiles of common machines, and the shapes of well-known models without weights."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuyou.errors import ConfigError

if TYPE_CHECKING:
    from fuyou.hardware import HardwareProfile


def _shipped(name: str) -> dict[str, dict[str, Any]]:
    data: dict[str, dict[str, Any]] = json.loads(resources.files(__name__).joinpath(f"{name}.json").read_text("utf-8"))
    return data


def hardware_names() -> tuple[str, ...]:
    """Of the shipped profiles, each of a machine with one drive."""
    return tuple(_shipped("hardware"))


def model_names() -> tuple[str, ...]:
    """Of the shipped shapes."""
    return tuple(_shipped("models"))


def load_hardware(file_or_name: str) -> HardwareProfile:
    """The shipped profile of this name, or that of a JSON file; ConfigError names what there is."""
    # Here, so that the names alone (of `fuyou --help`) cost no import of torch.
    from fuyou.hardware import HardwareProfile
    from fuyou.recipe_text import read_json

    shipped = _shipped("hardware")
    if file_or_name in shipped:
        return HardwareProfile.from_json(shipped[file_or_name])
    if not Path(file_or_name).exists():
        raise ConfigError(f"--hardware {file_or_name}: neither a file nor one of {', '.join(shipped)}")
    return HardwareProfile.from_json(read_json(file_or_name, "--hardware"))


def load_model_config(file_or_name: str) -> Any:
    """A transformers config: the shipped shape of this name, a config.json or a folder that has one.

    Nothing is downloaded. ConfigError for what is none of these, or no config that transformers knows.
    """
    from transformers import AutoConfig

    from fuyou.recipe_text import read_json

    shipped = _shipped("models")
    if file_or_name in shipped:
        values = dict(shipped[file_or_name])
    else:
        path = Path(file_or_name).expanduser()
        if not path.exists():
            raise ConfigError(
                f"--model {file_or_name}: neither a config.json nor a folder nor one of {', '.join(shipped)}"
            )
        values = read_json(path / "config.json" if path.is_dir() else path, "--model")
    kind = values.pop("model_type", None)
    try:
        return AutoConfig.for_model(kind, **values)
    except Exception as error:  # configs of many authors check themselves in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ConfigError(
            f"--model {file_or_name}: no config that transformers knows (model_type={kind!r}): {reason}"
        ) from error
