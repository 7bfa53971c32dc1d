"""What can go wrong here, and how to catch it by cause.

EngineError
├── BudgetError            a buffer does not fit into its pool's budget
└── StoreError             a store cannot be made or used as asked
    ├── StoreLockedError   another process, or this one, has the store open
    └── StoreCorruptError  bytes on disk are not what the store wrote

Failures of the drive or the file system are the real `OSError` with its errno; `filename` is the path, and
the text names the operation, the offset and the length.
"""

from __future__ import annotations

import os


class EngineError(Exception):
    """Root of this package's own errors."""


class BudgetError(EngineError):
    """A buffer does not fit into its pool's budget, or not now."""


class StoreError(EngineError):
    """A store cannot be made, opened or changed as asked."""


class StoreLockedError(StoreError):
    """The store is open elsewhere; a store belongs to one process at a time."""


class StoreCorruptError(StoreError):
    """Bytes on disk are not what the store wrote."""


def io_error(
    error_number: int, operation: str, path: str, offset_bytes: int, num_bytes: int, detail: str = ""
) -> OSError:
    """Build the `OSError` of a failed transfer; Python picks the subclass (such as FileNotFoundError)."""
    text = f"{os.strerror(error_number)} ({operation} of {num_bytes} bytes at offset {offset_bytes}"
    text += f": {detail})" if detail else ")"
    return OSError(error_number, text, path)
