"""Writing a GGUF file tensor by tensor, through the gguf package."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, LowbitError, WriteError
from lowbit.numerics.gguf_blocks import block_type

from .positioned_io import sync_folder

_MAX_AXES = 4  # ggml's
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PLAIN = {dtype: kind for kind, dtype in FLOATS.items()} | {
    torch.float64: "F64",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its type, its shape (torch's order), and what makes it."""

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape in bytes; the first of more axes than ggml has are one."""
        shape = self.shape or (1,)
        if len(shape) > _MAX_AXES:
            shape = (math.prod(shape[: 1 - _MAX_AXES]), *shape[1 - _MAX_AXES :])
        if self.kind in PLAIN.values():
            item = next(dtype.itemsize for dtype, kind in PLAIN.items() if kind == self.kind)
            return (*shape[:-1], shape[-1] * item)
        return (*shape[:-1], shape[-1] // block_type(self.kind).columns * block_type(self.kind).size)


def as_bytes(tensor: Tensor) -> Tensor:
    """uint8, the last axis as many times longer as an element has bytes."""
    return tensor.reshape(tensor.shape or (1,)).contiguous().view(torch.uint8)


def write_gguf(
    target: Path, entries: Sequence[Entry], architecture: str, metadata: dict[str, Any], fields_of: Path | None
) -> None:
    """Write the file beside its place, and move it there when it is complete.

    fields_of: a GGUF file whose fields go along. Shapes of more than ggml's four axes, such as those of kernels of
    video models, are noted as ComfyUI-GGUF does. Raises `WriteError`, `CheckpointError`, and what the entries raise.
    """
    import gguf
    import numpy as np

    shapes = {f"comfy.gguf.orig_shape.{entry.name}": entry.shape for entry in entries if len(entry.shape) > _MAX_AXES}
    metadata = {**metadata, **shapes}
    partial_path = target.with_name(target.name + ".partial")
    writer = gguf.GGUFWriter(partial_path, architecture)
    if fields_of is not None:
        _copy_fields(writer, fields_of, {*metadata, *(("general.architecture",) if architecture else ())})
    writer.add_quantization_version(2)
    for name, value in metadata.items():
        _add_field(writer, name, value)
    for entry in entries:
        shape = entry.stored
        kind = gguf.GGMLQuantizationType[entry.kind]
        writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=kind)
    try:
        _write_all(writer, entries)
        _sync(partial_path)
        partial_path.replace(target)
        sync_folder(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # what is not written yet cannot be now, either
            writer.close()
        partial_path.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, LowbitError):
            why = f"{error.strerror or error}; free space or choose another place"
            raise WriteError(f"{target}: cannot be written: {why}") from error
        raise


def _write_all(writer: Any, entries: Sequence[Entry]) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        data = entry.make()
        data = data.reshape(-1, *data.shape[1 - _MAX_AXES :]) if data.dim() > _MAX_AXES else data
        if tuple(data.shape) != entry.stored:
            sizes = f"{list(data.shape)}, not {list(entry.stored)}"
            raise CheckpointError(f"tensor {entry.name!r} came as {sizes}; report this")
        writer.write_tensor_data(data.numpy())
    writer.close()


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _copy_fields(writer: Any, path: Path, without: set[str]) -> None:
    """Take the fields of another GGUF file over, but those that describe its tensors."""
    import gguf

    own = {"general.quantization_version", "general.file_type", "general.alignment"}
    for name, field in gguf.GGUFReader(path).fields.items():
        if name in own | without or name.startswith(("GGUF.", "split.")):
            continue
        kind, inner = field.types[0], field.types[1] if len(field.types) > 1 else None
        try:
            contents = field.contents()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: the text of field {name!r} is not UTF-8; download it again") from error
        writer.add_key_value(name, contents, kind, inner)


def _add_field(writer: Any, name: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        (writer.add_uint32 if 0 <= value < 2**32 else writer.add_int64)(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    elif isinstance(value, list | tuple) and value:
        writer.add_array(name, value)
    else:
        raise CheckpointError(
            f"metadata {name!r} is {value!r}; GGUF fields are text, flags, numbers and lists of these with an element"
        )
