"""What can go wrong, by cause, so that callers can catch one kind and the command line can choose its exit code.

    FuyouError
    ├── ConfigError      a wrong value in a config, a recipe or a call            (exit 2)
    ├── PlanError        the model does not fit the given budgets                 (exit 3)
    ├── ModelError       a model, checkpoint or batch that cannot be used         (exit 1)
    └── DataError        a data set that cannot be used                           (exit 1)

Errors of storage are io_engine's EngineError/StoreError and plain OSError; an update that would write NaN or infinity
is optim's NonFiniteUpdateError (exit 1, nothing is lost).
"""

from __future__ import annotations


class FuyouError(Exception):
    """Base of every error that fuyou raises on purpose."""


class ConfigError(FuyouError, ValueError):
    """A wrong value in a config, a recipe or a call."""


class PlanError(FuyouError):
    """The model does not fit: says which memory is short, by how much, and what would fit."""

    def __init__(self, message: str, *, short_bytes: int | None = None) -> None:
        super().__init__(message)
        self.short_bytes = short_bytes
        """Of the memory that the message names; None where it names none."""


class ModelError(FuyouError):
    """A model, a checkpoint or a batch that cannot be used."""


class DataError(FuyouError):
    """A data set that cannot be used."""
