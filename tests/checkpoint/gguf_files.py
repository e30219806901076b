"""GGUF files to test with, made by the gguf package or exported, and what that package reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowbit.checkpoint.export_gguf import ExportReport, export_gguf
from lowbit.checkpoint.source import open_source

gguf: Any = pytest.importorskip("gguf", reason="the files are made with the gguf package")
Tensors = Mapping[str, "tuple[str, np.ndarray]"]


def blocks(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """uint8 [rows, row bytes] of any content; bit 6 of each byte is zero, so that no scale is infinite."""
    size, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][::-1]
    return np.random.default_rng(seed).integers(0, 256, (rows, columns // width * size), dtype=np.uint8) & 0xBF


def write_file(path: Path, tensors: Tensors, fields: Mapping[str, Any] | None = None, arch: str = "llama") -> Path:
    """Write tensors, name -> (type, array), and fields; arrays of blocks are uint8."""
    writer = gguf.GGUFWriter(path, arch)
    for name, value in (fields or {}).items():
        add = writer.add_array if isinstance(value, list) else writer.add_uint32
        (writer.add_string if isinstance(value, str) else add)(name, value)
    for name, (kind, array) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def export(path: Path, target: Path, *args: Any, **options: Any) -> ExportReport:
    """Open, export, close."""
    with open_source(path) as source:
        return export_gguf(source, target, *args, **options)


def read_file(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """What the gguf package reads: name -> (type, array)."""
    return {tensor.name: (tensor.tensor_type.name, np.array(tensor.data)) for tensor in gguf.GGUFReader(path).tensors}
