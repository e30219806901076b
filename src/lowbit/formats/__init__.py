"""The formats: one file each. Importing this package registers them all."""

from lowbit.formats import (
    awq_w4a16,
    convrot_w4a4,
    fp8,
    gguf_block,
    int8,
    mxfp4,
    mxfp8,
    nvfp4,
    svdquant_w4a4,
    w4a8_codebook,
    wna16,
)
from lowbit.formats.base import Candidate, Format
from lowbit.formats.parts import Dim, Part, Parts
from lowbit.formats.registry import as_format, formats, from_config, get_format, parse_spec, register

__all__ = [
    "Candidate",
    "Dim",
    "Format",
    "Part",
    "Parts",
    "as_format",
    "awq_w4a16",
    "convrot_w4a4",
    "formats",
    "fp8",
    "from_config",
    "get_format",
    "gguf_block",
    "int8",
    "mxfp4",
    "mxfp8",
    "nvfp4",
    "parse_spec",
    "register",
    "svdquant_w4a4",
    "w4a8_codebook",
    "wna16",
]
