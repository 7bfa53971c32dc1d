"""How the kernels are compiled: without the GIL, without fast math, kept on disk for the next process."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import numba

_P = ParamSpec("_P")
_R = TypeVar("_R")


def compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Compile a module's function with numba on its first call; it then runs without the GIL.

    The machine code is kept where numba finds a writable folder; where it finds none, every process compiles.
    The function itself must not raise OSError.
    """
    # numba names the file after the function and compiles anew when the function's own source file changes; it
    # does not see changes in the modules whose functions become part of it.
    function.__qualname__ += f".{_shared_sources()}"
    try:
        dispatcher = _njit(function, cache=True)
    except RuntimeError:
        # "no locator available": neither __pycache__ nor the user's cache folder is writable.
        dispatcher = _njit(function, cache=False)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return dispatcher(*args, **kwargs)
        except OSError:
            # The machine code could not be saved (disk full, or read-only by now). numba registers it before
            # it saves it and saves it before it runs it: nothing has run yet, and the second call just runs.
            return dispatcher(*args, **kwargs)

    return call


def inlined(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Compile a function that only compiled functions call; it becomes part of them and is not kept itself."""
    return _njit(function, cache=False)


def _njit(function: Callable[_P, _R], cache: bool) -> Callable[_P, _R]:
    # No fast math: it would reorder and contract. error_model "numpy": dividing by zero gives infinity,
    # without a branch that keeps LLVM from vectorising.
    dispatcher: Callable[_P, _R] = numba.njit(
        cache=cache, nogil=True, fastmath=False, error_model="numpy", boundscheck=False
    )(function)
    return dispatcher


@functools.cache
def _shared_sources() -> str:
    """Digest of the modules of the kernels: this one's siblings of that name."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("kernels*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]
