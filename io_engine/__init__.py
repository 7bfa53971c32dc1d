"""Bytes between memory and NVMe: engines, buffers, and a store whose steps are never lost.

Knows no tensors, no models and no plans, and imports nothing of the other packages.
"""

from __future__ import annotations

from io_engine.buffers import Buffer, BufferPool, ByteArray
from io_engine.checkpoints import Checkpoint
from io_engine.checksums import checksum, combine_checksums, piece_digest
from io_engine.choice import EngineChoice, choose_engine
from io_engine.engine import Engine, Kind, Transfer
from io_engine.errors import BudgetError, EngineError, StoreCorruptError, StoreError, StoreLockedError
from io_engine.extents import ALIGNMENT_BYTES, Extent, round_up
from io_engine.interrupts import InterruptsDeferred, move_now
from io_engine.kvikio_engine import KvikioEngine
from io_engine.layout import ExtentSpec
from io_engine.mock_engine import MockEngine
from io_engine.posix_engine import PosixEngine
from io_engine.probe import DirectoryProbe, probe_directory
from io_engine.store import Store, StoreSnapshot
from io_engine.verifying_engine import VerifyingEngine

__all__ = [
    "ALIGNMENT_BYTES",
    "BudgetError",
    "Buffer",
    "BufferPool",
    "ByteArray",
    "Checkpoint",
    "DirectoryProbe",
    "Engine",
    "EngineChoice",
    "EngineError",
    "Extent",
    "ExtentSpec",
    "InterruptsDeferred",
    "Kind",
    "KvikioEngine",
    "MockEngine",
    "PosixEngine",
    "Store",
    "StoreCorruptError",
    "StoreError",
    "StoreLockedError",
    "StoreSnapshot",
    "Transfer",
    "VerifyingEngine",
    "checksum",
    "choose_engine",
    "combine_checksums",
    "move_now",
    "piece_digest",
    "probe_directory",
    "round_up",
]
