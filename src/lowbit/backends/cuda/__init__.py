"""Kernels in CUDA C++, compiled at first use by NVRTC.

The import fails, in words, where the compiler is missing, and where there are GPUs that run none of its code.
"""

from __future__ import annotations

from lowbit.backends.cuda import compiler

compiler.check()  # before any kernel is registered: a backend is there as a whole, or not at all

from lowbit.backends.cuda import device_check

device_check.check()

from lowbit.backends.cuda import (
    ahead,
    int4_plain_mm,
    linear_int8,
    linear_svdquant_w4a4,
    linear_words,
    quantize_rows_int8,
    quantize_svdquant_w4a4,
    scaled_mm_svdquant_w4a4,
)

__all__ = [
    "ahead",
    "compiler",
    "device_check",
    "int4_plain_mm",
    "linear_int8",
    "linear_svdquant_w4a4",
    "linear_words",
    "quantize_rows_int8",
    "quantize_svdquant_w4a4",
    "scaled_mm_svdquant_w4a4",
]
