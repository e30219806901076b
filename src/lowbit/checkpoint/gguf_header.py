"""The header of a GGUF file: read with every claim checked.

The container (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), all little-endian: "GGUF", version, the
number of tensors, the number of fields; the fields (a name, a type, a value); the tensors (name, sizes with the fastest
first, ggml's number of the type, where the data starts); then, aligned, the tensors' data, each aligned.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lowbit.errors import CheckpointError
from lowbit.numerics.gguf_blocks import GGML_TYPES

from .safetensors_header import TensorInfo

MAGIC = b"GGUF"
VERSIONS = (2, 3)
PLAIN_TYPES = frozenset({"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"})  # safetensors' names for them, too
DEFAULT_ALIGNMENT = 32
_MAX_HEADER = 1 << 30  # bytes; vocabularies of a million words stay far below
_MAX_NAME = 65535
_MAX_AXES = 4  # ggml's
_MAX_NUMEL = 2**63 - 1
_SHORT = 64  # elements of an array that is kept
_MAX_DEPTH = 4  # of arrays in arrays
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL = 7


@dataclass
class GgufHeader:
    """What a header says.

    `fields`: every field but long arrays, as text (JSON, for arrays). `types`: tensor -> name of its ggml type.
    """

    version: int = 0
    alignment: int = DEFAULT_ALIGNMENT
    fields: dict[str, str] = field(default_factory=dict)
    arrays: dict[str, int] = field(default_factory=dict)
    """The fields that are long arrays or arrays of strings, and how many elements they have."""
    types: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    """In the order of the data. Blocks appear as uint8, with the bytes of a row as the last size."""
    stop: int = 0
    """The length of the header in bytes, without the padding behind it."""


class _Cursor:
    """Takes the header's pieces one after the other. `read(start, stop)` gives bytes of the file."""

    def __init__(self, read: Callable[[int, int], bytes], path: Path, size: int) -> None:
        self._read, self.path, self._size = read, path, size
        self.at, self._start, self._buffer = 0, 0, b""

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        self.skip(count, what)
        begin = self.at - count
        if not self._start <= begin or self.at > self._start + len(self._buffer):
            self._start = begin
            self._buffer = self._read(begin, min(self._size, max(self.at, begin + (1 << 20))))
        return self._buffer[begin - self._start : self.at - self._start]

    def skip(self, count: int, what: str) -> None:
        """Go on by `count` bytes."""
        stop = self.at + count
        if stop > self._size:
            raise CheckpointError(
                f"{self.path}: is truncated: {what} reaches to byte {stop}, the file has {self._size}; download it "
                "again"
            )
        if stop > _MAX_HEADER:
            raise damaged(self.path, f"the header is longer than {_MAX_HEADER} bytes")
        self.at = stop

    def number(self, layout: str, what: str) -> int:
        """The next integer."""
        value: int = struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]
        return value

    def text(self, what: str, limit: int | None = None) -> str:
        """The next string."""
        length = self.number("<Q", what)
        if limit is not None and length > limit:
            raise damaged(self.path, f"{what} has {length} bytes, more than {limit}")
        return self.take(length, what).decode("utf-8", errors="replace")


def parse_gguf_header(read: Callable[[int, int], bytes], path: Path, size: int) -> GgufHeader:
    """The header of a file of `size` bytes, of which `read(start, stop)` gives pieces.

    Raises:
        CheckpointError: it is no GGUF file, of an unknown version, byte order or type of tensor, one part of several,
            damaged or truncated.
    """
    cursor, found = _Cursor(read, path, size), GgufHeader()
    if size < 4 or cursor.take(4, "the header") != MAGIC:
        raise CheckpointError(f"{path}: does not begin with 'GGUF', so it is no GGUF file; download it again")
    found.version = cursor.number("<I", "the version")
    if found.version not in VERSIONS:
        swapped = found.version & 0xFFFF == 0
        what = "is big-endian" if swapped else f"is of version {found.version}"
        raise CheckpointError(f"{path}: {what}; lowbit reads little-endian GGUF of version 2 and 3. Convert it anew")
    tensors, fields = cursor.number("<Q", "the header"), cursor.number("<Q", "the header")
    for _ in range(fields):
        _take_field(cursor, found)
    _check_fields(found, path)
    rows = [_take_tensor(cursor) for _ in range(tensors)]
    found.stop = cursor.at
    data_start = _align(cursor.at, found.alignment)
    for name, sizes, type_number, offset in rows:
        if name in found.tensors:
            raise damaged(path, f"tensor {name!r} is in the header twice: one of two layers would be lost")
        shape = _noted_shape(name, sizes, type_number, found)
        info = _info(name, shape, type_number, data_start + offset, path)
        found.tensors[name], found.types[name] = info, GGML_TYPES[type_number][0]
    _check_coverage(found, path, data_start, size)
    return found


def damaged(path: Path, what: str) -> CheckpointError:
    """The error for a header that cannot be right."""
    return CheckpointError(f"{path}: {what}; the file is damaged, download or write it again")


def _take_field(cursor: _Cursor, found: GgufHeader) -> None:
    name = cursor.text("a field's name", _MAX_NAME)
    if name in found.fields or name in found.arrays:
        raise damaged(cursor.path, f"the field {name!r} is in the header twice")
    kind = cursor.number("<I", f"field {name!r}")
    if kind == _ARRAY:
        _take_array(cursor, name, found)
    elif kind == _STRING:
        found.fields[name] = cursor.text(f"field {name!r}")
    elif kind in _SCALARS:
        value = cursor.number(_SCALARS[kind], f"field {name!r}")
        found.fields[name] = str(bool(value)).lower() if kind == _BOOL else str(value)
    else:
        raise damaged(cursor.path, f"the field {name!r} has the unknown type {kind}")


