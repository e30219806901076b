"""Positioned reads and writes on a file descriptor, and the few system calls whose names differ between systems.

Positioned calls share no file position, so threads read and write one descriptor at once. There is no mapping of files:
mapped pages count as this process's memory, and a file that shrinks under a mapping kills the process.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_STORE = 2  # SYNC_FILE_RANGE_WRITE: begin, and do not wait
_CALL_LIMIT = 1 << 30  # bytes a call; Linux stops at 2**31 - 4096, macOS refuses 2**31 and more
_HAS_POSITIONED = hasattr(os, "preadv") and hasattr(os, "pwrite")
_seek_lock = threading.Lock()  # guards the shared file position where the system has no positioned calls


def byte_view(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor of any shape and dtype as a flat view of bytes, without a copy."""
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()  # Any: ndarray's stub lacks the buffer protocol
    return memoryview(array)


def read_into(fd: int, view: memoryview, offset: int) -> int:
    """Fill `view` from byte `offset` of the file; return the bytes read, fewer than asked only at the file's end."""
    done = 0
    while done < len(view):
        piece = view[done : done + _CALL_LIMIT]
        if _HAS_POSITIONED:
            count = os.preadv(fd, [piece], offset + done)
        else:
            with _seek_lock:
                os.lseek(fd, offset + done, os.SEEK_SET)
                data = os.read(fd, len(piece))
            count = len(data)
            piece[:count] = data
        if count == 0:
            break
        done += count
    return done


def write_all(fd: int, view: memoryview, offset: int) -> None:
    """Write all of `view` at byte `offset` of the file."""
    done = 0
    while done < len(view):
        piece = view[done : done + _CALL_LIMIT]
        if _HAS_POSITIONED:
            done += os.pwrite(fd, piece, offset + done)
        else:
            with _seek_lock:
                os.lseek(fd, offset + done, os.SEEK_SET)
                done += os.write(fd, piece)


def begin_to_store(fd: int, offset: int, size: int) -> None:
    """Ask the system to begin storing what was written there, which `fsync` then finds done; it need not."""
    if size and (request := _storing()) is not None:  # of no size it would be all up to the file's end
        request(fd, offset, size, _STORE)


@functools.cache
def _storing() -> Callable[[int, int, int, int], object] | None:
    """Linux's sync_file_range, or None."""
    try:
        request = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError, TypeError):  # Windows has no library without a name
        return None
    request.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return request  # what it returns does not matter


def reserve(fd: int, size: int, folder: Path) -> None:
    """Make the file `size` bytes long with its disk blocks allocated.

    A file system that cannot allocate ahead gets a file of that length without blocks, after a look at the free space
    of `folder`.

    Raises:
        OSError: with errno ENOSPC, EDQUOT or EFBIG when the file does not fit.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in {errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}:
                raise
        else:
            return
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(fd, size)


def try_lock(fd: int) -> bool:
    """Take the exclusive lock of an open file, held until the descriptor is closed; False if another open file has it.

    Raises:
        OSError: when the file system has no locks.
    """
    try:
        if sys.platform == "win32":
            os.lseek(fd, 1 << 62, os.SEEK_SET)  # a byte far past the end: a locked byte cannot be read by others
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}:
            return False
        raise
    return True


def sync_folder(folder: Path) -> None:
    """Force a folder's entries (a rename in it) to the disk; systems that cannot open folders do it by themselves."""
    if sys.platform == "win32":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:  # some network file systems have no such call
            raise
    finally:
        os.close(fd)
