"""Reading one file of weights by positioned reads; what its header looks like is a subclass's business."""

from __future__ import annotations

import hashlib
import math
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from lowbit import memory
from lowbit.errors import CheckpointError

from .positioned_io import byte_view, read_into
from .safetensors_header import TensorInfo

W = TypeVar("W", bound="WeightFile")


class WeightFile(ABC):
    """One open file of weights, checked on construction. A context manager; threads may read at the same time.

    Attributes:
        path: the file.
        size: its length in bytes.
        mtime_ns: its time of modification when it was opened, in nanoseconds.
        metadata: what its header says beside the tensors, as text.
        tensors: every tensor, in the order of the data.
        header_sha256: hex digest of the header, which fixes every name, dtype, shape and offset.

    Raises:
        CheckpointError: the file is missing, unreadable, or not sound.
    """

    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        _refuse_irregular(self.path)
        try:
            self._file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be opened: {error.strerror}; check its permissions") from error
        try:
            status = os.fstat(self._file.fileno())
            self.size = status.st_size
            self.mtime_ns = status.st_mtime_ns
            self.header_sha256 = hashlib.sha256(self._parse_header()).hexdigest()
        except BaseException:
            self._file.close()
            raise

    @abstractmethod
    def _parse_header(self) -> bytes:
        """Set `metadata` and `tensors`, every claim checked, and return the header's bytes."""

    def _fill(self, view: memoryview, start: int, what: str) -> None:
        try:
            count = read_into(self._file.fileno(), view, start)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot read {what}: {error.strerror}; check the disk") from error
        if count < len(view):
            raise CheckpointError(
                f"{self.path}: {what} ends {len(view) - count} bytes early; "
                "the file became shorter while it was read. Start again when nothing writes to it"
            )

    def _read_range(self, start: int, stop: int) -> bytes:
        buffer = bytearray(stop - start)
        self._fill(memoryview(buffer), start, "the header")
        return bytes(buffer)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r} in it; `lowbit inspect` lists its tensors")
        return self.tensors[name]

    def _read_tensor(self, info: TensorInfo, start: int, shape: tuple[int, ...]) -> torch.Tensor:
        dtype = info.dtype
        buffer = memory.empty((math.prod(shape) * dtype.itemsize,), torch.uint8)
        self._fill(byte_view(buffer), start, f"tensor {info.name!r}")
        return buffer.view(dtype).reshape(shape)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor as fresh CPU memory, which the caller may write to.

        Raises:
            CheckpointError: no such tensor, a dtype that torch lacks, or the file cannot be read.
        """
        info = self._info(name)
        return self._read_tensor(info, info.start, info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) along dimension 0 as fresh CPU memory of shape [stop - start, *shape[1:]].

        Raises:
            CheckpointError: as `read`, and for rows that the tensor does not have.
        """
        info = self._info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} of shape {list(info.shape)} has no rows {start} to {stop}; "
                "ask for rows within its first dimension"
            )
        shape = (stop - start, *info.shape[1:])
        row_bytes = math.prod(info.shape[1:]) * info.dtype.itemsize
        return self._read_tensor(info, info.start + start * row_bytes, shape)

    def read_elements(self, name: str, places: Sequence[int]) -> torch.Tensor:
        """Return the elements of a tensor at these indices of its data, [len(places)], and read nothing else of it.

        Errors as `read`; indices are the caller's affair.
        """
        info = self._info(name)
        size = info.dtype.itemsize
        found = torch.empty(len(places), dtype=info.dtype)
        view = byte_view(found)
        for index, place in enumerate(places):
            self._fill(view[index * size : (index + 1) * size], info.start + place * size, f"tensor {name!r}")
        return found

    def read_bytes(self, name: str) -> bytes:
        """Return a tensor's bytes as stored; works for every dtype, known or not."""
        info = self._info(name)
        buffer = bytearray(info.nbytes)
        self._fill(memoryview(buffer), info.start, f"tensor {name!r}")
        return bytes(buffer)

    def close(self) -> None:
        """Close the file. Closing twice is allowed; reading afterwards is an error."""
        self._file.close()

    def __enter__(self: W) -> W:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {len(self.tensors)} tensors, {self.size} bytes)"


def _refuse_irregular(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be opened: {error}"
        raise CheckpointError(f"{path}: {reason}; check the path") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise CheckpointError(f"{path}: is {kind}, not a file; name a .safetensors file")