def _take_array(cursor: _Cursor, name: str, found: GgufHeader) -> None:
    """Keep a short array of numbers as a field; go past any other."""
    begin, what = cursor.at, f"field {name!r}"
    kind, count = cursor.number("<I", what), cursor.number("<Q", what)
    if kind in _SCALARS and count <= _SHORT:
        found.fields[name] = json.dumps([cursor.number(_SCALARS[kind], what) for _ in range(count)])
    else:
        cursor.at = begin
        found.arrays[name] = _skip_array(cursor, name, 0)


def _skip_array(cursor: _Cursor, name: str, depth: int) -> int:
    """Go past an array, and return how many elements it has."""
    what = f"field {name!r}"
    kind, count = cursor.number("<I", what), cursor.number("<Q", what)
    if kind in _SCALARS:
        cursor.skip(count * struct.calcsize(_SCALARS[kind]), what)
    elif kind == _STRING:
        for _ in range(count):
            cursor.skip(cursor.number("<Q", what), what)
    elif kind == _ARRAY and depth < _MAX_DEPTH:
        for _ in range(count):
            _skip_array(cursor, name, depth + 1)
    else:
        raise damaged(cursor.path, f"the field {name!r} holds elements of the unknown type {kind}")
    return count


def _check_fields(found: GgufHeader, path: Path) -> None:
    alignment = found.fields.get("general.alignment", str(DEFAULT_ALIGNMENT))
    found.alignment = int(alignment) if alignment.isdecimal() else 0
    if found.alignment <= 0 or found.alignment & (found.alignment - 1):
        raise damaged(path, f"general.alignment is {alignment!r}, expected a power of two")
    parts = found.fields.get("split.count", "0")
    if parts not in ("0", "1"):
        raise CheckpointError(
            f"{path}: is one of {parts} parts of a model; join them first, with `llama-gguf-split --merge` of llama.cpp"
        )


def _take_tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, sizes in torch's order, number of the type, and offset of the next tensor."""
    name = cursor.text("a tensor's name", _MAX_NAME)
    what = f"tensor {name!r}"
    axes = cursor.number("<I", what)
    if axes > _MAX_AXES:
        raise damaged(cursor.path, f"{what} has {axes} axes, more than {_MAX_AXES}")
    sizes = tuple(cursor.number("<Q", what) for _ in range(axes))
    if math.prod(max(size, 1) for size in sizes) > _MAX_NUMEL:
        raise damaged(cursor.path, f"{what} has the sizes {list(sizes)}, more elements than can be counted")
    return name, sizes[::-1], cursor.number("<I", what), cursor.number("<Q", what)


def _info(name: str, shape: tuple[int, ...], number: int, start: int, path: Path) -> TensorInfo:
    if number not in GGML_TYPES:
        raise CheckpointError(
            f"{path}: tensor {name!r} is of ggml type {number}, whose size lowbit does not know; it knows "
            f"{', '.join(known for known, _, _ in GGML_TYPES.values())}. Convert the file with llama.cpp"
        )
    kind, columns, size = GGML_TYPES[number]
    if columns == 1:
        dtype = kind if kind in PLAIN_TYPES else "U8"
        return TensorInfo(name, dtype, shape, start, start + math.prod(shape) * size, path)
    if not shape or shape[-1] % columns:
        raise damaged(
            path, f"tensor {name!r} has the sizes {list(shape)}, which blocks of {columns} ({kind}) cannot hold"
        )
    stored = (*shape[:-1], shape[-1] // columns * size)
    return TensorInfo(name, "U8", stored, start, start + math.prod(stored), path)


def _noted_shape(name: str, sizes: tuple[int, ...], number: int, found: GgufHeader) -> tuple[int, ...]:
    """The shape that ComfyUI-GGUF notes for a tensor it has reshaped, where blocks allow it; else the sizes."""
    noted = found.fields.get(f"comfy.gguf.orig_shape.{name}", "[]")
    shape = json.loads(noted) if noted.startswith("[") else []
    sound = shape and all(type(size) is int and size > 0 for size in shape) and math.prod(shape) == math.prod(sizes)
    return tuple(shape) if sound and shape[-1] % GGML_TYPES.get(number, ("", 1, 1))[1] == 0 else sizes


def _check_coverage(found: GgufHeader, path: Path, data_start: int, size: int) -> None:
    """Check that the tensors lie one after the other, each aligned, without overlap or hole, within the file."""
    infos = sorted(found.tensors.values(), key=lambda info: (info.start, info.stop))
    found.tensors = {info.name: info for info in infos}
    stop = max((info.stop for info in infos), default=data_start)
    if stop > size:
        cut = next(info for info in infos if info.stop > size)
        raise CheckpointError(
            f"{path}: is truncated: {stop - size} of {stop} bytes are missing, from tensor {cut.name!r} on. "
            "Download it again"
        )
    if infos and infos[0].start != data_start:
        raise damaged(path, f"the data of tensor {infos[0].name!r} does not start where the data starts")
    for before, after in itertools.pairwise(infos):
        if after.start < before.stop:
            raise damaged(path, f"tensors {before.name!r} and {after.name!r} overlap")
        if after.start != _align(before.stop, found.alignment):
            raise damaged(path, f"there is a hole between tensors {before.name!r} and {after.name!r}")


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
