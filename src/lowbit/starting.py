"""Ctrl-C in the first seconds of the command, while it imports PyTorch: it ends as it does later, without a traceback.

No work has begun then, and nothing is there to be undone; an exception would come out of whatever module is being
imported, or be lost in it. A program that imports lowbit is left alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

_SCRIPTS = ("lowbit", "lowbit.exe", "lowbit-script.py")  # not somebody's lowbit.py
_INTERRUPTED = 130  # the exit code, as `lowbit.cli.output.Exit` has it


def end_at_interrupt() -> None:
    """End the process at Ctrl-C until `begun` is called, if it is the command and nobody else looks after Ctrl-C."""
    if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def begun() -> None:
    """Let Ctrl-C be a `KeyboardInterrupt` again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command() -> bool:
    """Whether this process was started as `lowbit ...` or `python -m lowbit ...`; not what such a one starts itself."""
    started = sys.orig_argv[1:]  # the interpreter's own options, what it runs, and arguments, as many as in sys.argv
    what = started[-len(sys.argv)] if 0 < len(sys.argv) <= len(started) else ""
    if sys.argv[:1] == ["-m"]:  # until the module is found
        return what in ("lowbit", "-mlowbit")
    return sys.argv[:1] == [what] and Path(what).name in _SCRIPTS


def _end(*_: Any) -> None:
    with contextlib.suppress(OSError):  # a closed stream
        os.write(2, b"interrupted\n")
    os._exit(_INTERRUPTED)
