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
    path: Path | None, *, read: Iterable[Path | None], others: Iterable[Path | None] = (), made: Path | None = None
) -> None:
    """Raise `WriteError` unless a text file can be put at `path`; None is always well.

    `read`: files and folders that the command reads, `others`: what else it writes; it may be none of them. `made`: a
    folder that the command will have made by then.
    """
    if path is None:
        return
    check_text_target(path, made)
    refuse_inputs([path], files_of(read))
    for other in others:
        if other is not None and os.path.realpath(other) == os.path.realpath(path):
            raise WriteError(f"{path}: two things would be written there, each in the other's place; name another file")


def files_of(paths: Iterable[Path | None]) -> list[Path]:
    """The files among the paths and below them, but for pages."""
    given = [path for path in paths if path is not None]
    below = [file for path in given if path.is_dir() for file in path.rglob("*") if file.suffix != _PAGE]
    return [*(path for path in given if not path.is_dir()), *below]
