"""Pure PyTorch: serves every format on every device, never refuses, and is the oracle of all other backends."""

from lowbit.backends.eager import (
    awq,
    dequantize,
    embedding,
    fp8,
    int4_plain,
    int8,
    linear,
    linear_input_gradient,
    mxfp8,
    nvfp4,
    packing,
    quantize,
    row_errors,
    scale_search,
    svdquant,
)

__all__ = [
    "awq",
    "dequantize",
    "embedding",
    "fp8",
    "int4_plain",
    "int8",
    "linear",
    "linear_input_gradient",
    "mxfp8",
    "nvfp4",
    "packing",
    "quantize",
    "row_errors",
    "scale_search",
    "svdquant",
]
