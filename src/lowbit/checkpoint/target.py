"""Whether a checkpoint can be written where the user wants it, asked before any work is done."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from lowbit.errors import WriteError
from lowbit.text_files import names_folder

from .index import PICKLE_SUFFIXES
from .source import Source

_LONGEST_END = ".partial.journal.new"
_ENDINGS = (".safetensors", ".sft")  # of one file, the second in ComfyUI


def check_target(source: Source, target: str | Path) -> None:
    """Raise `WriteError` if writing to `target` would touch the source, also through links, or cannot succeed."""
    written_as, target = target, Path(target)
    _check_reachable(target)
    _refuse_gguf(target)
    inputs = [*(file.path for file in source.files.values()), *source.extra_files]
    below = [target / path.relative_to(source.root) for path in inputs] if target.is_dir() else []
    partial = target.with_name(target.name + ".partial")
    refuse_inputs([target, partial], inputs)
    for path, written in zip(inputs, below, strict=False):
        refuse_inputs([written], [path])
    if source.kind == "folder" and Path(os.path.realpath(target)).is_relative_to(os.path.realpath(source.root)):
        raise WriteError(f"{target}: lies in the folder that is read, {source.root}; choose an output outside of it")
    if is_single(source, target):
        check_weights_target(written_as)
        return
    if target.suffix.lower() in _ENDINGS and not names_folder(written_as):
        names = ", ".join(component.name or "." for component in source.components)
        raise WriteError(
            f"{target}: is the name of a file, and the models in {source.root} ({names}) become a folder; name a "
            "folder, or convert one of them"
        )
    if target.is_dir() and any(target.iterdir()):
        raise WriteError(f"{target}: exists already; remove it or choose another output folder")
    if target.exists() and not target.is_dir():
        raise WriteError(f"{target}: is a file, but a folder will be written; choose another output")
    if not target.parent.is_dir():
        raise _no_folder(target)
    _check_permission(target, target.parent)


def is_single(source: Source, target: Path) -> bool:
    """Whether `source` is written to `target` as one file, and not as a folder of its layout."""
    return source.kind == "file" or (len(source.components) == 1 and target.suffix.lower() in _ENDINGS)


def check_weights_target(target: str | Path) -> None:
    """Raise `WriteError` if no safetensors file can be put at `target`, or if it could not be read again by that name.

    The ending of a name decides how a file is opened.
    """
    path = Path(target)
    _refuse_gguf(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise WriteError(
            f"{path}: would be safetensors under the name of a pickle, which programs, this one too, refuse or "
            f"misread; name it {path.stem}.safetensors"
        )
    if path.suffix.lower() == ".json":
        raise WriteError(
            f"{path}: would be safetensors under the name of an index, and could not be read again; name it "
            f"{path.stem}.safetensors"
        )
    check_file_target(target)


def _refuse_gguf(target: Path) -> None:
    if target.suffix.lower() == ".gguf":
        raise WriteError(f"{target}: would be safetensors under the name of GGUF; write that with lowbit export")


def check_file_target(target: str | Path, example: str = "model.safetensors") -> None:
    """Raise `WriteError` if no file can be put at `target`; the error for a folder proposes the name `example` in it.

    A folder, device or pipe is there, or no folder for it, or one that nothing may be written in. Text that ends in a
    separator names a folder, whether it is there or not.
    """
    written_as, target = target, Path(target)
    _check_reachable(target)
    if target.is_dir() or names_folder(written_as):
        raise WriteError(f"{target}: is a folder; name a file to write, such as {target / example}")
    special = target.exists() and not target.is_file()
    if special or _is_descriptor(target):  # a finished file is renamed onto it, which would remove a device
        raise WriteError(f"{target}: is a device or a pipe, and a file would take its place; name a file to write")
    if not target.parent.is_dir():
        raise _no_folder(target)
    _check_permission(target, target.parent)


def _is_descriptor(target: Path) -> bool:
    """Whether it is /dev/stdout or the like: a link to a descriptor, behind which there may be a regular file."""
    return target.is_symlink() and target.readlink().parent.name == "fd"


def _check_reachable(target: Path) -> None:
    """Raise `WriteError` for a name that is too long, also with the ends that unfinished files have, and the like."""
    if not target.name:
        raise WriteError(f"{str(target)!r}: has no name of its own, which the output needs; name a file or folder")
    try:
        for path in (target, target.with_name(target.name + _LONGEST_END)):
            path.exists()
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        why = getattr(error, "strerror", None) or error
        raise WriteError(f"{target}: cannot be written: {why}; choose another output") from error


def _check_permission(target: Path, folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise WriteError(f"{target}: nothing can be written in {folder}; check its permissions")


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
