"""Text files that are written beside the main work, such as plans and reports: asked about before it, written whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from .errors import WriteError

_SEPARATORS = ("/", os.sep)
_A_FOLDER = "it is a folder; name a file to write"


def names_folder(path: str | Path) -> bool:
    """Whether this is the name of a folder, there or not, by the separator at its end. A `Path` has lost its own."""
    return str(path).endswith(_SEPARATORS)


def check_text_target(path: str | Path, made: Path | None = None) -> None:
    """Raise `WriteError` unless `write_text` can put a file at `path`; nothing is created by asking.

    `made`: a folder that will be there by then. A device or a pipe, such as /dev/stdout, can be written to. Text that
    ends in a separator names a folder.
    """
    try:
        why = _A_FOLDER if names_folder(path) else _why_not(Path(path), made)
    except OSError as error:  # a name that is too long, a folder that cannot be entered
        why = f"{error.strerror}; choose another place"
    if why:
        raise WriteError(f"{path}: cannot be written: {why}")


def _why_not(path: Path, made: Path | None) -> str:
    """Why no file can be put at `path`, and what to do, or ""."""
    folder = path.parent
    if path.is_dir():
        return _A_FOLDER
    if path.exists():
        return "" if os.access(path, os.W_OK) else "the file there is read-only; check its permissions"
    if made is not None and folder == made:
        return ""
    if not folder.is_dir():
        return f"{folder} is no folder that exists; create it first, or choose another place"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"{folder} takes no files; check its permissions"


def write_text(path: str | Path, text: str, what: str) -> None:
    """Put a file in its place as a whole: what was there stays until then, and after a failure.

    Links are followed. Where no file can be made beside it, and on devices, it is written in place. Raises
    `WriteError`, which calls the file `what`; text that ends in a separator names no file.
    """
    if names_folder(path):
        raise WriteError(f"{path}: {what} cannot be written: {_A_FOLDER}")
    place = Path(os.path.realpath(path))
    in_place = (place.exists() and not place.is_file()) or not os.access(place.parent, os.W_OK)
    beside = place if in_place else place.with_name(f"{place.name}.{os.getpid()}.new")
    try:
        mode = "w" if in_place else "x"
        with beside.open(mode, encoding="utf-8", errors="backslashreplace") as file:  # names of files may be any bytes
            file.write(text)
        if not in_place:
            if place.exists():
                shutil.copymode(place, beside)
            beside.replace(place)
    except BaseException as error:
        if not in_place:
            with contextlib.suppress(OSError):
                beside.unlink()
        if isinstance(error, OSError):
            raise WriteError(f"{path}: {what} cannot be written: {error.strerror}; choose another place") from error
        raise
