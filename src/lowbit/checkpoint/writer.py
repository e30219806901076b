"""Writing one safetensors file as a stream: any order, any thread, resumable, and visible only when it is complete."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import math
import os
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lowbit import memory
from lowbit.errors import CheckpointError, WriteError

from .journal import Journal, JournalHead, load_journal
from .positioned_io import begin_to_store, byte_view, read_into, reserve, sync_folder, try_lock, write_all
from .safetensors_header import encode_header
from .target import check_file_target

_log = logging.getLogger("lowbit")

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_FLAGS = (
    os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
)


class CheckpointWriter:
    """Write tensors, in any order, at offsets fixed beforehand into `<target>.partial`; rename it when it is complete.

    A unit is a piece of work whose tensors belong together, such as one layer. After its tensors are written, `commit`
    notes it in `<target>.partial.journal`. A run that was killed is resumed by a writer with the same arguments: `done`
    then holds the committed units, which need not be written again, and the finished file has the same bytes as that of
    a run without interruption. A target that exists (a link too: the link, not what it points to) is replaced at the
    end, in one step, and untouched until then.

    Args:
        target: the file to make; its folder must exist.
        entries: (name, dtype, shape) of every tensor.
        metadata: the header's `__metadata__`.
        fingerprint: names the input and the options; a partial file of another fingerprint is not resumed.
        resume: False discards the work of an interrupted run.

    Attributes:
        done: unit -> record of the units that an interrupted run had finished; empty when the run is fresh.

    Raises:
        WriteError: the target cannot be written: no such folder, no permission, no space for the whole file, a
            folder in its place, or another writer at work on it.
    """

    def __init__(
        self,
        target: str | Path,
        entries: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str],
        *,
        fingerprint: str,
        resume: bool = True,
    ) -> None:
        self.target = Path(target)
        self._partial = self.target.with_name(self.target.name + ".partial")
        self._journal_path = self.target.with_name(self.target.name + ".partial.journal")
        try:
            self._header, self._spans = encode_header(entries, metadata)
        except CheckpointError as error:
            raise CheckpointError(f"{self.target}: {error}") from error
        self._entries = {name: (dtype, tuple(shape)) for name, dtype, shape in entries}
        self._size = max((stop for _, stop in self._spans.values()), default=len(self._header))
        self._head = JournalHead(fingerprint, hashlib.sha256(self._header).hexdigest(), self._size)
        self._written: set[str] = set()
        self._units = 0
        self._lock = threading.Lock()  # guards _written and the journal
        self._closed = False
        check_file_target(target)  # as it was given: a Path has lost the separator at its end
        self._fd = _open_locked(self._partial, self.target)
        try:
            found = self._find_finished() if resume else None
            self.done: dict[str, dict[str, Any]] = {} if found is None else found
            with self._errors("begin to write"):
                self._journal = self._start_afresh() if found is None else self._go_on(found)
        except BaseException:
            self._close_file()
            raise
        self._units = len(self.done)
        for record in self.done.values():
            self._written.update(record["tensors"])

    def _find_finished(self) -> dict[str, dict[str, Any]] | None:
        """Return the finished units of an interrupted run, or None when this run must start afresh."""
        if os.fstat(self._fd).st_size == 0:
            return None
        reason: str | None
        try:
            done, reason = load_journal(self._journal_path, self._head)
        except OSError as error:
            done, reason = {}, f"its journal cannot be read ({error.strerror})"
        if reason is None and not self._partial_is_sound():
            reason = "it does not have the length and header that its journal says"
        if reason is None and any(name not in self._spans for record in done.values() for name in record["tensors"]):
            reason = "its journal is damaged"
        if reason is not None:
            _log.warning("%s: starting afresh, the unfinished file there cannot be resumed: %s", self.target, reason)
            return None
        _log.info("%s: resuming, %d units are done", self.target, len(done))
        return done

    def _partial_is_sound(self) -> bool:
        header = bytearray(len(self._header))
        count = read_into(self._fd, memoryview(header), 0)
        return os.fstat(self._fd).st_size == self._size and count == len(header) and header == self._header

    def _start_afresh(self) -> Journal:
        """Empty the partial file, take the disk space of the whole output, write the header, and begin a journal."""
        try:
            self._journal_path.unlink(missing_ok=True)
            os.ftruncate(self._fd, 0)
            reserve(self._fd, self._size, self._partial.parent)
            write_all(self._fd, memoryview(self._header), 0)
            return Journal(self._journal_path, self._head, {}, records_synced=False)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)  # gives back at once what was taken, which is not to count as missing
            self._partial.unlink(missing_ok=True)
            raise

    def _go_on(self, found: dict[str, dict[str, Any]]) -> Journal:
        if found:
            os.fsync(self._fd)  # the new journal says that what it repeats is on the disk
        return Journal(self._journal_path, self._head, found, records_synced=bool(found))

    def _close_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @contextlib.contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        """Turn the system's errors into one that names the target, what was tried, and the remedy."""
        try:
            yield
        except CheckpointError:
            raise
        except OSError as error:
            if error.errno in _NO_SPACE:
                free = shutil.disk_usage(self.target.parent).free
                raise WriteError(
                    f"{self.target}: no space left: cannot {action}; the file needs {self._size / 1e6:.1f} MB in all, "
                    f"{free / 1e6:.1f} MB are free. Make room or write to another disk"
                ) from error
            if error.errno == errno.EFBIG:
                raise WriteError(
                    f"{self.target}: cannot {action}: {self._size} bytes are more than this file system or the "
                    "process's limit (ulimit -f) allows for one file. Write shards or write to another disk"
                ) from error
            raise WriteError(f"{self.target}: cannot {action}: {error.strerror}; check the disk") from error

    def _require_open(self) -> None:
        if self._closed:
            raise CheckpointError(f"{self.target}: this writer is finished or aborted; make a new one to write again")

    def _entry(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        if name not in self._entries:
            raise CheckpointError(f"{self.target}: tensor {name!r} is not among those announced for this file")
        return self._entries[name]

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor at its place. Threads may write at the same time.

        Raises:
            CheckpointError: the tensor was not announced, has another dtype or shape, or the disk refuses.
        """
        self._require_open()
        dtype, shape = self._entry(name)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self.target}: tensor {name!r} should be {dtype} of shape {list(shape)}, "
                f"not {tensor.dtype} of shape {list(tensor.shape)}"
            )
        plain = tensor.detach().cpu().resolve_conj().contiguous()
        self._put(name, byte_view(plain), self._spans[name][0])
        with self._lock:
            self._written.add(name)

    def write_rows(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Write rows of a tensor from row `start` on along dimension 0, for one too large to hold whole.

        The tensor counts as written with its last row, so write in order. Errors as `write`.
        """
        self._require_open()
        dtype, shape = self._entry(name)
        fits = shape and start >= 0 and start + rows.shape[0] <= shape[0]
        if rows.dtype != dtype or not fits or tuple(rows.shape[1:]) != shape[1:]:
            raise CheckpointError(
                f"{self.target}: tensor {name!r} is {dtype} of shape {list(shape)}; {rows.dtype} rows of shape "
                f"{list(rows.shape)} from row {start} on do not fit"
            )
        offset = self._spans[name][0] + start * math.prod(shape[1:]) * dtype.itemsize
        self._put(name, byte_view(rows.detach().cpu().contiguous()), offset)
        if start + rows.shape[0] == shape[0]:
            with self._lock:
                self._written.add(name)

    def _put(self, name: str, data: memoryview, offset: int) -> None:
        """Write, and let the disk begin: what waited for `finish` would all be stored while nothing is computed."""
        with self._errors(f"write tensor {name!r}"):
            write_all(self._fd, data, offset)
            begin_to_store(self._fd, offset, len(data))

    def read_back(self, name: str) -> torch.Tensor:
        """Return a written tensor as it stands in the file, as fresh CPU memory.

        Raises:
            CheckpointError: it was not written yet, or cannot be read.
        """
        self._require_open()
        dtype, shape = self._entry(name)
        if name not in self._written:
            raise CheckpointError(f"{self.target}: tensor {name!r} was not written yet, so it cannot be read back")
        return self._read_from_partial(name, self._spans[name][0], dtype, shape)

    def read_back_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a tensor as they stand in the file; they must have been written."""
        self._require_open()
        dtype, shape = self._entry(name)
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        return self._read_from_partial(
            name, self._spans[name][0] + start * row_bytes, dtype, (stop - start, *shape[1:])
        )

    def _read_from_partial(self, name: str, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        buffer = memory.empty((math.prod(shape) * dtype.itemsize,), torch.uint8)
        with self._errors(f"read back tensor {name!r}"):
            count = read_into(self._fd, byte_view(buffer), offset)
        if count < buffer.numel():
            raise WriteError(f"{self._partial}: was made shorter by another program; start again")
        return buffer.view(dtype).reshape(shape)

    def commit(self, unit: str, record: Mapping[str, Any]) -> None:
        """Note in the journal that a unit is finished; call it after the unit's tensors are written.

        `record` is JSON data and comes back in `done` when the run is resumed; its item "tensors" lists the names of
        the unit's tensors.

        Raises:
            CheckpointError: one of those tensors was not written, or the journal cannot be.
        """
        self._require_open()
        names: Iterable[str] | None = record.get("tensors")
        if not isinstance(names, list):
            raise CheckpointError(f"{self.target}: the record of unit {unit!r} must list its tensors under 'tensors'")
        with self._lock:
            missing = [name for name in names if name not in self._written]
            if missing:
                raise CheckpointError(f"{self.target}: unit {unit!r} is not complete: {_some(missing)} not written")
            with self._errors(f"note unit {unit!r} in {self._journal_path.name}"):
                self._journal.append(unit, dict(record))
                self._units += 1
                self._journal.sync(lambda: os.fsync(self._fd))

    def settle(self) -> None:
        """Check that every tensor is there, and force the file to the disk, so that `finish` takes no time.

        Raises:
            CheckpointError: a tensor is missing, or the disk refuses; the partial file stays.
        """
        self._require_open()
        missing = [name for name in self._entries if name not in self._written]
        if missing:
            raise CheckpointError(f"{self.target}: is not complete: {_some(missing)} not written")
        with self._errors("finish the file"):
            os.fsync(self._fd)

    def finish(self) -> Path:
        """`settle`, then move the file onto the target; return the target.

        Raises:
            CheckpointError: as `settle`, or the target cannot be replaced; the partial file stays.
        """
        self.settle()
        check_file_target(self.target)
        if sys.platform == "win32":  # which cannot rename an open file; elsewhere the lock is kept until it is renamed
            self._close_file()
        with self._errors("move the finished file into place"):
            self._partial.replace(self.target)
            sync_folder(self.target.parent)
            self._journal.close()
            self._journal_path.unlink(missing_ok=True)
        self._closed = True
        self._close_file()
        return self.target

    def abort(self, keep: bool) -> None:
        """Stop; the target stays as it was. `keep` leaves the partial file and its journal, for a later run to resume.

        Without a finished unit there is nothing to resume, and the space that was taken is given back.
        Call it when no thread writes any more. Does nothing after `finish` or an earlier `abort`.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if keep and self._units:
                with self._errors("save the unfinished file"):
                    self._journal.sync(lambda: os.fsync(self._fd), now=True)
            else:
                with self._errors("remove the unfinished file"):
                    self._journal_path.unlink(missing_ok=True)
                    self._partial.unlink(missing_ok=True)
        finally:
            self._journal.close()
            self._close_file()


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return f"{shown} and {len(names) - 3} more tensors were" if len(names) > 3 else f"{shown} {_was(names)}"


def _was(names: Sequence[str]) -> str:
    return "was" if len(names) == 1 else "were"


def _open_locked(partial: Path, target: Path) -> int:
    """Open the partial file, new or left by an earlier run, with its lock; return the descriptor."""
    while True:
        try:
            fd = os.open(partial, _FLAGS, 0o666)
        except OSError as error:
            hint = "it is a link, remove it" if error.errno == errno.ELOOP else "check the folder's permissions"
            raise WriteError(f"{target}: cannot create {partial}: {error.strerror}; {hint}") from error
        if not _lock_if_possible(fd, target):
            os.close(fd)
            raise WriteError(
                f"{target}: another process is writing this file (it holds {partial}); "
                "wait until it ends or choose another output"
            )
        # Between opening and locking, the lock's holder may have renamed (finished) or removed the file opened here.
        if partial.exists() and os.path.samestat(os.fstat(fd), partial.stat()):
            return fd
        os.close(fd)


def _lock_if_possible(fd: int, target: Path) -> bool:
    try:
        return try_lock(fd)
    except OSError as error:
        _log.warning("%s: the file system has no locks (%s); let no second run write it", target, error.strerror)
        return True
