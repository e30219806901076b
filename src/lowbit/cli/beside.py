"""Files that a command writes beside its main work: whether each can be, asked before anything else is done."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from lowbit.checkpoint.target import refuse_inputs
from lowbit.errors import WriteError
from lowbit.text_files import check_text_target

_PAGE = ".html"  # an old report in a model folder is no part of the model


def check_beside(
    path: str | None,
    *,
    read: Iterable[str | Path | None],
    others: Iterable[str | Path | None] = (),
    made: Path | None = None,
) -> Path | None:
    """The path of a text file as it was written on the command line, None where none was.

    Raises `WriteError` unless a file can be put there.

    `read`: files and folders that the command reads, `others`: what else it writes; it may be none of them. `made`: a
    folder that the command will have made by then.
    """
    if path is None:
        return None
    check_text_target(path, made)  # as it was written: a Path has lost the separator at its end
    refuse_inputs([Path(path)], files_of(read))
    for other in others:
        if other is not None and os.path.realpath(other) == os.path.realpath(path):
            raise WriteError(f"{path}: two things would be written there, each in the other's place; name another file")
    return Path(path)


def files_of(paths: Iterable[str | Path | None]) -> list[Path]:
    """The files among the paths and below them, but for pages."""
    given = [Path(path) for path in paths if path is not None]
    below = [file for path in given if path.is_dir() for file in path.rglob("*") if file.suffix != _PAGE]
    return [*(path for path in given if not path.is_dir()), *below]
