"""Where a rewritten checkpoint goes: one file, or a folder with the shards, index and other files of its source.

A folder is built beside the target, as `<target>.partial`, and renamed when it is complete.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from torch import Tensor

from lowbit.errors import CheckpointError, LowbitError, WriteError

from .dialects.base import TensorSpec
from .positioned_io import sync_folder
from .source import Component, Source
from .target import check_target, is_single
from .writer import CheckpointWriter

_log = logging.getLogger("lowbit")
_WRITER_SUFFIXES = (".partial", ".partial.journal", ".partial.journal.new")


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file to write: its path below the output's root, its tensors in order, its header metadata."""

    relative: str
    entries: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]


class Staging:
    """The place of an output while it is written. `Staging(source, target)` refuses a target that cannot work.

    A source of one file becomes a file. Shards and model folders become a folder of the same layout with the same other
    files, or one file when `target` ends in .safetensors and the source is one model.

    Raises:
        WriteError: the target touches the source, exists as a folder with contents, or cannot be written.
        CheckpointError: a file that goes along with the weights may not be read.
    """

    def __init__(self, source: Source, target: str | Path) -> None:
        check_target(source, target)
        self.source, self.target = source, Path(target)
        self.single = is_single(source, self.target)
        for path in () if self.single else source.extra_files:
            if not os.access(path, os.R_OK):  # it is copied when all else is done
                raise CheckpointError(f"{path}: may not be read, and goes along with the weights; check permissions")
        self._root = self.target.parent if self.single else self.target.with_name(self.target.name + ".partial")
        self.replaced: dict[str, str | None] = {}
        """Text files of the output folder that are not copied from the source, by path; None: left out."""
        self.orders: dict[str, dict[str, Tensor]] = {}
        """By output file and key, vectors that lie there in another order than they are made: value i at places[i]."""
        self._shard_of = {file.path: name for name, file in source.files.items()}

    def file_of(self, component: Component, key: str) -> str:
        """The output file of a source tensor and what is made of it, relative to the output's root."""
        return self.target.name if self.single else self._shard_of[component.tensors[key].path]

    def reorder(self, component: Component, orders: Mapping[str, Tensor]) -> None:
        """From now on tensors of a component, whichever of its files they go to, are written in other orders."""
        for file in {self.file_of(component, key) for key in component.tensors} if orders else ():
            self.orders.setdefault(file, {}).update(orders)

    def metadata(self) -> dict[str, dict[str, str]]:
        """The header metadata of the source, by output file; of merged files, the first to give a name wins."""
        found: dict[str, dict[str, str]] = {}
        for name, file in self.source.files.items():
            into = found.setdefault(self.target.name if self.single else name, {})
            for key, value in file.metadata.items():
                into.setdefault(key, value)
        return found

    @contextmanager
    def open(
        self, files: Sequence[OutputFile], fingerprint: str, *, resume: bool
    ) -> Iterator[dict[str, CheckpointWriter]]:
        """Writers by file. At the end of the block everything is put in place; after an exception, nothing is.

        An interrupt or an error of reading or writing keeps the work for a later run, if `resume`; an error that would
        come again, such as a weight that is not finite, does not.
        """
        texts = {} if self.single else _indexes(self.source, files)
        texts |= {path: text for path, text in self.replaced.items() if text is not None}
        self._prepare(files, texts)
        with ExitStack() as stack:
            writers: dict[str, CheckpointWriter] = {}
            stack.callback(self._tidy, texts)
            for file in files:
                writers[file.relative] = self._writer(file, fingerprint, resume=resume)
                stack.push(partial(_abort, writers[file.relative], resume))
            yield writers
            for writer in writers.values():  # what takes long or can fail comes first: finished files are not resumed
                writer.settle()
            if not self.single:
                self._write_others(texts)
            for writer in writers.values():
                writer.finish()
            if not self.single:
                self._put_in_place()

    def _writer(self, file: OutputFile, fingerprint: str, *, resume: bool) -> CheckpointWriter:
        entries = [(key, spec.dtype, spec.shape) for key, spec in file.entries.items()]
        path = self._root / file.relative
        if not self.single:
            self._make_folder_of(path)
        return CheckpointWriter(path, entries, file.metadata, fingerprint=fingerprint, resume=resume)

    def _prepare(self, files: Sequence[OutputFile], texts: Mapping[str, str]) -> None:
        """Make the folders; refuse leftovers in the staging folder that are not this run's."""
        if self.single:
            return
        mine = {file.relative for file in files} | self._others(texts)
        mine |= {file.relative + suffix for file in files for suffix in _WRITER_SUFFIXES}
        if self._root.exists():
            found = [path.relative_to(self._root).as_posix() for path in self._root.rglob("*") if not path.is_dir()]
            if strange := sorted(set(found) - mine):
                raise WriteError(
                    f"{self._root}: holds {strange[0]!r}, which this run does not write; remove that folder or choose "
                    "another output"
                )
        for relative in mine:
            self._make_folder_of(self._root / relative)

    def _make_folder_of(self, path: Path) -> None:
        """Make the folder of an output file, also if a second run, which is refused, has just tidied it away."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WriteError(f"{self._root}: cannot be created: {error.strerror}; check its permissions") from error

    def _others(self, texts: Mapping[str, str]) -> set[str]:
        """The output files that hold no weights, relative to the root."""
        return set(texts) | {relative for _, relative in self._extras()}

    def _extras(self) -> list[tuple[Path, str]]:
        extras = [(path, path.relative_to(self.source.root).as_posix()) for path in self.source.extra_files]
        return [(path, relative) for path, relative in extras if relative not in self.replaced]

    def _write_others(self, texts: Mapping[str, str]) -> None:
        try:
            for path, relative in self._extras():
                self._make_folder_of(self._root / relative)
                shutil.copyfile(path, self._root / relative)
            for relative, text in texts.items():
                self._make_folder_of(self._root / relative)
                (self._root / relative).write_text(text, encoding="utf-8")
        except OSError as error:
            raise WriteError(
                f"{self.target}: cannot write the files beside the weights: {error}; check the disk"
            ) from error

    def _put_in_place(self) -> None:
        try:
            if self.target.exists():
                self.target.rmdir()
            self._root.rename(self.target)
            sync_folder(self.target.parent)
        except OSError as error:
            raise WriteError(
                f"{self.target}: cannot put the finished folder in place: {error}; check the disk"
            ) from error

    def _tidy(self, texts: Mapping[str, str]) -> None:
        """Remove the staging folder, unless there are weights in it: kept for a later run, or another process's."""
        if self.single or not self._root.is_dir():
            return
        others = self._others(texts)
        files = [path for path in self._root.rglob("*") if not path.is_dir()]
        if any(path.relative_to(self._root).as_posix() not in others for path in files):
            return
        for path in files:
            path.unlink(missing_ok=True)
        for folder, _, _ in os.walk(self._root, topdown=False):
            with contextlib.suppress(OSError):  # it is not empty: a run that has just begun
                Path(folder).rmdir()


