"""Where backends keep what they compiled or measured: `LOWBIT_CACHE`, or a folder of the user's cache."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """The folder for one kind of entries; it need not exist."""
    chosen = os.environ.get("LOWBIT_CACHE")
    if chosen:
        return Path(chosen) / kind
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "lowbit" / kind
    except RuntimeError:  # no home, as a container's user without a name has it: nothing is kept
        return Path(os.devnull) / "lowbit" / kind


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in its place as a whole, or not at all: other processes never see half of one.

    A folder that cannot be written costs time at the next start and nothing else, so it is no error.
    """
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            made = Path(file.name)
        try:
            made.write_bytes(content)
            made.replace(path)
        except OSError:  # a full disk
            made.unlink(missing_ok=True)
            raise
