"""The header of a safetensors file: read with every claim checked, and written.

The container (https://github.com/huggingface/safetensors, "Format"): 8 bytes with the header's length (little-endian),
a JSON header, then the tensors' bytes, little-endian and row-major, back to back, each where its `data_offsets` say.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.errors import CheckpointError

from .strict_json import DuplicateNameError, parse_object

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
# Types that the format knows and torch has no element type for: they are listed and their sizes checked, but not read.
_SUBBYTE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_MAX_NUMEL = 2**63 - 1
_ALIGNMENT = 8  # bytes


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` and `stop` are absolute byte offsets in the file at `path`."""

    name: str
    dtype_name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    path: Path

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype. Raises CheckpointError for a type that torch has no dtype for."""
        if self.dtype_name not in DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {self.name!r} has dtype {self.dtype_name!r}, which torch has no type for; "
                f"readable are {', '.join(sorted(DTYPES))}. Convert that tensor with the program that wrote the file."
            )
        return DTYPES[self.dtype_name]

    @property
    def nbytes(self) -> int:
        """Its size in the file, in bytes."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)


def parse_header(raw: bytes, path: Path, size: int) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Return the metadata and the tensors that a header describes, in the order of the data.

    `raw` is the JSON text, `size` the length of the whole file in bytes, `path` the file, for the messages.

    Raises:
        CheckpointError: the header is damaged, or disagrees with itself or with the file's length.
    """
    try:
        header = parse_object(raw)
    except DuplicateNameError as error:
        raise CheckpointError(
            f"{path}: the header has {error.name!r} twice: two layers with one name, and one of them would be lost; "
            "write the file again under distinct names"
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path}: the header cannot be read: {error}. The file is damaged or is no safetensors file; "
            "download or write it again"
        ) from error
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(
            f"{path}: __metadata__ must map names to strings; write the file again with every value as a string"
        )
    data_start = 8 + len(raw)
    infos = [_parse_entry(name, entry, path, data_start) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.start, info.stop))
    _check_coverage(infos, path, data_start, size)
    return metadata, {info.name: info for info in infos}


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_NUMEL  # type(): JSON's true is an int to isinstance


def _parse_entry(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    again = "the file is damaged; download or write it again"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have exactly dtype, shape and data_offsets in the header; {again}")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str):
        raise CheckpointError(f"{where} has the dtype {dtype_name!r}, which is no name; {again}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise CheckpointError(f"{where} has the shape {shape!r}; expected a list of sizes from 0 up; {again}")
    if math.prod(max(size, 1) for size in shape) > _MAX_NUMEL:
        raise CheckpointError(f"{where} has the shape {shape}, more elements than can be counted; {again}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise CheckpointError(f"{where} has data_offsets {offsets!r}; expected two offsets from 0 up; {again}")
    start, stop = offsets
    if stop < start:
        raise CheckpointError(f"{where} ends at byte {stop} before it starts at {start}; {again}")
    bits = _SUBBYTE_BITS.get(dtype_name)
    if dtype_name in DTYPES:
        bits = 8 * DTYPES[dtype_name].itemsize
    if bits is not None and 8 * (stop - start) != bits * math.prod(shape):
        raise CheckpointError(
            f"{where} holds {stop - start} bytes, but dtype {dtype_name} and shape {shape} need "
            f"{bits * math.prod(shape) / 8:g}; {again}"
        )
    return TensorInfo(name, dtype_name, tuple(shape), data_start + start, data_start + stop, path)


def _check_coverage(infos: list[TensorInfo], path: Path, data_start: int, size: int) -> None:
    """Check that the tensors, sorted by offset, fill the data exactly: no overlap, no hole, nothing missing or left."""
    stop = max((info.stop for info in infos), default=data_start)
    if stop > size:
        cut = next(info for info in infos if info.stop > size)
        raise CheckpointError(
            f"{path}: is truncated: {stop - size} of {stop} bytes are missing, from tensor {cut.name!r} on. "
            "Download or write it again"
        )
    if infos and infos[0].start != data_start:
        raise CheckpointError(
            f"{path}: {infos[0].start - data_start} bytes before tensor {infos[0].name!r} belong to no tensor; "
            "the file is damaged; download or write it again"
        )
    for before, after in itertools.pairwise(infos):
        if after.start < before.stop:
            raise CheckpointError(
                f"{path}: tensors {before.name!r} and {after.name!r} overlap by {before.stop - after.start} bytes; "
                "the file is damaged; download or write it again"
            )
        if after.start > before.stop:
            raise CheckpointError(
                f"{path}: {after.start - before.stop} bytes between tensors {before.name!r} and {after.name!r} "
                "belong to no tensor; the file is damaged; download or write it again"
            )
    if stop < size:
        raise CheckpointError(
            f"{path}: {size - stop} bytes after the last tensor belong to no tensor; "
            "the file is damaged; download or write it again"
        )


def encode_header(
    entries: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Lay out a file: its first bytes (length and JSON header) and each tensor's absolute (start, stop) byte offsets.

    Tensors with wide elements come first, so that every tensor is aligned to its element without holes, which the
    format forbids; within one width the order of `entries` stays. The same arguments give the same bytes.

    Raises:
        CheckpointError: a name twice or reserved, a dtype that the format lacks, metadata that is no text, or a header
            larger than the format allows.
    """
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = {name: metadata[name] for name in sorted(metadata)}
        if set(map(type, metadata.values())) != {str}:  # the library refuses to load a file with any other value
            raise CheckpointError("every metadata value must be text; pass numbers and objects as str or JSON text")
    relative: dict[str, tuple[int, int]] = {}
    stop = 0
    for name, dtype, shape in sorted(entries, key=lambda entry: -entry[1].itemsize):
        if name in header or name == "__metadata__":
            raise CheckpointError(f"two layers with one name: {name!r} is taken; every tensor needs its own name")
        if dtype not in DTYPE_NAMES:
            raise CheckpointError(f"tensor {name!r} has {dtype}, which safetensors cannot store; convert it first")
        start, stop = stop, stop + math.prod(shape) * dtype.itemsize
        relative[name] = (start, stop)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
    try:
        raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(f"a tensor name or metadata text cannot be written as UTF-8: {error}") from error
    raw += b" " * (-len(raw) % _ALIGNMENT)
    if len(raw) > MAX_HEADER:
        raise CheckpointError(f"the header would have {len(raw)} bytes, safetensors allows {MAX_HEADER}; write shards")
    data_start = 8 + len(raw)
    return len(raw).to_bytes(8, "little") + raw, {
        name: (data_start + first, data_start + last) for name, (first, last) in relative.items()
    }
