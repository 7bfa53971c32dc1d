"""A stand-in for kvikio with kvikio 26.10's traps, so that the engine over it is tested without a GPU.

Its futures do not hold the buffer; a second `get()` raises; errors are RuntimeErrors that have no errno; "r+" makes no
file; there is no sync; torch's host tensors are refused; changing the number of threads rebuilds the pool.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
import types
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from io_engine import kvikio_engine


class FakeDevice:
    """GPU memory, in truth host memory at an odd address; only its interface says that it is on a device."""

    def __init__(self, data: np.ndarray, *, read_only: bool = False, strides: tuple[int, ...] | None = None) -> None:
        self.memory = np.concatenate([np.zeros(16, np.uint8), data.view(np.uint8).reshape(-1)])
        self.shape, self.typestr = data.shape, data.dtype.str
        self.read_only, self.strides = read_only, strides

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        address = self.memory.ctypes.data + 16
        return {
            "version": 3, "shape": self.shape, "typestr": self.typestr, "data": (address, self.read_only),
            "strides": self.strides,
        }  # fmt: skip

    def bytes(self) -> bytes:
        return self.memory[16:].tobytes()


class FakeKvikio:
    """What the tests look at and change."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {
            "num_threads": 1,
            "task_size": 4 << 20,
            "auto_direct_io_read": False,
            "auto_direct_io_write": True,
        }
        self.compat_mode = True
        self.gds_available: bool | None = False
        self.pool = ThreadPoolExecutor(4)
        self.transfers: list[tuple[str, int, int, int]] = []
        self.failure: str | None = None
        """The text of the error of the next transfer."""
        self.short_bytes: int | None = None
        """What the next transfer says that it has moved."""

    def modules(self) -> dict[str, types.ModuleType]:
        root, defaults, driver = (types.ModuleType(n) for n in ("kvikio", "kvikio.defaults", "kvikio.cufile_driver"))
        fake = self

        class CuFile:
            def __init__(self, path: str, flags: str = "r") -> None:
                try:
                    self._descriptor = os.open(path, os.O_RDONLY if flags == "r" else os.O_RDWR)
                except OSError as error:
                    raise _error(error.strerror) from None

            def close(self) -> None:
                os.close(self._descriptor)

            def pread(self, buffer: Any, size: int, file_offset: int, task_size: int) -> FakeFuture:
                return fake._start("read", self._descriptor, buffer, size, file_offset, task_size)

            def pwrite(self, buffer: Any, size: int, file_offset: int, task_size: int) -> FakeFuture:
                return fake._start("write", self._descriptor, buffer, size, file_offset, task_size)

        def set_defaults(values: dict[str, Any]) -> None:
            for name in values:
                fake.settings[name]  # as kvikio: KeyError for what it does not know
            fake.settings.update(values)

        def get_property(name: str) -> Any:
            if fake.gds_available is None:
                raise KeyError(name)
            return {"is_gds_available": fake.gds_available}[name]

        root.CuFile, root.defaults, root.__version__ = CuFile, defaults, "26.10.00"  # type: ignore[attr-defined]
        defaults.get, defaults.set = fake.settings.__getitem__, set_defaults  # type: ignore[attr-defined]
        defaults.is_compat_mode_preferred = lambda: fake.compat_mode  # type: ignore[attr-defined]
        driver.get = get_property  # type: ignore[attr-defined]
        return {"kvikio": root, "kvikio.defaults": defaults, "kvikio.cufile_driver": driver}

    def _start(self, kind: str, descriptor: int, buffer: Any, size: int, offset: int, task_size: int) -> FakeFuture:
        interface = getattr(buffer, "__cuda_array_interface__", None)
        address = interface["data"][0] if interface else np.frombuffer(buffer, np.uint8).ctypes.data
        if size > len(buffer):
            raise ValueError("Size is greater than the size of the buffer")
        self.transfers.append((kind, offset, size, task_size))
        failure, self.failure = self.failure, None
        short_bytes, self.short_bytes = self.short_bytes, None
        held = weakref.ref(buffer)

        def work() -> int:
            time.sleep(0.001)
            if held() is None:
                raise _error("Bad address")
            if failure is not None:
                raise _error(failure)
            view = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
            done = 0
            while done < size:
                call = os.preadv if kind == "read" else os.pwritev
                moved = call(descriptor, [view[done : done + task_size]], offset + done)
                if moved == 0:
                    raise RuntimeError("KvikIO failure at: posix_io.hpp: EOF")
                done += moved
            return size if short_bytes is None else short_bytes

        return FakeFuture(self.pool.submit(work))


class FakeFuture:
    def __init__(self, future: Future[int]) -> None:
        self._future: Future[int] | None = future

    def get(self) -> int:
        if self._future is None:
            raise RuntimeError("std::future_error: No associated state")
        future, self._future = self._future, None
        return future.result()


def _error(text: str | None) -> RuntimeError:
    return RuntimeError(f"KvikIO failure at: /kvikio/cpp/include/kvikio/posix_io.hpp:106: {text}")


def install(monkeypatch: pytest.MonkeyPatch) -> FakeKvikio:
    """Let `import kvikio` find the stand-in, on a machine that seems to have a driver."""
    fake = FakeKvikio()
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(kvikio_engine.ctypes, "CDLL", lambda name: None)
    return fake
