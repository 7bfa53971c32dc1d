"""An engine over NVIDIA's kvikio: GPU memory straight to and from the drive, where GPUDirect Storage is there.

What is peculiar about kvikio, and where that is dealt with: its futures do not hold their buffers (a thread of the
directory's queue holds it until the future is done, and asks it once, since a second `get()` raises); its errors are
RuntimeErrors without errno (`_real_error`); it neither syncs nor preallocates (the system calls of `Files`); it reads
beside the page cache only when told to, with one thread (`_tune`); without libcuda every transfer fails, also of host
memory (`load_kvikio` asks first).
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import os
from types import ModuleType
from typing import Any

import numpy as np

from io_engine.engine import Kind, check_array
from io_engine.errors import EngineError, io_error
from io_engine.extents import Extent
from io_engine.files import Files, OpenFile, open_nameless, short_error
from io_engine.queued_engine import QueuedEngine

TASK_BYTES = 16 << 20
"""What one thread of kvikio moves at a time: as long as its bounce buffer."""

INSTALL_HINT = "pip install 'fuyou[cuda12]' (or 'fuyou[cuda13]'), or use io='posix', which needs no driver"


def load_kvikio() -> ModuleType:
    """Import kvikio; EngineError says what is missing and what to install."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise EngineError(
            f"io='kvikio' needs NVIDIA's driver, whose libcuda.so.1 cannot be loaded ({error}); without it kvikio cannot "
            f"even move host memory: install the driver, then {INSTALL_HINT}"
        ) from None
    try:
        importlib.import_module("kvikio.defaults")
        return importlib.import_module("kvikio")
    except ImportError as error:
        raise EngineError(
            f"io='kvikio' needs the kvikio package, which cannot be imported ({error}): {INSTALL_HINT}"
        ) from None


class DeviceBytes:
    """A part of an array in GPU memory, as bytes; keeps the array alive. What kvikio takes for a buffer."""

    def __init__(self, owner: Any, address: int, num_bytes: int, *, read_only: bool) -> None:
        self._owner = owner
        self._address = address
        self._num_bytes = num_bytes
        self._read_only = read_only

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": (self._num_bytes,),
            "typestr": "|u1",
            "data": (self._address, self._read_only),
            "strides": None,
        }

    def __len__(self) -> int:
        return self._num_bytes


class KvikioEngine(QueuedEngine):
    """`Engine` over kvikio; see `io_engine.engine` for what it promises.

    Arrays are numpy arrays in host memory (4096-aligned), or anything with `__cuda_array_interface__`, uint8, 1-D and
    contiguous, in GPU memory, such as `tensor.view(torch.uint8)` of a CUDA tensor: whatever fills or reads that memory
    must have been waited for, or run on the default stream, which kvikio synchronizes. `num_threads` transfers' requests
    are under way for each directory, and kvikio's own pool, which all engines of the process share, gets as many
    threads. EngineError at once if kvikio or the driver is missing. Not usable in a forked child.
    """

    def __init__(self, num_threads: int = 8, request_bytes: int = 64 << 20) -> None:
        super().__init__(num_threads, request_bytes)
        self._kvikio = load_kvikio()
        self._not_tuned = _tune(self._kvikio, num_threads)

    @property
    def reason(self) -> str:
        """Which path the bytes take and why, e.g. 'kvikio 26.10: GPUDirect Storage, 8 threads'."""
        path = gpu_direct_text(self._kvikio)
        lacking = f"; this version has no setting {', '.join(self._not_tuned)}" if self._not_tuned else ""
        return f"kvikio {getattr(self._kvikio, '__version__', '')}: {path}, {self._threads_text()}{lacking}"

    def _make_files(self) -> Files:
        return KvikioFiles(self._kvikio)

    def _check_array(self, kind: Kind, extent: Extent, array: Any) -> None:
        if _is_on_device(array):
            _check_device_array(kind, extent, array)
        elif isinstance(array, np.ndarray):
            check_array(kind, extent, array, needs_alignment=True)
        else:
            raise ValueError(
                f"{kind} of {extent.num_bytes} bytes of {extent.path}: {type(array).__name__} is neither a numpy array nor "
                "in GPU memory; pass tensor.view(torch.uint8).numpy() for a torch tensor in host memory"
            )

    def _view(self, array: Any, begin_bytes: int, num_bytes: int) -> Any:
        if not _is_on_device(array):
            return array[begin_bytes : begin_bytes + num_bytes]
        address, read_only = array.__cuda_array_interface__["data"]
        return DeviceBytes(array, address + begin_bytes, num_bytes, read_only=read_only)