def _abort(
    writer: CheckpointWriter, resume: bool, kind: type[BaseException] | None, error: BaseException | None, trace: object
) -> None:
    """Close a writer at the end of its block; does nothing after `finish`."""
    comes_again = isinstance(error, LowbitError) and not isinstance(error, CheckpointError)
    try:
        writer.abort(keep=resume and not comes_again)
    except CheckpointError as second:
        _log.warning("%s", second)  # the first error is the one to report


def _indexes(source: Source, files: Sequence[OutputFile]) -> dict[str, str]:
    """The index of each component that had one, for its new tensors, by path relative to the root."""
    texts: dict[str, str] = {}
    for component in source.components:
        if component.index is None or component.index_name is None:
            continue
        folder = PurePosixPath(component.name)
        mine = [file for file in files if file.relative in component.files]
        places = {
            key: PurePosixPath(file.relative).relative_to(folder).as_posix() for file in mine for key in file.entries
        }
        total = sum(spec.nbytes for file in mine for spec in file.entries.values())
        about = component.index.get("metadata")
        about = {**(about if isinstance(about, dict) else {}), "total_size": total}
        content = {**component.index, "metadata": about, "weight_map": dict(sorted(places.items()))}
        texts[(folder / component.index_name).as_posix()] = json.dumps(content, indent=2, sort_keys=True) + "\n"
    return texts
