"""The program `fuyou`, also `python -m fuyou`: the command line from the first import to the end of the process."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn


def run() -> NoReturn:
    """Run `fuyou.cli.main` and end the process with its exit code; Ctrl-C never shows a traceback."""
    # Until main has handlers of its own, and after it: Python's would say where in an import or a finaliser it hit.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fuyou.cli import EXIT_INTERRUPTED, main

    code = main()
    if code == EXIT_INTERRUPTED:
        # All that matters is closed. Python's own end takes seconds, waits for threads, and, where the interrupt hit
        # generated code, kills the process by a signal instead of giving it the exit code.
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