class KvikioFiles(Files):
    """Moves through kvikio's handles; syncs, and learns why a file cannot be opened, by descriptors of its own."""

    def __init__(self, kvikio: ModuleType) -> None:
        super().__init__(direct=False)
        self._kvikio = kvikio

    def _open(self, path: str, kind: Kind) -> OpenFile:
        flags = os.O_CLOEXEC | (os.O_RDONLY if kind == "read" else os.O_RDWR | os.O_CREAT)
        # First by the system, which says why not, and makes the file, which kvikio's "r+" does not. This descriptor
        # also does the syncs: opened before the writes, it is told of all that failed to reach the drive.
        descriptor = open_nameless(path, flags)
        try:
            handle = self._kvikio.CuFile(path, "r" if kind == "read" else "r+")
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, RuntimeError):
                raise _real_error("opening", path, 0, 0, error) from None
            raise
        return OpenFile(descriptor, direct=False, handle=handle)

    def _close(self, file: OpenFile) -> None:
        try:
            file.handle.close()
        finally:
            super()._close(file)

    def _move_all(self, kind: Kind, file: OpenFile, view: Any, path: str, offset_bytes: int) -> None:
        num_bytes = len(view)
        if kind == "read":
            # Asked before: kvikio says nothing of how much there was.
            left_bytes = max(0, os.fstat(file.descriptor).st_size - offset_bytes)
            if left_bytes < num_bytes:
                raise short_error(kind, file, path, offset_bytes, num_bytes, left_bytes)
        move = file.handle.pread if kind == "read" else file.handle.pwrite
        try:
            # The future does not hold the buffer: `view` is held by this frame until it is done.
            moved_bytes = move(view, num_bytes, offset_bytes, TASK_BYTES).get()
        except RuntimeError as error:
            raise _real_error(kind, path, offset_bytes, num_bytes, error) from None
        if moved_bytes != num_bytes:
            raise short_error(kind, file, path, offset_bytes, num_bytes, moved_bytes)


def gpu_direct_text(kvikio: ModuleType) -> str:
    """Say whether kvikio reaches GPU memory without a stop in host memory, and if not, why."""
    if kvikio.defaults.is_compat_mode_preferred():
        return "compatibility mode, through host memory (libcufile or a readable /run/udev is missing, or it was asked for)"
    try:
        available = importlib.import_module("kvikio.cufile_driver").get("is_gds_available")
    except (ImportError, AttributeError, KeyError, RuntimeError) as error:
        return f"libcufile, which does not say whether GPUDirect Storage is there ({error})"
    return (
        "GPUDirect Storage" if available else "libcufile without GPUDirect Storage (no nvidia-fs), through host memory"
    )


def _tune(kvikio: ModuleType, num_threads: int) -> list[str]:
    """Set what its defaults leave slow, for the whole process; return the settings that this version does not know."""
    unknown: list[str] = []
    # Changing the number rebuilds the pool, waiting for everybody's transfers: only ever more.
    wanted = max(num_threads, int(kvikio.defaults.get("num_threads")))
    settings = {"num_threads": wanted, "auto_direct_io_read": True, "auto_direct_io_write": True}
    for name, value in settings.items():
        try:
            if kvikio.defaults.get(name) != value:
                kvikio.defaults.set({name: value})
        except KeyError:
            unknown.append(name)
    return unknown


def _is_on_device(array: Any) -> bool:
    # A property that raises for a torch tensor in host memory, so that hasattr is the question to ask.
    return hasattr(array, "__cuda_array_interface__")


def _check_device_array(kind: Kind, extent: Extent, array: Any) -> None:
    interface = array.__cuda_array_interface__
    what = f"{kind} of {extent.num_bytes} bytes at offset {extent.offset_bytes} of {extent.path}"
    shape, strides = tuple(interface["shape"]), interface.get("strides")
    if interface["typestr"] != "|u1" or len(shape) != 1 or (strides is not None and tuple(strides) != (1,)):
        raise ValueError(
            f"{what}: the device array is {interface['typestr']} of shape {shape} and strides {strides}, not 1-D contiguous "
            "uint8; pass tensor.view(-1).view(torch.uint8)"
        )
    if shape[0] != extent.num_bytes:
        raise ValueError(f"{what}: the device array has {shape[0]} bytes; slice it to {extent.num_bytes}")
    if kind == "read" and interface["data"][1]:
        raise ValueError(f"{what}: the device array is read-only; pass a writable one")


# Not of a missing file: the system has just opened it, and kvikio says the same of missing libraries.
_NUMBER_OF_TEXT = {os.strerror(number): number for number in errno.errorcode if number != errno.ENOENT}


def _real_error(operation: str, path: str, offset_bytes: int, num_bytes: int, error: RuntimeError) -> OSError:
    """Build the OSError that the text of kvikio's error is about; EIO if it does not tell."""
    text = " ".join(str(error).split())
    numbers = [number for message, number in _NUMBER_OF_TEXT.items() if message in text]
    return io_error(numbers[0] if numbers else errno.EIO, operation, path, offset_bytes, num_bytes, f"kvikio: {text}")
