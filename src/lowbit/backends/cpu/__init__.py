"""Compiled kernels for CPUs, C++ for every instruction set. The import fails, in words, where none are built."""

from lowbit.backends.cpu import native

native.module()  # before any kernel is registered: a backend is there as a whole, or not at all

from lowbit.backends.cpu import (
    dequantize,
    descent_columns,
    embedding,
    gptq_columns,
    int4_plain_mm,
    linear_awq_w4a16,
    linear_convrot_w4a4,
    linear_fp8,
    linear_int8,
    linear_mxfp4,
    linear_mxfp8,
    linear_nvfp4,
    linear_plain,
    linear_svdquant_w4a4,
    linear_wna16,
    pack_rows16,
    quantize_granular,
    quantize_integer_groups,
    quantize_mx,
    quantize_nvfp4,
    refit_unit,
    row_errors,
)
from lowbit.backends.cpu.bandwidth import copy_bandwidth, read_bandwidth

__all__ = [
    "copy_bandwidth",
    "dequantize",
    "descent_columns",
    "embedding",
    "gptq_columns",
    "int4_plain_mm",
    "linear_awq_w4a16",
    "linear_convrot_w4a4",
    "linear_fp8",
    "linear_int8",
    "linear_mxfp4",
    "linear_mxfp8",
    "linear_nvfp4",
    "linear_plain",
    "linear_svdquant_w4a4",
    "linear_wna16",
    "native",
    "pack_rows16",
    "quantize_granular",
    "quantize_integer_groups",
    "quantize_mx",
    "quantize_nvfp4",
    "read_bandwidth",
    "refit_unit",
    "row_errors",
]
