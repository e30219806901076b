"""Whether a checkpoint can be written where the user wants it, asked before any work is done."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from lowbit.errors import WriteError

from .source import Source


def check_target(source: Source, target: str | Path) -> None:
    """Raise `WriteError` if writing to `target` would touch the source, also through links, or cannot succeed."""
    target = Path(target)
    if target.suffix == ".gguf":
        raise WriteError(f"{target}: would be safetensors under the name of GGUF; write that with lowbit export")
    inputs = [*(file.path for file in source.files.values()), *source.extra_files]
    below = [target / path.relative_to(source.root) for path in inputs] if target.is_dir() else []
    partial = target.with_name(target.name + ".partial")
    refuse_inputs([target, partial], inputs)
    for path, written in zip(inputs, below, strict=False):
        refuse_inputs([written], [path])
    if source.kind == "folder" and Path(os.path.realpath(target)).is_relative_to(os.path.realpath(source.root)):
        raise WriteError(f"{target}: lies in the folder that is read, {source.root}; choose an output outside of it")
    if source.kind == "file":
        check_file_target(target)
    elif target.exists() and not target.is_dir() and target.suffix != ".safetensors":
        raise WriteError(f"{target}: is a file, but a folder will be written; choose another output")
    parent = target if target.is_dir() else target.parent
    if not parent.is_dir():
        raise _no_folder(target)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise WriteError(f"{target}: nothing can be written in {parent}; check its permissions")


def check_file_target(target: Path) -> None:
    """Raise `WriteError` if no file can be put at `target`: a folder, device or pipe is there, or no folder for it."""
    if target.is_dir():
        raise WriteError(f"{target}: is a folder; name a file to write, such as {target / 'model.safetensors'}")
    if target.exists() and not target.is_file():  # a finished file is renamed onto it, which would remove a device
        raise WriteError(f"{target}: is a device or a pipe, and a file would take its place; name a file to write")
    if not target.parent.is_dir():
        raise _no_folder(target)


def _no_folder(target: Path) -> WriteError:
    return WriteError(f"{target}: {target.parent} is no folder that exists; create it first")


def refuse_inputs(targets: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise `WriteError` if one of the targets is one of the files that are read, also through links."""
    for target in targets:
        for path in inputs:
            same = target.exists() and path.exists() and target.samefile(path)
            if same or os.path.realpath(target) == os.path.realpath(path):
                raise WriteError(
                    f"{target}: is the input {path} itself (links are followed); choose another output, "
                    "so that the input stays as it is"
                )
